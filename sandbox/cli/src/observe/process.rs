//! What a process of a pod's has cost its host so far, as the kernel says it in `/proc`.
//!
//! Called by `observe`. Guest memory is the guest's and is never counted as its process's: it is
//! shared memory of a name that is known (QEMU's, and that of our monitor).

use std::{fs, io::BufReader, path::PathBuf, time::Duration};

/// How guest memory is called in the tables of processes.
const GUESTS: [&str; 2] = ["memfd:memory-backend", "memfd:guest"];
/// How the threads that are the guest's CPUs begin: our monitor's, and QEMU's.
const CPUS: [&str; 3] = ["cpu-", "CPU ", "ALL CPUs"];

/// What is seen of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    /// CPU time of all its threads, and of those that have ended.
    pub(crate) cpu: Duration,
    /// Bytes of its own that are in memory, and of files; without any shared memory.
    pub(crate) resident: u64,
    /// Its share of all it has in memory, bytes, without guest memory. None where it was not asked
    /// for, or may not be known.
    pub(crate) proportional: Option<u64>,
}

/// What is seen of a guest in the machine's process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Guest {
    /// CPU time of its virtual CPUs.
    pub(crate) cpu: Duration,
    /// Bytes of its memory that the host has given it; none where that may not be known.
    pub(crate) resident: Option<u64>,
}

/// The cost of a process that is `parent`'s child, or `parent` itself; none where it is gone, and
/// another one may have its number.
pub(super) fn cost(pid: u32, parent: u32, exact: bool) -> Option<Cost> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (child_of, cpu) = stat_of(&stat)?;
    if pid != parent && child_of != parent {
        return None;
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let proportional = || {
        let maps = fs::File::open(format!("/proc/{pid}/smaps")).ok()?;
        proportional_bytes(BufReader::new(maps))
    };
    Some(Cost {
        cpu,
        resident: resident_bytes(&status),
        proportional: exact.then(proportional).flatten(),
    })
}

/// The guest of a machine's process.
pub(super) fn guest(pid: u32) -> Guest {
    Guest {
        cpu: threads_of_cpus(pid),
        resident: memory_given(pid),
    }
}

/// The parent and the CPU time of a line of `/proc/PID/stat`.
fn stat_of(line: &str) -> Option<(u32, Duration)> {
    // The name may have spaces and brackets in it.
    let (_, rest) = line.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // proc(5): state is the third field, utime the 14th, stime the 15th.
    let number = |index: usize| fields.get(index - 3)?.parse::<u64>().ok();
    let ticks = number(14)? + number(15)?;
    let each = rustix::param::clock_ticks_per_second();
    let cpu = Duration::from_nanos(ticks * (1_000_000_000 / each.max(1)));
    Some((u32::try_from(number(4)?).ok()?, cpu))
}

/// RssAnon and RssFile of `/proc/PID/status`.
fn resident_bytes(status: &str) -> u64 {
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        number.unwrap_or(0)
    };
    (kib("RssAnon:") + kib("RssFile:")) << 10
}

/// The sum of proportional set sizes in `/proc/PID/smaps`, without those of guests.
fn proportional_bytes(maps: impl std::io::BufRead) -> Option<u64> {
    let (mut guests, mut kib) = (false, 0);
    for line in maps.split(b'\n') {
        let line = line.ok()?;
        let line = String::from_utf8_lossy(&line);
        let first = line.split_whitespace().next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            guests = GUESTS.iter().any(|name| line.contains(name));
        } else if first == "Pss:" && !guests {
            kib += line.split_whitespace().nth(1)?.parse::<u64>().ok()?;
        }
    }
    Some(kib << 10)
}

fn threads_of_cpus(pid: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let of_thread = |task: PathBuf| -> Option<u64> {
        let name = fs::read_to_string(task.join("comm")).ok()?;
        if !CPUS.iter().any(|begin| name.starts_with(begin)) {
            return None;
        }
        // Nanoseconds on a CPU come first.
        let text = fs::read_to_string(task.join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    let all = tasks.into_iter().flatten().flatten();
    let ns = all.filter_map(|task| of_thread(task.path())).sum();
    Duration::from_nanos(ns)
}

/// What the host has of the memory that the process has open as its guest's.
fn memory_given(pid: u32) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut found: Vec<(u64, u64)> = open
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let name = fs::read_link(&path).ok()?;
            let name = name.to_string_lossy().into_owned();
            let is_guests = GUESTS.iter().any(|guests| name.contains(guests));
            let there = is_guests.then(|| fs::metadata(&path)).transpose().ok()??;
            Some((there.ino(), there.blocks() * 512))
        })
        .collect();
    // It may be open twice.
    found.sort_unstable();
    found.dedup_by_key(|(inode, _)| *inode);
    (!found.is_empty()).then(|| found.iter().map(|(_, bytes)| bytes).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_be_anything() {
        let line = "42 (a) b (c) S 7 42 42 0 -1 0 1 2 3 4 150 50 0 0 20 0 1 0 99 0 0";
        let each = rustix::param::clock_ticks_per_second();
        let want = Duration::from_nanos(200 * (1_000_000_000 / each));
        assert_eq!(stat_of(line), Some((7, want)));
        assert_eq!(stat_of("42 (x) S 7"), None);
        assert_eq!(stat_of(""), None);
    }

    #[test]
    fn guest_memory_is_not_its_process_own() {
        let maps = "7f00-7f10 rw-s 00000000 00:01 5  /memfd:guest (deleted)\n\
                    Rss:  900 kB\nPss:   500 kB\n\
                    5500-5600 r-xp 00000000 08:01 7  /usr/bin/x\n\
                    Pss:   12 kB\nPss_Dirty: 7 kB\n\
                    7f20-7f30 rw-s 0 00:01 6  /memfd:memory-backend-memfd (deleted)\nPss: 9 kB\n\
                    7f40-7f50 rw-p 0 00:00 0 \nPss: 3 kB\n";
        assert_eq!(proportional_bytes(maps.as_bytes()), Some(15 << 10));
        assert_eq!(
            resident_bytes("RssAnon:\t 4 kB\nRssFile:\t  8 kB\nRssShmem:\t 1 kB\n"),
            12 << 10
        );
    }

    #[test]
    fn our_own_process_is_seen_and_a_strangers_is_not() {
        let own = std::process::id();
        let cost = cost(own, own, true).unwrap();
        assert!(cost.resident > 1 << 16, "{cost:?}");
        assert!(cost.proportional.is_some_and(|bytes| bytes > 1 << 16));
        assert_eq!(super::cost(1, u32::MAX, false), None);
    }
}
