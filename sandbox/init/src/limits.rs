//! Holds the command to its own CPU and memory limits with a cgroup.
//!
//! The machine is larger than the limits (see `sizing` in `pericarp`), so that the guest's kernel
//! has room of its own; this is what the command itself may use. The group exists in every run,
//! with or without limits.

use std::{fs, io, path::Path};

use pericarp_protocol::Limits;

use crate::error::{InitError, during};

const ROOT: &str = "/sys/fs/cgroup";
const GROUP: &str = "/sys/fs/cgroup/pericarp";
/// Microseconds over which a CPU limit is reckoned: the kernel's default.
const PERIOD_US: u64 = 100_000;

/// The cgroup of the command and all it starts.
pub(crate) struct Group;

impl Group {
    pub(crate) fn create(limits: Limits) -> Result<Self, InitError> {
        write(ROOT, "cgroup.subtree_control", "+cpu +memory +pids")?;
        fs::create_dir(GROUP).map_err(during(GROUP))?;
        for (file, value) in settings(limits) {
            write(GROUP, file, &value)?;
        }
        Ok(Self)
    }

    /// Runs `start` with this process inside the group, so that what it starts begins there.
    pub(crate) fn within<T>(&self, start: impl FnOnce() -> T) -> Result<T, InitError> {
        write(GROUP, "cgroup.procs", "0")?;
        let started = start();
        write(ROOT, "cgroup.procs", "0")?;
        Ok(started)
    }

    /// Whether the kernel has killed something in the group for want of memory.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        let path = Path::new(GROUP).join("memory.events");
        fs::read_to_string(path).is_ok_and(|events| oom_kills(&events) > 0)
    }
}

fn settings(limits: Limits) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    if let Some(milli) = limits.milli_cpus {
        let quota = u64::from(milli) * PERIOD_US / 1000;
        settings.push(("cpu.max", format!("{quota} {PERIOD_US}")));
    }
    if let Some(bytes) = limits.memory {
        settings.push(("memory.max", bytes.to_string()));
        // Half a command is of no use: it ends as a whole, as a container does.
        settings.push(("memory.oom.group", "1".to_owned()));
    }
    settings
}

fn oom_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

fn write(directory: &str, file: &str, value: &str) -> Result<(), InitError> {
    let path = Path::new(directory).join(file);
    let written: io::Result<()> = fs::write(&path, value);
    written.map_err(during(format!("writing '{value}' to {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_of_a_cpu_become_a_quota() {
        let limits = Limits {
            milli_cpus: Some(500),
            memory: Some(64 << 20),
        };
        assert_eq!(
            settings(limits),
            [
                ("cpu.max", "50000 100000".to_owned()),
                ("memory.max", "67108864".to_owned()),
                ("memory.oom.group", "1".to_owned()),
            ]
        );
        assert_eq!(settings(Limits::default()), []);
    }

    #[test]
    fn kills_for_want_of_memory_are_counted() {
        assert_eq!(oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(oom_kills("low 0\noom 3\noom_kill 0\n"), 0);
    }
}
