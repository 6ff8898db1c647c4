//! The private directory of one run, and the removal of those that dead runs left.
//!
//! A run locks its directory; the kernel drops the lock with the process, however it ends. So a
//! directory whose lock is free belongs to nobody, and the next run removes it.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
};

use crate::failure::{Failure, during};

const PREFIX: &str = "run-";
/// Left by a run that made a container; holds the container's id.
pub(crate) const CONTAINER_FILE: &str = "container";
/// Where that run has the container runtime's state.
pub(crate) const CONTAINER_STATE: &str = "runc";

/// What a run puts into its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Sockets and small files: kept in memory where the session has a directory for that.
    Small,
    /// A disk image as well: kept on a disk.
    Large,
}

/// A directory that only this run uses. Removed when dropped.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    base: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Makes a directory, after removing those of dead runs beside it.
    pub(crate) fn create(contents: Contents) -> Result<Self, Failure> {
        let parent = match contents {
            Contents::Small => variable("XDG_RUNTIME_DIR").unwrap_or_else(|| "/tmp".into()),
            Contents::Large => variable("TMPDIR").unwrap_or_else(|| "/var/tmp".into()),
        };
        let base = parent.join(format!("pericarp-{}", rustix::process::geteuid().as_raw()));
        Self::create_in(&base)
    }

    fn create_in(base: &Path) -> Result<Self, Failure> {
        let failed =
            |error: io::Error| during(format!("the directory '{}'", base.display()))(error);
        // Held while this run has a directory but no lock on it yet.
        let _base_lock = lock_base(base).map_err(failed)?;
        sweep(base);
        let moment = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.subsec_nanos());
        let path = base.join(format!("{PREFIX}{}-{moment:x}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(failed)?;
        let lock = open_directory(&path).and_then(|directory| {
            rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
            Ok(directory)
        });
        match lock {
            Ok(lock) => Ok(Self {
                path,
                base: base.to_owned(),
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_dir(&path);
                Err(failed(error.into()))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A path in the directory.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            crate::report::warn(&format!(
                "'{}' cannot be removed: {error}",
                self.path.display()
            ));
        }
        // The last run takes the base with it; one that is just beginning makes it anew.
        if let Ok(_lock) = lock_base(&self.base) {
            let _ = fs::remove_dir(&self.base);
        }
    }
}

/// Makes the base if it is missing, and locks it.
fn lock_base(base: &Path) -> io::Result<File> {
    loop {
        private_directory(base)?;
        let lock = match open_directory(base) {
            Ok(lock) => lock,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        // Another run may have removed it between the two.
        let locked = lock.metadata()?;
        if fs::symlink_metadata(base).is_ok_and(|now| now.ino() == locked.ino()) {
            return Ok(lock);
        }
    }
}

fn variable(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os(name)?);
    // A socket's path must stay short: see the hypervisor's specification.
    (path.is_absolute() && path.is_dir() && path.as_os_str().len() < 50 && path.to_str().is_some())
        .then_some(path)
}

/// Makes a directory of mode 0700, or checks that an existing one is ours alone.
fn private_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let metadata = match fs::symlink_metadata(path) {
        // Removed by another run a moment ago: the caller finds out.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let ours = metadata.uid() == rustix::process::geteuid().as_raw();
    if metadata.is_dir() && ours && metadata.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "it exists and is not a directory of this user alone; remove it",
    ))
}

fn open_directory(path: &Path) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Removes the directories of runs that are no more. What cannot be removed is left for the next.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let Ok(directory) = open_directory(&path) else {
            continue;
        };
        if rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        if let Ok(id) = fs::read_to_string(path.join(CONTAINER_FILE)) {
            crate::runc::remove_left_over(&path.join(CONTAINER_STATE), id.trim());
        }
        let _ = fs::remove_dir_all(&path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_dead_runs_are_swept_and_live_ones_are_not() {
        let base = std::env::temp_dir().join(format!("pericarp-base-{}", std::process::id()));
        let first = RunDir::create_in(&base).unwrap();
        fs::write(first.join("file"), "x").unwrap();
        let dead = base.join("run-1-dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("socket"), "x").unwrap();
        let second = RunDir::create_in(&base).unwrap();
        assert!(!dead.exists());
        assert!(first.join("file").exists() && first.path() != second.path());
        let mode = fs::metadata(second.path()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
        let path = second.path().to_owned();
        drop(second);
        assert!(!path.exists());
        drop(first);
        assert!(!base.exists());
    }

    #[test]
    fn a_base_that_others_can_write_is_refused() {
        let base = std::env::temp_dir().join(format!("pericarp-open-{}", std::process::id()));
        DirBuilder::new().mode(0o755).create(&base).unwrap();
        let error = RunDir::create_in(&base).unwrap_err().to_string();
        fs::remove_dir(&base).unwrap();
        assert!(
            error.contains("not a directory of this user alone; remove it"),
            "{error}"
        );
    }
}
