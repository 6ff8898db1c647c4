//! The notification protocol, every order of it: [`SplitQueue`]'s own code
//! against a driver as Linux has it, under `loom`.
//!
//! Nobody may sleep while the other side has work for it and did not ring.
//! Driver and device each publish, fence, and look at what the other wants
//! (virtio 1.3, 2.7.7 and 2.7.10; `virtqueue_kick_prepare_split` and
//! `virtqueue_enable_cb_prepare_split` in drivers/virtio/virtio_ring.c). The
//! same scenarios are run with each fence taken out in turn, and must fail.

pub(crate) mod model;

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use loom::sync::atomic::AtomicBool;

use crate::testing::{AVAILABLE, Guest, USED, USER};
use crate::{GuestMemory, QueueLayout, SplitQueue};
use model::Without;

const SIZE: u16 = 2;
/// Chains, and completions, in one scenario.
const COUNT: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One scenario.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    event_idx: bool,
    /// Where all indices begin.
    start: u16,
    /// Times the device looks at an empty ring again before it asks for kicks.
    polls: u8,
    without: Without,
}

/// Addresses of the ring's fields, as both sides reach them.
#[derive(Debug, Clone, Copy)]
struct Fields {
    available: usize,
    used: usize,
}

impl Fields {
    fn of(memory: &GuestMemory) -> Self {
        let find = |at| memory.user_pointer(USER + at, 64).unwrap() as usize;
        Self {
            available: find(AVAILABLE),
            used: find(USED),
        }
    }

    fn avail_entry(self, index: u16) -> usize {
        self.available + 4 + 2 * usize::from(index % SIZE)
    }

    fn used_element(self, index: u16) -> usize {
        self.used + 4 + 8 * usize::from(index % SIZE)
    }

    fn used_event(self) -> usize {
        self.available + 4 + 2 * usize::from(SIZE)
    }

    fn avail_event(self) -> usize {
        self.used + 4 + 8 * usize::from(SIZE)
    }

    /// Everything with the value it has before anybody starts. Entries nobody
    /// wrote yet are beyond the table, so that a stale one is noticed.
    fn initial(self, start: u16) -> Vec<(usize, u32)> {
        let mut cells = vec![
            (self.available, 0),
            (self.available + 2, u32::from(start)),
            (self.used_event(), 0),
            (self.used, 0),
            (self.used + 2, u32::from(start)),
            (self.avail_event(), 0),
        ];
        for index in 0..SIZE {
            cells.push((self.avail_entry(index), 0xffff));
            cells.push((self.used_element(index), 0xffff));
            cells.push((self.used_element(index) + 4, 0xffff));
        }
        cells
    }
}

/// Something to wake the other side with.
#[derive(Debug, Clone)]
struct Bell(Arc<AtomicBool>);

impl Bell {
    fn new() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }

    /// As an eventfd, which the kernel locks: no store slips in between.
    fn ring(&self) {
        self.0.swap(true, AcqRel);
    }

    /// True if it rang since this was asked last.
    fn heard(&self) -> bool {
        self.0.swap(false, AcqRel)
    }
}

/// Runs `act` with a queue whose memory the model holds.
fn explore(scenario: Scenario, act: fn(Scenario, SplitQueue, Fields)) {
    let guest = Guest::new(SIZE);
    let (memory, layout) = (Arc::clone(&guest.memory), guest.layout());
    let mut builder = loom::model::Builder::new();
    // Without a bound it passes, too, in a minute; with it in half a second.
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let fields = Fields::of(&memory);
        let _installed = model::install(fields.initial(scenario.start), scenario.without);
        act(scenario, queue(&memory, layout, scenario), fields);
    });
}

fn queue(memory: &Arc<GuestMemory>, layout: QueueLayout, scenario: Scenario) -> SplitQueue {
    let mut queue = SplitQueue::new(
        Arc::clone(memory),
        layout,
        scenario.start,
        scenario.event_idx,
    )
    .unwrap();
    assert!(queue.publish(), "the first call of every start");
    queue
}

/// The driver adds chains and kicks; the device must not sleep on one.
fn kicks(scenario: Scenario, mut queue: SplitQueue, fields: Fields) {
    let bell = Bell::new();
    let kick = bell.clone();
    let driver = loom::thread::spawn(move || {
        for n in 0..COUNT {
            let old = scenario.start.wrapping_add(n);
            let new = old.wrapping_add(1);
            model::put(fields.avail_entry(old), n, Relaxed);
            model::put(fields.available + 2, new, Release);
            model::driver_fence();
            let wanted = if scenario.event_idx {
                let event = model::get(fields.avail_event(), Relaxed);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            } else {
                model::get(fields.used, Relaxed) & NO_NOTIFY == 0
            };
            if wanted {
                kick.ring();
            }
        }
    });
    let mut popped = 0;
    // What a worker does with one queue, until it would sleep.
    loop {
        queue.disable_kicks();
        for _ in 0..=scenario.polls {
            popped += pop_all(&mut queue, popped);
        }
        if popped < COUNT && !queue.enable_kicks().unwrap() && !bell.heard() {
            break;
        }
        if popped == COUNT {
            break;
        }
    }
    driver.join().unwrap();
    if popped < COUNT {
        assert!(bell.heard(), "lost wake-up: the device sleeps on a chain");
        popped += pop_all(&mut queue, popped);
        assert_eq!(popped, COUNT);
    }
}

/// Pops until the ring looks empty; heads come in the driver's order.
fn pop_all(queue: &mut SplitQueue, before: u16) -> u16 {
    let mut count = 0;
    while let Some(head) = queue.pop().expect("stale: an entry nobody wrote") {
        assert_eq!(head, before + count, "stale: an entry of the last lap");
        count += 1;
    }
    count
}

/// The device completes chains and calls; the driver must not sleep on one.
fn calls(scenario: Scenario, mut queue: SplitQueue, fields: Fields) {
    let bell = Bell::new();
    let heard = bell.clone();
    let driver = loom::thread::spawn(move || {
        let mut taken = 0;
        while taken < COUNT {
            if !scenario.event_idx {
                model::put(fields.available, NO_INTERRUPT, Relaxed);
            }
            taken += take_all(fields, scenario.start, taken);
            let last = scenario.start.wrapping_add(taken);
            if scenario.event_idx {
                model::put(fields.used_event(), last, Relaxed);
            } else {
                model::put(fields.available, 0, Relaxed);
            }
            model::driver_fence();
            let more = model::get(fields.used + 2, Acquire) != last;
            if !more && !heard.heard() {
                break;
            }
        }
        taken
    });
    for n in 0..COUNT {
        queue.push_used(n, 100 + u32::from(n));
        if queue.publish() {
            bell.ring();
        }
    }
    let taken = driver.join().unwrap();
    if taken < COUNT {
        assert!(bell.heard(), "lost wake-up: the driver sleeps on a result");
        assert_eq!(taken + take_all(fields, scenario.start, taken), COUNT);
    }
}

/// Takes what used.idx covers.
fn take_all(fields: Fields, start: u16, before: u16) -> u16 {
    let end = model::get(fields.used + 2, Acquire).wrapping_sub(start);
    for n in before..end {
        let at = fields.used_element(start.wrapping_add(n));
        assert_eq!(model::get(at, Relaxed), n, "stale: a used element");
        assert_eq!(model::get(at + 4, Relaxed), 100 + n, "stale: a used length");
    }
    end - before
}

/// Every way to negotiate, at the first index and across the wrap.
fn all(act: fn(Scenario, SplitQueue, Fields), polls: u8, without: Without) {
    for event_idx in [true, false] {
        for start in [0, 0xffff] {
            let scenario = Scenario {
                event_idx,
                start,
                polls,
                without,
            };
            explore(scenario, act);
        }
    }
}

/// One way to negotiate, with something taken out.
fn one(act: fn(Scenario, SplitQueue, Fields), event_idx: bool, without: Without) {
    let scenario = Scenario {
        event_idx,
        start: 0xffff,
        polls: 0,
        without,
    };
    explore(scenario, act);
}

#[test]
fn no_kick_is_lost() {
    all(kicks, 0, Without::Nothing);
}

#[test]
fn no_kick_is_lost_by_a_device_that_polls_before_it_sleeps() {
    all(kicks, 1, Without::Nothing);
}

#[test]
fn no_call_is_lost() {
    all(calls, 0, Without::Nothing);
}

/// The protection taken out: each of these must find the fault.
mod faults {
    use super::*;

    #[test]
    #[should_panic(expected = "lost wake-up")]
    fn a_kick_is_lost_without_the_devices_fence() {
        one(kicks, true, Without::FenceBeforeSleep);
    }

    #[test]
    #[should_panic(expected = "lost wake-up")]
    fn a_kick_is_lost_without_the_devices_fence_and_event_index() {
        one(kicks, false, Without::FenceBeforeSleep);
    }

    #[test]
    #[should_panic(expected = "lost wake-up")]
    fn a_kick_is_lost_without_the_drivers_fence() {
        one(kicks, true, Without::DriverFence);
    }

    #[test]
    #[should_panic(expected = "lost wake-up")]
    fn a_call_is_lost_without_the_devices_fence() {
        one(calls, true, Without::FenceBeforeCall);
    }

    #[test]
    #[should_panic(expected = "lost wake-up")]
    fn a_call_is_lost_without_the_devices_fence_and_event_index() {
        one(calls, false, Without::FenceBeforeCall);
    }

    #[test]
    #[should_panic(expected = "lost wake-up")]
    fn a_call_is_lost_without_the_drivers_fence() {
        one(calls, true, Without::DriverFence);
    }

    #[test]
    #[should_panic(expected = "stale")]
    fn an_entry_is_read_too_early_without_acquire() {
        one(kicks, true, Without::IndexOrder);
    }

    #[test]
    #[should_panic(expected = "stale")]
    fn an_element_is_written_too_late_without_release() {
        one(calls, true, Without::IndexOrder);
    }
}
