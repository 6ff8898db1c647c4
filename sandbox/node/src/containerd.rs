//! containerd's configuration: a block of ours at its end, with a runtime for each handler.
//!
//! Not a file of its own: containerd 1.x replaces a plugin's whole table by that of an imported
//! file, so that a file which names our runtimes would take away what the first one says of
//! networks. A block can be taken out again, and what is left is what was there, to the byte.
//!
//! ```text
//! # pericarp: begin
//! [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.pericarp]
//! ...
//! # pericarp: end
//! ```

mod block;
mod plan;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use pericarp_config::Config;
use thiserror::Error;

pub use block::Runtimes;
pub use plan::Plan;

use crate::check::{Finding, State};

/// Where it is unless somebody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/containerd/config.toml";
/// The oldest that passes annotations and paths of runtimes on.
const LEAST: (u32, u32) = (1, 6);

/// Why a configuration is left as it is.
#[derive(Debug, Error)]
pub enum ContainerdError {
    /// It cannot be read.
    #[error("'{}' cannot be read: {source}; check its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It cannot be written.
    #[error("'{}' cannot be written: {source}; nothing was changed", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is not as a configuration has to be.
    #[error("'{}' {rule}; {cure}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        rule: String,
        /// What to do.
        cure: String,
    },
}

/// Rules about containerd and its configuration.
pub(crate) fn look(path: &Path, config: &Config) -> Vec<Finding> {
    let output = Command::new("containerd").arg("--version").output();
    let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    vec![version(said.ok().as_deref()), enabled(path, config)]
}

fn version(said: Option<&str>) -> Finding {
    let numbers = |text: &str| {
        let mut parts = text.trim_start_matches('v').split(['.', '~', '-', '+']);
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    let found = said.and_then(|said| {
        let word = said.split_whitespace().nth(2)?;
        Some((word.to_owned(), numbers(word)?))
    });
    let (state, found) = match found {
        Some((word, numbers)) if numbers >= LEAST => (State::Good, word),
        Some((word, _)) => (State::Missing, word),
        None => (State::Degraded, "not in the search path".to_owned()),
    };
    let (major, minor) = LEAST;
    let rule =
        format!("pods are containerd's, {major}.{minor} or later; `pericarp run` does without it");
    Finding::new(
        "containerd",
        state,
        found,
        &rule,
        "install the package containerd",
    )
}

fn enabled(path: &Path, config: &Config) -> Finding {
    let rule = "containerd has a runtime for each handler";
    let finding = |state, found: String, cure: &str| {
        Finding::new("containerd's configuration", state, found, rule, cure)
    };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            let found = format!("'{}': {error}", path.display());
            return finding(State::Degraded, found, "pericarp node enable");
        }
    };
    if block::cri_is_off(&text) {
        let found = format!("'{}' has 'cri' among its disabled_plugins", path.display());
        return finding(State::Missing, found, "take it out: Kubernetes needs it");
    }
    let there = block::handlers(&text);
    let missing: Vec<&str> = config
        .handlers()
        .map(|(handler, _)| handler)
        .filter(|handler| !there.iter().any(|one| one == handler))
        .collect();
    match missing.is_empty() {
        true => finding(State::Good, format!("'{}' has all", path.display()), ""),
        false => {
            let found = format!("'{}' has no {}", path.display(), missing.join(", "));
            finding(State::Degraded, found, "pericarp node enable")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let of = |word: &str| {
            version(Some(&format!(
                "containerd github.com/containerd/containerd {word} x"
            )))
            .state
        };
        assert_eq!(of("1.6.20~ds1"), State::Good);
        assert_eq!(of("v2.1.0"), State::Good);
        assert_eq!(of("1.4.13~ds1"), State::Missing);
        assert_eq!(version(Some("what")).state, State::Degraded);
        assert_eq!(version(None).state, State::Degraded);
    }

    #[test]
    fn a_configuration_without_our_handlers_is_found_out() {
        let path = std::env::temp_dir().join(format!("pericarp-look-{}", std::process::id()));
        let config = Config::default();
        let state = |text: &str| {
            fs::write(&path, text).unwrap();
            enabled(&path, &config).state
        };
        assert_eq!(state("disabled_plugins = [\"cri\"]\n"), State::Missing);
        assert_eq!(state("version = 2\n"), State::Degraded);
        let runtimes = Runtimes::of(&config, Path::new("/s"), None);
        Plan::enable(&path, &runtimes).unwrap().apply().unwrap();
        assert_eq!(enabled(&path, &config).state, State::Good);
        fs::remove_file(&path).unwrap();
        assert_eq!(enabled(&path, &config).state, State::Degraded);
    }
}
