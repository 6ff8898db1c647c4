//! Has a node have what a directory brings along: programs below `/opt/pericarp/bin`, guest files in
//! the node's store.
//!
//! Each program is written beside its place and moved there, so that one that runs goes on with its
//! own file and nobody starts half of one. What is the same already is left alone.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use pericarp_pod::assets::place::STORE;
use thiserror::Error;

use crate::assets::{Store, StoreError};

/// Where programs are on a node.
pub const PREFIX: &str = "/opt/pericarp";
/// All that a node needs.
pub const PROGRAMS: [&str; 7] = [
    "pericarp",
    "containerd-shim-pericarp-v2",
    "pericarp-vmm",
    "pericarp-block",
    "pericarp-fs",
    "pericarp-net",
    "pericarp-vsock",
];
const NEW: &str = ".pericarp-new";

/// Why a node is not prepared.
#[derive(Debug, Error)]
pub enum InstallError {
    /// What is to be installed is not there.
    #[error("'{}' is missing; take an image with all of {}", .0.display(), PROGRAMS.join(", "))]
    Missing(PathBuf),
    /// The kernel says no.
    #[error("'{}': {source}", path.display())]
    System {
        /// What was worked on.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The store of guest files.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn during(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    move |source| InstallError::System {
        path: path.to_owned(),
        source,
    }
}

/// Copies the programs in `from` to the node whose root directory is `host`; says which were not there
/// or were others.
///
/// # Errors
///
/// One of them is missing; nothing is changed then. Or one cannot be written.
pub fn programs(from: &Path, host: &Path) -> Result<Vec<&'static str>, InstallError> {
    for name in PROGRAMS {
        let source = from.join(name);
        if !source.is_file() {
            return Err(InstallError::Missing(source));
        }
    }
    let place = below(host, PREFIX).join("bin");
    fs::create_dir_all(&place).map_err(during(&place))?;
    let mut changed = Vec::new();
    for name in PROGRAMS {
        let (source, target) = (from.join(name), place.join(name));
        if same(&source, &target).map_err(during(&target))? {
            continue;
        }
        replace(&source, &target).map_err(during(&target))?;
        changed.push(name);
    }
    File::open(&place)
        .and_then(|directory| directory.sync_all())
        .map_err(during(&place))?;
    Ok(changed)
}

/// Adds the guest files in `from` to the node's store, and has new pods take them. The version's name,
/// and whether they took another before.
///
/// # Errors
///
/// As [`Store::add`] and [`Store::take`].
pub fn guest(from: &Path, host: &Path) -> Result<(String, bool), InstallError> {
    let store = Store::at(&below(host, STORE));
    let (version, _) = store.add(from, None, None)?;
    if version.current {
        return Ok((version.name, false));
    }
    store.take(&version.name)?;
    Ok((version.name, true))
}

/// A path of the node.
fn below(host: &Path, path: &str) -> PathBuf {
    host.join(path.trim_start_matches('/'))
}

fn same(one: &Path, other: &Path) -> io::Result<bool> {
    let mut other = match File::open(other) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    let mut one = File::open(one)?;
    let (length, other_length) = (one.metadata()?.len(), other.metadata()?.len());
    let is_program = other.metadata()?.permissions().mode() & 0o111 == 0o111;
    if length != other_length || !is_program {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let count = one.read(&mut left)?;
        if count == 0 {
            return Ok(true);
        }
        // Of the same length, or it was changed meanwhile.
        if other.read_exact(&mut right[..count]).is_err() || left[..count] != right[..count] {
            return Ok(false);
        }
    }
}

fn replace(source: &Path, target: &Path) -> io::Result<()> {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(NEW);
    let new = target.with_file_name(name);
    let written = || -> io::Result<()> {
        // One that was left by somebody who was killed at it may be running.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::copy(source, &new)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        File::open(&new)?.sync_all()?;
        fs::rename(&new, target)
    };
    written().inspect_err(|_| drop(fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn programs_are_replaced_while_they_run() {
        let base = std::env::temp_dir().join(format!("pericarp-install-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        let (from, host) = (base.join("from"), base.join("host"));
        fs::create_dir_all(&from).unwrap();
        let error = programs(&from, &host).unwrap_err().to_string();
        assert!(error.contains("/pericarp' is missing"), "{error}");
        assert!(!host.exists());
        for name in PROGRAMS {
            fs::copy("/bin/cat", from.join(name)).unwrap();
        }
        assert_eq!(programs(&from, &host).unwrap(), PROGRAMS);
        assert!(programs(&from, &host).unwrap().is_empty());
        let installed = host.join("opt/pericarp/bin/pericarp-fs");
        let mut running = Command::new(&installed)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        fs::write(from.join("pericarp-fs"), "another").unwrap();
        assert_eq!(programs(&from, &host).unwrap(), ["pericarp-fs"]);
        assert_eq!(fs::read(&installed).unwrap(), b"another");
        let mut input = running.stdin.take().unwrap();
        input.write_all(b"it goes on").unwrap();
        drop(input);
        let said = running.wait_with_output().unwrap().stdout;
        assert_eq!(said, b"it goes on");
        let left = fs::read_dir(host.join("opt/pericarp/bin")).unwrap().count();
        assert_eq!(left, PROGRAMS.len());
        fs::remove_dir_all(&base).unwrap();
    }
}
