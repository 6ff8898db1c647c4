//! `pericarp-block` killed again and again under verified load, and served on
//! by a successor: no request may be lost, done twice in the guest's eyes, or
//! land late. `PERICARP_CRASH_SECONDS` makes it longer than CI has time for.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod polled;
mod qemu;
mod records;

use std::path::Path;
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::verified::{BLOCK, BLOCKS, Load};
use rustix::process::Signal;

/// How long a test kills.
fn patience(default: u64) -> Duration {
    let named = std::env::var("PERICARP_CRASH_SECONDS").ok();
    Duration::from_secs(named.and_then(|n| n.parse().ok()).unwrap_or(default))
}

fn block(scratch: &Scratch, extra: &[&str]) -> Process {
    let mut program = command(&Part::PERICARP_BLOCK.find().unwrap());
    let path = |name: &str| scratch.path(name).display().to_string();
    program
        .arg(format!("--socket-path={}", path("s")))
        .arg(format!("--blk-file={}", path("disk")))
        .arg("--log-level=info")
        .args(extra);
    Process::start(&mut program, patience(60) + Duration::from_secs(120)).unwrap()
}

fn disk(scratch: &Scratch) {
    // Written once, or direct writes would have to allocate.
    scratch.file("disk", &vec![0; BLOCK * BLOCKS]);
}

fn setup(inflight: bool) -> Setup {
    Setup {
        queue_size: 256,
        inflight,
        ..Setup::default()
    }
}

fn killed_under_load(test: &str, inflight: bool, extra: &[&str]) {
    if !have(test, &[Part::PERICARP_BLOCK]) {
        return;
    }
    let scratch = Scratch::new();
    disk(&scratch);
    let (load, _) = killed_on(&scratch, test, inflight, extra);
    load.compare(&scratch.path("disk")).unwrap();
}

/// Kills every 200 ms or so, now and then while the successor still recovers.
/// What was done, and how many kills it took.
fn killed_on(scratch: &Scratch, test: &str, inflight: bool, extra: &[&str]) -> (Load, u32) {
    let record = format!("--inflight-file={}", scratch.path("record").display());
    let mut extra = extra.to_vec();
    if !inflight {
        extra.push(&record);
    }
    let mut backend = block(scratch, &extra);
    let connected = Driver::connect(&wait_for(&scratch.path("s")), &setup(inflight));
    let mut driver = connected.unwrap_or_else(|e| {
        let ended = backend.wait(Duration::from_secs(2));
        panic!("{e}; {ended:?}\n{}", backend.output().last(20))
    });
    let mut load = Load::new(42);
    let (begin, limit) = (Instant::now(), patience(10));
    let (mut kills, mut again, mut longest) = (0, 0, Duration::ZERO);
    while begin.elapsed() < limit {
        let millis = if load.below(4) == 0 {
            load.below(8)
        } else {
            50 + load.below(250)
        };
        let ran = load.run(&mut driver, Duration::from_millis(millis));
        ran.unwrap_or_else(|e| panic!("after {kills} kills: {e}\n{}", backend.output().last(20)));
        backend.signal(Signal::KILL);
        let dead = Instant::now();
        // Every other time the successor comes before its predecessor is gone.
        if kills % 2 == 0 {
            backend.kill();
        }
        let successor = block(scratch, &extra);
        drop(std::mem::replace(&mut backend, successor));
        // The socket may be gone for a moment, or still be the dying process's.
        let mut last = String::new();
        let connected = poll(Duration::from_secs(20), || {
            let tried = driver.reconnect(&scratch.path("s"));
            tried.map_err(|e| last = e.to_string()).ok()
        });
        assert!(connected.is_some(), "{last}\n{}", backend.output().last(20));
        longest = longest.max(dead.elapsed());
        again += u32::from(backend.output().find("done again").is_some());
        kills += 1;
    }
    let drained = load.drain(&mut driver);
    drained.unwrap_or_else(|e| panic!("at the end: {e}\n{}", backend.output().last(20)));
    std::thread::sleep(Duration::from_millis(500));
    eprintln!(
        "{test}: {kills} kills, {} requests, {again} successors had some to do again, \
         longest pause {longest:?}",
        load.done
    );
    assert!(kills > 5, "{kills} kills prove little");
    // What the page cache serves is done at once: that disk is idle often.
    assert!(
        again > kills / 10,
        "{again} of {kills} successors had something to do"
    );
    backend.signal(Signal::TERM);
    let status = backend.wait(Duration::from_secs(10)).unwrap();
    assert_eq!(status.code(), Some(0));
    (load, kills)
}

#[test]
fn killed_with_memory_that_the_front_end_keeps() {
    killed_under_load("killed_with_memory_that_the_front_end_keeps", true, &[]);
}

#[test]
fn killed_with_a_file() {
    killed_under_load("killed_with_a_file", false, &["--cache=buffered"]);
}

#[test]
fn killed_with_the_synchronous_engine() {
    killed_under_load(
        "killed_with_the_synchronous_engine",
        true,
        &["--io-engine=sync"],
    );
}

/// A clean end of a ring or a connection leaves nothing in flight behind.
#[test]
fn rings_stop_and_front_ends_come_and_go_with_a_record() {
    if !have(
        "rings_stop_and_front_ends_come_and_go_with_a_record",
        &[Part::PERICARP_BLOCK],
    ) {
        return;
    }
    let scratch = Scratch::new();
    disk(&scratch);
    let mut backend = block(&scratch, &[]);
    let mut driver = Driver::connect(&wait_for(&scratch.path("s")), &setup(true)).unwrap();
    let mut load = Load::new(7);
    let step = Duration::from_millis(30);
    for round in 0..10 {
        load.run(&mut driver, step).unwrap();
        let base = driver.stop(0).unwrap();
        assert_eq!(
            base,
            driver.rings[0].used_idx(),
            "all that was taken is done"
        );
        driver.configure(0).unwrap();
        driver.enable(0, true).unwrap();
        load.run(&mut driver, step).unwrap();
        driver.send_memory().unwrap();
        load.run(&mut driver, step).unwrap();
        if round % 2 == 0 {
            // The connection, with the process alive.
            driver.reconnect(&scratch.path("s")).unwrap();
        }
    }
    load.drain(&mut driver).unwrap();
    load.compare(&scratch.path("disk")).unwrap();
    let text = backend.output().last(400);
    assert!(
        !text.contains("done again") && !text.contains("dropped"),
        "{text}"
    );
    // A new ring in the same record, as after a reset of the guest.
    driver.stop(0).unwrap();
    driver.rings[0].reset(128);
    driver.configure(0).unwrap();
    driver.enable(0, true).unwrap();
    driver.request(0, &Op::Flush).unwrap();
    backend.signal(Signal::TERM);
    assert_eq!(
        backend.wait(Duration::from_secs(10)).unwrap().code(),
        Some(0)
    );
}

fn wait_for(path: &Path) -> std::path::PathBuf {
    let limit = Duration::from_secs(10);
    poll(limit, || path.exists().then_some(())).expect("a socket");
    path.to_owned()
}
