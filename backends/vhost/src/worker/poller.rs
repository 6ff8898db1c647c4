//! Whether a worker that has nothing to do looks again for a moment or sleeps.
//!
//! Going to sleep and being woken costs the worker several microseconds and the
//! driver a kick; looking at the rings costs nothing but the time it takes. So
//! a worker polls for a short time, and only while that has lately been enough
//! more often than not: a disk that takes its time, or a guest that does, is
//! waited for asleep. The time is what the requests since the last attempt can
//! pay for: a driver that gets many results at once takes longer to come back,
//! and what its kick and our waking would cost is shared by as many. Drivers are
//! asked to kick only when the worker goes to sleep.
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
/// How long an attempt may take that no request pays for. Direct reads at
/// depth 1: 20 us of CPU each, as without any polling; with 15, 32 us.
const BASE: Duration = Duration::from_micros(5);
/// What each completion since the last attempt or sleep adds.
const PER_COMPLETION: Duration = Duration::from_micros(1);

/// Decides, and learns from what came of it.
#[derive(Debug)]
pub(super) struct Poller {
    limit: Duration,
    /// What the next attempt may take, as far as `limit` lets it.
    earned: Duration,
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
            earned: BASE,
            idle: fresh(),
            busy: fresh(),
        }
    }

    /// So many completions came from the kernel.
    pub(super) fn earn(&mut self, completions: usize) {
        let completions = u32::try_from(completions).unwrap_or(u32::MAX);
        let more = PER_COMPLETION.saturating_mul(completions);
        self.earned = self.earned.saturating_add(more);
    }

    /// Asked before every sleep; `busy` when requests are in flight.
    pub(super) fn wants_to(&mut self, busy: bool) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let record = self.record(busy);
        record.sleeps += 1;
        let wants = record.promise >= WORTH_IT || record.sleeps >= PROBE_EVERY;
        if !wants {
            self.earned = BASE;
        }
        wants
    }

    /// Looks until there is something to do, or the time is over. True in the
    /// first case.
    pub(super) fn poll(&mut self, busy: bool, ready: impl FnMut() -> bool) -> bool {
        let found = look_for(self.spend(), ready);
        self.record(busy).learn(found);
        found
    }

    /// How long an attempt may take that is made now.
    fn spend(&mut self) -> Duration {
        std::mem::replace(&mut self.earned, BASE).min(self.limit)
    }

    fn record(&mut self, busy: bool) -> &mut Record {
        if busy { &mut self.busy } else { &mut self.idle }
    }
}

/// Looks until there is something to do, or the time is over. True in the
/// first case.
pub(super) fn look_for(limit: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if (0..LOOKS).any(|_| {
            std::hint::spin_loop();
            ready()
        }) {
            return true;
        }
        if start.elapsed() >= limit {
            return false;
        }
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
    fn requests_pay_for_the_time() {
        let limit = Duration::from_micros(20);
        let mut poller = Poller::new(limit);
        assert_eq!(poller.spend(), BASE);
        poller.earn(3);
        assert_eq!(poller.spend(), BASE + 3 * PER_COMPLETION);
        assert_eq!(poller.spend(), BASE, "once");
        poller.earn(usize::MAX);
        poller.earn(usize::MAX);
        assert_eq!(poller.spend(), limit);
        // What a sleep had is not there for the next attempt.
        attempts(&mut poller, 100, false);
        poller.earn(8);
        assert!(!poller.wants_to(true));
        assert_eq!(poller.spend(), BASE);
        let mut short = Poller::new(BASE / 2);
        assert_eq!(short.spend(), BASE / 2);
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
