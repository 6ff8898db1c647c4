//! Why pods in machines are not well: what a shim has written down of one is said where kubectl shows
//! it, and what the node itself refuses a pod is written down beside that. Called by `worker`.
//!
//! Both are for the one who asks `pericarp why` and the one who asks `kubectl describe`: they are told
//! the same sentence. Nothing here may fail the pod.

use std::fmt::Debug;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::seen::{Instance, Sandbox, Seen};
use super::spec::Pod;
use super::worker::Worker;

/// The end of a container and what is written down of it are not further apart.
const NEAR: Duration = Duration::from_secs(10);
/// So long after the end of a container it is looked at again for what is written down of it.
const AWAITED: Duration = Duration::from_secs(5);
/// Of a pod that runs this is looked for so often.
const REGULAR: Duration = Duration::from_secs(10);

/// One thing that went wrong in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// In one word, as events have it.
    pub reason: &'static str,
    /// The container's name, if it is about one.
    pub container: Option<String>,
    /// All of it in one sentence that is safe to print.
    pub sentence: String,
}

/// What the node itself says of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Remark<'a> {
    /// What containerd calls the pod.
    pub sandbox: &'a str,
    /// What Kubernetes calls it, `namespace/name`.
    pub pod: &'a str,
    /// The container's name, if it is about one.
    pub container: Option<&'a str>,
    /// All of it in one sentence.
    pub sentence: &'a str,
}

/// Where it is written down what goes wrong in pods.
pub trait Chronicle: Debug + Send + Sync {
    /// What a shim says of a pod, in the order of time: what nobody else has told a client. Nothing of
    /// a pod that is in no machine.
    fn of(&self, sandbox: &str) -> Vec<Cause>;
    /// Writes down what the node says, if the pod is in a machine.
    fn note(&self, remark: Remark<'_>);
}

/// A cause, and in which sandbox it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) sandbox: String,
    pub(super) cause: Cause,
}

/// What explains the end of a container that failed: what was said of it, else of its machine, when
/// it ended.
pub(super) fn explains<'a>(causes: &'a [Placed], one: &Instance) -> Option<&'a str> {
    if one.exit_code == 0 {
        return None;
    }
    let ended = nanoseconds(one.finished);
    let is_near = |placed: &&Placed| {
        let at = Duration::from_millis(placed.cause.at);
        placed.sandbox == one.sandbox && at.abs_diff(ended) <= NEAR
    };
    let all = || causes.iter().rev().filter(is_near);
    let own = all().find(|placed| placed.cause.container.as_ref() == Some(&one.name));
    let found = own.or_else(|| all().find(|placed| placed.cause.container.is_none()));
    found.map(|placed| placed.cause.sentence.as_str())
}

fn nanoseconds(since: i64) -> Duration {
    Duration::from_nanos(u64::try_from(since).unwrap_or_default())
}

impl Worker {
    /// Reads what has been written down of the pod, and tells what is new in it.
    pub(super) fn learn(&mut self, pod: &Pod, seen: &Seen) {
        let chronicle = &self.shared.chronicle;
        let of = |sandbox: &Sandbox| {
            let place = |cause| Placed {
                sandbox: sandbox.id.clone(),
                cause,
            };
            let causes = chronicle.of(&sandbox.id).into_iter();
            causes.map(place).collect::<Vec<_>>()
        };
        let causes: Vec<Placed> = seen.sandboxes.iter().rev().flat_map(of).collect();
        for Placed { cause, .. } in causes.iter().filter(|one| !self.causes.contains(one)) {
            let at = UNIX_EPOCH + Duration::from_millis(cause.at);
            let container = cause.container.as_deref();
            let events = &self.shared.events;
            events.tell_once(pod, container, cause.reason, &cause.sentence, at);
        }
        self.causes = causes;
    }

    /// When to look again for what may yet be written down: soon after containers have failed, and
    /// now and then of those that run, since what is killed beside a first process changes nothing that
    /// containerd tells. Never of a pod that is in no machine, as its class says.
    pub(super) fn until_learned(&self, pod: &Pod, seen: &Seen) -> Duration {
        if pod.spec.runtime_class_name.is_none() {
            return Duration::MAX;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let is_awaited = |one: &Instance| {
            one.exit_code != 0
                && now.abs_diff(nanoseconds(one.finished)) < AWAITED
                && explains(&self.causes, one).is_none()
        };
        match seen.containers.iter().any(is_awaited) {
            true => Duration::from_secs(1),
            false if seen.ready().is_some() => REGULAR,
            false => Duration::MAX,
        }
    }

    /// Writes down what the node says of a pod that has a sandbox.
    pub(super) fn note(&self, pod: &Pod, seen: &Seen, container: Option<&str>, sentence: &str) {
        if let Some(sandbox) = seen.sandbox() {
            self.shared.chronicle.note(Remark {
                sandbox: &sandbox.id,
                pod: &format!("{}/{}", pod.metadata.namespace, pod.metadata.name),
                container,
                sentence: sentence.trim_end(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(sandbox: &str, at: u64, container: Option<&str>, sentence: &str) -> Placed {
        Placed {
            sandbox: sandbox.into(),
            cause: Cause {
                at: at * 1000,
                reason: "MachineEnded",
                container: container.map(Into::into),
                sentence: sentence.into(),
            },
        }
    }

    #[test]
    fn the_end_of_a_container_is_explained_by_what_was_said_of_it_then() {
        let causes = [
            placed("old", 100, Some("a"), "of another machine"),
            placed("new", 100, Some("a"), "of a"),
            placed("new", 101, None, "of the machine"),
            placed("new", 500, Some("a"), "later"),
        ];
        let explained = |name: &str, finished: i64| {
            let one = Instance {
                name: name.into(),
                sandbox: "new".into(),
                exit_code: 255,
                finished: finished * 1_000_000_000,
                ..Instance::default()
            };
            explains(&causes, &one).map(str::to_owned)
        };
        assert_eq!(explained("a", 102).as_deref(), Some("of a"));
        assert_eq!(explained("b", 102).as_deref(), Some("of the machine"));
        assert_eq!(explained("b", 200), None);
        assert_eq!(explained("a", 495).as_deref(), Some("later"));
    }
}
