//! How long something that failed is left alone. Called by `worker`, for containers and images.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

/// After the first failure.
const FIRST: Duration = Duration::from_secs(10);
/// At most.
const MOST: Duration = Duration::from_secs(300);
/// What has held for so long counts as never having failed.
const FORGIVEN: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug)]
struct Entry {
    delay: Duration,
    /// When the last attempt was allowed.
    since: SystemTime,
}

/// The delays of some things, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Backoff(HashMap<String, Entry>);

/// Whether something may be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It may, now.
    Now,
    /// In a while.
    Later {
        /// The whole delay, as it is told to people.
        delay: Duration,
        /// What is left of it.
        left: Duration,
    },
}

impl Backoff {
    /// Whether `name`, which failed or ended at `failed`, may be tried at `now`; when it may, the
    /// next delay is twice as long.
    ///
    /// `failures` is how often that happened before, as far as somebody else remembers: this
    /// value is new after a restart, and what failed all the time is not to be tried at once then.
    pub(super) fn turn(
        &mut self,
        name: &str,
        failed: SystemTime,
        now: SystemTime,
        failures: u32,
    ) -> Turn {
        let passed = |since: SystemTime| now.duration_since(since).unwrap_or_default();
        let entry = self.0.get(name).copied().or_else(|| {
            let delay = after(failures)?;
            Some(Entry {
                delay,
                since: failed,
            })
        });
        let Some(entry) = entry else {
            self.set(name, FIRST, now);
            return Turn::Now;
        };
        // The clock was set back since: how long it has waited is not known, and it may be long
        // until the clock is there again.
        if failed > now || entry.since > now {
            self.set(name, entry.delay, now);
            return Turn::Now;
        }
        // It held for long after the last attempt.
        let held = failed.duration_since(entry.since).unwrap_or_default();
        if held > FORGIVEN {
            self.set(name, FIRST, now);
            return Turn::Now;
        }
        if let Some(left) = entry.delay.checked_sub(passed(failed))
            && !left.is_zero()
        {
            let delay = entry.delay;
            return Turn::Later { delay, left };
        }
        self.set(name, (entry.delay * 2).min(MOST), now);
        Turn::Now
    }

    /// Forgets what failed before.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }

    fn set(&mut self, name: &str, delay: Duration, since: SystemTime) {
        self.0.insert(name.to_owned(), Entry { delay, since });
    }
}

/// The delay after so many failures, of which the first is free.
fn after(failures: u32) -> Option<Duration> {
    let doubled = failures.checked_sub(1)?;
    Some((FIRST * 2_u32.pow(doubled.min(5))).min(MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn later(delay: u64, left: u64) -> Turn {
        Turn::Later {
            delay: Duration::from_secs(delay),
            left: Duration::from_secs(left),
        }
    }

    #[test]
    fn the_first_restart_is_free_and_delays_double() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.turn("c", at(100), at(100), 0), Turn::Now);
        assert_eq!(backoff.turn("c", at(101), at(102), 1), later(10, 9));
        assert_eq!(backoff.turn("c", at(101), at(111), 1), Turn::Now);
        assert_eq!(backoff.turn("c", at(112), at(113), 2), later(20, 19));
        let mut now = 200;
        for _ in 0..10 {
            now += 400;
            assert_eq!(backoff.turn("c", at(now - 301), at(now), 3), Turn::Now);
        }
        assert_eq!(backoff.turn("c", at(now), at(now), 13), later(300, 300));
    }

    #[test]
    fn what_held_for_long_is_forgiven() {
        let mut backoff = Backoff::default();
        for second in [0, 50, 100] {
            assert_eq!(backoff.turn("c", at(second), at(second + 40), 0), Turn::Now);
        }
        assert_eq!(backoff.turn("c", at(1000), at(1000), 3), Turn::Now);
        assert_eq!(backoff.turn("c", at(1001), at(1001), 4), later(10, 10));
    }

    #[test]
    fn a_clock_that_is_set_back_keeps_nobody_waiting() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.turn("c", at(5000), at(5001), 0), Turn::Now);
        assert_eq!(backoff.turn("c", at(5002), at(5003), 1), later(10, 9));
        // An hour back: what ended then ends in the future.
        assert_eq!(backoff.turn("c", at(5002), at(1400), 1), Turn::Now);
        // From there on it is as it was.
        assert_eq!(backoff.turn("c", at(1401), at(1402), 2), later(10, 9));
        assert_eq!(backoff.turn("c", at(1401), at(1411), 2), Turn::Now);
        assert_eq!(backoff.turn("c", at(1412), at(1413), 3), later(20, 19));
        // And on by an hour.
        assert_eq!(backoff.turn("c", at(1412), at(5000), 3), Turn::Now);
    }

    #[test]
    fn a_restart_does_not_forget_what_failed_all_the_time() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.turn("c", at(100), at(110), 3), later(40, 30));
        assert_eq!(backoff.turn("c", at(100), at(140), 3), Turn::Now);
        assert_eq!(backoff.turn("c", at(141), at(141), 4), later(80, 80));
        assert_eq!(after(0), None);
        assert_eq!(after(90), Some(MOST));
    }
}
