//! When the parts of the pod's start were over, and of its containers', for `pericarp_pod::starts`.
//!
//! Told by `bootstrap` (when the first process of the shim began), `serve`, `machine` and `pod`. What
//! is over before the pod has a directory is kept until it has. Nothing here may fail the pod: what
//! cannot be written is a line in the log.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pericarp_pod::starts::{Part, append};
use rustix::time::{ClockId, clock_gettime};

/// Has, for the copy of the shim that serves, the nanoseconds at which its first process began.
pub(crate) const BEGAN: &str = "PERICARP_SHIM_BEGAN";
/// Parts that are written: a container has five, and may be started again for ever.
const MOST: usize = 512;

/// The time since this machine was started, the same for all processes.
pub(crate) fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or_default(),
        u32::try_from(now.tv_nsec).unwrap_or_default(),
    )
}

#[derive(Debug)]
struct State {
    /// Of the whole.
    began: Duration,
    /// Of the pod's next part.
    last: Duration,
    /// Not written yet.
    kept: Vec<Part>,
    /// The pod has been made or was tried to.
    used: bool,
    written: usize,
}

/// The parts of one pod.
#[derive(Debug)]
pub(crate) struct Stamps {
    directory: PathBuf,
    id: String,
    state: Mutex<State>,
}

impl Stamps {
    /// Those of the pod with this directory, whose shim began at `began`.
    pub(crate) fn new(directory: &Path, id: &str, began: Duration) -> Self {
        Self {
            directory: directory.to_owned(),
            id: id.to_owned(),
            state: Mutex::new(State {
                began,
                last: began,
                kept: Vec::new(),
                used: false,
                written: 0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// containerd has asked for the pod. The shim's own start belongs to the first one it is asked for.
    pub(crate) fn asked(&self) {
        let mut state = self.state();
        if std::mem::replace(&mut state.used, true) {
            let now = now();
            *state = State {
                began: now,
                last: now,
                kept: Vec::new(),
                used: true,
                written: 0,
            };
            return;
        }
        drop(state);
        self.over("call");
    }

    /// A part of the pod's start is over now.
    pub(crate) fn over(&self, phase: &str) {
        self.over_at(phase, now());
    }

    /// A part was over at a moment that has passed.
    pub(crate) fn over_at(&self, phase: &str, at: Duration) {
        let mut state = self.state();
        let part = part(&self.id, phase, state.last, at, state.began);
        state.last = at.max(state.last);
        state.kept.push(part);
    }

    /// The pod has a machine: writes what is known of its start, and says it in the log.
    pub(crate) fn made(&self) {
        let mut state = self.state();
        let kept = std::mem::take(&mut state.kept);
        let total = state.last.saturating_sub(state.began);
        log::info!("{}", sentence(&kept, total));
        self.write(state, &kept);
    }

    /// A part of a container's start is over that began at `from`; when it was.
    pub(crate) fn of(&self, id: &str, phase: &str, from: Duration) -> Duration {
        let at = now();
        let state = self.state();
        let part = part(id, phase, from, at, state.began);
        self.write(state, &[part]);
        at
    }

    fn write(&self, mut state: MutexGuard<'_, State>, parts: &[Part]) {
        if state.written >= MOST {
            return;
        }
        state.written += parts.len();
        if let Err(error) = append(&self.directory, parts) {
            log::warn!("how long the start took is not written down: {error}");
        }
    }
}

fn part(id: &str, phase: &str, from: Duration, at: Duration, began: Duration) -> Part {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Part {
        id: id.to_owned(),
        phase: phase.to_owned(),
        at_us: us(at.saturating_sub(began)),
        took_us: us(at.saturating_sub(from)),
    }
}

fn sentence(parts: &[Part], total: Duration) -> String {
    let parts = parts
        .iter()
        .map(|part| format!("{} {}", part.phase, part.took_us / 1000));
    let parts: Vec<String> = parts.collect();
    format!(
        "the pod's start took {} ms: {}",
        total.as_millis(),
        parts.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use pericarp_pod::starts::read;

    use super::*;

    #[test]
    fn parts_follow_each_other_and_a_second_pod_begins_anew() {
        let directory =
            std::env::temp_dir().join(format!("pericarp-stamps-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let began = now();
        let stamps = Stamps::new(&directory, "p", began);
        stamps.over_at("shim", began + Duration::from_millis(3));
        stamps.asked();
        stamps.over_at("kernel", began + Duration::from_secs(4));
        // The guest's word for it may be older than what was over before.
        stamps.over_at("agent", began + Duration::from_secs(3));
        stamps.made();
        let at = stamps.of("c", "root", began);
        assert!(at >= began);
        let first = read(&directory);
        stamps.asked();
        stamps.over("prepare");
        stamps.made();
        let second = read(&directory);
        std::fs::remove_dir_all(&directory).unwrap();
        let phases: Vec<_> = first.iter().map(|part| part.phase.as_str()).collect();
        assert_eq!(phases, ["shim", "call", "kernel", "agent", "root"]);
        assert_eq!((first[0].at_us, first[0].took_us), (3000, 3000));
        assert_eq!((first[2].at_us, first[3].took_us), (4_000_000, 0));
        let new = &second[first.len()..];
        assert_eq!(new.len(), 1, "{new:?}");
        assert_eq!(new[0].at_us, new[0].took_us);
    }

    #[test]
    fn the_log_has_all_of_it_in_one_line() {
        let part = |phase: &str, took_us| Part {
            phase: phase.into(),
            took_us,
            ..Part::default()
        };
        assert_eq!(
            sentence(
                &[part("shim", 12_900), part("call", 400)],
                Duration::from_millis(13)
            ),
            "the pod's start took 13 ms: shim 12, call 0"
        );
    }
}
