//! How often a sidecar of a running machine is started again: not without end, since something is
//! wrong then that a new process does not mend.
//!
//! Kept by `cards` and `disks`.

use std::{
    collections::VecDeque,
    fs,
    time::{Duration, Instant},
};

use crate::oom;

/// How often it may die, within what time, before the pod is given up.
const MOST: usize = 5;
const WITHIN: Duration = Duration::from_secs(60);

/// When it has died lately.
#[derive(Debug, Default)]
pub(crate) struct Lives(VecDeque<Instant>);

impl Lives {
    /// It has died now. Whether it is to be started again.
    pub(crate) fn spend(&mut self) -> bool {
        let now = Instant::now();
        self.0.retain(|at| now.duration_since(*at) < WITHIN);
        self.0.push_back(now);
        self.0.len() <= MOST
    }
}

/// A process that came later is as killable as the machine's others.
pub(crate) fn as_killable_as(machine: u32, process: u32) {
    let score = fs::read_to_string(format!("/proc/{machine}/oom_score_adj"));
    if let Some(score) = score.ok().and_then(|text| text.trim().parse().ok()) {
        oom::set(&[process], score);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_five_at_once() {
        let mut lives = Lives::default();
        for _ in 0..MOST {
            assert!(lives.spend());
        }
        assert!(!lives.spend());
        let long_ago = Instant::now().checked_sub(WITHIN).unwrap();
        lives.0.iter_mut().for_each(|at| *at = long_ago);
        assert!(lives.spend());
    }
}
