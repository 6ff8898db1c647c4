//! What a Pod's status says: its phase, its conditions and its containers'. Called by `worker`
//! after it has looked. It computes and does nothing.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::causes::{self, Placed};
use super::plan::Healths;
use super::resources::Quality;
use super::seen::{Instance, Seen, State};
use super::spec::{Container, Pod, RestartPolicy};

/// Why a container waits, or why a pod failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reason {
    /// In one word.
    pub(super) word: String,
    /// In more; it may be empty.
    pub(super) message: String,
}

impl Reason {
    pub(super) fn new(word: &str, message: impl Into<String>) -> Self {
        let (word, message) = (word.into(), message.into());
        Self { word, message }
    }
}

/// Why containers wait, by name.
pub(super) type Waits = BTreeMap<String, Reason>;

/// What a status is made of.
pub(super) struct Report<'a> {
    pub(super) pod: &'a Pod,
    /// The status so far.
    pub(super) old: &'a Value,
    pub(super) seen: &'a Seen,
    pub(super) healths: &'a Healths<'a>,
    pub(super) waits: &'a Waits,
    /// Why the pod has failed as a whole.
    pub(super) failed: Option<&'a Reason>,
    /// Nothing of it will run again.
    pub(super) over: bool,
    pub(super) host_ip: &'a str,
    pub(super) now: SystemTime,
    /// What a container said at its end.
    pub(super) last_words: &'a dyn Fn(&Instance) -> String,
    /// What its shims have written down.
    pub(super) causes: &'a [Placed],
}

/// The status.
pub(super) fn status(report: &Report<'_>) -> Value {
    let pod = report.pod;
    let phase = phase(report);
    let spec = &pod.spec;
    let first: Vec<Value> = spec
        .init_containers
        .iter()
        .map(|one| container(report, one))
        .collect();
    let mains: Vec<Value> = spec
        .containers
        .iter()
        .map(|one| container(report, one))
        .collect();
    let mut status = json!({
        "phase": phase,
        "conditions": conditions(report, phase, &first, &mains),
        "hostIP": report.host_ip,
        "hostIPs": [{"ip": report.host_ip}],
        "qosClass": Quality::of(pod).name(),
        "containerStatuses": mains,
    });
    let old = |field: &str| report.old.get(field).filter(|value| !value.is_null());
    status["startTime"] = old("startTime").cloned().unwrap_or(json!(time(report.now)));
    if !first.is_empty() {
        status["initContainerStatuses"] = json!(first);
    }
    let ips = addresses(report);
    if let Some(ip) = ips.first() {
        status["podIP"] = json!(ip);
        let all = ips.iter().map(|ip| json!({"ip": ip}));
        status["podIPs"] = all.collect();
    } else {
        // What has ended keeps its address, for who looks for what it was.
        for field in ["podIP", "podIPs"] {
            if let Some(value) = old(field) {
                status[field] = value.clone();
            }
        }
    }
    match report.failed {
        Some(reason) => {
            status["reason"] = json!(reason.word);
            status["message"] = json!(reason.message);
        }
        None => {
            for field in ["reason", "message"] {
                if let Some(value) = old(field).filter(|_| is_over(report.old)) {
                    status[field] = value.clone();
                }
            }
        }
    }
    status
}

/// The pod's addresses; those of the node for a pod on its network.
pub(super) fn addresses(report: &Report<'_>) -> Vec<String> {
    if report.pod.spec.host_network {
        return match report.seen.ready() {
            Some(_) => vec![report.host_ip.to_owned()],
            None => Vec::new(),
        };
    }
    let ready = report.seen.ready();
    ready.map(|sandbox| sandbox.ips.clone()).unwrap_or_default()
}

/// Whether a status is of a pod that has run.
pub(super) fn is_over(status: &Value) -> bool {
    matches!(
        status.get("phase").and_then(Value::as_str),
        Some("Succeeded" | "Failed")
    )
}

/// A kubelet's getPhase (pkg/kubelet/kubelet_pods.go).
fn phase(report: &Report<'_>) -> &'static str {
    if report.failed.is_some() {
        return "Failed";
    }
    match report.old.get("phase").and_then(Value::as_str) {
        Some("Succeeded") => return "Succeeded",
        Some("Failed") => return "Failed",
        _ => {}
    }
    let policy = report.pod.spec.restart_policy;
    let begun =
        (report.pod.spec.containers.iter()).any(|one| report.seen.latest(&one.name).is_some());
    if !begun {
        let first = report.pod.spec.init_containers.iter();
        let mut ended = first.filter(|one| !one.is_sidecar());
        let failed = ended.any(|one| {
            let latest = report.seen.latest(&one.name);
            latest.is_some_and(|one| one.state == State::Exited && one.exit_code != 0)
        });
        let failed = failed && policy == RestartPolicy::Never && report.over;
        return if failed { "Failed" } else { "Pending" };
    }
    let (mut running, mut ended, mut well, mut waiting) = (0, 0, 0, 0);
    for container in &report.pod.spec.containers {
        match report.seen.latest(&container.name) {
            Some(one) if one.state == State::Running => running += 1,
            Some(one) if one.state == State::Exited => {
                ended += 1;
                well += usize::from(one.exit_code == 0);
            }
            _ => waiting += 1,
        }
    }
    if waiting > 0 {
        "Pending"
    } else if running > 0 || policy == RestartPolicy::Always {
        "Running"
    } else if ended == well {
        "Succeeded"
    } else if policy == RestartPolicy::Never {
        "Failed"
    } else {
        "Running"
    }
}

fn container(report: &Report<'_>, container: &Container) -> Value {
    let latest = report.seen.latest(&container.name);
    let mut status = json!({
        "name": container.name,
        "image": container.image,
        "imageID": latest.map(|one| one.image_ref.as_str()).unwrap_or_default(),
        "ready": is_ready(report, container),
        "restartCount": latest.map_or(0, |one| one.attempt),
        "started": latest.is_some_and(|one| {
            one.state == State::Running && (report.healths)(&one.id).started
        }),
        "lastState": {},
    });
    if let Some(one) = latest {
        status["containerID"] = json!(name_of(one));
    }
    // Nothing is waited for any more when all is over.
    let wait = report.waits.get(&container.name).filter(|_| !report.over);
    let before = report.seen.previous(&container.name);
    let (state, last) = match latest {
        Some(one) if one.state == State::Running => {
            let state = json!({"running": {"startedAt": nanoseconds(one.started)}});
            (state, before)
        }
        Some(one) if one.state == State::Exited => match wait {
            // It is to be started again.
            Some(wait) => (waiting(wait), latest),
            None => (terminated(report, one), before),
        },
        _ => match wait {
            Some(wait) => (waiting(wait), before),
            None => (waiting(&to_come(report)), before),
        },
    };
    status["state"] = state;
    let last = last.filter(|one| one.state == State::Exited);
    if let Some(one) = last {
        status["lastState"] = terminated(report, one);
    }
    status
}

/// How clients know a container.
pub(super) fn name_of(one: &Instance) -> String {
    format!("containerd://{}", one.id)
}

fn waiting(reason: &Reason) -> Value {
    let mut waiting = json!({"reason": reason.word});
    if !reason.message.is_empty() {
        waiting["message"] = json!(reason.message);
    }
    json!({"waiting": waiting})
}

/// Why a container that never was waits when nothing went wrong. kubectl counts those that come
/// first by this word.
fn to_come(report: &Report<'_>) -> Reason {
    match report.pod.spec.init_containers.is_empty() {
        true => Reason::new("ContainerCreating", ""),
        false => Reason::new("PodInitializing", ""),
    }
}

fn terminated(report: &Report<'_>, one: &Instance) -> Value {
    let reason = match one.reason.as_str() {
        "" if one.exit_code == 0 => "Completed",
        "" => "Error",
        said => said,
    };
    let mut terminated = json!({
        "exitCode": one.exit_code,
        "reason": reason,
        "startedAt": nanoseconds(one.started),
        "finishedAt": nanoseconds(one.finished),
        "containerID": name_of(one),
    });
    let words = (report.last_words)(one);
    // It may say itself why it ended; else who saw it does.
    let message = match (words.as_str(), one.message.as_str()) {
        ("", "") => causes::explains(report.causes, one).unwrap_or_default(),
        ("", message) => message,
        (words, _) => words,
    };
    if !message.is_empty() {
        terminated["message"] = json!(message);
    }
    json!({"terminated": terminated})
}

fn is_ready(report: &Report<'_>, container: &Container) -> bool {
    let Some(one) = report.seen.latest(&container.name) else {
        return false;
    };
    let first = report.pod.spec.init_containers.iter();
    let ends = first
        .filter(|one| !one.is_sidecar())
        .any(|one| one.name == container.name);
    match one.state {
        State::Running => !ends && (report.healths)(&one.id).ready,
        State::Exited => ends && one.exit_code == 0,
        _ => false,
    }
}

fn is_initialized(report: &Report<'_>, container: &Container) -> bool {
    let latest = report.seen.latest(&container.name);
    latest.is_some_and(|one| match one.state {
        State::Running => container.is_sidecar() && (report.healths)(&one.id).started,
        State::Exited => !container.is_sidecar() && one.exit_code == 0,
        _ => false,
    })
}

fn conditions(report: &Report<'_>, phase: &str, first: &[Value], mains: &[Value]) -> Vec<Value> {
    let spec = &report.pod.spec;
    let begun = (spec.containers.iter()).any(|one| report.seen.latest(&one.name).is_some());
    let incomplete: Vec<&str> = spec
        .init_containers
        .iter()
        .filter(|one| !begun && !is_initialized(report, one))
        .map(|one| one.name.as_str())
        .collect();
    let of = |name: &&Value| name["name"].as_str().unwrap_or_default().to_owned();
    let sidecars = first.iter().filter(|status| {
        let name = status["name"].as_str().unwrap_or_default();
        let mut all = spec.init_containers.iter();
        all.any(|one| one.is_sidecar() && one.name == name)
    });
    let all = sidecars.chain(mains);
    let unready: Vec<String> = all
        .filter(|status| status["ready"] != json!(true))
        .map(|status| of(&status))
        .collect();
    let named = |names: String| format!("containers with {names}");
    let initialized = match phase {
        "Succeeded" => Ok(Some("PodCompleted")),
        _ if incomplete.is_empty() => Ok(None),
        _ => {
            let message = named(format!("incomplete status: [{}]", incomplete.join(" ")));
            Err(("ContainersNotInitialized", message))
        }
    };
    let ready = match phase {
        "Succeeded" => Err(("PodCompleted", String::new())),
        "Failed" => Err(("PodFailed", String::new())),
        _ if unready.is_empty() => Ok(None),
        _ => {
            let message = named(format!("unready status: [{}]", unready.join(" ")));
            Err(("ContainersNotReady", message))
        }
    };
    let network = match report.seen.ready() {
        Some(_) => Ok(None),
        None => Err(("", String::new())),
    };
    let all = [
        ("PodReadyToStartContainers", network),
        ("Initialized", initialized),
        ("Ready", ready.clone()),
        ("ContainersReady", ready),
        ("PodScheduled", Ok(None)),
    ];
    all.into_iter()
        .map(|(kind, is)| condition(report, kind, is))
        .collect()
}

/// A condition, with the time of its last change: of its status, as Kubernetes has it.
fn condition(report: &Report<'_>, kind: &str, is: Result<Option<&str>, (&str, String)>) -> Value {
    let status = if is.is_ok() { "True" } else { "False" };
    let mut condition = json!({"type": kind, "status": status, "lastProbeTime": null});
    let (reason, message) = match is {
        Ok(reason) => (reason.unwrap_or_default(), String::new()),
        Err((reason, message)) => (reason, message),
    };
    if !reason.is_empty() {
        condition["reason"] = json!(reason);
    }
    if !message.is_empty() {
        condition["message"] = json!(message);
    }
    let old = report.old.get("conditions").and_then(Value::as_array);
    let old = old.into_iter().flatten();
    let since = old
        .filter(|one| one["type"] == kind && one["status"] == status)
        .find_map(|one| one["lastTransitionTime"].as_str());
    condition["lastTransitionTime"] = match since {
        Some(since) => json!(since),
        None => json!(time(report.now)),
    };
    condition
}

/// A time as Kubernetes writes it.
pub(super) fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

fn nanoseconds(since: i64) -> Value {
    let since = u64::try_from(since).unwrap_or_default();
    json!(time(UNIX_EPOCH + Duration::from_nanos(since)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::causes::Cause;
    use crate::node::plan::Health;
    use crate::node::seen::Sandbox;

    const WELL: Health = Health {
        started: true,
        ready: true,
        failed: None,
    };

    fn pod(policy: &str) -> Pod {
        Pod::read(&json!({"metadata": {"name": "p"}, "spec": {
            "restartPolicy": policy,
            "initContainers": [{"name": "i"}],
            "containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "x"}],
        }}))
        .unwrap()
    }

    /// Containers as `name attempt state`; an exit code is a state.
    fn seen(containers: &[(&str, u32, &str)]) -> Seen {
        let sandbox = Sandbox {
            id: "box".into(),
            ready: true,
            ips: vec!["10.1.0.2".into()],
            ..Sandbox::default()
        };
        let instance = |(name, attempt, state): &(&str, u32, &str)| Instance {
            id: format!("{name}{attempt}"),
            name: (*name).into(),
            sandbox: "box".into(),
            attempt: *attempt,
            state: match *state {
                "running" => State::Running,
                _ => State::Exited,
            },
            exit_code: state.parse().unwrap_or_default(),
            started: 1_000_000_000,
            finished: 2_000_000_000,
            ..Instance::default()
        };
        Seen {
            sandboxes: vec![sandbox],
            containers: containers.iter().map(instance).collect(),
        }
    }

    fn of(pod: &Pod, seen: &Seen, waits: &Waits, old: &Value, over: bool) -> Value {
        status(&Report {
            pod,
            old,
            seen,
            healths: &|_| WELL,
            waits,
            failed: None,
            over,
            host_ip: "10.0.0.1",
            now: UNIX_EPOCH + Duration::from_secs(60),
            last_words: &|one| {
                if one.exit_code == 3 {
                    "I am done".into()
                } else {
                    String::new()
                }
            },
            causes: &[Placed {
                sandbox: "box".into(),
                cause: Cause {
                    at: 2_500,
                    reason: "MachineEnded",
                    container: None,
                    sentence: "the machine is gone".into(),
                },
            }],
        })
    }

    fn phase_of(policy: &str, containers: &[(&str, u32, &str)], over: bool) -> String {
        let (pod, seen) = (pod(policy), seen(containers));
        let status = of(&pod, &seen, &Waits::new(), &json!({}), over);
        status["phase"].as_str().unwrap().to_owned()
    }

    fn is(status: &Value, kind: &str) -> (String, String) {
        let conditions = status["conditions"].as_array().unwrap();
        let found = conditions.iter().find(|one| one["type"] == kind).unwrap();
        let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
        (text("status"), text("message"))
    }

    #[test]
    fn phases() {
        let run = [("i", 0, "0"), ("a", 0, "running"), ("b", 0, "0")];
        for (policy, containers, over, phase) in [
            ("Always", &[][..], false, "Pending"),
            ("Always", &[("i", 0, "running")], false, "Pending"),
            ("Never", &[("i", 0, "1")], true, "Failed"),
            ("Always", &[("i", 0, "1")], false, "Pending"),
            ("Always", &run, false, "Running"),
            (
                "Always",
                &[("i", 0, "0"), ("a", 0, "running")],
                false,
                "Pending",
            ),
            ("Always", &[("a", 0, "1"), ("b", 0, "0")], false, "Running"),
            ("Never", &[("a", 0, "1"), ("b", 0, "0")], true, "Failed"),
            (
                "OnFailure",
                &[("a", 0, "1"), ("b", 0, "0")],
                false,
                "Running",
            ),
            (
                "OnFailure",
                &[("a", 1, "0"), ("b", 0, "0")],
                true,
                "Succeeded",
            ),
        ] {
            assert_eq!(
                phase_of(policy, containers, over),
                phase,
                "{policy} {containers:?}"
            );
        }
    }

    #[test]
    fn what_is_over_stays_over() {
        let old =
            json!({"phase": "Failed", "reason": "Evicted", "message": "why", "podIP": "10.1.0.9"});
        let status = of(&pod("Always"), &Seen::default(), &Waits::new(), &old, true);
        assert_eq!(status["phase"], "Failed");
        assert_eq!(
            (&status["reason"], &status["message"]),
            (&json!("Evicted"), &json!("why"))
        );
        assert_eq!(status["podIP"], "10.1.0.9");
    }

    #[test]
    fn a_container_that_is_started_again_says_how_the_last_ended() {
        let seen = seen(&[
            ("i", 0, "0"),
            ("a", 0, "1"),
            ("a", 1, "3"),
            ("b", 0, "running"),
        ]);
        let wait = Reason::new("CrashLoopBackOff", "back-off 10s");
        let waits = Waits::from([("a".to_owned(), wait)]);
        let status = of(&pod("Always"), &seen, &waits, &json!({}), false);
        let a = &status["containerStatuses"][0];
        assert_eq!(a["state"]["waiting"]["reason"], "CrashLoopBackOff");
        assert_eq!(a["lastState"]["terminated"]["exitCode"], 3);
        assert_eq!(a["lastState"]["terminated"]["reason"], "Error");
        assert_eq!(a["lastState"]["terminated"]["message"], "I am done");
        assert_eq!(
            a["lastState"]["terminated"]["finishedAt"],
            "1970-01-01T00:00:02Z"
        );
        assert_eq!(
            (&a["restartCount"], &a["ready"]),
            (&json!(1), &json!(false))
        );
        assert_eq!(a["containerID"], "containerd://a1");
        let b = &status["containerStatuses"][1];
        assert_eq!(b["state"]["running"]["startedAt"], "1970-01-01T00:00:01Z");
        assert_eq!(b["lastState"], json!({}));
        assert_eq!(
            is(&status, "Ready"),
            ("False".into(), "containers with unready status: [a]".into())
        );
        assert_eq!(is(&status, "Initialized").0, "True");
        assert_eq!(status["podIPs"], json!([{"ip": "10.1.0.2"}]));
    }

    #[test]
    fn who_says_nothing_at_its_end_is_explained_by_what_was_written_down() {
        let seen = seen(&[("i", 0, "0"), ("a", 0, "255"), ("b", 0, "3")]);
        let status = of(&pod("Never"), &seen, &Waits::new(), &json!({}), true);
        let message = |at: usize| {
            let ended = &status["containerStatuses"][at]["state"]["terminated"];
            ended["message"].clone()
        };
        assert_eq!(message(0), "the machine is gone");
        assert_eq!(message(1), "I am done");
    }

    #[test]
    fn what_is_to_come_says_what_it_waits_for() {
        let status = of(
            &pod("Always"),
            &Seen::default(),
            &Waits::new(),
            &json!({}),
            false,
        );
        let of = |list: &str, at: usize| status[list][at]["state"]["waiting"]["reason"].clone();
        assert_eq!(of("initContainerStatuses", 0), "PodInitializing");
        assert_eq!(of("containerStatuses", 0), "PodInitializing");
        assert_eq!(
            is(&status, "Initialized"),
            (
                "False".into(),
                "containers with incomplete status: [i]".into()
            )
        );
        assert_eq!(is(&status, "PodReadyToStartContainers").0, "False");
        assert_eq!(is(&status, "PodScheduled").0, "True");
    }

    #[test]
    fn conditions_keep_the_time_of_their_last_change() {
        let seen = seen(&[("i", 0, "0"), ("a", 0, "running"), ("b", 0, "running")]);
        let old = json!({"startTime": "1970-01-01T00:00:05Z", "conditions": [
            {"type": "Ready", "status": "False", "lastTransitionTime": "1970-01-01T00:00:07Z"},
            {"type": "Initialized", "status": "True", "lastTransitionTime": "1970-01-01T00:00:08Z"},
        ]});
        let status = of(&pod("Always"), &seen, &Waits::new(), &old, false);
        let conditions = status["conditions"].as_array().unwrap();
        let since = |kind: &str| {
            let found = conditions.iter().find(|one| one["type"] == kind).unwrap();
            found["lastTransitionTime"].as_str().unwrap()
        };
        assert_eq!(since("Ready"), "1970-01-01T00:01:00Z");
        assert_eq!(since("Initialized"), "1970-01-01T00:00:08Z");
        assert_eq!(status["startTime"], "1970-01-01T00:00:05Z");
        assert_eq!(status["qosClass"], "BestEffort");
    }
}
