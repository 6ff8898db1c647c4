//! How often a sidecar of a running machine is started again: not without end, since something is
//! wrong then that a new process does not mend.
//!
//! Kept for cards and shares by `lasting`, for disks by the shim.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{PodError, Sidecar};

/// How often it may die, within what time, before the machine is given up.
const MOST: usize = 5;
const WITHIN: Duration = Duration::from_secs(60);

/// When it died lately.
#[derive(Debug, Default)]
pub struct Deaths(VecDeque<Instant>);

impl Deaths {
    /// Has a sidecar launched again if it has ended; returns how it did. One that ends before it
    /// serves anybody has died once more.
    ///
    /// # Errors
    ///
    /// For the machine to end with: it has died too often, or cannot be started.
    pub fn revive(
        &mut self,
        sidecar: &mut Sidecar,
        mut launch: impl FnMut() -> Result<Sidecar, PodError>,
    ) -> Result<Option<PodError>, PodError> {
        let Some(mut end) = sidecar.how_it_ended() else {
            return Ok(None);
        };
        loop {
            end = self.another(end)?;
            match launch() {
                Ok(successor) => {
                    *sidecar = successor;
                    return Ok(Some(PodError::Sidecar(end)));
                }
                Err(PodError::Sidecar(again)) => end = again,
                Err(error) => return Err(error),
            }
        }
    }

    /// It has died now, and this is how; given back if it is to be started again.
    fn another(&mut self, end: String) -> Result<String, PodError> {
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
    use std::process::Command;

    use pericarp_hypervisor::{Confinement, Process};

    use super::*;

    fn sidecar(script: &str) -> Sidecar {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let mut process = Process::spawn("x", command, Confinement::default()).unwrap();
        if script.starts_with("exit") {
            process.wait_for(Duration::from_secs(10)).unwrap();
        }
        Sidecar::of("x", process)
    }

    #[test]
    fn what_has_ended_is_launched_until_it_serves() {
        let mut deaths = Deaths::default();
        let mut one = sidecar("exec sleep 100");
        let lives = deaths.revive(&mut one, || unreachable!());
        assert!(lives.unwrap().is_none());
        let mut one = sidecar("exit 3");
        let mut ends = vec!["again".to_owned()];
        let launch = || match ends.pop() {
            Some(end) => Err(PodError::Sidecar(end)),
            None => Ok(sidecar("exec sleep 100")),
        };
        let death = deaths.revive(&mut one, launch).unwrap().unwrap();
        assert!(death.to_string().ends_with("died (again)"), "{death}");
        assert!(one.death().is_none());
        let mut one = sidecar("exit 3");
        let error = deaths.revive(&mut one, || Err(PodError::Sidecar("x".into())));
        let error = error.unwrap_err().to_string();
        assert!(error.ends_with("died (x), 6 times within 60 s"), "{error}");
    }

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
