//! What a node needs, looked at in one go: each rule with what was found and what to do.
//!
//! Nothing is changed, and nothing that fails ends the rest: whoever prepares a node wants all of it
//! at once.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use pericarp_config::Config;
use serde_json::{Value, json};

use crate::{containerd, host};

/// What holds of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It is kept.
    Good,
    /// It cannot be told from here.
    Unknown,
    /// Pods run, but slower or with less around them.
    Degraded,
    /// No pod runs.
    Missing,
}

impl State {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Unknown => "unknown",
            Self::Degraded => "degraded",
            Self::Missing => "missing",
        }
    }
}

/// One rule, and how this node keeps it. Prints as one line, or two with a cure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What the rule is about.
    pub name: String,
    /// What holds of it.
    pub state: State,
    /// What there is.
    pub found: String,
    /// The rule.
    pub rule: String,
    /// What to do; empty where nothing is.
    pub cure: String,
}

impl Finding {
    pub(crate) fn new(
        name: &str,
        state: State,
        found: impl Into<String>,
        rule: &str,
        cure: &str,
    ) -> Self {
        let cure = if state == State::Good { "" } else { cure };
        Self {
            name: name.to_owned(),
            state,
            found: found.into(),
            rule: rule.to_owned(),
            cure: cure.to_owned(),
        }
    }

    /// The same for programs.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "name": self.name,
            "state": self.state.name(),
            "found": self.found,
            "rule": self.rule,
            "cure": self.cure,
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (state, name) = (self.state.name(), &self.name);
        write!(f, "{state:8}  {name}: {}", self.found)?;
        if self.state == State::Good {
            return Ok(());
        }
        write!(f, "\n          {}", self.rule)?;
        if !self.cure.is_empty() {
            write!(f, "; {}", self.cure)?;
        }
        Ok(())
    }
}

/// Where things are that are looked at.
#[derive(Debug, Clone)]
pub struct Places {
    /// Our configuration; without it, the one in its usual place, which may be missing.
    pub config: Option<PathBuf>,
    /// That of containerd.
    pub containerd: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            config: None,
            containerd: containerd::DEFAULT_PATH.into(),
        }
    }
}

/// Everything.
#[must_use]
pub fn all(places: &Places) -> Vec<Finding> {
    let mut findings = host::all();
    match Config::load(places.config.as_deref()) {
        Ok(config) => {
            findings.push(configured(&config));
            findings.extend(features(&config));
            findings.extend(containerd::look(&places.containerd, &config));
        }
        Err(violations) => findings.extend(violations.0.iter().map(|violation| {
            let rule = "what is configured is understood and allowed";
            Finding::new(
                "configuration",
                State::Missing,
                violation.to_string(),
                rule,
                "",
            )
        })),
    }
    findings
}

fn configured(config: &Config) -> Finding {
    let files: Vec<String> = config.files().iter().map(|file| shown(file)).collect();
    let handlers: Vec<&str> = config.handlers().map(|(handler, _)| handler).collect();
    let from = match files.is_empty() {
        true => "no file".to_owned(),
        false => files.join(", "),
    };
    let found = format!("{from}; handlers {}", handlers.join(", "));
    let rule = "what is configured is understood and allowed";
    Finding::new("configuration", State::Good, found, rule, "")
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn features(config: &Config) -> Vec<Finding> {
    use pericarp_config::feature::{FeatureFile, State as Prepared};
    let states = FeatureFile::in_directory(config.state_directory()).states();
    let of = |feature: &pericarp_config::feature::Feature| {
        let (state, found) = match &states {
            Ok(states) => match states.get(feature) {
                Some(Prepared::Ready) => (State::Good, Prepared::Ready.to_string()),
                Some(other) => (State::Degraded, other.to_string()),
                None => (State::Degraded, Prepared::Off.to_string()),
            },
            Err(error) => (State::Missing, error.to_string()),
        };
        let rule = "a feature that is wanted is ready, or pods that use it are refused";
        let cure = format!("pericarp feature enable {feature}");
        Finding::new(&format!("feature {feature}"), state, found, rule, &cure)
    };
    config.features().iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_says_what_to_do_only_if_there_is_something_to_do() {
        let finding = |state| Finding::new("kvm", state, "none", "there is one", "get one");
        assert_eq!(finding(State::Good).to_string(), "good      kvm: none");
        assert_eq!(
            finding(State::Degraded).to_string(),
            "degraded  kvm: none\n          there is one; get one"
        );
        assert_eq!(finding(State::Good).json()["cure"], "");
    }

    #[test]
    fn a_broken_configuration_is_one_finding_for_each_mistake() {
        let file = std::env::temp_dir().join(format!("pericarp-check-{}", std::process::id()));
        std::fs::write(&file, "features = [\"x\"]\n[profiles.a]\nsizing = \"b\"\n").unwrap();
        let places = Places {
            config: Some(file.clone()),
            ..Places::default()
        };
        let all = all(&places);
        std::fs::remove_file(file).unwrap();
        let broken: Vec<_> = all.iter().filter(|f| f.name == "configuration").collect();
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken.iter().all(|finding| finding.state == State::Missing));
        // The rest was looked at all the same.
        assert!(all.iter().any(|finding| finding.name == "kernel"));
    }
}
