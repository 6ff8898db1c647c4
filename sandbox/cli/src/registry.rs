//! What is known of each run: written by the run itself, read by `ps`, `exec`, `logs`, `stop` and
//! `rm`.
//!
//! One file, `record.json`, in the run's directory, replaced whole. Whether a run is still there
//! is not read from it but from the directory's lock, see `rundir`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    failure::{Failure, during},
    input::problem::Problem,
    rundir::{self, PREFIX},
};

const FILE: &str = "record.json";
/// What stays of a detached run after its end.
const HISTORY: [&str; 3] = [FILE, "log", "log.old"];
/// The container in every machine that `run` makes.
pub(crate) const CONTAINER: &str = "main";

/// How far a run has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// Its machine is being made.
    #[default]
    Created,
    Running,
    Exited,
}

/// A run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Twelve hexadecimal digits.
    pub(crate) id: String,
    pub(crate) name: String,
    /// Process that runs it.
    pub(crate) pid: u32,
    /// `vm` or `runc`.
    pub(crate) runtime: String,
    /// Image, disk or directory the root came from.
    pub(crate) image: String,
    pub(crate) command: Vec<String>,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) finished: Option<u64>,
    pub(crate) status: Status,
    pub(crate) exit_code: Option<i32>,
    /// Why it ended without an exit code of its own.
    pub(crate) error: Option<String>,
    pub(crate) detached: bool,
    /// What `stop` sends first.
    pub(crate) stop_signal: u8,
    /// Of the container's OCI configuration, the part that `exec` starts from.
    pub(crate) process: Value,
}

/// A run found in the base directory.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) record: Record,
    pub(crate) path: PathBuf,
    /// Its process is there.
    pub(crate) alive: bool,
}

impl Record {
    /// Reads the record in a run's directory.
    pub(crate) fn read(directory: &Path) -> Option<Self> {
        let bytes = fs::read(directory.join(FILE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes it, in the place of an earlier one.
    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        let unfinished = directory.join(format!("{FILE}.new"));
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::rename(unfinished, directory.join(FILE))
    }

    /// All runs in `base`, the oldest first. Call with the base locked.
    pub(crate) fn all_in(base: &Path) -> Vec<Entry> {
        let mut entries: Vec<Entry> = fs::read_dir(base)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
            .filter_map(|entry| {
                let path = entry.path();
                let record = Self::read(&path)?;
                let alive = !rundir::is_over(&path);
                Some(Entry {
                    record,
                    path,
                    alive,
                })
            })
            .collect();
        entries.sort_by(|a, b| {
            (a.record.created, &a.record.id).cmp(&(b.record.created, &b.record.id))
        });
        entries
    }
}

impl Entry {
    /// What to show as its state.
    pub(crate) fn state(&self) -> String {
        match (self.alive, self.record.status, self.record.exit_code) {
            (true, Status::Created, _) => "starting".into(),
            (true, Status::Running, _) => "running".into(),
            (_, Status::Exited, Some(code)) => format!("exited ({code})"),
            _ => "died".into(),
        }
    }

    /// Whether commands can be run in it.
    pub(crate) fn is_running(&self) -> bool {
        self.alive && self.record.status == Status::Running
    }

    /// The socket of its machine's vsock device.
    pub(crate) fn guest_socket(&self) -> PathBuf {
        guest_socket(&self.path)
    }
}

/// The socket of the vsock device of the run in `directory`.
pub(crate) fn guest_socket(directory: &Path) -> PathBuf {
    directory.join("vsock").join("guest")
}

/// All runs of this user.
pub(crate) fn all() -> Result<Vec<Entry>, Failure> {
    all_by(rundir::lock_base)
}

/// The same, for those who wait no longer than this for others that hold the base.
pub(crate) fn all_within(limit: Duration) -> Result<Vec<Entry>, Failure> {
    all_by(|base| rundir::lock_base_within(base, limit))
}

fn all_by(lock: impl Fn(&Path) -> io::Result<fs::File>) -> Result<Vec<Entry>, Failure> {
    let base = rundir::base();
    if !base.exists() {
        return Ok(Vec::new());
    }
    let _lock = lock(&base).map_err(during(format!("the directory '{}'", base.display())))?;
    Ok(Record::all_in(&base))
}

/// The run that `wanted` names: its name, its id, or the unmistakable beginning of one.
pub(crate) fn find(wanted: &str) -> Result<Result<Entry, Problem>, Failure> {
    Ok(pick(all()?, wanted))
}

fn pick(entries: Vec<Entry>, wanted: &str) -> Result<Entry, Problem> {
    let problem = |rule: &str, cure: &str| Err(Problem::new("NAME", wanted.to_owned(), rule, cure));
    if let Some(exact) = entries
        .iter()
        .find(|entry| entry.record.name == wanted || entry.record.id == wanted)
    {
        return Ok(exact.clone());
    }
    let mut matching = entries
        .into_iter()
        .filter(|entry| !wanted.is_empty() && entry.record.id.starts_with(wanted));
    match (matching.next(), matching.next()) {
        (Some(entry), None) => Ok(entry),
        (Some(_), Some(_)) => problem("is the beginning of several ids", "write more of it"),
        (None, _) => problem(
            "there is no such run",
            "`pericarp ps -a` lists those there are",
        ),
    }
}

/// Removes a run's files but its record and log.
pub(crate) fn remove_all_but_history(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if HISTORY.iter().any(|kept| entry.file_name() == *kept) {
            continue;
        }
        let path = entry.path();
        // What stays is removed with the record, by `rm`.
        let _ = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(path),
            _ => fs::remove_file(path),
        };
    }
}

/// A new id.
pub(crate) fn new_id() -> io::Result<String> {
    let mut bytes = [0; 6];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |passed| passed.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, name: &str) -> Entry {
        Entry {
            record: Record {
                id: id.into(),
                name: name.into(),
                ..Record::default()
            },
            path: "/r".into(),
            alive: true,
        }
    }

    #[test]
    fn a_run_is_found_by_name_id_or_beginning() {
        let all = || {
            vec![
                entry("aa11", "web"),
                entry("aa22", "db"),
                entry("bb33", "aa"),
            ]
        };
        for (wanted, id) in [
            ("web", "aa11"),
            ("aa22", "aa22"),
            ("b", "bb33"),
            ("aa", "bb33"),
        ] {
            assert_eq!(pick(all(), wanted).unwrap().record.id, id, "{wanted}");
        }
        for (wanted, text) in [
            (
                "a",
                "NAME 'a': is the beginning of several ids; write more of it",
            ),
            (
                "zz",
                "NAME 'zz': there is no such run; `pericarp ps -a` lists those there are",
            ),
            (
                "",
                "NAME '': there is no such run; `pericarp ps -a` lists those there are",
            ),
        ] {
            assert_eq!(pick(all(), wanted).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn a_dead_run_is_told_from_one_that_ended() {
        let mut run = entry("1", "x");
        assert_eq!(run.state(), "starting");
        run.record.status = Status::Running;
        assert_eq!(run.state(), "running");
        run.alive = false;
        assert_eq!(run.state(), "died");
        run.record.status = Status::Exited;
        run.record.exit_code = Some(7);
        assert_eq!(run.state(), "exited (7)");
    }
}
