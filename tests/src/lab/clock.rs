//! Keeps a laboratory's one CPU on one of ours; [`Lab::run`](super::Lab::run) does so at
//! its start.
//!
//! QEMU's emulated CPU counts with the counter of the CPU that its thread is on. Where
//! those of two CPUs differ, as on hosts that were moved or stopped, what the
//! laboratory counts leaps forward whenever the thread changes, and the clock of a
//! virtual machine in it then stands until all others have caught up: its sleepers
//! sleep for hours. A thread that never changes counts evenly.

use std::fs;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// How QEMU calls the thread, if asked to name them.
const THREAD: &str = "CPU 0/TCG";

/// Leaves the emulated CPU of this process where it is now. False as long as it has none.
pub(super) fn hold(process: i32) -> bool {
    thread(process).is_some_and(|(thread, cpu)| {
        let mut here = CpuSet::new();
        here.set(cpu);
        // Refused, it is as it would have been.
        let _ = sched_setaffinity(Some(thread), &here);
        true
    })
}

/// The thread, and the CPU that it was on last.
fn thread(process: i32) -> Option<(Pid, usize)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).ok()?;
    tasks.flatten().find_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        if name.trim_end() != THREAD {
            return None;
        }
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        // The name, in parentheses, is the second field of proc(5); the CPU the 39th.
        let (_, fields) = stat.rsplit_once(')')?;
        let cpu = fields.split_whitespace().nth(36)?.parse().ok()?;
        let id = task.file_name().to_str()?.parse().ok()?;
        Some((Pid::from_raw(id)?, cpu))
    })
}

#[cfg(test)]
mod tests {
    use rustix::thread::sched_getaffinity;

    use super::*;

    #[test]
    fn the_thread_of_the_cpu_stays_and_no_other_is_touched() {
        let us = rustix::process::getpid().as_raw_nonzero().get();
        let allowed = sched_getaffinity(None).unwrap().count();
        assert!(!hold(us));
        let (told, tell) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let emulated = std::thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || {
                told.send(rustix::thread::gettid()).unwrap();
                let _ = ended.recv();
            })
            .unwrap();
        let thread = tell.recv().unwrap();
        assert!(hold(us));
        assert_eq!(sched_getaffinity(Some(thread)).unwrap().count(), 1);
        assert_eq!(sched_getaffinity(None).unwrap().count(), allowed);
        drop(end);
        emulated.join().unwrap();
    }
}
