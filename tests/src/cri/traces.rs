//! What pods leave on a node: processes, mounts, namespaces, interfaces, cgroups, sockets and
//! files, each as a line of text, so that two moments can be compared. Called by `node`.
//!
//! Nothing is looked for by name: the node's namespaces are its own, so whatever is more in them
//! than before is a pod's.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Directories of the node in which each pod or container has an entry.
const ENTRIES: [&str; 9] = [
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "/run/containerd/io.containerd.grpc.v1.cri/containers",
    "/run/containerd/fifo",
    "/run/containerd/runc/k8s.io",
    "/run/containerd/s",
    "/run/netns",
    "/run/pericarp",
    "/var/lib/cni/results",
];
/// The same below the node's own directory.
const OWN_ENTRIES: [&str; 4] = [
    "root/io.containerd.runtime.v2.task/k8s.io",
    "root/io.containerd.grpc.v1.cri/sandboxes",
    "root/io.containerd.grpc.v1.cri/containers",
    "addresses/pods",
];
/// What the network's plugin keeps beside the addresses.
const NO_ADDRESSES: [&str; 2] = ["last_reserved_ip.0", "lock"];

/// All traces, one line for each.
pub type Traces = BTreeSet<String>;

/// What there is in the namespaces of `init`, below `dir`, and in cgroups below `parent`.
///
/// # Errors
/// When the node is gone.
pub(super) fn of(init: i32, dir: &Path, parent: &str) -> io::Result<Traces> {
    let proc = PathBuf::from(format!("/proc/{init}"));
    let root = proc.join("root");
    let mut traces = Traces::new();
    processes(&root.join("proc"), &mut traces)?;
    for line in fs::read_to_string(proc.join("mountinfo"))?.lines() {
        let mut words = line.split(' ').skip(4);
        let place = words.next().unwrap_or_default();
        let kind = words.skip_while(|word| *word != "-").nth(1);
        traces.insert(format!("mount {place} of {}", kind.unwrap_or_default()));
    }
    for line in fs::read_to_string(proc.join("net/dev"))?.lines().skip(2) {
        let name = line.split(':').next().unwrap_or_default().trim();
        traces.insert(format!("interface {name}"));
    }
    for place in ENTRIES {
        entries(&root.join(&place[1..]), place, &mut traces)?;
    }
    for place in OWN_ENTRIES {
        entries(&dir.join(place), place, &mut traces)?;
    }
    for hierarchy in hierarchies()? {
        cgroups(&hierarchy.join(parent), &mut traces)?;
    }
    Ok(traces)
}

fn processes(proc: &Path, traces: &mut Traces) -> io::Result<()> {
    for entry in fs::read_dir(proc)? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        let Ok(words) = fs::read(proc.join(&name).join("cmdline")) else {
            continue;
        };
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        let words = if words.is_empty() {
            let name = fs::read_to_string(proc.join(&name).join("comm"));
            format!("({}, dead)", name.unwrap_or_default().trim())
        } else {
            words
        };
        traces.insert(format!("process {pid} {}", words.trim()));
    }
    Ok(())
}

fn entries(directory: &Path, shown: &str, traces: &mut Traces) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !NO_ADDRESSES.contains(&name.as_str()) {
            traces.insert(format!("entry {shown}/{name}"));
        }
    }
    Ok(())
}

fn cgroups(group: &Path, traces: &mut Traces) -> io::Result<()> {
    let entries = match fs::read_dir(group) {
        // None was made here, or it went away.
        Err(_) => return Ok(()),
        Ok(entries) => entries,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            traces.insert(format!("cgroup {}", entry.path().display()));
            cgroups(&entry.path(), traces)?;
        }
    }
    Ok(())
}

/// Where cgroups are: one place for each controller or group of them, and that of version 2.
pub(super) fn hierarchies() -> io::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(place))
    });
    Ok(mounts.collect())
}

/// Removes a cgroup and those below it, in all hierarchies, as far as nobody is in them. True
/// when none is left.
pub(super) fn remove_cgroups(parent: &str) -> bool {
    let hierarchies = hierarchies().unwrap_or_default();
    let groups: Vec<PathBuf> = hierarchies.iter().map(|one| one.join(parent)).collect();
    groups.iter().for_each(|group| remove_below(group));
    !groups.iter().any(|group| group.exists())
}

fn remove_below(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_seen_and_places_that_are_not_there_are_empty() {
        let scratch = crate::scratch::Scratch::new();
        let mut traces = Traces::new();
        entries(&scratch.path("none"), "x", &mut traces).unwrap();
        assert_eq!(traces, Traces::new());
        scratch.file("10.88.0.2", b"");
        scratch.file("lock", b"");
        entries(scratch.dir(), "x", &mut traces).unwrap();
        assert_eq!(traces, Traces::from(["entry x/10.88.0.2".to_owned()]));
    }
}
