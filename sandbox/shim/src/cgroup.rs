//! The pod's control group on the host, named by `linux.cgroupsPath` of its first container.
//!
//! Entered by `machine` before the pod's first process, so that all of them, and the guest's memory,
//! are counted where a kubelet looks and held to what it has set on the group above. Nothing is
//! limited here but the CPUs that the pod's profile names: what a sandbox's own configuration says (two
//! shares of a CPU) is meant for a process that sleeps.

use std::{
    fs::{self, OpenOptions},
    io::{self, ErrorKind, Write as _},
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use pericarp_config::CpuSet;

use crate::{
    bundle::refused,
    error::{ShimError, during},
    pinned,
};

const MOUNTS: &str = "/proc/self/mountinfo";
const OURS: &str = "/proc/self/cgroup";
const PROCESSES: &str = "cgroup.procs";
const CPUS: &str = "cpuset.cpus";
/// What a version 2 group counts only if the group above says so.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// For processes that were ended to have gone.
const LIMIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// One of the kernel's hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    /// The group that this process is in, from the top.
    home: PathBuf,
    unified: bool,
}

/// A group that this process has entered, and leaves when this is dropped.
#[derive(Debug)]
pub(crate) struct Entered {
    group: PathBuf,
    hierarchies: Vec<Hierarchy>,
    /// Of the processes that the kernel has killed, those that have nothing to do with an end: the
    /// group was there before, or another process has come in place of one.
    outlived: u64,
}

/// Where a configuration's group is, from the top of each hierarchy. None if it names none.
pub(crate) fn group(path: &str) -> Result<Option<PathBuf>, ShimError> {
    if path.is_empty() {
        return Ok(None);
    }
    let wrong = |rule: &str| refused(&format!("linux.cgroupsPath: {path:?}"), rule);
    let parts: Vec<&str> = path.split(':').collect();
    let group = match parts[..] {
        [plain] => PathBuf::from(plain.trim_start_matches('/')),
        // As systemd names them.
        [slice, prefix, name] => slice_path(slice)
            .ok_or_else(|| wrong("begins with no slice"))?
            .join(format!("{prefix}-{name}.scope")),
        _ => return Err(wrong("is neither a path nor slice:prefix:name")),
    };
    let mut parts = group.components();
    if group.as_os_str().is_empty() || !parts.all(|part| matches!(part, Component::Normal(_))) {
        return Err(wrong("is not below the top"));
    }
    Ok(Some(group))
}

/// `a-b.slice` is in `a.slice`.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    if name == "-" {
        return Some(path);
    }
    for (at, _) in name.match_indices('-') {
        path.push(format!("{}.slice", &name[..at]));
    }
    path.push(slice);
    Some(path)
}

impl Entered {
    /// Makes the group and moves this process there; its children are born in it. It is held to
    /// these CPUs where it has any: none of its threads leaves them, whatever it asks for.
    pub(crate) fn enter(group: PathBuf, cpus: Option<&CpuSet>) -> Result<Self, ShimError> {
        let read = |path| fs::read_to_string(path).map_err(during(path));
        let hierarchies = hierarchies(&read(MOUNTS)?, &read(OURS)?);
        let mut entered = Self {
            group,
            hierarchies: Vec::new(),
            outlived: 0,
        };
        for hierarchy in hierarchies {
            let path = hierarchy.mount.join(&entered.group);
            let failed = || during(format!("the control group {}", path.display()));
            make(&hierarchy, &entered.group).map_err(failed())?;
            // Even if it is not entered, it is there to be removed.
            entered.hierarchies.push(hierarchy);
            if let Some(cpus) = cpus {
                hold(&path, cpus)?;
            }
            move_to(&path).map_err(failed())?;
        }
        entered.outlive(u64::MAX);
        Ok(entered)
    }

    /// The pod goes on without that many processes, which others have come in place of. One more that
    /// was killed may be the machine, which takes longer to end: that is still to be told.
    pub(crate) fn outlive(&mut self, processes: u64) {
        let killed = self.killed().map_or(0, |(killed, _)| killed);
        self.outlived = killed.min(self.outlived.saturating_add(processes));
    }

    /// What the kernel says if it has killed processes of the group for want of memory, which nothing
    /// has come in place of: the group above is full, or the host is.
    pub(crate) fn killed_for_memory(&self) -> Option<String> {
        let (killed, limit) = self.killed()?;
        let killed = killed.checked_sub(self.outlived).filter(|new| *new > 0)?;
        let limit = limit.map_or_else(String::new, |limit| {
            format!("; its group may hold {} MiB", limit >> 20)
        });
        Some(format!(
            "the host's kernel has killed {killed} of the pod's processes for want of memory{limit}"
        ))
    }

    /// How many it has killed since the group was made, and what the group above may hold.
    fn killed(&self) -> Option<(u64, Option<u64>)> {
        let number = |path: PathBuf, name: &str| -> Option<u64> {
            let text = fs::read_to_string(path).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse().ok()
        };
        self.hierarchies.iter().find_map(|hierarchy| {
            let group = hierarchy.mount.join(&self.group);
            let (events, limit) = match hierarchy.unified {
                true => ("memory.events", "memory.max"),
                false => ("memory.oom_control", "memory.limit_in_bytes"),
            };
            let killed = number(group.join(events), "oom_kill ")?;
            let above = group.parent()?;
            let limit = number(above.join(limit), "").filter(|limit| *limit < 1 << 60);
            Some((killed, limit))
        })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        for hierarchy in &self.hierarchies {
            // A parent that is gone or full leaves the top, where nobody is refused.
            let home = hierarchy.mount.join(&hierarchy.home);
            if let Err(error) = move_to(&home).or_else(|_| move_to(&hierarchy.mount)) {
                log::warn!("{} cannot be entered again: {error}", home.display());
            }
        }
        remove(&self.group, &self.hierarchies);
    }
}

/// Removes a group whose processes have gone with a shim that was killed.
pub(crate) fn sweep(group: &Path) {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    remove(group, &hierarchies(&read(MOUNTS), &read(OURS)));
}

fn remove(group: &Path, hierarchies: &[Hierarchy]) {
    let end = Instant::now() + LIMIT;
    for hierarchy in hierarchies {
        let path = hierarchy.mount.join(group);
        loop {
            match fs::remove_dir(&path) {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                Err(error) if Instant::now() >= end => {
                    log::warn!("the control group {} stays: {error}", path.display());
                    break;
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
}

/// Leaves a group these CPUs, unless it is of a hierarchy without.
fn hold(group: &Path, cpus: &CpuSet) -> Result<(), ShimError> {
    let file = group.join(CPUS);
    match write(&file, &cpus.to_string()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => {
            let above = group.parent().unwrap_or(group).join(CPUS);
            let rule = format!(
                "{} does not take them ({error}): name some of those in {}",
                file.display(),
                above.display()
            );
            Err(refused(&pinned::field(cpus), &rule))
        }
    }
}

/// Moves this process there, with all of its threads.
fn move_to(group: &Path) -> io::Result<()> {
    write(&group.join(PROCESSES), "0")
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    // Never created: a file that is not there is one that the kernel does not have.
    OpenOptions::new()
        .write(true)
        .open(file)?
        .write_all(text.as_bytes())
}

/// Makes the group and those above it.
fn make(hierarchy: &Hierarchy, group: &Path) -> io::Result<()> {
    let mut path = hierarchy.mount.clone();
    for part in group {
        if hierarchy.unified {
            for controller in CONTROLLERS {
                // Refused by a group that has processes of its own, or no such controller: then
                // less is counted, as for all others there.
                let _ = write(
                    &path.join("cgroup.subtree_control"),
                    &format!("+{controller}"),
                );
            }
        }
        let above = path.clone();
        path.push(part);
        match fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            other => other?,
        }
        // A new version 1 group of CPUs has none, and takes no process before it has.
        for set in [CPUS, "cpuset.mems"] {
            let (own, inherited) = (path.join(set), above.join(set));
            if !hierarchy.unified
                && let Ok(text) = fs::read_to_string(&own)
                && text.trim().is_empty()
            {
                write(&own, fs::read_to_string(inherited)?.trim())?;
            }
        }
    }
    Ok(())
}

/// The hierarchies of which this process sees all: `mounts` as mountinfo has them, `ours` as
/// `/proc/self/cgroup` does.
fn hierarchies(mounts: &str, ours: &str) -> Vec<Hierarchy> {
    let homes = ours.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, home) = (parts.next()?, parts.next()?, parts.next()?);
        Some((controllers, home))
    });
    homes
        .filter_map(|(controllers, home)| {
            let unified = controllers.is_empty();
            let mount = mounts
                .lines()
                .find_map(|line| mounted(line, controllers, unified))?;
            Some(Hierarchy {
                mount,
                home: PathBuf::from(home.trim_start_matches('/')),
                unified,
            })
        })
        .collect()
}

/// Where a line of mountinfo has the hierarchy with these controllers, if it has all of it.
fn mounted(line: &str, controllers: &str, unified: bool) -> Option<PathBuf> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, place) = (mount.next()?, mount.next()?);
    let mut filesystem = filesystem.split(' ');
    let (kind, options) = (filesystem.next()?, filesystem.nth(1)?);
    let same = match kind {
        "cgroup2" => unified,
        "cgroup" => {
            let mut wanted = controllers.split(',');
            !unified && wanted.all(|one| options.split(',').any(|option| option == one))
        }
        _ => false,
    };
    (same && root == "/").then(|| PathBuf::from(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_named_in_two_ways() {
        let at = |path: &str| group(path).unwrap().unwrap();
        assert_eq!(group("").unwrap(), None);
        assert_eq!(at("/kubepods/pod7/abc"), Path::new("kubepods/pod7/abc"));
        assert_eq!(
            at("kubepods-burstable-pod7.slice:cri-containerd:abc"),
            Path::new(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice/\
                 cri-containerd-abc.scope"
            )
        );
        assert_eq!(at("-.slice:a:b"), Path::new("a-b.scope"));
        for wrong in ["/", "/a/../b", "..", "a:b", "a:b:c", "a.slice:b:/../../c"] {
            let error = group(wrong).unwrap_err().to_string();
            assert!(error.starts_with("linux.cgroupsPath: "), "{error}");
        }
    }

    #[test]
    fn what_was_killed_before_ends_nothing() {
        let top = std::env::temp_dir().join(format!("pericarp-killed-{}", std::process::id()));
        fs::create_dir_all(top.join("pod/p")).unwrap();
        fs::write(top.join("pod/memory.max"), "67108864\n").unwrap();
        let kernel = |killed: u32| {
            let text = format!("oom 9\noom_kill {killed}\noom_group_kill 0\n");
            fs::write(top.join("pod/p/memory.events"), text).unwrap();
        };
        let hierarchy = Hierarchy {
            mount: top.clone(),
            home: PathBuf::new(),
            unified: true,
        };
        let mut entered = Entered {
            group: "pod/p".into(),
            hierarchies: vec![hierarchy],
            outlived: 0,
        };
        kernel(0);
        assert_eq!(entered.killed_for_memory(), None);
        kernel(2);
        let said = entered.killed_for_memory().unwrap();
        assert!(said.contains("has killed 2 of"), "{said}");
        entered.outlive(1);
        let said = entered.killed_for_memory().unwrap();
        assert!(said.contains("has killed 1 of"), "{said}");
        // Not all of them were killed by the kernel.
        entered.outlive(3);
        assert_eq!(entered.killed_for_memory(), None);
        kernel(3);
        let said = entered.killed_for_memory().unwrap();
        assert!(
            said.ends_with(
                "killed 1 of the pod's processes for want of memory; its group may hold 64 MiB"
            ),
            "{said}"
        );
        // There is nothing to leave.
        entered.hierarchies.clear();
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn hierarchies_are_found_where_they_are_whole() {
        let mounts = "\
            30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
            33 30 0:29 /part /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let ours = "4:memory:/a\n3:cpu,cpuacct:/b/c\n1:name=systemd:/\n0::/d\n";
        let found = hierarchies(mounts, ours);
        let expected = |mount: &str, home: &str, unified| Hierarchy {
            mount: mount.into(),
            home: home.into(),
            unified,
        };
        assert_eq!(
            found,
            [
                expected("/sys/fs/cgroup/cpu", "b/c", false),
                expected("/sys/fs/cgroup/systemd", "", false),
                expected("/sys/fs/cgroup/unified", "d", true),
            ]
        );
    }
}
