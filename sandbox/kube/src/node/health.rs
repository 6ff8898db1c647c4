//! Whether a container is well, from the answers of its probes. Called by `probes`, which asks.
//!
//! The states and thresholds are those of kubelet's prober (pkg/kubelet/prober/worker.go).

use std::time::Duration;

use super::plan::{Failed, Health};
use super::spec::{Container, Probe};

/// What a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Whether it has come up; nothing else is asked before.
    Startup,
    /// Whether it is to be started again.
    Liveness,
    /// Whether it can do its work.
    Readiness,
}

impl Kind {
    /// As people know it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// The answers of one probe.
#[derive(Clone, Copy, Debug)]
struct Tally {
    needed: (u32, u32),
    /// What counts, once enough answers agree.
    result: Option<bool>,
    last: Option<bool>,
    run: u32,
}

impl Tally {
    fn new(probe: &Probe) -> Self {
        let needed = |said: Option<u32>, default| said.unwrap_or(default).max(1);
        Self {
            needed: (
                needed(probe.success_threshold, 1),
                needed(probe.failure_threshold, 3),
            ),
            result: None,
            last: None,
            run: 0,
        }
    }

    /// Counts an answer; true when another result counts now.
    fn answer(&mut self, well: bool) -> bool {
        self.run = if self.last == Some(well) {
            self.run.saturating_add(1)
        } else {
            1
        };
        self.last = Some(well);
        let needed = if well { self.needed.0 } else { self.needed.1 };
        let changed = self.run >= needed && self.result != Some(well);
        if changed {
            self.result = Some(well);
        }
        changed
    }
}

/// What is known of one container.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    startup: Option<Tally>,
    liveness: Option<Tally>,
    readiness: Option<Tally>,
}

impl State {
    /// Of a container that was started, or found running: then it is as it was said to be.
    pub(super) fn new(container: &Container, was: Health) -> Self {
        let tally = |probe: &Option<Probe>| probe.as_ref().map(Tally::new);
        let mut state = Self {
            startup: tally(&container.startup_probe),
            liveness: tally(&container.liveness_probe),
            readiness: tally(&container.readiness_probe),
        };
        if let Some(startup) = &mut state.startup {
            startup.result = was.started.then_some(true);
        }
        if let Some(readiness) = &mut state.readiness {
            readiness.result = was.ready.then_some(true);
        }
        state
    }

    /// Whether this probe is to be asked now.
    pub(super) fn is_asked(&self, kind: Kind) -> bool {
        let Health {
            started, failed, ..
        } = self.health();
        // It is on its way out.
        if failed.is_some() {
            return false;
        }
        match kind {
            Kind::Startup => !started && self.startup.is_some(),
            Kind::Liveness => started && self.liveness.is_some(),
            Kind::Readiness => started && self.readiness.is_some(),
        }
    }

    /// Counts an answer; true when the container's health is another.
    pub(super) fn answer(&mut self, kind: Kind, well: bool) -> bool {
        let tally = match kind {
            Kind::Startup => &mut self.startup,
            Kind::Liveness => &mut self.liveness,
            Kind::Readiness => &mut self.readiness,
        };
        tally.as_mut().is_some_and(|tally| tally.answer(well))
    }

    /// How it is.
    pub(super) fn health(&self) -> Health {
        let result = |tally: &Option<Tally>| tally.as_ref().map(|tally| tally.result);
        let startup = result(&self.startup);
        let started = startup.is_none_or(|result| result == Some(true));
        let ready = result(&self.readiness).is_none_or(|result| result == Some(true));
        let failed = if startup == Some(Some(false)) {
            Some(Failed::Startup)
        } else if started && result(&self.liveness) == Some(Some(false)) {
            Some(Failed::Liveness)
        } else {
            None
        };
        Health {
            started,
            ready: started && ready,
            failed,
        }
    }
}

/// How long after its start a container is first asked.
pub(super) fn delay(probe: &Probe) -> Duration {
    Duration::from_secs(probe.initial_delay_seconds.unwrap_or(0).into())
}

/// How long it is left alone after an answer.
pub(super) fn period(probe: &Probe) -> Duration {
    let seconds = probe.period_seconds.filter(|seconds| *seconds > 0);
    Duration::from_secs(seconds.unwrap_or(10).into())
}

/// How long an answer may take.
pub(super) fn limit(probe: &Probe) -> Duration {
    let seconds = probe.timeout_seconds.filter(|seconds| *seconds > 0);
    Duration::from_secs(seconds.unwrap_or(1).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize as _;
    use serde_json::{Value, json};

    fn state(container: Value, was: Health) -> State {
        State::new(&Container::deserialize(container).unwrap(), was)
    }

    fn probe(success: u32, failure: u32) -> Value {
        json!({"exec": {"command": ["x"]}, "successThreshold": success, "failureThreshold": failure})
    }

    #[test]
    fn who_is_not_asked_is_well() {
        let health = state(json!({}), Health::default()).health();
        assert_eq!(
            (health.started, health.ready, health.failed),
            (true, true, None)
        );
    }

    #[test]
    fn readiness_takes_as_many_answers_as_said() {
        let mut state = state(json!({"readinessProbe": probe(2, 3)}), Health::default());
        let answers = [
            (true, false, false),
            (true, true, true),
            (false, false, true),
            (false, false, true),
            (true, false, true),
            (false, false, true),
            (false, false, true),
            (false, true, false),
            (false, false, false),
        ];
        for (at, (answer, changed, ready)) in answers.into_iter().enumerate() {
            assert_eq!(state.answer(Kind::Readiness, answer), changed, "{at}");
            assert_eq!(state.health().ready, ready, "{at}");
        }
    }

    #[test]
    fn liveness_waits_for_startup() {
        let container = json!({"startupProbe": probe(1, 2), "livenessProbe": probe(1, 1)});
        let mut state = state(container.clone(), Health::default());
        assert!(state.is_asked(Kind::Startup) && !state.is_asked(Kind::Liveness));
        state.answer(Kind::Startup, false);
        assert_eq!(state.health(), Health::default());
        state.answer(Kind::Startup, true);
        assert!(!state.is_asked(Kind::Startup) && state.is_asked(Kind::Liveness));
        assert!(state.health().started && state.health().ready);
        assert!(state.answer(Kind::Liveness, false));
        assert_eq!(state.health().failed, Some(Failed::Liveness));
        assert!(!state.is_asked(Kind::Liveness));

        let mut never = self::state(container, Health::default());
        never.answer(Kind::Startup, false);
        never.answer(Kind::Startup, false);
        assert_eq!(never.health().failed, Some(Failed::Startup));
    }

    #[test]
    fn who_was_ready_stays_ready_until_it_is_not() {
        let container = json!({"startupProbe": probe(1, 2), "readinessProbe": probe(1, 1)});
        let was = Health {
            started: true,
            ready: true,
            failed: None,
        };
        let mut state = state(container, was);
        assert_eq!(state.health(), was);
        assert!(state.answer(Kind::Readiness, false));
        assert!(!state.health().ready);
    }

    #[test]
    fn times_have_their_defaults() {
        let probe = Probe::default();
        let seconds = |time: Duration| time.as_secs();
        assert_eq!(
            (
                seconds(delay(&probe)),
                seconds(period(&probe)),
                seconds(limit(&probe))
            ),
            (0, 10, 1)
        );
    }
}
