//! Takes away the cgroup that a pod's containers were in: runtimes make it and remove their own
//! only. Called by `ending`.

use std::fs;
use std::path::{Path, PathBuf};

/// Removes it from all hierarchies, with empty ones below it. One that somebody is in stays.
pub(super) fn remove(name: &str) {
    // Slices are systemd's to remove.
    if name.ends_with(".slice") {
        return;
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for hierarchy in hierarchies(&mounts) {
        below(&hierarchy.join(name.trim_start_matches('/')));
    }
}

fn below(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path());
        }
    }
    // It is not there in most hierarchies, and that is fine.
    let _ = fs::remove_dir(group);
}

/// Where cgroups are: a place for each controller or group of them, and that of version 2.
fn hierarchies(mounts: &str) -> Vec<PathBuf> {
    let places = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(place))
    });
    places.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let mounts = "proc /proc proc rw 0 0\ncgroup /c/cpu cgroup rw,cpu 0 0\ncgroup2 /c/u cgroup2 rw 0 0\n";
        assert_eq!(
            hierarchies(mounts),
            [PathBuf::from("/c/cpu"), PathBuf::from("/c/u")]
        );
    }
}
