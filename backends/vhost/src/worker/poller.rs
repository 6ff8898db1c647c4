//! Whether a worker that has nothing to do looks again for a moment or sleeps.
//!
//! Going to sleep and being woken costs the worker several microseconds and the
//! driver a kick; looking at the rings costs nothing but the time it takes. So
//! a worker polls for at most a fixed, short time, and only while that has
//! lately been enough more often than not: a disk that takes its time, or a
//! guest that does, is waited for asleep. Drivers are asked to kick only when the
//! worker goes to sleep; what was asked for before an earlier sleep and did not
//! come yet still stands while it polls.
//!
//! The loop of the worker is the only caller.

use std::time::{Duration, Instant};

/// How much the last attempt counts, as a shift: one eighth.
const WEIGHT: u32 = 3;
/// An unbroken row of hits.
const CERTAIN: u32 = 1 << 16;
/// More hits than misses.
const WORTH_IT: u32 = CERTAIN / 2;
/// While polling does not pay, every so many sleeps one is put off to see
/// whether it would again.
const PROBE_EVERY: u32 = 16;
/// Looks between two readings of the clock.
const LOOKS: u32 = 16;

/// Decides, and learns from what came of it.
#[derive(Debug)]
pub(super) struct Poller {
    limit: Duration,
    /// Waiting for the disk is one thing, for the driver alone another.
    idle: Record,
    busy: Record,
}

/// What came of earlier attempts.
#[derive(Debug)]
struct Record {
    /// Share of attempts that ended with something to do, out of [`CERTAIN`].
    promise: u32,
    /// Sleeps since the last attempt.
    sleeps: u32,
}

impl Poller {
    /// Polls for `limit` at most; zero is never.
    pub(super) fn new(limit: Duration) -> Self {
        let fresh = || Record {
            promise: WORTH_IT,
            sleeps: 0,
        };
        Self {
            limit,
            idle: fresh(),
            busy: fresh(),
        }
    }

    /// Asked before every sleep; `busy` when requests are in flight.
    pub(super) fn wants_to(&mut self, busy: bool) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let record = self.record(busy);
        record.sleeps += 1;
        record.promise >= WORTH_IT || record.sleeps >= PROBE_EVERY
    }

    /// Looks until there is something to do, or the time is over. True in the
    /// first case.
    pub(super) fn poll(&mut self, busy: bool, mut ready: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        let found = loop {
            if (0..LOOKS).any(|_| {
                std::hint::spin_loop();
                ready()
            }) {
                break true;
            }
            if start.elapsed() >= self.limit {
                break false;
            }
        };
        self.record(busy).learn(found);
        found
    }

    fn record(&mut self, busy: bool) -> &mut Record {
        if busy { &mut self.busy } else { &mut self.idle }
    }
}

impl Record {
    fn learn(&mut self, found: bool) {
        self.sleeps = 0;
        self.promise -= self.promise >> WEIGHT;
        if found {
            self.promise += CERTAIN >> WEIGHT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `count` chances to sleep: attempts made.
    fn attempts(poller: &mut Poller, count: u32, found: bool) -> u32 {
        let mut made = 0;
        for _ in 0..count {
            if poller.wants_to(true) {
                made += 1;
                poller.busy.learn(found);
            }
        }
        made
    }

    #[test]
    fn polling_in_vain_ends_and_is_tried_again_now_and_then() {
        let mut poller = Poller::new(Duration::from_micros(10));
        attempts(&mut poller, 100, false);
        assert_eq!(attempts(&mut poller, 160, false), 10);
        // It pays again: a few probes later every sleep is put off.
        attempts(&mut poller, 16 * 8, true);
        assert_eq!(attempts(&mut poller, 100, true), 100);
        // And a long quiet time costs a handful of attempts, not more.
        assert!(attempts(&mut poller, 100, false) < 12);
    }

    #[test]
    fn a_limit_of_zero_never_polls() {
        let mut poller = Poller::new(Duration::ZERO);
        assert_eq!(attempts(&mut poller, 1000, true), 0);
    }

    #[test]
    fn polling_ends_at_the_first_success_and_at_the_limit() {
        let mut poller = Poller::new(Duration::from_micros(50));
        let mut looks = 0;
        assert!(poller.poll(false, || {
            looks += 1;
            looks == 40
        }));
        assert_eq!(looks, 40);
        assert!(!poller.poll(false, || false));
    }
}
