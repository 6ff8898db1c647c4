//! What processes of a pod hold of the host, seen from outside: memory without their guest's, open
//! files, threads, and the control groups that each thread is charged to. Called by `endure` and by
//! tests of resources.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use crate::peer::Footprint;

/// Between two looks of a [`Watch`].
const LOOK: Duration = Duration::from_millis(5);

/// What a process holds at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Its proportional set size without its guest's memory, KiB.
    pub pss_kib: u64,
    /// Private memory, KiB.
    pub anon_kib: u64,
    /// Open descriptors.
    pub fds: u64,
    /// Threads of its own.
    pub threads: u64,
    /// Threads that the kernel has for its rings.
    pub workers: u64,
}

impl Usage {
    /// That of a process; `None` when it is gone.
    pub fn of(pid: i32) -> Option<Self> {
        let footprint = Footprint::of(pid)?;
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
        let threads = threads(pid).ok()?;
        let workers = threads.iter().filter(|one| one.is_worker()).count();
        Some(Self {
            pss_kib: proportional_kib(&maps),
            anon_kib: footprint.anon_kib,
            fds: footprint.fds as u64,
            threads: (threads.len() - workers) as u64,
            workers: workers as u64,
        })
    }
}

/// What a process holds while a guest floods it, looked at all the time.
#[derive(Debug)]
pub struct Watch {
    pid: i32,
    before: Usage,
    end: Sender<()>,
    looks: JoinHandle<u64>,
}

impl Watch {
    /// Begins to look.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn begin(pid: i32) -> Self {
        let before = Usage::of(pid).expect("a process that runs");
        let (end, ended) = channel();
        let looks = spawn(move || {
            let mut most = 0_u64;
            while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                let Some(now) = Footprint::of(pid) else { break };
                most = most.max(now.anon_kib);
            }
            most
        });
        Self {
            pid,
            before,
            end,
            looks,
        }
    }

    /// Ends while the flood still stands. The private memory that was held at most, and the set size
    /// as it is now, may be no more than this above what they were; all are printed.
    ///
    /// # Panics
    /// When they are, or the process is gone.
    pub fn end(self, flood: &str, bound_kib: u64) {
        // Not looked at before: while maps change some are listed twice.
        let now = Usage::of(self.pid).expect("a process that still runs");
        drop(self.end);
        let most = self.looks.join().expect("a look at it").max(now.anon_kib);
        let before = self.before;
        println!(
            "{flood}: private {} KiB before, {most} at most; PSS {} KiB before, {} now; {bound_kib} more \
             are allowed",
            before.anon_kib, before.pss_kib, now.pss_kib
        );
        let private = most.saturating_sub(before.anon_kib);
        let pss = now.pss_kib.saturating_sub(before.pss_kib);
        assert!(
            private <= bound_kib && pss <= bound_kib,
            "{flood}: {private} KiB of private memory and {pss} of PSS more"
        );
    }
}

/// The proportional set size of a process's maps, without those of its guest's memory.
pub fn proportional_kib(maps: &str) -> u64 {
    let (mut guests, mut kib) = (false, 0);
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let first = fields.next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            // QEMU's, and our monitor's.
            guests = line.contains("memfd:memory-backend") || line.contains("memfd:guest");
        } else if first == "Pss:" && !guests {
            let size = fields.next().and_then(|size| size.parse::<u64>().ok());
            kib += size.unwrap_or(0);
        }
    }
    kib
}

/// A thread, and what it is charged to.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Its id.
    pub id: i32,
    /// Its name.
    pub name: String,
    /// Its control groups, as the kernel lists them.
    pub groups: String,
}

impl Thread {
    /// Whether the kernel made it, for a ring.
    pub fn is_worker(&self) -> bool {
        self.name.starts_with("iou-wrk-") || self.name.starts_with("iou-sqp-")
    }
}

/// All threads of a process. One that ends meanwhile is left out.
///
/// # Errors
/// The process is gone.
pub fn threads(pid: i32) -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let id = path.file_name().unwrap_or_default().to_string_lossy();
        let read = |name: &str| fs::read_to_string(path.join(name));
        if let (Ok(id), Ok(name), Ok(groups)) = (id.parse(), read("comm"), read("cgroup")) {
            threads.push(Thread {
                id,
                name: name.trim().to_owned(),
                groups,
            });
        }
    }
    Ok(threads)
}

/// Controllers that a pod is held to.
pub const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// Those of [`CONTROLLERS`] by which a thread with these control groups is charged to another group
/// than this one, which is named from the top. Where version 1 has no hierarchy of a controller it is
/// that of version 2 which counts.
pub fn astray(groups: &str, group: &str) -> Vec<String> {
    let group = group.trim_start_matches('/');
    let mut unified = None;
    let mut of = std::collections::BTreeMap::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(place)) = (parts.next(), parts.next()) else {
            continue;
        };
        if controllers.is_empty() {
            unified = Some(place);
        }
        for controller in controllers.split(',') {
            of.insert(controller, place);
        }
    }
    let known: BTreeSet<&str> = CONTROLLERS.into_iter().collect();
    let wrong = known.into_iter().filter_map(|controller| {
        let place = of.get(controller).copied().or(unified);
        let place = place.unwrap_or("no group");
        (place.trim_start_matches('/') != group).then(|| format!("{controller} is {place}'s"))
    });
    wrong.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_not_counted() {
        let maps = "7f00-7f01 rw-s 00000000 00:01 5 /memfd:guest (deleted)\nPss: 4096 kB\n\
                    7f02-7f03 rw-p 00000000 00:00 0\nSize: 9 kB\nPss: 5 kB\nPss_Dirty: 5 kB\n";
        assert_eq!(proportional_kib(maps), 5);
    }

    #[test]
    fn we_have_threads_and_hold_something() {
        let pid = std::process::id().cast_signed();
        let usage = Usage::of(pid).unwrap();
        assert!(usage.threads >= 1 && usage.anon_kib > 0 && usage.pss_kib > 0);
        assert!(threads(pid).unwrap().iter().any(|one| one.id == pid));
        assert_eq!(Usage::of(i32::MAX), None);
    }

    #[test]
    fn a_thread_elsewhere_is_found_in_each_version() {
        let one = "8:pids:/a/pod\n4:memory:/a/pod\n2:cpu,cpuacct:/a/pod\n1:name=systemd:/\n";
        assert_eq!(astray(one, "/a/pod"), Vec::<String>::new());
        let two = "0::/a/pod\n";
        assert_eq!(astray(two, "a/pod"), Vec::<String>::new());
        assert_eq!(astray(two, "a/other").len(), 3);
        // Both: what version 1 has is not version 2's.
        let both = format!("{one}0::/\n");
        assert_eq!(astray(&both, "/a/pod"), Vec::<String>::new());
        let part = "4:memory:/a/pod\n0::/\n";
        assert_eq!(astray(part, "/a/pod"), ["cpu is /'s", "pids is /'s"]);
        let out = one.replace("memory:/a/pod", "memory:/a");
        assert_eq!(astray(&out, "/a/pod"), ["memory is /a's"]);
        assert_eq!(astray("", "/a").len(), 3);
    }
}
