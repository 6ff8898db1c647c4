//! CPU time of a backend and of a guest, seen from outside.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::Outcome;

/// How often a watch looks whether the job begins or ends.
const LOOK: Duration = Duration::from_millis(5);
/// How many looks lie between two at a guest's processes. What a process did
/// after the last of them, before it ended, is not seen; each costs a
/// millisecond of CPU, because it goes through all processes there are.
const LOOKS: u32 = 20;

/// The threads of a process, each with its CPU time in nanoseconds.
fn threads(pid: i32) -> Outcome<Vec<(PathBuf, u64)>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        // A thread may end between the listing and the look.
        let text = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        let running = text.split_whitespace().next().unwrap_or("0").parse()?;
        threads.push((task, running));
    }
    Ok(threads)
}

/// CPU time of all threads of a process, the kernel's workers for it included.
///
/// # Errors
/// When there is no such process.
pub fn time(pid: i32) -> Outcome<Duration> {
    let all = threads(pid)?.into_iter().map(|(_, running)| running);
    Ok(Duration::from_nanos(all.sum()))
}

/// CPU time of the threads of a process whose names are such, and of all others.
///
/// # Errors
/// When there is no such process.
pub fn split(pid: i32, such: impl Fn(&str) -> bool) -> Outcome<(Duration, Duration)> {
    let (mut these, mut others) = (0, 0);
    for (task, running) in threads(pid)? {
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        match such(name.trim_end()) {
            true => these += running,
            false => others += running,
        }
    }
    Ok((Duration::from_nanos(these), Duration::from_nanos(others)))
}

/// CPU time of a process and of all that it started and that is still there.
///
/// # Errors
/// When there is no such process.
pub fn family(pid: i32) -> Outcome<Duration> {
    let others = descendants(pid, &parents());
    let others = others.into_iter().filter_map(|pid| time(pid).ok());
    Ok(time(pid)? + others.sum::<Duration>())
}

/// What a job cost while it ran.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// How long that was.
    pub took: Duration,
    /// The backend.
    pub backend: Duration,
    /// All other processes that this one started.
    pub guest: Duration,
    /// This process itself, the watch aside: the store, if it serves one.
    pub own: Duration,
}

/// Looks at a backend and at the guest it serves from the moment that a file
/// appears until another does. A guest makes these files around its job, so that
/// what it takes to boot is not counted.
#[derive(Debug)]
pub struct Watch {
    stop: Sender<Infallible>,
    thread: JoinHandle<Option<Spent>>,
}

impl Watch {
    /// Waits for `begin` and `end` in `dir`.
    pub fn start(dir: &Path, backend: i32) -> Self {
        let (stop, stopped) = channel();
        let (begin, end) = (dir.join("begin"), dir.join("end"));
        let thread = spawn(move || {
            let wait = |file: &Path, each: &mut dyn FnMut()| {
                while !file.exists() {
                    each();
                    match stopped.recv_timeout(LOOK) {
                        Err(RecvTimeoutError::Timeout) => {}
                        // The guest is gone: one last look at the file.
                        _ => return file.exists(),
                    }
                }
                true
            };
            if !wait(&begin, &mut || {}) {
                return None;
            }
            let start = Instant::now();
            let first = Sample::take(backend);
            let mut last = first.clone();
            let mut looks = 0;
            let ended = wait(&end, &mut || {
                looks += 1;
                if looks % LOOKS == 0 {
                    last.renew(Sample::take(backend));
                }
            });
            let took = start.elapsed();
            last.renew(Sample::take(backend));
            ended.then(|| Spent {
                took,
                ..last.since(&first)
            })
        });
        Watch { stop, thread }
    }

    /// What was seen; nothing, if the job did not begin or not end.
    pub fn finish(self) -> Option<Spent> {
        let Watch { stop, thread } = self;
        // Closed rather than written to: both waits have to hear of it, and the
        // first would take the only message away from the second.
        drop(stop);
        thread.join().ok().flatten()
    }
}

/// CPU times at one moment.
#[derive(Debug, Clone, Default)]
struct Sample {
    backend: Duration,
    own: Duration,
    guest: BTreeMap<i32, Duration>,
}

impl Sample {
    fn take(backend: i32) -> Self {
        let this = i32::try_from(std::process::id()).unwrap_or(0);
        let mut others = descendants(this, &parents());
        others.retain(|pid| *pid != backend);
        let clock = clock_gettime(ClockId::ThreadCPUTime);
        let watch = Duration::new(clock.tv_sec as u64, clock.tv_nsec as u32);
        Sample {
            backend: time(backend).unwrap_or_default(),
            own: time(this).unwrap_or_default().saturating_sub(watch),
            guest: others
                .into_iter()
                .filter_map(|pid| Some((pid, time(pid).ok()?)))
                .collect(),
        }
    }

    /// Takes over a later sample, but keeps what it no longer has.
    fn renew(&mut self, later: Self) {
        self.backend = self.backend.max(later.backend);
        self.own = self.own.max(later.own);
        for (pid, time) in later.guest {
            let known = self.guest.entry(pid).or_default();
            *known = time.max(*known);
        }
    }

    fn since(&self, first: &Self) -> Spent {
        let guest = self.guest.iter().map(|(pid, time)| {
            let before = first.guest.get(pid).copied().unwrap_or_default();
            time.saturating_sub(before)
        });
        Spent {
            backend: self.backend.saturating_sub(first.backend),
            guest: guest.sum(),
            own: self.own.saturating_sub(first.own),
            ..Spent::default()
        }
    }
}

/// Each process and the one that started it.
fn parents() -> BTreeMap<i32, i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((pid, parent(&stat)?))
    })
    .collect()
}

/// The parent in /proc/PID/stat: the second word after the name, which may hold
/// anything.
fn parent(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// All that `root` started, and what these started.
fn descendants(root: i32, parents: &BTreeMap<i32, i32>) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&of) = found.get(next) {
        let children = parents.iter().filter(|(_, parent)| **parent == of);
        found.extend(children.map(|(pid, _)| *pid).filter(|pid| *pid != root));
        next += 1;
    }
    found.split_off(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    use pericarp_tests::bounded::poll;
    use pericarp_tests::scratch::Scratch;

    #[test]
    fn the_parent_stands_after_the_name() {
        assert_eq!(parent("12 (a) b (c)) S 7 12 12"), Some(7));
        assert_eq!(parent("12 (a"), None);
    }

    #[test]
    fn descendants_are_children_and_theirs() {
        let parents = [(1, 0), (2, 1), (3, 2), (4, 3), (5, 1), (6, 0)].into();
        let mut found = descendants(2, &parents);
        found.sort_unstable();
        assert_eq!(found, [3, 4]);
        assert!(descendants(6, &parents).is_empty());
    }

    #[test]
    fn what_ended_in_between_still_counts() {
        let second = |seconds| Duration::from_secs(seconds);
        let first = Sample {
            backend: second(5),
            guest: [(1, second(10)), (2, second(1))].into(),
            ..Sample::default()
        };
        let mut last = first.clone();
        last.renew(Sample {
            backend: second(6),
            guest: [(1, second(11)), (2, second(3)), (3, second(4))].into(),
            ..Sample::default()
        });
        last.renew(Sample {
            backend: second(7),
            guest: [(1, second(12))].into(),
            ..Sample::default()
        });
        let spent = last.since(&first);
        assert_eq!(spent.backend, second(2));
        assert_eq!(spent.guest, second(2 + 2 + 4));
    }

    /// A child that is busy before the job, during it and after it, in parts.
    #[test]
    fn only_what_lies_between_the_marks_counts() {
        let scratch = Scratch::new();
        let busy = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        let script = format!(
            "{busy}; cat /proc/$$/schedstat >a; : >begin; {busy}; : >end; sleep 0.3; \
             cat /proc/$$/schedstat >b; {busy}"
        );
        let watch = Watch::start(scratch.dir(), 0);
        let mut shell = Command::new("sh");
        let mut shell = shell
            .args(["-c", &script])
            .current_dir(scratch.dir())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let ended = poll(Duration::from_secs(60), || shell.try_wait().unwrap());
        assert!(ended.unwrap().success());
        let spent = watch.finish().unwrap();
        let read = |name| -> u64 {
            let text = fs::read_to_string(scratch.path(name)).unwrap();
            text.split(' ').next().unwrap().parse().unwrap()
        };
        let want = Duration::from_nanos(read("b") - read("a"));
        eprintln!("{:?} seen of {want:?}, {:?}", spent.guest, start.elapsed());
        // Other tests of this program may have children, too.
        assert!(spent.guest >= want / 2, "{spent:?} of {want:?}");
        assert!(spent.backend.is_zero());
    }

    #[test]
    fn threads_are_told_apart_by_their_names() {
        let this = std::process::id() as i32;
        let work = std::thread::Builder::new().name("one/work".to_owned());
        let busy = work.spawn(move || {
            let clock = || clock_gettime(ClockId::ThreadCPUTime).tv_nsec;
            while clock() < 20_000_000 {}
            let parts = split(this, |name| name.ends_with("/work")).unwrap();
            // Later, while this thread is still one.
            (parts, time(this).unwrap(), family(this).unwrap())
        });
        let ((these, others), all, family) = busy.unwrap().join().unwrap();
        assert!(these >= Duration::from_millis(10), "{these:?}");
        assert!(these + others <= all, "{these:?}, {others:?}, {all:?}");
        assert!(others < all - Duration::from_millis(10));
        assert!(family > others, "{family:?}, {others:?}");
    }

    #[test]
    fn a_job_that_never_ends_costs_nothing_known() {
        let scratch = Scratch::new();
        let watch = Watch::start(scratch.dir(), 0);
        scratch.file("begin", b"");
        assert!(watch.finish().is_none());
    }
}
