//! What looks at a pod that comes to rest have shown, the last complete one above all: somebody may end
//! the pod meanwhile.
//!
//! Called by `measure`.

use super::Measured;
use crate::observe::Pod;

/// What looks at a pod have shown so far.
#[derive(Debug, Default)]
pub(super) struct Looks {
    complete: Option<Measured>,
    /// Why the last one that saw the pod was not.
    lacks: Option<&'static str>,
    has_vanished: bool,
}

impl Looks {
    /// Takes the next one; whether another may show more.
    pub(super) fn take(&mut self, look: Option<Result<Measured, &'static str>>) -> bool {
        match look {
            Some(Ok(measured)) => (self.complete, self.lacks) = (Some(measured), None),
            Some(Err(lacks)) => self.lacks = Some(lacks),
            None => self.has_vanished = self.complete.is_some() || self.lacks.is_some(),
        }
        !self.has_vanished
    }

    /// The last complete one, or why there was none; `is_gone` says whether the pod has ended.
    pub(super) fn outcome(self, is_gone: impl Fn() -> bool) -> Result<Measured, &'static str> {
        match (self.complete, self.lacks) {
            (Some(measured), _) => Ok(measured),
            (None, Some(lacks)) if !self.has_vanished => Err(lacks),
            (None, None) if !is_gone() => Err(
                "is in no machine of ours; `pericarp node enable` has containerd know the handler",
            ),
            (None, _) => Err(
                "was gone before all of it was seen; a kubelet on this node may have ended it, as it \
                 does with pods that it does not know: try again, or with the kubelet stopped",
            ),
        }
    }
}

/// What a whole pod takes, or what is missing.
pub(super) fn of_pod(profile: &str, pod: &Pod) -> Result<Measured, &'static str> {
    if !pod.is_whole() {
        return Err("not all of its processes are there");
    }
    if pod.guest.and_then(|guest| guest.resident).is_none() {
        return Err("its guest's memory is not known; run it as root");
    }
    let processes = pod.processes.iter();
    let processes = processes.map(|one| Some((one.role.clone(), one.cost.proportional?)));
    let processes = processes.collect::<Option<_>>();
    Ok(Measured {
        profile: profile.to_owned(),
        hypervisor: pod.record.hypervisor.clone(),
        processes: processes
            .ok_or("the memory of its processes may not be read; run it as root")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::tests::sample;

    #[test]
    fn a_process_that_may_not_be_looked_at_is_no_measure() {
        let mut pod = sample(1);
        pod.processes[1].cost.proportional = None;
        assert!(of_pod("x", &pod).unwrap_err().contains("may not be read"));
        let mut pod = sample(1);
        pod.processes.pop();
        assert!(of_pod("x", &pod).unwrap_err().contains("not all"));
        let mut pod = sample(1);
        pod.guest = None;
        assert!(of_pod("x", &pod).unwrap_err().contains("guest's memory"));
    }

    #[test]
    fn the_last_whole_look_counts() {
        let whole = |profile: &str| Some(of_pod(profile, &sample(1)));
        let outcome = |all: Vec<Option<Result<Measured, &'static str>>>, is_gone| {
            let mut looks = Looks::default();
            let all = all.into_iter().map(|one| looks.take(one));
            let goes_on: Vec<bool> = all.collect();
            let outcome = looks.outcome(|| is_gone);
            (goes_on, outcome.map(|one| one.profile))
        };
        // A kubelet ends it while it is at rest.
        let (goes_on, last) = outcome(vec![whole("a"), whole("b"), Some(Err("x")), None], true);
        assert_eq!(goes_on, [true, true, true, false]);
        assert_eq!(last.unwrap(), "b");
        let (_, early) = outcome(vec![Some(Err("x")), None], true);
        assert!(early.unwrap_err().contains("a kubelet"));
        let (_, earlier) = outcome(vec![None, None], true);
        assert!(earlier.unwrap_err().contains("a kubelet"));
        let (goes_on, late) = outcome(vec![None, None, Some(Err("x"))], false);
        assert_eq!((goes_on, late), (vec![true; 3], Err("x")));
        let (_, never) = outcome(vec![None], false);
        assert!(never.unwrap_err().contains("in no machine of ours"));
    }
}
