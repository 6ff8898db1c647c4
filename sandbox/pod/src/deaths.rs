//! How often a sidecar of a running machine is started again: not without end, since something is
//! wrong then that a new process does not mend.
//!
//! Kept for cards by `cards`, for disks by the shim.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::PodError;

/// How often it may die, within what time, before the machine is given up.
const MOST: usize = 5;
const WITHIN: Duration = Duration::from_secs(60);

/// When it died lately.
#[derive(Debug, Default)]
pub struct Deaths(VecDeque<Instant>);

impl Deaths {
    /// It has died now, and this is how; given back if it is to be started again.
    ///
    /// # Errors
    ///
    /// [`PodError::KeepsDying`], for the machine to end with.
    pub fn another(&mut self, end: String) -> Result<String, PodError> {
        match self.too_many(Instant::now()) {
            None => Ok(end),
            Some(times) => Err(PodError::KeepsDying {
                end,
                times,
                seconds: WITHIN.as_secs(),
            }),
        }
    }

    /// How many there were, if those are too many.
    fn too_many(&mut self, now: Instant) -> Option<usize> {
        self.0.retain(|at| now.duration_since(*at) < WITHIN);
        self.0.push_back(now);
        (self.0.len() > MOST).then_some(self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dies_now_and_then_is_started_again_and_what_keeps_dying_is_not() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut deaths = Deaths::default();
        for turn in 0..20 {
            assert_eq!(deaths.too_many(at(turn * 13)), None, "{turn}");
        }
        let mut deaths = Deaths::default();
        let counts: Vec<_> = (0..6).map(|turn| deaths.too_many(at(turn))).collect();
        assert_eq!(counts, [None, None, None, None, None, Some(6)]);
        assert_eq!(deaths.too_many(at(64)), None);
    }
}
