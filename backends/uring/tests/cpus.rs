//! Where the kernel's threads for a ring run. In a process of its own, since it looks at all of
//! them there are.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::os::fd::AsRawFd as _;
use std::{fs, thread};

use pericarp_uring::{Engine, EngineKind};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The CPUs of the kernel's threads, as it lists them.
fn threads() -> Vec<String> {
    let all = fs::read_dir("/proc/self/task").unwrap().flatten();
    let status = all.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let ours = status.filter(|status| status.starts_with("Name:\tiou-wrk-"));
    let list = |status: String| {
        let mut lines = status.lines();
        let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"))?;
        Some(list.to_owned())
    };
    ours.filter_map(list).collect()
}

/// On one CPU and on another one: where whoever made the ring was, though it may be elsewhere later.
#[test]
fn the_kernels_threads_are_where_the_process_is() {
    let mine = sched_getaffinity(None).unwrap();
    let cpus = (0..CpuSet::MAX_CPU).filter(|cpu| mine.is_set(*cpu));
    for cpu in cpus.take(2) {
        thread::spawn(move || {
            let mut only = CpuSet::new();
            only.set(cpu);
            sched_setaffinity(None, &only).unwrap();
            let mut engine = Engine::new(EngineKind::Auto, 8, 2).unwrap();
            sched_setaffinity(None, &mine).unwrap();
            engine.start().unwrap();
            if engine.is_synchronous() {
                return;
            }
            let file = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
            let slot = engine.add_file(file.as_raw_fd()).unwrap();
            // No thread of ours ever does this.
            engine.sync(slot, true, 1);
            let mut done = Vec::new();
            while done.is_empty() {
                engine.submit(true).unwrap();
                engine.completions(&mut done);
            }
            let seen = threads();
            assert!(!seen.is_empty());
            assert!(seen.iter().all(|list| *list == cpu.to_string()), "{seen:?}");
        })
        .join()
        .unwrap();
    }
}
