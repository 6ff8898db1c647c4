//! What a process of a pod's has cost its host so far, as the kernel says it in `/proc`.
//!
//! Called by `observe`. Guest memory is the guest's and is never counted as its process's: it is the
//! one file that the machine's process has under a name that is known (QEMU's, and that of our
//! monitor). A file of that name which others have made is theirs.

use std::{
    collections::HashMap,
    fs,
    io::BufReader,
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::fs::{major, minor};

/// How the machine's process calls guest memory.
const GUESTS: [&str; 2] = ["memfd:memory-backend", "memfd:guest"];
/// For how long a proportional size is good that was [`Kept`].
const GOOD: Duration = Duration::from_secs(60);
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

/// A file, by device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct File {
    major: u32,
    minor: u32,
    inode: u64,
}

/// What is the guest's in the memory of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guests {
    /// Nobody knows: the machine's process is not there, or may not be looked at.
    Unknown,
    /// Nothing: it has no such file yet. Nor has it where there are several, one of which may be a
    /// sidecar's that wants to hide what it takes: then too much is counted.
    Nothing,
    File(File),
}

/// Proportional sizes of processes, so that the kernel does not have to go through all of their
/// memory each time that somebody asks.
#[derive(Debug, Default)]
pub(crate) struct Kept(HashMap<Key, (Instant, u64)>);

/// A process by its number and its start, in ticks; and what was left out.
type Key = (u32, u64, Option<(u32, u32, u64)>);

impl Kept {
    /// What is kept, or else what `walk` finds.
    fn get(&mut self, key: Key, now: Instant, walk: impl FnOnce() -> Option<u64>) -> Option<u64> {
        // Those that have ended go this way, too.
        self.0
            .retain(|_, (at, _)| now.saturating_duration_since(*at) < GOOD);
        if let Some((_, bytes)) = self.0.get(&key) {
            return Some(*bytes);
        }
        let bytes = walk()?;
        self.0.insert(key, (now, bytes));
        Some(bytes)
    }
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
/// another one may have its number. The proportional size only with a place to keep it, and without
/// what is the guest's.
pub(super) fn cost(pid: u32, parent: u32, guests: Guests, kept: Option<&mut Kept>) -> Option<Cost> {
    let stat = stat(pid, parent)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let proportional = |kept: &mut Kept| {
        let guests = match guests {
            Guests::Unknown => return None,
            Guests::Nothing => None,
            Guests::File(file) => Some(file),
        };
        let inode = guests.map(|file| (file.major, file.minor, file.inode));
        kept.get((pid, stat.start, inode), Instant::now(), || {
            let maps = fs::File::open(format!("/proc/{pid}/smaps")).ok()?;
            proportional_bytes(BufReader::new(maps), guests)
        })
    };
    Some(Cost {
        cpu: stat.cpu,
        resident: resident_bytes(&status),
        proportional: kept.and_then(proportional),
    })
}

/// The guest of a machine's process, which is `parent`'s child, and what of other processes' memory is
/// its; none where it is gone.
pub(super) fn guest(pid: u32, parent: u32) -> Option<(Guest, Guests)> {
    stat(pid, parent)?;
    let (guests, resident) = memory_given(pid);
    let cpu = threads_of_cpus(pid);
    Some((Guest { cpu, resident }, guests))
}

/// What `/proc/PID/stat` says.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    cpu: Duration,
    /// Ticks since the host's boot.
    start: u64,
}

/// That of a process which is `parent` or its child.
fn stat(pid: u32, parent: u32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat_of(&stat).filter(|stat| pid == parent || stat.parent == parent)
}

fn stat_of(line: &str) -> Option<Stat> {
    // The name may have spaces and brackets in it.
    let (_, rest) = line.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // proc(5): state is the third field, utime the 14th, stime the 15th, starttime the 22nd.
    let number = |index: usize| fields.get(index - 3)?.parse::<u64>().ok();
    let ticks = number(14)?.saturating_add(number(15)?);
    let each = rustix::param::clock_ticks_per_second();
    Some(Stat {
        parent: u32::try_from(number(4)?).ok()?,
        cpu: Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / each.max(1))),
        start: number(22)?,
    })
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

/// The sum of proportional set sizes in `/proc/PID/smaps`, without those of the guest's memory.
fn proportional_bytes(maps: impl std::io::BufRead, guests: Option<File>) -> Option<u64> {
    let (mut is_guests, mut kib) = (false, 0_u64);
    for line in maps.split(b'\n') {
        let line = line.ok()?;
        let line = String::from_utf8_lossy(&line);
        let first = line.split_whitespace().next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            is_guests = guests.is_some() && mapped(&line) == guests;
        } else if first == "Pss:" && !is_guests {
            let more = line.split_whitespace().nth(1)?.parse().ok()?;
            kib = kib.saturating_add(more);
        }
    }
    Some(kib << 10)
}

/// The file of a line of `/proc/PID/maps`: after addresses, rights and offset.
fn mapped(line: &str) -> Option<File> {
    let mut fields = line.split_whitespace().skip(3);
    let (major, minor) = fields.next()?.split_once(':')?;
    let hex = |text| u32::from_str_radix(text, 16).ok();
    Some(File {
        major: hex(major)?,
        minor: hex(minor)?,
        inode: fields.next()?.parse().ok()?,
    })
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

/// The memory that the machine's process has open as its guest's, and what the host has given of it.
fn memory_given(pid: u32) -> (Guests, Option<u64>) {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return (Guests::Unknown, None);
    };
    let mut found: Vec<(u64, u64, u64)> = open
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let name = fs::read_link(&path).ok()?;
            let name = name.to_string_lossy();
            GUESTS.iter().find(|guests| name.contains(**guests))?;
            let there = fs::metadata(&path).ok()?;
            Some((there.dev(), there.ino(), there.blocks().saturating_mul(512)))
        })
        .collect();
    // It may be open twice.
    found.sort_unstable();
    found.dedup_by_key(|(device, inode, _)| (*device, *inode));
    let [(device, inode, bytes)] = found[..] else {
        return (Guests::Nothing, None);
    };
    let file = File {
        major: major(device),
        minor: minor(device),
        inode,
    };
    (Guests::File(file), Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_be_anything() {
        let line = "42 (a) b (c) S 7 42 42 0 -1 0 1 2 3 4 150 50 0 0 20 0 1 0 99 0 0";
        let each = rustix::param::clock_ticks_per_second();
        let want = Stat {
            parent: 7,
            cpu: Duration::from_nanos(200 * (1_000_000_000 / each)),
            start: 99,
        };
        assert_eq!(stat_of(line), Some(want));
        assert_eq!(stat_of("42 (x) S 7"), None);
        assert_eq!(stat_of(""), None);
    }

    #[test]
    fn guest_memory_is_not_its_process_own() {
        let maps = "7f00-7f10 rw-s 00000000 00:01 5  /memfd:guest (deleted)\n\
                    Rss:  900 kB\nPss:   500 kB\n\
                    5500-5600 r-xp 00000000 08:01 7  /usr/bin/x\n\
                    Pss:   12 kB\nPss_Dirty: 7 kB\n\
                    7f20-7f30 rw-s 0 00:1a 5  /memfd:guest (deleted)\nPss: 9 kB\n\
                    7f40-7f50 rw-p 0 00:00 0 \nPss: 3 kB\n";
        let of = |guests| proportional_bytes(maps.as_bytes(), guests);
        let file = |major, minor, inode| {
            Some(File {
                major,
                minor,
                inode,
            })
        };
        // Whatever others call so is their own.
        assert_eq!(of(file(0, 1, 5)), Some(24 << 10));
        assert_eq!(of(file(0, 26, 5)), Some(515 << 10));
        assert_eq!(of(file(0, 1, 6)), Some(524 << 10));
        assert_eq!(of(None), Some(524 << 10));
        assert_eq!(
            resident_bytes("RssAnon:\t 4 kB\nRssFile:\t  8 kB\nRssShmem:\t 1 kB\n"),
            12 << 10
        );
    }

    #[test]
    fn our_own_process_is_seen_and_a_strangers_is_not() {
        let own = std::process::id();
        let mut kept = Kept::default();
        let seen = cost(own, own, Guests::Nothing, Some(&mut kept)).unwrap();
        assert!(seen.resident > 1 << 16, "{seen:?}");
        assert!(seen.proportional.is_some_and(|bytes| bytes > 1 << 16));
        let seen = cost(own, own, Guests::Unknown, Some(&mut kept)).unwrap();
        assert_eq!(seen.proportional, None);
        assert_eq!(cost(1, u32::MAX, Guests::Nothing, None), None);
        assert_eq!(guest(1, u32::MAX), None);
    }

    #[test]
    fn a_size_is_good_for_a_minute_and_one_process() {
        let mut kept = Kept::default();
        let now = Instant::now();
        let key = (7, 99, None);
        assert_eq!(kept.get(key, now, || None), None);
        assert_eq!(kept.get(key, now, || Some(1)), Some(1));
        assert_eq!(kept.get(key, now + GOOD / 2, || Some(2)), Some(1));
        assert_eq!(kept.get((7, 100, None), now, || Some(3)), Some(3));
        assert_eq!(kept.get((7, 99, Some((0, 1, 5))), now, || Some(4)), Some(4));
        assert_eq!(kept.get(key, now + GOOD, || Some(5)), Some(5));
        assert_eq!(kept.0.len(), 1);
    }

    #[test]
    fn guest_memory_is_one_file_of_the_machines_own() {
        let own = std::process::id();
        let make = |name: &str| {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            fs::File::from(rustix::fs::memfd_create(name, flags).unwrap())
        };
        // Tests of one process are threads of it; no other makes files of this name.
        assert_eq!(memory_given(own), (Guests::Nothing, None));
        let first = make("guest");
        first.set_len(1 << 20).unwrap();
        let again = first.try_clone().unwrap();
        let (guests, resident) = memory_given(own);
        assert!(matches!(guests, Guests::File(_)) && resident == Some(0));
        drop(again);
        let second = make("guest");
        assert_eq!(memory_given(own), (Guests::Nothing, None));
        drop((first, second));
        assert_eq!(memory_given(u32::MAX), (Guests::Unknown, None));
    }
}
