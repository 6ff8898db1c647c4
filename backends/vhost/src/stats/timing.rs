//! The worker's side of the statistics: the times of requests in flight.
//!
//! [`Active`](crate::worker) calls it as a request moves. Between two readings
//! of the clock it only takes notes: [`Timing::flush`] says that requests went to
//! the kernel, [`Timing::publish`] that they are back with the driver, and
//! [`Timing::settle`] ends the turn.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::QueueStats;
use crate::clock;
use crate::device::Account;
use crate::histogram::add;
use crate::oversight::Oversight;

/// The times of one request, by head.
#[derive(Debug, Default, Clone, Copy)]
struct Times {
    seen: u64,
    popped: u64,
    /// The running operation was handed over.
    handed: u64,
    /// Sum over the operations that are done.
    device: u64,
}

/// Times of the requests of one queue while a worker has it.
#[derive(Debug)]
pub(crate) struct Timing {
    oversight: Arc<Oversight>,
    queue: usize,
    /// Operations are done when they are handed over.
    synchronous: bool,
    /// When the entries of the available ring were first seen, by ring slot.
    seen: Box<[u64]>,
    /// The index up to which they were seen, and when that was.
    seen_up_to: u16,
    looked: u64,
    /// Requests were left in the ring at the last look.
    held: bool,
    times: Box<[Times]>,
    popped: u64,
    handed: Vec<u16>,
    finished: Vec<(Times, Account)>,
    /// Something was published in this turn.
    told: bool,
}

impl Timing {
    /// `None` when nobody counts.
    pub(crate) fn new(
        oversight: &Arc<Oversight>,
        queue: u16,
        size: u16,
        next_avail: u16,
        synchronous: bool,
    ) -> Option<Self> {
        let queue = usize::from(queue);
        oversight.stats.as_ref()?.queues.get(queue)?;
        let size = usize::from(size);
        Some(Self {
            oversight: Arc::clone(oversight),
            queue,
            synchronous,
            seen: vec![0; size].into_boxed_slice(),
            seen_up_to: next_avail,
            looked: 0,
            held: false,
            times: vec![Times::default(); size].into_boxed_slice(),
            popped: 0,
            handed: Vec::with_capacity(size),
            finished: Vec::with_capacity(size),
            told: false,
        })
    }

    fn stats(&self) -> Option<&QueueStats> {
        let queues = &self.oversight.stats.as_ref()?.queues;
        queues.get(self.queue).map(|padded| &**padded)
    }

    /// The available ring was read, up to this index.
    pub(crate) fn look(&mut self, up_to: u16, now: u64) {
        // What came while a limit kept us from looking waited since then.
        let seen = if self.held { self.looked } else { now };
        let mask = self.seen.len() - 1;
        while self.seen_up_to != up_to {
            self.seen[usize::from(self.seen_up_to) & mask] = seen;
            self.seen_up_to = self.seen_up_to.wrapping_add(1);
        }
        self.held = false;
        self.looked = now;
    }

    /// A limit leaves requests in the ring.
    pub(crate) fn hold(&mut self) {
        self.held = true;
        if let Some(stats) = self.stats() {
            add(&stats.throttled, 1);
        }
    }

    /// The request at this index of the available ring was popped.
    pub(crate) fn pop(&mut self, index: u16, head: u16, now: u64) {
        let mask = self.seen.len() - 1;
        if index == self.seen_up_to {
            // It came while the ones before it were popped.
            self.seen[usize::from(index) & mask] = now;
            self.seen_up_to = index.wrapping_add(1);
        }
        self.times[usize::from(head)] = Times {
            seen: self.seen[usize::from(index) & mask],
            popped: now,
            ..Times::default()
        };
        self.popped += 1;
    }

    /// A request of a predecessor's starts again, now, which is returned.
    pub(crate) fn again(&mut self, head: u16) -> u64 {
        let now = clock::now();
        self.times[usize::from(head)] = Times {
            seen: now,
            popped: now,
            ..Times::default()
        };
        self.popped += 1;
        now
    }

    /// An operation of the request goes to the kernel at the end of this turn.
    pub(crate) fn hand(&mut self, head: u16, now: u64) {
        self.times[usize::from(head)].handed = now;
        if !self.synchronous {
            self.handed.push(head);
        }
    }

    /// It came back.
    pub(crate) fn back(&mut self, head: u16, now: u64) {
        let times = &mut self.times[usize::from(head)];
        times.device += now.saturating_sub(times.handed);
    }

    /// The request is finished; the next [`publish`](Self::publish) is its end.
    pub(crate) fn finish(&mut self, head: u16, account: Account) {
        self.finished.push((self.times[usize::from(head)], account));
    }

    /// So many packets moved at once, and so many did not.
    pub(crate) fn carried(&mut self, class: usize, packets: u64, bytes: u64, dropped: u64) {
        if packets + dropped == 0 {
            return;
        }
        if let Some(class) = self.stats().and_then(|stats| stats.classes.get(class)) {
            add(&class.requests, packets + dropped);
            add(&class.bytes, bytes);
            add(&class.errors, dropped);
        }
        self.popped += packets + dropped;
        self.told = true;
    }

    pub(crate) fn kick(&self) {
        if let Some(stats) = self.stats() {
            add(&stats.kicks, 1);
        }
    }

    pub(crate) fn call(&self) {
        if let Some(stats) = self.stats() {
            add(&stats.calls, 1);
        }
    }

    /// Operations handed over so far are with the kernel now.
    pub(crate) fn flush(&mut self) {
        if !self.handed.is_empty() {
            self.flushed(clock::now());
        }
    }

    fn flushed(&mut self, now: u64) {
        for head in self.handed.drain(..) {
            self.times[usize::from(head)].handed = now;
        }
    }

    /// What is finished so far is visible to the driver now.
    pub(crate) fn publish(&mut self) {
        if !self.finished.is_empty() {
            self.published(clock::now());
        }
    }

    fn published(&mut self, now: u64) {
        let mut finished = std::mem::take(&mut self.finished);
        self.told |= !finished.is_empty();
        if let Some(stats) = self.stats() {
            for (times, account) in &finished {
                record(stats, times, account, now);
            }
        }
        finished.clear();
        self.finished = finished;
    }

    /// Whether [`settle`](Self::settle) has anything to do.
    pub(crate) fn is_settled(&self) -> bool {
        self.popped == 0 && self.handed.is_empty() && !self.told
    }

    /// The turn ends at `now`: what was handed over goes to the kernel.
    pub(crate) fn settle(&mut self, now: u64, in_flight: u16) {
        self.flushed(now);
        let popped = std::mem::take(&mut self.popped);
        let told = std::mem::take(&mut self.told);
        if let Some(stats) = self.stats() {
            if popped > 0 {
                stats.batch.record(popped);
            }
            if popped > 0 || told {
                add(&stats.turns, 1);
                stats.in_flight.store(in_flight.into(), Ordering::Relaxed);
            }
        }
    }
}

fn record(stats: &QueueStats, times: &Times, account: &Account, now: u64) {
    if let Some(class) = stats.classes.get(account.class) {
        add(&class.requests, 1);
        if account.failed {
            add(&class.errors, 1);
        } else {
            add(&class.bytes, account.bytes);
        }
    }
    let total = now.saturating_sub(times.seen);
    let wait = times.popped.saturating_sub(times.seen);
    stats.total.record(total);
    stats.queue_wait.record(wait);
    stats.device.record(times.device);
    let backend = total.saturating_sub(wait).saturating_sub(times.device);
    stats.backend.record(backend);
}

impl Drop for Timing {
    fn drop(&mut self) {
        if let Some(stats) = self.stats() {
            stats.in_flight.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::DeviceStats;

    fn timing(synchronous: bool) -> (Arc<Oversight>, Timing) {
        let mut oversight = Oversight::default();
        oversight.stats = Some(DeviceStats {
            classes: &["read", "other"],
            queues: Box::new([Default::default()]),
        });
        let oversight = Arc::new(oversight);
        let timing = Timing::new(&oversight, 0, 4, 0xffff, synchronous).unwrap();
        (oversight, timing)
    }

    fn parts(oversight: &Oversight) -> [u64; 4] {
        let stats = &oversight.stats.as_ref().unwrap().queues[0];
        [
            &stats.queue_wait,
            &stats.device,
            &stats.backend,
            &stats.total,
        ]
        .map(|h| h.snapshot().sum())
    }

    const READ: Account = Account {
        class: 0,
        bytes: 4096,
        failed: false,
    };

    #[test]
    fn the_parts_add_up_over_turns_and_operations() {
        let (oversight, mut timing) = timing(false);
        // Seen at 10, held until 50; two operations; published at 200.
        timing.look(1, 10);
        timing.hold();
        timing.settle(12, 0);
        timing.look(1, 50);
        timing.pop(0xffff, 3, 50);
        timing.hand(3, 50);
        timing.settle(55, 1);
        timing.back(3, 100);
        timing.hand(3, 100);
        timing.settle(103, 1);
        timing.back(3, 190);
        timing.finish(3, READ);
        timing.published(200);
        timing.settle(200, 0);
        assert_eq!(parts(&oversight), [40, 45 + 87, 5 + 3 + 10, 190]);
        let stats = &oversight.stats.as_ref().unwrap().queues[0];
        assert_eq!(stats.classes[0].bytes.load(Ordering::Relaxed), 4096);
        assert_eq!(stats.throttled.load(Ordering::Relaxed), 1);
        assert_eq!(stats.turns.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn what_comes_while_others_are_popped_has_not_waited() {
        let (oversight, mut timing) = timing(false);
        for turn in 1..10u16 {
            let (now, index) = (u64::from(turn) * 1000, (turn * 2).wrapping_sub(3));
            timing.look(index.wrapping_add(1), now);
            for (index, head) in [(index, 0), (index.wrapping_add(1), 1)] {
                timing.pop(index, head, now);
                timing.finish(head, READ);
            }
            timing.published(now + 1);
            timing.settle(now + 1, 0);
        }
        assert_eq!(parts(&oversight), [0, 0, 18, 18]);
    }

    #[test]
    fn what_comes_while_a_limit_holds_waits_since_the_last_look() {
        let (oversight, mut timing) = timing(true);
        timing.look(0, 100);
        timing.hold();
        timing.look(1, 500);
        timing.pop(0, 1, 500);
        timing.hand(1, 500);
        timing.back(1, 700);
        timing.finish(
            1,
            Account {
                failed: true,
                ..READ
            },
        );
        timing.published(710);
        timing.settle(710, 0);
        assert_eq!(parts(&oversight), [400, 200, 10, 610]);
        let stats = &oversight.stats.as_ref().unwrap().queues[0];
        let class = &stats.classes[0];
        assert_eq!(class.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(class.errors.load(Ordering::Relaxed), 1);
    }
}
