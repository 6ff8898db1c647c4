//! Who was made of a version and still runs: whoever has its directory open.
//!
//! Asked of `/proc`, where it cannot be out of date, by device and inode: a process may see the
//! directory in another place. Its own name is the same there, and nothing of another name is looked
//! at: it may be on a dead server, for which we would wait.

use std::{
    fmt, fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use pericarp_pod::record::{BASE, PodRecord};

const SHIM: &[u8] = b"containerd-shim-pericarp";

/// A process, and the pod that it is there for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its program.
    pub program: String,
    /// The pod's name, where it is a pod's shim.
    pub pod: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pod {
            Some(pod) => write!(f, "the pod {pod}"),
            None => write!(f, "process {} ({})", self.pid, self.program),
        }
    }
}

/// Everybody who has this directory open, as far as we may see it.
#[must_use]
pub fn holders(directory: &Path) -> Vec<Holder> {
    let Ok(directory) = fs::canonicalize(directory) else {
        return Vec::new();
    };
    let Ok(wanted) = fs::metadata(&directory) else {
        return Vec::new();
    };
    let wanted = (wanted.dev(), wanted.ino());
    let is_called_so = |fd: &Path| {
        let leads_to = fs::read_link(fd);
        leads_to.is_ok_and(|place| place.file_name() == directory.file_name())
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let process = entry.path();
            let open = fs::read_dir(process.join("fd")).ok()?.flatten();
            let open = open.map(|fd| fd.path()).filter(|fd| is_called_so(fd));
            let open = open.filter_map(|fd| fs::metadata(fd).ok());
            let times = open.filter(|file| (file.dev(), file.ino()) == wanted);
            let times = times.count();
            // Who removes it has it open, too, once.
            let least = if pid == std::process::id() { 2 } else { 1 };
            (times >= least).then(|| describe(pid, &process))
        })
        .collect()
}

fn describe(pid: u32, process: &Path) -> Holder {
    let exe = fs::read_link(process.join("exe")).unwrap_or_default();
    let program = exe.file_name().unwrap_or_default();
    let is_shim = program.as_bytes().starts_with(SHIM);
    Holder {
        pid,
        program: program.to_string_lossy().into_owned(),
        pod: is_shim.then(|| pod(process)).flatten(),
    }
}

/// The name of the pod that this shim is there for.
fn pod(process: &Path) -> Option<String> {
    let line = fs::read(process.join("cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    let (namespace, id) = arguments(&line)?;
    // As the shim sees it.
    let base = process.join("root").join(BASE.trim_start_matches('/'));
    let directory: PathBuf = base.join(&namespace).join(&id);
    let record = PodRecord::read(&directory).filter(|record| record.id == id);
    Some(record.map_or_else(|| format!("{namespace}/{id}"), |record| record.name))
}

/// The namespace and the pod that a shim was started with.
fn arguments(line: &str) -> Option<(String, String)> {
    let words: Vec<&str> = line.split('\0').collect();
    let after = |option: &str| {
        let at = words.iter().position(|word| *word == option)?;
        words.get(at + 1).map(|word| (*word).to_owned())
    };
    Some((after("-namespace")?, after("-id")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_says_its_pod() {
        let line = "/x/containerd-shim-pericarp-v2\0-namespace\0k8s.io\0-id\0aa11\0-address\0/a\0";
        assert_eq!(arguments(line), Some(("k8s.io".into(), "aa11".into())));
        assert_eq!(arguments("sh\0-id"), None);
    }

    #[test]
    fn who_has_a_directory_open_is_seen() {
        let directory = std::env::temp_dir().join(format!("pericarp-held-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let open = || fs::File::open(&directory).unwrap();
        assert_eq!(holders(&directory), []);
        let (_one, _other) = (open(), open());
        let found = holders(&directory);
        fs::remove_dir(&directory).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, std::process::id());
        assert!(found[0].to_string().starts_with("process "), "{}", found[0]);
    }
}
