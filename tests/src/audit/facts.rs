//! One process as `/proc` shows it. Nothing is judged here. What all threads have alike is
//! read of each: the loosest counts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// The kinds of namespaces that are looked at.
const NAMESPACES: [&str; 7] = ["mnt", "net", "ipc", "uts", "cgroup", "user", "pid"];
/// `O_PATH` in the octal flags of fdinfo.
const PATH_ONLY: u32 = 0o10_000_000;

/// A process's root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// A read-only file system without a file.
    Empty,
    /// The same with this many numbered directories, each a mount of its own.
    Trees(usize),
    /// Something else, with so many entries.
    Other(usize),
}

/// What the kernel says of a process.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Effective user.
    pub user: u32,
    /// How many there are.
    pub threads: usize,
    /// In the effective, permitted or bounding set of any thread.
    pub capabilities: u64,
    /// In the inheritable or ambient set of any.
    pub passed_on: u64,
    /// Every thread can gain nothing by executing.
    pub no_new_privileges: bool,
    /// Every thread has a filter for system calls.
    pub filtered: bool,
    /// The fewest and the most filters that a thread has.
    pub filters: (u32, u32),
    /// Namespaces that neither the first process nor the pod's own is in.
    pub namespaces: BTreeSet<&'static str>,
    /// Its root directory.
    pub root: Root,
    /// How many mounts it has in its namespace.
    pub mounts: usize,
    /// How many descriptors of each kind.
    pub descriptors: BTreeMap<&'static str, usize>,
    /// Files, directories and devices among them, with what they are open for.
    pub files: Vec<String>,
    /// No core file is written, whatever happens.
    pub no_core: bool,
    /// A process of the same rights may look into it; unknown where it has rights that a
    /// look without CAP_SYS_PTRACE has not.
    pub dumpable: Option<bool>,
    /// Its limit of open files.
    pub open_files: String,
    /// Its control group, of version 2 or else of the first hierarchy.
    pub cgroup: String,
}

/// The namespaces of a process, in the order of [`NAMESPACES`].
pub(super) fn namespaces(pid: i32) -> io::Result<Vec<u64>> {
    let number = |name: &&str| {
        let namespace = fs::metadata(format!("/proc/{pid}/ns/{name}"))?;
        Ok(namespace.ino())
    };
    NAMESPACES.iter().map(number).collect()
}

impl Facts {
    /// Reads them; `known` are namespaces that are not its own.
    ///
    /// # Errors
    /// The process has ended, or is not ours to look at.
    pub(super) fn of(pid: i32, known: &[Vec<u64>]) -> io::Result<Self> {
        let mut facts = Self {
            user: 0,
            threads: 0,
            capabilities: 0,
            passed_on: 0,
            no_new_privileges: true,
            filtered: true,
            filters: (u32::MAX, 0),
            namespaces: BTreeSet::new(),
            root: Root::Other(0),
            mounts: 0,
            descriptors: BTreeMap::new(),
            files: Vec::new(),
            no_core: false,
            dumpable: None,
            open_files: String::new(),
            cgroup: String::new(),
        };
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            match fs::read_to_string(task?.path().join("status")) {
                Ok(status) => facts.add_thread(&status)?,
                Err(error) if super::gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let own = namespaces(pid)?;
        for (index, name) in NAMESPACES.into_iter().enumerate() {
            if known.iter().all(|known| known[index] != own[index]) {
                facts.namespaces.insert(name);
            }
        }
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        facts.mounts = mounts.lines().count();
        let names: io::Result<Vec<_>> = fs::read_dir(format!("/proc/{pid}/root/"))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect();
        facts.root = root(&mounts, &names?);
        facts.add_descriptors(pid)?;
        let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
        facts.no_core = limit(&limits, "Max core file size") == Some("0");
        facts.open_files = limit(&limits, "Max open files").unwrap_or("?").to_owned();
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        facts.cgroup = group(&groups);
        facts.dumpable = dumpable(pid, facts.capabilities, facts.user)?;
        Ok(facts)
    }

    /// Takes in what one thread's status says.
    fn add_thread(&mut self, status: &str) -> io::Result<()> {
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name));
            let value = value.and_then(|value| value.strip_prefix(':'));
            let value = value.map(str::trim);
            value.ok_or_else(|| io::Error::other(format!("no {name} in a thread's status")))
        };
        let set = |name: &str| u64::from_str_radix(field(name)?, 16).map_err(io::Error::other);
        let number = |name: &str| field(name)?.parse::<u32>().map_err(io::Error::other);
        self.threads += 1;
        let users = field("Uid")?.split_whitespace().nth(1);
        self.user = users.and_then(|user| user.parse().ok()).unwrap_or(u32::MAX);
        self.capabilities |= set("CapEff")? | set("CapPrm")? | set("CapBnd")?;
        self.passed_on |= set("CapInh")? | set("CapAmb")?;
        self.no_new_privileges &= number("NoNewPrivs")? == 1;
        self.filtered &= number("Seccomp")? == 2;
        // Linux before 5.9 does not count them.
        let filters = number("Seccomp_filters").unwrap_or(0);
        self.filters = (self.filters.0.min(filters), self.filters.1.max(filters));
        Ok(())
    }

    fn add_descriptors(&mut self, pid: i32) -> io::Result<()> {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            let number = path.file_name().unwrap_or_default().to_string_lossy();
            let read = || {
                let target = fs::read_link(&path)?.to_string_lossy().into_owned();
                let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
                Ok::<_, io::Error>((target, info))
            };
            // One that was closed meanwhile is none.
            let Ok((target, info)) = read() else {
                continue;
            };
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
            let flags = flags.unwrap_or_default();
            let kind = kind(&target, flags, &path);
            *self.descriptors.entry(kind).or_default() += 1;
            if matches!(kind, "file" | "directory" | "path" | "device" | "disk") {
                let access = match flags & 3 {
                    _ if flags & PATH_ONLY != 0 => "path",
                    0 => "r",
                    _ => "rw",
                };
                self.files.push(format!("{target} ({access})"));
            }
        }
        self.files.sort();
        Ok(())
    }
}

/// The kind of an open file, in the words of the table in `SECURITY.md`.
fn kind(target: &str, flags: u32, path: &Path) -> &'static str {
    let anonymous = target
        .strip_prefix("anon_inode:")
        .map(|name| name.trim_matches(['[', ']']));
    match anonymous {
        Some("eventfd") => return "eventfd",
        Some("eventpoll") => return "epoll",
        Some("io_uring") => return "ring",
        Some("timerfd") => return "timer",
        Some("signalfd") => return "signals",
        Some("pidfd") => return "process",
        Some(name) if name.starts_with("kvm-") => return "kvm",
        Some(_) => return "other",
        None => {}
    }
    match target {
        "/dev/kvm" => return "kvm",
        "/dev/null" => return "null",
        "/dev/net/tun" => return "tap",
        "/dev/ptmx" | "/dev/tty" => return "terminal",
        _ => {}
    }
    for (prefix, kind) in [
        ("socket:", "socket"),
        ("pipe:", "pipe"),
        ("pidfd:", "process"),
        ("/memfd:", "memory"),
        ("/dev/pts/", "terminal"),
        ("net:", "namespace"),
        ("mnt:", "namespace"),
    ] {
        if target.starts_with(prefix) {
            return kind;
        }
    }
    if flags & PATH_ONLY != 0 {
        return "path";
    }
    let Ok(found) = fs::metadata(path).map(|found| found.file_type()) else {
        return "other";
    };
    match () {
        () if found.is_dir() => "directory",
        () if found.is_file() => "file",
        () if found.is_block_device() => "disk",
        () if found.is_fifo() => "pipe",
        () if found.is_socket() => "socket",
        () => "device",
    }
}

/// What a root directory is, from the mounts and its names.
fn root(mounts: &str, names: &[String]) -> Root {
    let mut at_root = mounts.lines().filter_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(4);
        let (point, options) = (fields.next()?, fields.next()?);
        (point == "/").then(|| {
            (
                options.split(',').any(|o| o == "ro"),
                kind.starts_with("tmpfs "),
            )
        })
    });
    let fixed = at_root.next() == Some((true, true)) && at_root.next().is_none();
    let numbers = names.iter().all(|name| name.parse::<usize>().is_ok());
    match (fixed, names.len()) {
        (true, 0) => Root::Empty,
        (true, count) if numbers => Root::Trees(count),
        (_, count) => Root::Other(count),
    }
}

/// The hard limit of this name.
fn limit<'a>(limits: &'a str, name: &str) -> Option<&'a str> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().nth(1)
}

fn group(groups: &str) -> String {
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::"));
    // A hybrid system has the limits in the others.
    let other = groups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .find(|path| *path != "/");
    let unified = unified.filter(|path| *path != "/");
    unified.or(other).unwrap_or("/").to_owned()
}

/// Whether a thread of this user without CAP_SYS_PTRACE may look into the process: the
/// kernel lets it, unless the process cannot be dumped or has rights that it has not.
fn dumpable(pid: i32, rights: u64, user: u32) -> io::Result<Option<bool>> {
    let may_not = CapabilitySet::SYS_PTRACE;
    let mut sets = capabilities(None)?;
    let less = sets.permitted - may_not;
    if rights & !less.bits() != 0 || user != rustix::process::geteuid().as_raw() {
        return Ok(None);
    }
    sets.effective -= may_not;
    sets.permitted = less;
    sets.inheritable = CapabilitySet::empty();
    // Capabilities are a thread's own.
    let looked = std::thread::spawn(move || {
        set_capabilities(None, sets)?;
        match fs::read_link(format!("/proc/{pid}/ns/mnt")) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(false),
            Err(error) => Err(error),
        }
    });
    let looked = looked
        .join()
        .map_err(|_| io::Error::other("a look failed"))?;
    looked.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_empty_only_where_nothing_is_in_it() {
        let line = |point: &str, options: &str, kind: &str| {
            format!("36 35 0:40 / {point} {options} - {kind} {kind} rw\n")
        };
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let own = line("/", "ro,nosuid", "tmpfs");
        assert_eq!(root(&own, &[]), Root::Empty);
        assert_eq!(root(&own, &names(&["0", "1"])), Root::Trees(2));
        assert_eq!(root(&own, &names(&["etc"])), Root::Other(1));
        let below = own.clone() + &line("/0", "rw", "ext4");
        assert_eq!(root(&below, &names(&["0"])), Root::Trees(1));
        assert_eq!(root(&line("/", "rw", "tmpfs"), &[]), Root::Other(0));
        assert_eq!(root(&line("/", "ro", "ext4"), &[]), Root::Other(0));
        assert_eq!(root(&(own.clone() + &own), &[]), Root::Other(0));
    }

    #[test]
    fn what_is_read_of_ourselves_is_true() {
        let pid = std::process::id().cast_signed();
        let own = namespaces(pid).unwrap();
        let held = fs::File::open("/dev/null").unwrap();
        let facts = Facts::of(pid, &[own]).unwrap();
        drop(held);
        assert!(facts.namespaces.is_empty());
        assert!(matches!(facts.root, Root::Other(2..)));
        assert_eq!(facts.user, rustix::process::geteuid().as_raw());
        assert!(facts.descriptors["null"] > 0);
        assert_ne!(facts.dumpable, Some(false));
    }

    #[test]
    fn limits_and_groups_are_found() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max core file size        0                    unlimited            bytes\n";
        assert_eq!(limit(limits, "Max core file size"), Some("unlimited"));
        assert_eq!(limit(limits, "Max cpu time"), None);
        assert_eq!(group("0::/pod\n"), "/pod");
        assert_eq!(group("4:memory:/pod\n0::/\n"), "/pod");
        assert_eq!(group("0::/\n"), "/");
    }
}
