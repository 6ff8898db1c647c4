//! What is to be done next for a pod: from its manifest, what containerd has of it, and how its
//! containers are. It decides and does nothing; `worker` does it and asks again.

use super::seen::{Instance, Seen, State};
use super::spec::{Container, Pod, RestartPolicy};

/// How a container that runs is, by its probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Health {
    /// It has come up; true where nobody asks.
    pub(super) started: bool,
    /// It can do its work.
    pub(super) ready: bool,
    /// The probe that says that it is to be started again.
    pub(super) failed: Option<Failed>,
}

/// A probe that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    Liveness,
    Startup,
}

impl Failed {
    /// As people know it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Liveness => "liveness",
            Self::Startup => "startup",
        }
    }
}

/// Health by the id of a container.
pub(super) type Healths<'a> = dyn Fn(&str) -> Health + 'a;

/// What the pod's sandbox needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SandboxNeed {
    /// Nothing: it is there, or none is wanted any more.
    Nothing,
    /// A new one, the how manieth.
    Make(u32),
}

/// A container to be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kill {
    pub(super) id: String,
    pub(super) name: String,
    /// The probe that wants it; else the pod ends, or containerd does not know the container.
    pub(super) failed: Option<Failed>,
}

/// A container to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Start {
    pub(super) name: String,
    /// How many of its name there were.
    pub(super) attempt: u32,
    /// The one whose end is the reason, when there is one.
    pub(super) after: Option<String>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) sandbox: SandboxNeed,
    pub(super) kill: Vec<Kill>,
    /// Containers that were made and never started.
    pub(super) remove: Vec<String>,
    pub(super) start: Vec<Start>,
    /// Nothing of the pod will run again.
    pub(super) over: bool,
}

impl Plan {
    fn nothing() -> Self {
        Self {
            sandbox: SandboxNeed::Nothing,
            kill: Vec::new(),
            remove: Vec::new(),
            start: Vec::new(),
            over: false,
        }
    }
}

/// For a pod that is to run.
pub(super) fn run(pod: &Pod, seen: &Seen, health: &Healths<'_>) -> Plan {
    if seen.ready().is_none() {
        return without_sandbox(pod, seen);
    }
    let mut plan = Plan::nothing();
    let begun = pod
        .spec
        .containers
        .iter()
        .any(|one| seen.current(&one.name).is_some());
    for container in &pod.spec.init_containers {
        let next = if container.is_sidecar() {
            sidecar(pod, container, seen, health, &mut plan)
        } else if begun {
            Next::GoOn
        } else {
            first(pod, container, seen, &mut plan)
        };
        match next {
            Next::GoOn => {}
            Next::Wait if begun => {}
            Next::Wait => return plan,
            Next::Fail => {
                return over(seen);
            }
        }
    }
    let mut lasting = false;
    for container in &pod.spec.containers {
        lasting |= main(pod, container, seen, health, &mut plan);
    }
    if lasting { plan } else { over(seen) }
}

/// For a pod that is to end: its containers first, then the sidecars, the last of them first.
pub(super) fn end(pod: &Pod, seen: &Seen) -> Plan {
    let mut plan = Plan::nothing();
    plan.over = true;
    let sidecars = pod.spec.init_containers.iter();
    let sidecars: Vec<&str> = sidecars
        .filter(|one| one.is_sidecar())
        .map(|one| one.name.as_str())
        .collect();
    let is_sidecar = |one: &&Instance| sidecars.contains(&one.name.as_str());
    let mains: Vec<&Instance> = seen.alive().filter(|one| !is_sidecar(one)).collect();
    if mains.is_empty() {
        let mut last_first = sidecars.iter().rev();
        let next = last_first.find_map(|name| seen.alive().find(|one| one.name == *name));
        plan.kill.extend(next.map(|one| kill(one, None)));
    } else {
        plan.kill
            .extend(mains.into_iter().map(|one| kill(one, None)));
    }
    plan
}

fn over(seen: &Seen) -> Plan {
    let mut plan = Plan::nothing();
    plan.over = true;
    plan.kill.extend(seen.alive().map(|one| kill(one, None)));
    plan
}

fn kill(one: &Instance, failed: Option<Failed>) -> Kill {
    Kill {
        id: one.id.clone(),
        name: one.name.clone(),
        failed,
    }
}

/// A new sandbox is made when something is to run in it.
fn without_sandbox(pod: &Pod, seen: &Seen) -> Plan {
    let wanted = pod.spec.containers.iter().any(|container| {
        let latest = seen.latest(&container.name);
        latest.is_none_or(|latest| again(pod.spec.restart_policy, latest))
    });
    // What was running in a sandbox that is gone has failed, whatever it was.
    let never = pod.spec.restart_policy == RestartPolicy::Never && !seen.containers.is_empty();
    if !wanted || never {
        return over(seen);
    }
    let attempt = seen.sandbox().map_or(0, |sandbox| sandbox.attempt + 1);
    Plan {
        sandbox: SandboxNeed::Make(attempt),
        ..Plan::nothing()
    }
}

enum Next {
    GoOn,
    Wait,
    Fail,
}

/// One of those that come first and end.
fn first(pod: &Pod, container: &Container, seen: &Seen, plan: &mut Plan) -> Next {
    match seen.current(&container.name) {
        None => start(container, seen, plan),
        Some(one) => match one.state {
            State::Running => {}
            State::Exited if one.exit_code == 0 => return Next::GoOn,
            State::Exited if pod.spec.restart_policy == RestartPolicy::Never => return Next::Fail,
            State::Exited => start(container, seen, plan),
            State::Created | State::Unknown => replace(container, one, seen, plan),
        },
    }
    Next::Wait
}

/// One of those that come first and stay, whatever the pod's policy is.
fn sidecar(
    _: &Pod,
    container: &Container,
    seen: &Seen,
    health: &Healths<'_>,
    plan: &mut Plan,
) -> Next {
    match seen.current(&container.name) {
        None => start(container, seen, plan),
        Some(one) => match one.state {
            State::Running => {
                let health = health(&one.id);
                if health.failed.is_some() {
                    plan.kill.push(kill(one, health.failed));
                } else if health.started {
                    return Next::GoOn;
                }
            }
            State::Exited => start(container, seen, plan),
            State::Created | State::Unknown => replace(container, one, seen, plan),
        },
    }
    Next::Wait
}

/// One of the pod's own. Whether it runs or will.
fn main(
    pod: &Pod,
    container: &Container,
    seen: &Seen,
    health: &Healths<'_>,
    plan: &mut Plan,
) -> bool {
    let policy = pod.spec.restart_policy;
    let Some(one) = seen.current(&container.name) else {
        // It may have done its work in a sandbox that is gone.
        let done = seen.latest(&container.name);
        let wanted = done.is_none_or(|latest| again(policy, latest));
        if wanted {
            start(container, seen, plan);
        }
        return wanted;
    };
    match one.state {
        State::Running => {
            let failed = health(&one.id).failed;
            plan.kill
                .extend(failed.map(|failed| kill(one, Some(failed))));
            true
        }
        State::Exited if again(policy, one) => {
            start(container, seen, plan);
            true
        }
        State::Exited => false,
        State::Created | State::Unknown => {
            replace(container, one, seen, plan);
            true
        }
    }
}

/// Whether a container that is over is to be started again.
fn again(policy: RestartPolicy, one: &Instance) -> bool {
    match policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => one.state != State::Exited || one.exit_code != 0,
        RestartPolicy::Never => false,
    }
}

fn start(container: &Container, seen: &Seen, plan: &mut Plan) {
    let latest = seen.latest(&container.name);
    plan.start.push(Start {
        name: container.name.clone(),
        attempt: latest.map_or(0, |latest| latest.attempt + 1),
        after: latest.map(|latest| latest.id.clone()),
    });
}

/// What was never started, or is not known any more, gives way to a new one. The new one is
/// planned once the old one is gone.
fn replace(container: &Container, one: &Instance, seen: &Seen, plan: &mut Plan) {
    if one.state == State::Created {
        plan.remove.push(one.id.clone());
        start(container, seen, plan);
    } else {
        plan.kill.push(kill(one, None));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::seen::Sandbox;
    use serde_json::{Value, json};

    fn pod(spec: Value) -> Pod {
        Pod::read(&json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    fn two(policy: &str) -> Pod {
        pod(json!({
            "restartPolicy": policy,
            "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
            "containers": [{"name": "a"}, {"name": "b"}],
        }))
    }

    /// Containers as `name attempt state`; an exit code is a state. All in the ready sandbox.
    fn seen(containers: &[(&str, u32, &str)]) -> Seen {
        let sandbox = Sandbox {
            id: "box".into(),
            ready: true,
            ..Sandbox::default()
        };
        let instance = |(name, attempt, state): &(&str, u32, &str)| Instance {
            id: format!("{name}{attempt}"),
            name: (*name).into(),
            sandbox: "box".into(),
            attempt: *attempt,
            state: match *state {
                "running" => State::Running,
                "created" => State::Created,
                "unknown" => State::Unknown,
                _ => State::Exited,
            },
            exit_code: state.parse().unwrap_or_default(),
            ..Instance::default()
        };
        Seen {
            sandboxes: vec![sandbox],
            containers: containers.iter().map(instance).collect(),
        }
    }

    const WELL: Health = Health {
        started: true,
        ready: true,
        failed: None,
    };

    fn planned(pod: &Pod, containers: &[(&str, u32, &str)]) -> (Vec<String>, Vec<String>, bool) {
        let plan = run(pod, &seen(containers), &|_| WELL);
        assert_eq!(plan.sandbox, SandboxNeed::Nothing);
        let start = plan.start.iter();
        let start = start.map(|one| format!("{}{}", one.name, one.attempt));
        let kill = plan.kill.iter().map(|one| one.id.clone());
        (start.collect(), kill.collect(), plan.over)
    }

    #[test]
    fn containers_come_in_their_order() {
        let pod = two("Always");
        let starts = |containers: &[(&str, u32, &str)]| planned(&pod, containers).0;
        assert_eq!(starts(&[]), ["i0"]);
        assert!(starts(&[("i", 0, "running")]).is_empty());
        assert_eq!(starts(&[("i", 0, "1")]), ["i1"]);
        assert_eq!(starts(&[("i", 0, "1"), ("i", 1, "0")]), ["s0"]);
        let up = [("i", 0, "0"), ("s", 0, "running")];
        assert_eq!(starts(&up), ["a0", "b0"]);
        assert_eq!(starts(&[up[0], ("s", 0, "0")]), ["s1"]);
        // Once it has begun, those that came first are not started again.
        let begun = [("a", 0, "running"), ("s", 0, "3"), ("b", 4, "0")];
        assert_eq!(starts(&begun), ["s1", "b5"]);
    }

    #[test]
    fn a_sidecar_that_has_not_come_up_is_waited_for() {
        let pod = two("Always");
        let seen = seen(&[("i", 0, "0"), ("s", 0, "running")]);
        let plan = run(&pod, &seen, &|_| Health::default());
        assert_eq!(plan, Plan::nothing());
        let failed = Some(Failed::Startup);
        let health = Health { failed, ..WELL };
        let plan = run(&pod, &seen, &|_| health);
        assert_eq!(plan.kill, [kill(&seen.containers[1], failed)]);
    }

    #[test]
    fn policies() {
        let ended = [
            ("i", 0, "0"),
            ("s", 0, "running"),
            ("a", 0, "0"),
            ("b", 0, "7"),
        ];
        let nothing = Vec::<String>::new();
        let of = |policy: &str| planned(&two(policy), &ended);
        assert_eq!(of("Always").0, ["a1", "b1"]);
        assert_eq!(of("OnFailure").0, ["b1"]);
        assert_eq!(of("Never"), (nothing.clone(), vec!["s0".into()], true));
        let failed = planned(&two("Never"), &[("i", 0, "1")]);
        assert_eq!(failed, (nothing, Vec::new(), true));
    }

    #[test]
    fn a_probe_that_fails_ends_its_container() {
        let pod = pod(json!({"restartPolicy": "Never", "containers": [{"name": "a"}]}));
        let seen = seen(&[("a", 0, "running")]);
        let failed = Some(Failed::Liveness);
        let plan = run(&pod, &seen, &|_| Health { failed, ..WELL });
        assert_eq!(plan.kill, [kill(&seen.containers[0], failed)]);
        assert!(!plan.over);
    }

    #[test]
    fn what_was_never_started_gives_way() {
        let pod = pod(json!({"containers": [{"name": "a"}]}));
        let plan = run(&pod, &seen(&[("a", 2, "created")]), &|_| WELL);
        assert_eq!(plan.remove, ["a2"]);
        assert_eq!((plan.start.len(), plan.start[0].attempt), (1, 3));
        let plan = run(&pod, &seen(&[("a", 2, "unknown")]), &|_| WELL);
        assert_eq!((plan.kill.len(), plan.start.len()), (1, 0));
    }

    #[test]
    fn a_sandbox_that_is_gone_is_made_again_when_something_is_to_run() {
        let need = |policy: &str, containers: &[(&str, u32, &str)]| {
            let pod = pod(json!({"restartPolicy": policy, "containers": [{"name": "a"}]}));
            let mut seen = seen(containers);
            seen.sandboxes[0].ready = false;
            seen.sandboxes[0].attempt = 2;
            let plan = run(&pod, &seen, &|_| WELL);
            (plan.sandbox, plan.over)
        };
        let made = (SandboxNeed::Make(3), false);
        let over = (SandboxNeed::Nothing, true);
        assert_eq!(need("Always", &[("a", 0, "0")]), made);
        assert_eq!(need("OnFailure", &[("a", 0, "1")]), made);
        assert_eq!(need("OnFailure", &[("a", 0, "0")]), over);
        assert_eq!(need("Never", &[]), made);
        assert_eq!(need("Never", &[("a", 0, "255")]), over);
        let nothing = run(&two("Never"), &Seen::default(), &|_| WELL);
        assert_eq!(nothing.sandbox, SandboxNeed::Make(0));
    }

    #[test]
    fn containers_of_an_older_sandbox_are_history() {
        let pod = two("OnFailure");
        let mut seen = seen(&[
            ("i", 0, "0"),
            ("s", 0, "137"),
            ("a", 0, "0"),
            ("b", 0, "137"),
        ]);
        for one in &mut seen.containers {
            one.sandbox = "older".into();
        }
        let plan = run(&pod, &seen, &|_| WELL);
        assert_eq!(plan.start[0].name, "i");
        assert_eq!((plan.start.len(), plan.start[0].attempt), (1, 1));
    }

    #[test]
    fn the_end_takes_sidecars_last() {
        let pod = pod(json!({
            "initContainers": [
                {"name": "s", "restartPolicy": "Always"}, {"name": "t", "restartPolicy": "Always"},
            ],
            "containers": [{"name": "a"}, {"name": "b"}],
        }));
        let kills = |containers: &[(&str, u32, &str)]| {
            let plan = end(&pod, &seen(containers));
            let names = plan.kill.into_iter().map(|one| one.name);
            names.collect::<Vec<_>>()
        };
        let all = [
            ("s", 0, "running"),
            ("t", 0, "running"),
            ("a", 0, "running"),
            ("b", 0, "0"),
        ];
        assert_eq!(kills(&all), ["a"]);
        assert_eq!(kills(&all[..2]), ["t"]);
        assert_eq!(kills(&all[..1]), ["s"]);
        assert!(kills(&[]).is_empty());
    }
}
