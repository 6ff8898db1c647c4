//! One worker, several queues: however fast one of them is refilled, another's
//! request is done after a bounded number of the first one's.
//!
//! The bound is in requests. This thread alone refills the busy queue, so it
//! cannot run ahead while the test is not looking, and a slow machine changes
//! nothing.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use pericarp_tests::bounded::Deadline;
use pericarp_tests::frontend::{Driver, Op, STATUS, Setup};
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::scratch::Scratch;

use std::time::Duration;

const SIZE: u16 = 64;
/// Requests the busy queue holds: three descriptors each.
const DEPTH: u64 = 20;
/// Requests of the quiet queue, one after the other.
const ROUNDS: usize = 300;
/// How many of the busy queue's requests may end between the moment the quiet
/// one is offered and the one it is done: those that were in flight, those the
/// worker takes before it looks at the quiet queue, and those it takes in the
/// turns until the quiet one's I/O is back.
const BOUND: u64 = 3 * DEPTH;

/// Puts the read of `slot` into its three descriptors of queue 0.
fn offer(driver: &mut Driver, slot: u64) {
    let head = slot as u16 * 3;
    driver.rings[0].queue(head);
}

fn quiet_is_served(test: &str, options: Options) {
    if !Kind::Pericarp.usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.file("disk", &vec![1; 1 << 20]);
    let options = Options {
        num_queues: 2,
        extra: [options.extra, vec!["--workers=1".into()]].concat(),
        ..options
    };
    let backend = Backend::start(Kind::Pericarp, &scratch, &disk, &options).unwrap();
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
    }
    let quiet = DEPTH;
    let chain = driver.prepare(quiet, &read(0)).unwrap();
    driver.place(1, 0, &chain);
    driver.rings[0].publish();
    driver.rings[0].notify();

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
    for _ in 0..ROUNDS {
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
    let mean = total / ROUNDS as u64;
    eprintln!("{test}: {most} requests of the busy queue went first at most, {mean} on average");
}

#[test]
fn a_saturating_queue_does_not_delay_another_beyond_its_depth() {
    quiet_is_served(
        "a_saturating_queue_does_not_delay_another_beyond_its_depth",
        Options {
            cache: Cache::Buffered,
            ..Options::default()
        },
    );
}

#[test]
fn a_saturating_queue_does_not_delay_another_of_the_synchronous_engine() {
    quiet_is_served(
        "a_saturating_queue_does_not_delay_another_of_the_synchronous_engine",
        Options {
            cache: Cache::Buffered,
            extra: vec!["--io-engine=sync".into()],
            ..Options::default()
        },
    );
}
