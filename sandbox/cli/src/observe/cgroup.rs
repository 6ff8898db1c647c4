//! What a pod's control group holds in memory and may hold: all of the machine, the guest's memory
//! included, as the host's kernel counts it and a kubelet limits it on the group above.
//!
//! Called by `observe`, for pods: a run is in the group of whoever has started it.

use std::{fs, path::Path};

/// Where the hierarchies are: version 2, or one for each controller below.
const ROOT: &str = "/sys/fs/cgroup";

/// Bytes of the group of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Charged to it and to groups in it.
    pub(crate) used: u64,
    /// The least that it or a group above may hold; none is no limit.
    pub(crate) limit: Option<u64>,
}

/// That of this process; none where memory is not counted.
pub(super) fn memory(pid: u32) -> Option<Memory> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    memory_below(Path::new(ROOT), &groups)
}

fn memory_below(root: &Path, groups: &str) -> Option<Memory> {
    // Version 1 has the controller if it is there.
    let named = groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let of_memory = controllers.split(',').any(|one| one == "memory");
        of_memory.then_some((root.join("memory"), path, V1))
    });
    let unified = || {
        let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some((root.to_owned(), path, V2))
    };
    let (top, path, (used, limit)) = named.or_else(unified)?;
    let group = top.join(path.trim_start_matches('/'));
    let limits = group.ancestors().take_while(|place| **place != top);
    Some(Memory {
        used: number(&group.join(used))?,
        limit: limits.filter_map(|place| number(&place.join(limit))).min(),
    })
}

/// The files of what is used and of the limit.
const V1: (&str, &str) = ("memory.usage_in_bytes", "memory.limit_in_bytes");
const V2: (&str, &str) = ("memory.current", "memory.max");
/// Version 1 writes no limit as the largest multiple of a page.
const NO_LIMIT: u64 = 1 << 62;

/// What a file says; none for `max`.
fn number(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.trim().parse().ok().filter(|number| *number < NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_above_holds() {
        let name = format!("pericarp-cgroup-{}", std::process::id());
        let root = std::env::temp_dir().join(name);
        let write = |place: &str, text: &str| {
            let file = root.join(place);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("kube/pod/one/memory.current", "70\n");
        write("kube/pod/one/memory.max", "max\n");
        write("kube/pod/memory.max", "500\n");
        write("kube/memory.max", "900\n");
        write("memory/pods/one/memory.usage_in_bytes", "7\n");
        write(
            "memory/pods/one/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        let of = |groups: &str| memory_below(&root, groups);
        let unified = of("0::/kube/pod/one\n");
        let named = of("5:cpu,cpuacct:/x\n4:memory:/pods/one\n0::/\n");
        let (gone, none) = (of("0::/kube/two\n"), of("3:pids:/x\n"));
        fs::remove_dir_all(&root).unwrap();
        let memory = |used, limit| Some(Memory { used, limit });
        assert_eq!(unified, memory(70, Some(500)));
        assert_eq!(named, memory(7, None));
        assert_eq!((gone, none), (None, None));
    }
}
