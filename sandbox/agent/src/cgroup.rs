//! The control groups: one around all containers, one for each.
//!
//! crun makes a container's group and sets its limits; this module sets the limit around all of
//! them at the boot, so that they cannot take what the agent needs, and reads and kills the groups
//! afterwards.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::{AgentError, during};

const ROOT: &str = "/sys/fs/cgroup";
/// As the kernel and crun name it.
const PARENT: &str = "/pericarp";
/// Switched on where the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// Process ids that are left to the agent: its own threads and crun's.
const SPARE_PIDS: u64 = 1024;
/// Memory that is left to the agent and the kernel: this part of all, within bounds.
const SPARE_PART: u64 = 16;
const SPARE_LEAST: u64 = 16 << 20;
const SPARE_MOST: u64 = 64 << 20;
/// Longest file of a group that is read: the process list of a full machine.
const MAX_FILE: u64 = 512 * 1024;
/// Groups that a container may have made below its own and that are looked into.
const MAX_GROUPS: usize = 256;

/// Makes the group around all containers.
pub(crate) fn prepare() -> Result<(), AgentError> {
    let parent = PathBuf::from(format!("{ROOT}{PARENT}"));
    enable(Path::new(ROOT))?;
    fs::create_dir(&parent).map_err(during(parent.display().to_string()))?;
    enable(&parent)?;
    let pid_max = number("/proc/sys/kernel/pid_max");
    let threads_max = number("/proc/sys/kernel/threads-max");
    let most = pid_max.min(threads_max);
    // A small machine is shared evenly.
    let pids = most.saturating_sub(SPARE_PIDS).max(most / 2);
    write(&parent, "pids.max", &pids.to_string())?;
    // What the kernel has taken is gone already; were containers to take all the rest, it would
    // spend its time looking for memory instead of ending one of them.
    let spare = (memory_info("MemTotal:") / SPARE_PART).clamp(SPARE_LEAST, SPARE_MOST);
    let most = memory_info("MemAvailable:").saturating_sub(spare);
    write(&parent, "memory.max", &most.to_string())
}

/// Hands the controllers on to the groups below.
fn enable(group: &Path) -> Result<(), AgentError> {
    let there = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    let there: Vec<&str> = there.split_whitespace().collect();
    for controller in CONTROLLERS {
        if there.contains(&controller) {
            write(group, "cgroup.subtree_control", &format!("+{controller}"))?;
        }
    }
    Ok(())
}

fn write(group: &Path, file: &str, value: &str) -> Result<(), AgentError> {
    let path = group.join(file);
    let what = format!("writing '{value}' to {}", path.display());
    fs::write(&path, value).map_err(during(what))
}

fn number(path: &str) -> u64 {
    fs::read_to_string(path)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(u64::MAX)
}

/// A line of `/proc/meminfo`, bytes.
pub(crate) fn memory_info(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kib_line(&text, key)
}

/// The number in a line such as `VmRSS:  1234 kB`, bytes.
pub(crate) fn kib_line(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            line.strip_prefix(key)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .map_or(0, |kib: u64| kib.saturating_mul(1024))
}

/// The group of one container.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    name: String,
    directory: PathBuf,
}

impl Group {
    /// The group of the container with this checked id. It is there once crun has made it.
    pub(crate) fn of(container: &str) -> Self {
        let name = format!("{PARENT}/{container}");
        Self {
            directory: PathBuf::from(format!("{ROOT}{name}")),
            name,
        }
    }

    /// What crun calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Processes of the group killed for want of memory so far.
    pub(crate) fn oom_kills(&self) -> u64 {
        field(&self.read("memory.events"), "oom_kill")
    }

    /// The file whose changes tell of such kills, poll(2) with POLLPRI.
    pub(crate) fn events(&self) -> std::io::Result<fs::File> {
        fs::File::open(self.directory.join("memory.events"))
    }

    /// A file with one number; 0 where there is none.
    pub(crate) fn number(&self, file: &str) -> u64 {
        self.read(file).trim().parse().unwrap_or(0)
    }

    /// A number of `memory.stat`.
    pub(crate) fn memory_stat(&self, key: &str) -> u64 {
        field(&self.read("memory.stat"), key)
    }

    /// A number of `cpu.stat`.
    pub(crate) fn cpu_stat(&self, key: &str) -> u64 {
        field(&self.read("cpu.stat"), key)
    }

    /// Kills all processes of the group and of those below it.
    pub(crate) fn kill(&self) {
        // A group that is not there has no processes.
        let _ = fs::write(self.directory.join("cgroup.kill"), "1");
    }

    /// Stops all processes of the group and below where they are, or lets them go on.
    pub(crate) fn freeze(&self, frozen: bool) -> std::io::Result<()> {
        let value = if frozen { "1" } else { "0" };
        fs::write(self.directory.join("cgroup.freeze"), value)
    }

    /// Whether a process is in the group or below it.
    pub(crate) fn is_populated(&self) -> bool {
        field(&self.read("cgroup.events"), "populated") > 0
    }

    /// Sends a signal to every process of the group and below. Gives how many got it.
    pub(crate) fn signal(&self, signal: Signal) -> usize {
        let mut groups = vec![self.directory.clone()];
        let mut looked = 0;
        let mut reached = 0;
        while let Some(group) = groups.pop() {
            looked += 1;
            for pid in read(&group.join("cgroup.procs"))
                .lines()
                .filter_map(|line| line.parse().ok().and_then(Pid::from_raw))
            {
                reached += usize::from(self.signal_member(pid, signal));
            }
            if let Ok(entries) = fs::read_dir(&group) {
                let below = entries.flatten().filter(|entry| entry.path().is_dir());
                let room = MAX_GROUPS.saturating_sub(looked + groups.len());
                groups.extend(below.map(|entry| entry.path()).take(room));
            }
        }
        reached
    }

    /// Through a descriptor: between the list and the signal the id may have changed hands.
    fn signal_member(&self, pid: Pid, signal: Signal) -> bool {
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
            return false;
        };
        let path = format!("/proc/{}/cgroup", pid.as_raw_nonzero());
        self.contains(&read(Path::new(&path))) && pidfd_send_signal(process, signal).is_ok()
    }

    /// Whether this `/proc/PID/cgroup` names the group or one below it.
    fn contains(&self, membership: &str) -> bool {
        membership.lines().any(|line| {
            line.strip_prefix("0::")
                .and_then(|path| path.strip_prefix(self.name.as_str()))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    fn read(&self, file: &str) -> String {
        read(&self.directory.join(file))
    }
}

/// The text of a file, as much of it as is reasonable; nothing for one that is not there.
fn read(path: &Path) -> String {
    let mut text = String::new();
    // What was read before an error counts.
    if let Ok(file) = fs::File::open(path) {
        let _ = file.take(MAX_FILE).read_to_string(&mut text);
    }
    text
}

/// The number behind `key` in lines of key and number.
fn field(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, number)| number.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(events, "oom_kill"), 2);
        assert_eq!(field(events, "oom_"), 0);
        assert_eq!(field("", "oom_kill"), 0);
        assert_eq!(
            kib_line("VmHWM:\t 9 kB\nVmRSS:\t    12 kB\n", "VmRSS:"),
            12288
        );
        assert_eq!(kib_line("", "VmRSS:"), 0);
    }

    #[test]
    fn membership_is_by_whole_names() {
        let group = Group::of("web");
        for (line, member) in [
            ("0::/pericarp/web\n", true),
            ("0::/pericarp/web/below\n", true),
            ("0::/pericarp/web-2\n", false),
            ("0::/pericarp\n", false),
            ("1:name=x:/pericarp/web\n", false),
        ] {
            assert_eq!(group.contains(line), member, "{line}");
        }
    }
}
