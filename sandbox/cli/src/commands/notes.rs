//! What goes wrong in machines, for `pericarp node serve`: it reads what shims have written down and
//! writes beside it, so that `pericarp why` and kubectl say the same.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use pericarp_api::hello::printable;
use pericarp_kube::node::{Cause, Chronicle, Remark};
use pericarp_pod::history::{self, Kind};
use pericarp_pod::record::{self, PodRecord};

/// The namespace of containerd's that has Kubernetes' pods.
const NAMESPACE: &str = "k8s.io";

/// The directories of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notes;

impl Chronicle for Notes {
    fn of(&self, sandbox: &str) -> Vec<Cause> {
        let history = history::of(Path::new(history::BASE), NAMESPACE, sandbox);
        let causes = history.map_or_else(Vec::new, |history| history.causes);
        causes.into_iter().filter_map(told).collect()
    }

    fn note(&self, remark: Remark<'_>) {
        let directory = Path::new(record::BASE).join(NAMESPACE).join(remark.sandbox);
        // A pod of runc's, of which `pericarp why` knows nothing.
        if PodRecord::read(&directory).is_none() {
            return;
        }
        // What the shim refused comes back as containerd's answer.
        let known = history::of(Path::new(history::BASE), NAMESPACE, remark.sandbox);
        let last = known.as_ref().and_then(|all| all.causes.last());
        if last
            .is_some_and(|one| one.kind == Kind::Refused && remark.sentence.contains(&one.sentence))
        {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let cause = history::Cause {
            at: u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX),
            kind: Kind::Node,
            phase: "node".into(),
            container: remark.container.map(Into::into),
            sentence: printable(remark.sentence),
            ..history::Cause::default()
        };
        let base = Path::new(history::BASE);
        if let Err(error) = history::note(base, NAMESPACE, remark.sandbox, remark.pod, cause) {
            log::warn!(
                "what is wrong with {} is not written down: {error}",
                remark.pod
            );
        }
    }
}

/// As clients are told of it, if nobody else tells them: a refusal is in containerd's answer, and
/// the code of a command in the container's status.
fn told(cause: history::Cause) -> Option<Cause> {
    let reason = match cause.kind {
        Kind::Exit | Kind::Node | Kind::Refused => return None,
        Kind::DiskFull => "DiskFull",
        Kind::OutOfMemory => "OutOfMemory",
        Kind::Machine => "MachineEnded",
        Kind::HostOutOfMemory => "HostOutOfMemory",
    };
    Some(Cause {
        at: cause.at,
        reason,
        container: cause.container,
        sentence: printable(&cause.sentence),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_not_said_again() {
        let of = |kind| {
            told(history::Cause {
                kind,
                sentence: "a\u{1b}b".into(),
                ..history::Cause::default()
            })
        };
        assert_eq!(of(Kind::Refused), None);
        assert_eq!(of(Kind::Exit), None);
        let machine = of(Kind::Machine).unwrap();
        assert_eq!(machine.reason, "MachineEnded");
        assert_eq!(machine.sentence, "a\u{fffd}b");
    }
}
