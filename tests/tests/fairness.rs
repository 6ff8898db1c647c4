//! One worker, several queues: however fast one of them is refilled, another's
//! request is done after a bounded number of the first one's.
//!
//! The bound is in requests. This thread alone refills the busy queue, so it
//! cannot run ahead while the test is not looking, and a slow machine changes
//! nothing.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pericarp_tests::bounded::Deadline;
use pericarp_tests::frontend::{Driver, Op, STATUS, Setup};
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::scratch::Scratch;

const SIZE: u16 = 64;
/// Requests the busy queue holds: three descriptors each.
const DEPTH: u64 = 20;
/// Requests of the quiet queue, one after the other.
const ROUNDS: u64 = 300;
/// How many of the busy queue's requests may end between the moment the quiet
/// one is offered and the one it is done: those that were in flight, those the
/// worker takes before it looks at the quiet queue, and those it takes in the
/// turns until the quiet one's I/O is back.
const BOUND: u64 = 4 * DEPTH;

/// Puts the read of `slot` into its three descriptors of queue 0.
fn offer(driver: &mut Driver, slot: u64) {
    let head = slot as u16 * 3;
    driver.rings[0].queue(head);
}

/// Plays `rounds` on the disk.
fn quiet_is_served(test: &str, options: Options, (scratch, disk): (&Scratch, &Path), rounds: u64) {
    let options = Options {
        num_queues: 2,
        extra: [options.extra, vec!["--workers=1".into()]].concat(),
        ..options
    };
    let backend = Backend::start(Kind::Pericarp, scratch, disk, &options).unwrap();
    let setup = Setup {
        queues: 2,
        queue_size: SIZE,
        ..Setup::default()
    };
    let mut driver = Driver::connect(backend.socket(), &setup).unwrap();
    let read = |sector| Op::Read { sector, len: 4096 };
    for slot in 0..DEPTH {
        let chain = driver.prepare(slot, &read(slot * 8)).unwrap();
        driver.place(0, slot as u16 * 3, &chain);
        offer(&mut driver, slot);
        // One after the other: on a slow disk some are in flight at any time.
        driver.rings[0].publish();
        driver.rings[0].notify();
        std::thread::sleep(Duration::from_millis(1));
    }
    let quiet = DEPTH;
    let chain = driver.prepare(quiet, &read(0)).unwrap();
    driver.place(1, 0, &chain);

    let refill = |driver: &mut Driver| {
        let done = driver.rings[0].take();
        for used in &done {
            offer(driver, u64::from(used.head) / 3);
        }
        if !done.is_empty() {
            driver.rings[0].publish();
            driver.rings[0].notify();
        }
        done.len() as u64
    };
    let (mut most, mut total) = (0, 0);
    for _ in 0..rounds {
        // The other one is well under way.
        let deadline = Deadline::after(Duration::from_secs(20));
        let mut busy = 0;
        while busy < 2 * DEPTH {
            busy += refill(&mut driver);
            assert!(!deadline.left().is_zero(), "the busy queue stands still");
        }
        let seen = driver.rings[1].used_idx();
        driver.rings[1].queue(0);
        driver.rings[1].publish();
        driver.rings[1].notify();
        let mut passed = 0;
        while driver.rings[1].used_idx() == seen {
            passed += refill(&mut driver);
            assert!(passed <= BOUND, "{passed} requests went first");
            assert!(!deadline.left().is_zero(), "never served");
        }
        driver.rings[1].take();
        assert_eq!(driver.peek(STATUS(quiet), 1).unwrap(), [0]);
        most = most.max(passed);
        total += passed;
    }
    let mean = total / rounds;
    eprintln!("{test}: {most} requests of the busy queue went first at most, {mean} on average");
}

/// On a disk in the page cache.
fn fast(test: &str, extra: &[&str]) {
    if !Kind::Pericarp.usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.file("disk", &vec![1; 1 << 20]);
    let options = Options {
        cache: Cache::Buffered,
        extra: extra.iter().map(|&option| option.into()).collect(),
        ..Options::default()
    };
    quiet_is_served(test, options, (&scratch, &disk), ROUNDS);
}

#[test]
fn a_saturating_queue_does_not_delay_another_beyond_its_depth() {
    let test = "a_saturating_queue_does_not_delay_another_beyond_its_depth";
    fast(test, &[]);
}

#[test]
fn a_saturating_queue_does_not_delay_another_of_the_synchronous_engine() {
    let test = "a_saturating_queue_does_not_delay_another_of_the_synchronous_engine";
    fast(test, &["--io-engine=sync"]);
}

/// Every read takes 20 ms, so the busy queue always has some in flight.
#[test]
fn a_queue_that_is_never_idle_does_not_delay_another_beyond_its_depth() {
    let test = "a_queue_that_is_never_idle_does_not_delay_another_beyond_its_depth";
    if !Kind::Pericarp.usable(test) || !fuse::usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let mount = Fuse::mount(&scratch.path("mnt"), vec![1; 1 << 20]).unwrap();
    mount.behaviour.read_ms.store(20, Ordering::SeqCst);
    let options = Options {
        cache: Cache::Direct,
        ..Options::default()
    };
    quiet_is_served(test, options, (&scratch, &mount.file()), 20);
}
