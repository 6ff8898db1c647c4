//! The row of a pod: how far it is, in one word, and why if it is not.

use serde_json::{Value, json};

use super::{Column, or, since, text};

pub(super) const COLUMNS: &[Column] = &[
    ("Name", false),
    ("Ready", false),
    ("Status", false),
    ("Restarts", false),
    ("Age", false),
    ("IP", true),
    ("Node", true),
    ("Nominated Node", true),
    ("Readiness Gates", true),
];

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// An init container that goes on beside the others.
fn is_sidecar(pod: &Value, name: &Value) -> bool {
    let all = list(&pod["spec"]["initContainers"]);
    let found = all.iter().find(|one| one["name"] == *name);
    found.is_some_and(|one| one["restartPolicy"] == "Always")
}

pub(super) fn cells(pod: &Value) -> Vec<Value> {
    let status = &pod["status"];
    let own = list(&status["containerStatuses"]);
    let init = list(&status["initContainerStatuses"]);
    let sidecars = || init.iter().filter(|one| is_sidecar(pod, &one["name"]));
    let number_of_sidecars = list(&pod["spec"]["initContainers"])
        .iter()
        .filter(|one| one["restartPolicy"] == "Always")
        .count();
    let total = list(&pod["spec"]["containers"]).len() + number_of_sidecars;
    let ready = own.iter().chain(sidecars());
    let ready = ready.filter(|one| one["ready"] == true && is_running(one));
    let initializing = initializing(pod, init);
    // While it is being prepared, what was restarted are the init containers.
    let counted: Vec<&Value> = match &initializing {
        Some(_) => init.iter().collect(),
        None => own.iter().chain(sidecars()).collect(),
    };
    let restarts: i64 = counted
        .iter()
        .filter_map(|one| one["restartCount"].as_i64())
        .sum();
    let last = counted
        .iter()
        .filter_map(|one| one["lastState"]["terminated"]["finishedAt"].as_str())
        .max();
    let restarts = match last {
        Some(last) if restarts > 0 => format!("{restarts} ({} ago)", since(&json!(last))),
        _ => restarts.to_string(),
    };
    let none = |value: &Value| or(Some(text(value)), "<none>");
    [
        text(&pod["metadata"]["name"]),
        format!("{}/{total}", ready.count()),
        word(pod, own, initializing),
        restarts,
        since(&pod["metadata"]["creationTimestamp"]),
        none(&status["podIP"]),
        none(&pod["spec"]["nodeName"]),
        none(&status["nominatedNodeName"]),
        "<none>".to_owned(),
    ]
    .into_iter()
    .map(Value::String)
    .collect()
}

fn is_running(container: &Value) -> bool {
    !container["state"]["running"].is_null()
}

/// Why a container that has ended did.
fn end(terminated: &Value) -> String {
    let reason = text(&terminated["reason"]);
    if !reason.is_empty() {
        return reason;
    }
    match terminated["signal"].as_i64() {
        Some(signal) if signal != 0 => format!("Signal:{signal}"),
        _ => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0)),
    }
}

/// How far the init containers are, until they are done.
fn initializing(pod: &Value, init: &[Value]) -> Option<String> {
    let total = list(&pod["spec"]["initContainers"]).len();
    for (index, one) in init.iter().enumerate() {
        let state = &one["state"];
        let terminated = &state["terminated"];
        if !terminated.is_null() && terminated["exitCode"] == 0 {
            continue;
        }
        if is_sidecar(pod, &one["name"]) && one["started"] == true {
            continue;
        }
        if !terminated.is_null() {
            return Some(format!("Init:{}", end(terminated)));
        }
        let waiting = text(&state["waiting"]["reason"]);
        if !waiting.is_empty() && waiting != "PodInitializing" {
            return Some(format!("Init:{waiting}"));
        }
        return Some(format!("Init:{index}/{total}"));
    }
    None
}

fn word(pod: &Value, own: &[Value], initializing: Option<String>) -> String {
    let status = &pod["status"];
    let mut word = or(Some(text(&status["reason"])), &text(&status["phase"]));
    match initializing {
        Some(initializing) => word = initializing,
        None => {
            let mut running = false;
            for container in own.iter().rev() {
                let state = &container["state"];
                let waiting = text(&state["waiting"]["reason"]);
                if !waiting.is_empty() {
                    word = waiting;
                } else if !state["terminated"].is_null() {
                    word = end(&state["terminated"]);
                } else if is_running(container) && container["ready"] == true {
                    running = true;
                }
            }
            if word == "Completed" && running {
                let conditions = list(&status["conditions"]);
                let ready = conditions
                    .iter()
                    .any(|one| one["type"] == "Ready" && one["status"] == "True");
                word = if ready { "Running" } else { "NotReady" }.to_owned();
            }
        }
    }
    let ended = ["Succeeded", "Failed"].contains(&text(&status["phase"]).as_str());
    if !pod["metadata"]["deletionTimestamp"].is_null() && !ended {
        word = "Terminating".to_owned();
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pod: &Value) -> Vec<String> {
        let cells = cells(pod);
        cells[..4].iter().map(text).collect()
    }

    #[test]
    fn a_pod_is_in_one_word() {
        let mut pod = json!({
            "metadata": {"name": "a"},
            "spec": {
                "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
                "containers": [{"name": "c"}],
            },
            "status": {"phase": "Pending"},
        });
        assert_eq!(row(&pod), ["a", "0/2", "Pending", "0"]);
        pod["status"]["initContainerStatuses"] = json!([
            {"name": "i", "restartCount": 2, "state": {"running": {}}}, {"name": "s", "state": {}},
        ]);
        assert_eq!(row(&pod), ["a", "0/2", "Init:0/2", "2"]);
        pod["status"]["initContainerStatuses"] = json!([
            {"name": "i", "state": {"terminated": {"exitCode": 0}}},
            {"name": "s", "started": true, "ready": true, "state": {"running": {}}},
        ]);
        pod["status"]["containerStatuses"] = json!([
            {"name": "c", "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}}},
        ]);
        pod["status"]["phase"] = json!("Running");
        assert_eq!(row(&pod), ["a", "1/2", "CrashLoopBackOff", "3"]);
        pod["status"]["containerStatuses"][0]["state"] =
            json!({"terminated": {"exitCode": 1, "reason": "Error"}});
        assert_eq!(row(&pod)[2], "Error");
        pod["status"]["containerStatuses"] =
            json!([{"name": "c", "ready": true, "state": {"running": {}}}]);
        assert_eq!(row(&pod)[1..3], ["2/2", "Running"]);
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(row(&pod)[2], "Terminating");
    }
}
