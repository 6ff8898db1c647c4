//! The directory of one run, and the removal of what dead runs left.
//!
//! A run locks its directory; the kernel drops the lock with the process, however it ends. So a
//! directory whose lock is free belongs to a run that is over. All runs of a user lie side by side
//! in one base directory, which is how `ps`, `exec` and the others find them: see `registry`.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
};

use crate::{
    failure::{Failure, during},
    network::NETWORK_FILE,
    registry::{Record, Status, remove_all_but_history},
};

/// How the directories of runs begin; the id follows.
pub(crate) const PREFIX: &str = "run-";
/// Left by a run that made a container; holds the container's id.
pub(crate) const CONTAINER_FILE: &str = "container";
/// Where that run has the container runtime's state.
pub(crate) const CONTAINER_STATE: &str = "runc";

/// Between two tries to lock what another has locked.
const MOMENT: Duration = Duration::from_millis(10);

/// A directory that only this run uses. Removed when dropped.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    base: PathBuf,
    /// Record and log stay behind, for `ps -a` and `logs`.
    keeps_history: bool,
    _lock: File,
}

impl RunDir {
    /// Makes the directory of the run that `record` describes, after removing those of dead runs
    /// beside it.
    ///
    /// # Errors
    ///
    /// [`Failure::NameTaken`], or the system's.
    pub(crate) fn create(record: &Record) -> Result<Self, Failure> {
        Self::create_in(&base(), record)
    }

    fn create_in(base: &Path, record: &Record) -> Result<Self, Failure> {
        let failed =
            |error: io::Error| during(format!("the directory '{}'", base.display()))(error);
        // Held while this run has a directory but no lock on it yet.
        let _base_lock = lock_base(base).map_err(failed)?;
        sweep(base);
        if let Some(holder) = Record::all_in(base)
            .into_iter()
            .find(|entry| entry.record.name == record.name || entry.record.id == record.id)
        {
            return Err(Failure::NameTaken {
                name: record.name.clone(),
                id: holder.record.id,
            });
        }
        let path = base.join(format!("{PREFIX}{}", record.id));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(failed)?;
        let locked = open_directory(&path)
            .and_then(|directory| {
                rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
                Ok(directory)
            })
            .map_err(io::Error::from)
            .and_then(|lock| record.write(&path).map(|()| lock));
        match locked {
            Ok(lock) => Ok(Self {
                path,
                base: base.to_owned(),
                keeps_history: record.detached,
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_dir_all(&path);
                Err(failed(error))
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

    /// Forgets the run altogether: for one that never started.
    pub(crate) fn forget(&mut self) {
        self.keeps_history = false;
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // The next run undoes what it says, and removes all.
        if self.join(NETWORK_FILE).exists() {
            return;
        }
        if self.keeps_history {
            remove_all_but_history(&self.path);
            return;
        }
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

/// Where the directories of this user's runs are. In memory where the session has a place for
/// that: they hold sockets and small files.
pub(crate) fn base() -> PathBuf {
    let parent = variable("XDG_RUNTIME_DIR").unwrap_or_else(|| "/tmp".into());
    parent.join(format!("pericarp-{}", rustix::process::geteuid().as_raw()))
}

/// Makes the base if it is missing, and locks it.
pub(crate) fn lock_base(base: &Path) -> io::Result<File> {
    lock_base_by(base, |lock| {
        Ok(rustix::fs::flock(lock, FlockOperation::LockExclusive)?)
    })
}

/// The same, but it waits no longer than this for the lock.
pub(crate) fn lock_base_within(base: &Path, limit: Duration) -> io::Result<File> {
    let end = Instant::now() + limit;
    lock_base_by(base, |lock| {
        loop {
            match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < end => thread::sleep(MOMENT),
                Err(Errno::WOULDBLOCK) => {
                    let rule = "another process has it locked";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, rule));
                }
                other => return Ok(other?),
            }
        }
    })
}

fn lock_base_by(base: &Path, take: impl Fn(&File) -> io::Result<()>) -> io::Result<File> {
    loop {
        private_directory(base)?;
        let lock = match open_directory(base) {
            Ok(lock) => lock,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        take(&lock)?;
        // Another run may have removed it between the two.
        let locked = lock.metadata()?;
        // What was looked at before may have been another one.
        if !is_ours_alone(&locked) {
            continue;
        }
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

fn is_ours_alone(metadata: &fs::Metadata) -> bool {
    let ours = metadata.uid() == rustix::process::geteuid().as_raw();
    metadata.is_dir() && ours && metadata.mode() & 0o077 == 0
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
    if is_ours_alone(&metadata) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "it exists and is not a directory of this user alone; remove it",
    ))
}

pub(crate) fn open_directory(path: &Path) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Whether the run of this directory is over. Call with the base locked: a new run's directory is
/// without its lock for a moment.
pub(crate) fn is_over(path: &Path) -> bool {
    open_directory(path).is_ok_and(|directory| {
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockShared).is_ok()
    })
}

/// Undoes what a run did outside of its directory, which is over. False where the next one has to
/// try again.
pub(crate) fn settle(path: &Path) -> bool {
    if let Ok(id) = fs::read_to_string(path.join(CONTAINER_FILE)) {
        crate::runc::remove_left_over(&path.join(CONTAINER_STATE), id.trim());
    }
    crate::network::settle(path)
}

/// Removes what runs that are over have left, but not what `ps -a` and `logs` show. What cannot be
/// removed is left for the next.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) || !is_over(&path) {
            continue;
        }
        if !settle(&path) {
            continue;
        }
        match Record::read(&path) {
            Some(record) if record.detached && record.status != Status::Created => {
                remove_all_but_history(&path);
            }
            _ => {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, name: &str) -> Record {
        Record {
            id: id.into(),
            name: name.into(),
            ..Record::default()
        }
    }

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("pericarp-{name}-{}", std::process::id()))
    }

    #[test]
    fn directories_of_dead_runs_are_swept_and_live_ones_are_not() {
        let base = scratch("base");
        let first = RunDir::create_in(&base, &record("1", "one")).unwrap();
        fs::write(first.join("file"), "x").unwrap();
        let dead = base.join("run-dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("socket"), "x").unwrap();
        let second = RunDir::create_in(&base, &record("2", "two")).unwrap();
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
    fn a_name_is_taken_once_and_history_stays() {
        let base = scratch("names");
        let mut first = record("1", "one");
        first.detached = true;
        first.status = Status::Running;
        let run = RunDir::create_in(&base, &first).unwrap();
        fs::write(run.join("log"), "said").unwrap();
        fs::write(run.join("socket"), "x").unwrap();
        let error = RunDir::create_in(&base, &record("2", "one")).unwrap_err();
        assert!(
            error.to_string().starts_with("--name 'one': is in use by"),
            "{error}"
        );
        let path = run.path().to_owned();
        drop(run);
        assert!(path.join("log").exists() && !path.join("socket").exists());
        // The name stays taken until the history is removed.
        assert!(RunDir::create_in(&base, &record("2", "one")).is_err());
        assert_eq!(Record::all_in(&base).len(), 1);
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn a_base_that_stays_locked_is_given_up() {
        let base = scratch("locked");
        let held = lock_base(&base).unwrap();
        let error = lock_base_within(&base, MOMENT).unwrap_err().to_string();
        assert!(error.contains("has it locked"), "{error}");
        drop(held);
        assert!(lock_base_within(&base, Duration::from_secs(60)).is_ok());
        fs::remove_dir(&base).unwrap();
    }

    #[test]
    fn a_base_that_others_can_write_is_refused() {
        let base = scratch("open");
        DirBuilder::new().mode(0o755).create(&base).unwrap();
        let error = RunDir::create_in(&base, &record("1", "one"))
            .unwrap_err()
            .to_string();
        fs::remove_dir(&base).unwrap();
        assert!(
            error.contains("not a directory of this user alone; remove it"),
            "{error}"
        );
    }
}
