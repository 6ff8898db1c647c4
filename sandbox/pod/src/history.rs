//! What went wrong in a pod of containerd's: written by its shim, read by `pericarp why` when the pod
//! may be long gone, and by `pericarp node serve`, which writes down beside it what it refuses itself.
//!
//! One file of each writer for each pod that something went wrong in, in a directory of a bounded
//! number of them; a bounded number of causes in each. A sentence or a line of evidence may be a
//! guest's: whoever writes it has made it safe to print, and here it is cut.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

/// Where they are. Not below the directory of the pods that are there.
pub const BASE: &str = "/run/pericarp-why";
/// Files of each writer that are kept; the oldest go.
const MOST_PODS: usize = 256;
/// Causes of a pod that are kept; the first one and the last ones.
const MOST_CAUSES: usize = 24;
const MOST_EVIDENCE: usize = 24;
/// A command that ends so soon after one of its processes was killed has ended by that, ms.
const FOLLOWS: u64 = 5000;
/// Characters of a line.
const LONGEST: usize = 600;
/// How the names of files end that a shim writes.
const OF_SHIM: &str = ".json";
/// And of those that who runs the pods writes.
const OF_NODE: &str = "+node.json";

/// What kind of thing went wrong. The later, the more it explains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A container's command has ended with a code of its own.
    #[default]
    Exit,
    /// Who runs the pod has not made or not kept it: an image, a file or room was not to be had.
    Node,
    /// A container was not made or not started.
    Refused,
    /// A container's command has failed where a file system is full.
    DiskFull,
    /// The guest's kernel has killed for want of a container's memory.
    OutOfMemory,
    /// The machine is not there, or no longer.
    Machine,
    /// The host's kernel has killed for want of the pod's memory.
    HostOutOfMemory,
}

/// One thing that went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// Milliseconds since 1970.
    pub at: u64,
    /// What it is.
    pub kind: Kind,
    /// What the pod was at: `create`, `start`, `run`.
    pub phase: String,
    /// The container's name, if it is about one.
    pub container: Option<String>,
    /// All of it in one sentence. What containerd was told, where it was told anything.
    pub sentence: String,
    /// What shows it, line by line.
    pub evidence: Vec<String>,
    /// How often it came, one after the other.
    pub times: u32,
}

/// A pod's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Of containerd's.
    pub namespace: String,
    /// What containerd calls it.
    pub id: String,
    /// What Kubernetes calls it, `namespace/name`.
    pub name: String,
    /// Kubernetes' number of it, where it has been said: another pod of its name has another.
    #[serde(default)]
    pub uid: String,
    /// In the order in which they came.
    pub causes: Vec<Cause>,
    /// Causes that were left out between the first and the second of these.
    pub left_out: u32,
}

impl History {
    /// Adds a cause. The same again is counted.
    pub fn add(&mut self, mut cause: Cause) {
        cause.sentence = cut(&cause.sentence);
        cause.evidence.truncate(MOST_EVIDENCE);
        for line in &mut cause.evidence {
            *line = cut(line);
        }
        if let Some(last) = self.causes.last_mut()
            && (last.kind, &last.container, &last.sentence)
                == (cause.kind, &cause.container, &cause.sentence)
        {
            last.times = last.times.saturating_add(1);
            last.at = cause.at;
            return;
        }
        cause.times = 1;
        if self.causes.len() >= MOST_CAUSES {
            self.causes.remove(1);
            self.left_out = self.left_out.saturating_add(1);
        }
        self.causes.push(cause);
    }

    /// What explains the pod's state: the end of its machine if that has ended, else what came last
    /// to a container, unless that only followed from a want of memory.
    #[must_use]
    pub fn main(&self) -> Option<&Cause> {
        let of_machine = |one: &&Cause| one.kind >= Kind::Machine;
        if let Some(end) = self.causes.iter().rev().find(of_machine) {
            return Some(end);
        }
        let last = self.causes.last()?;
        let explains = |one: &&Cause| {
            let is_near = last.at.saturating_sub(one.at) <= FOLLOWS;
            one.kind == Kind::OutOfMemory && one.container == last.container && is_near
        };
        let before = self.causes.iter().rev().find(explains);
        Some(before.filter(|_| last.kind == Kind::Exit).unwrap_or(last))
    }

    /// Writes it, in the place of an earlier one. The oldest ones of others go where there are too
    /// many.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn write(&self, base: &Path) -> io::Result<()> {
        self.write_to(base, OF_SHIM)
    }

    fn write_to(&self, base: &Path, end: &str) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(base)?;
        let name = file_name(&self.namespace, &self.id, end);
        let file = base.join(&name);
        if !file.exists() {
            make_room(base, end)?;
        }
        // A node's threads write of several pods at once.
        let unfinished = base.join(format!(".{name}.{}", std::process::id()));
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::rename(unfinished, file)
    }

    fn read(base: &Path, namespace: &str, id: &str, end: &str) -> Option<Self> {
        let bytes = fs::read(base.join(file_name(namespace, id, end))).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Takes in what another has written of the same pod.
    fn join(&mut self, other: Self) {
        self.causes.extend(other.causes);
        self.causes.sort_by_key(|cause| cause.at);
        self.left_out = self.left_out.saturating_add(other.left_out);
    }
}

/// What is known of one pod, by what containerd calls it.
#[must_use]
pub fn of(base: &Path, namespace: &str, id: &str) -> Option<History> {
    let read = |end| History::read(base, namespace, id, end);
    match (read(OF_SHIM), read(OF_NODE)) {
        (Some(mut history), Some(other)) => {
            history.join(other);
            Some(history)
        }
        (one, other) => one.or(other),
    }
}

/// Adds what who runs the pods has to say of this one. `name` is what Kubernetes calls it. Not for
/// two processes at the same time.
///
/// # Errors
///
/// The kernel's.
pub fn note(base: &Path, namespace: &str, id: &str, name: &str, cause: Cause) -> io::Result<()> {
    let kept = History::read(base, namespace, id, OF_NODE);
    let mut history = kept.unwrap_or_else(|| History {
        namespace: namespace.to_owned(),
        id: id.to_owned(),
        name: name.to_owned(),
        ..History::default()
    });
    history.add(cause);
    history.write_to(base, OF_NODE)
}

/// The beginning of a text.
fn cut(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

/// Names are containerd's, who takes neither slashes nor anything longer than a file's name allows
/// for the two, nor a plus.
fn file_name(namespace: &str, id: &str, end: &str) -> String {
    format!("{namespace}+{id}{end}").replace('/', "_")
}

fn make_room(base: &Path, end: &str) -> io::Result<()> {
    let is_one = |name: &str| match end {
        OF_NODE => name.ends_with(OF_NODE),
        _ => !name.ends_with(OF_NODE),
    };
    let mut files: Vec<(SystemTime, PathBuf)> = fs::read_dir(base)?
        .flatten()
        .filter(|entry| is_one(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let many = (files.len() + 1).saturating_sub(MOST_PODS);
    for (_, file) in files.into_iter().take(many) {
        match fs::remove_file(file) {
            // Another shim was faster.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// All that are kept, the one that was written last first. Where several pods had one name, only the
/// last of them.
#[must_use]
pub fn all(base: &Path) -> Vec<History> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    // What is being written is there twice.
    let entries = entries.filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    let mut found: Vec<(SystemTime, History)> = entries
        .filter_map(|entry| {
            let bytes = fs::read(entry.path()).ok()?;
            let modified = entry.metadata().ok()?.modified().ok()?;
            Some((modified, serde_json::from_slice(&bytes).ok()?))
        })
        .collect();
    found.sort_by(|(one, _), (other, _)| other.cmp(one));
    let mut all: Vec<History> = Vec::new();
    for (_, history) in found {
        let same = |known: &&mut History| {
            (&known.namespace, &known.id) == (&history.namespace, &history.id)
        };
        if let Some(known) = all.iter_mut().find(same) {
            known.join(history);
        } else if !all.iter().any(|later| later.name == history.name) {
            all.push(history);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(kind: Kind, sentence: &str) -> Cause {
        Cause {
            kind,
            sentence: sentence.into(),
            ..Cause::default()
        }
    }

    #[test]
    fn the_machines_end_explains_more_than_what_followed() {
        let mut history = History::default();
        assert_eq!(history.main(), None);
        history.add(cause(Kind::OutOfMemory, "a"));
        history.add(cause(Kind::OutOfMemory, "a"));
        assert_eq!((history.causes.len(), history.causes[0].times), (1, 2));
        history.add(cause(Kind::Machine, "b"));
        history.add(cause(Kind::Exit, "c"));
        assert_eq!(history.main().unwrap().sentence, "b");
        let mut history = History::default();
        history.add(cause(Kind::OutOfMemory, "a"));
        history.add(cause(Kind::Exit, "c"));
        assert_eq!(history.main().unwrap().sentence, "a");
        history.add(Cause {
            at: 60_000,
            ..cause(Kind::Exit, "d")
        });
        assert_eq!(history.main().unwrap().sentence, "d");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut history = History::default();
        for number in 0..100 {
            let mut one = cause(Kind::Exit, &format!("{number}"));
            one.evidence = vec!["x".repeat(10_000); 100];
            history.add(one);
        }
        assert_eq!(history.causes.len(), MOST_CAUSES);
        assert_eq!(history.causes[0].sentence, "0");
        assert_eq!(history.causes[MOST_CAUSES - 1].sentence, "99");
        assert_eq!(history.left_out, 76);
        let longest = history.causes[0].evidence.iter().map(String::len).max();
        assert!(longest.unwrap() < 700);

        let base = std::env::temp_dir().join(format!("pericarp-why-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        for number in 0..MOST_PODS + 10 {
            let history = History {
                namespace: "k8s.io".into(),
                id: format!("{number:04}"),
                name: format!("default/{}", number % 200),
                ..History::default()
            };
            history.write(&base).unwrap();
            history.write(&base).unwrap();
        }
        let files = fs::read_dir(&base).unwrap().count();
        let all = all(&base);
        fs::remove_dir_all(&base).unwrap();
        assert_eq!(files, MOST_PODS);
        // One for each name.
        assert_eq!(all.len(), 200);
    }
    #[test]
    fn what_two_write_of_a_pod_is_one_history() {
        let base = std::env::temp_dir().join(format!("pericarp-why-two-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        assert_eq!(of(&base, "k8s.io", "a"), None);
        let at = |at, kind, sentence: &str| Cause {
            at,
            ..cause(kind, sentence)
        };
        let write = |image: Cause| note(&base, "k8s.io", "a", "default/web", image).unwrap();
        write(at(2, Kind::Node, "no image"));
        assert_eq!(all(&base)[0].main().unwrap().sentence, "no image");
        let mut shims = History {
            namespace: "k8s.io".into(),
            id: "a".into(),
            name: "default/web".into(),
            ..History::default()
        };
        shims.add(at(1, Kind::Exit, "a code"));
        shims.add(at(3, Kind::Refused, "no program"));
        shims.write(&base).unwrap();
        write(at(4, Kind::Node, "no image"));
        let (one, all) = (of(&base, "k8s.io", "a").unwrap(), all(&base));
        fs::remove_dir_all(&base).unwrap();
        let said: Vec<_> = (one.causes.iter())
            .map(|one| (one.sentence.as_str(), one.times))
            .collect();
        assert_eq!(said, [("a code", 1), ("no program", 1), ("no image", 2)]);
        assert_eq!(all, [one]);
    }
}
