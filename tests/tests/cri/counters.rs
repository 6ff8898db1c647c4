//! `pericarp metrics` and `pericarp measure`, asked on the node: what a pod's card carries is counted, by
//! its successor, too; and what an idle pod takes becomes its RuntimeClass.

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::machines::process;
use crate::stage::{Stage, until};

/// The value of the line with this name and all of these labels.
fn value(text: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let mut lines = text.lines().filter(|line| line.starts_with(name));
    let line = lines.find(|line| labels.iter().all(|label| line.contains(label)))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

fn metrics(stage: &Stage) -> String {
    let (code, text, errors) = stage.node.pericarp(&["metrics"]);
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    text
}

pub(crate) fn what_a_pod_does_is_counted(stage: &mut Stage) {
    let stage: &Stage = stage;
    let (pod, idle) = stage.idle("counted");
    let ping = "ping -c 3 -W 5 10.88.0.1 >/dev/null";
    idle.shell(ping);
    let text = metrics(stage);
    let sandbox = format!(
        "namespace=\"default\",pod=\"counted\",sandbox=\"{}\"",
        pod.id
    );
    let of = |name: &str, labels: &[&str]| {
        let labels: Vec<&str> = [sandbox.as_str()]
            .into_iter()
            .chain(labels.iter().copied())
            .collect();
        value(&text, name, &labels).unwrap_or_else(|| panic!("{name} {labels:?}:\n{text}"))
    };
    for direction in ["direction=\"rx\"", "direction=\"tx\""] {
        assert!(of("pericarp_net_packets_total{", &[direction]) >= 3.0);
        // Echoes of 84 bytes, as they are on the wire.
        assert!(of("pericarp_net_bytes_total{", &[direction]) >= 3.0 * 98.0);
    }
    for control in ["control=\"fs.control\"", "control=\"net.control\""] {
        assert_eq!(of("pericarp_sidecar_up{", &[control]), 1.0);
    }
    let lookups = ["volume=\"all\"", "class=\"lookup\""];
    assert!(of("pericarp_volume_requests_total{", &lookups) > 0.0);
    assert_eq!(of("pericarp_guest_memory_bytes{", &[]), 256.0 * 1048576.0);
    assert!(of("pericarp_guest_cpu_seconds_total{", &[]) > 0.0);
    let mut sum = 0.0;
    for role in [
        "shim",
        "machine",
        "pericarp-fs",
        "pericarp-net",
        "pericarp-vsock",
    ] {
        let role = format!("process=\"{role}\"");
        sum += of("pericarp_process_proportional_bytes{", &[&role]);
    }
    assert_eq!(of("pericarp_pod_overhead_bytes{", &[]), sum);
    assert!(of("pericarp_pod_overhead_allowed_bytes{", &[]) >= sum);
    assert_eq!(of("pericarp_pod_overhead_exceeded{", &[]), 0.0);

    // Another process counts in its place, and is found where it was.
    kill_process(process(&pod.id, "pericarp-net"), Signal::KILL).unwrap();
    until("its successor counts", || {
        let _ = idle.exec(&["/bin/sh", "-c", "ping -c 1 -W 1 10.88.0.1"]);
        let text = metrics(stage);
        let up = value(&text, "pericarp_sidecar_up{", &[&sandbox, "net.control"]);
        let sent = ["direction=\"tx\"", sandbox.as_str()];
        let sent = value(&text, "pericarp_net_packets_total{", &sent);
        up == Some(1.0) && sent.is_some_and(|sent| sent > 0.0)
    });
    pod.remove().unwrap();
    assert_eq!(
        value(&metrics(stage), "pericarp_pod_info{", &[&sandbox]),
        None
    );
}

pub(crate) fn an_idle_pod_of_each_profile_is_measured(stage: &mut Stage) {
    let socket = stage.node.scratch().path("c.sock");
    let socket = ["--containerd-socket", socket.to_str().unwrap()];
    let words = [&["measure", "--json"][..], &socket[..]].concat();
    let (code, said, errors) = stage.node.pericarp(&words);
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{said}");
    let said: Value = serde_json::from_str(&said).unwrap();
    let [profile] = &said["profiles"].as_array().unwrap()[..] else {
        panic!("{said}");
    };
    let number = |value: &Value| value.as_u64().unwrap();
    let processes = profile["processes"].as_array().unwrap();
    let each = processes.iter().map(|one| number(&one["bytes"]));
    assert_eq!(number(&profile["measured"]), each.sum::<u64>());
    for role in [
        "shim",
        "machine",
        "pericarp-fs",
        "pericarp-net",
        "pericarp-vsock",
    ] {
        let there = processes.iter().any(|one| one["process"] == role);
        assert!(there, "{role}: {said}");
    }
    let overhead = number(&profile["overhead"]);
    assert!(overhead > number(&profile["measured"]), "{said}");
    // With 2 GiB of the sizing policy; the names of AKS and Kata mean the same profile.
    let handlers = said["handlers"].as_array().unwrap();
    assert_eq!(handlers.len(), 4, "{said}");
    let fixed = format!("{}Mi", (overhead >> 20) + 2048);
    assert!(
        handlers
            .iter()
            .all(|one| one["podFixed"]["memory"] == *fixed),
        "{said}"
    );
    // Nobody listens there: bad input, and nothing was started.
    let (code, _, errors) = stage
        .node
        .pericarp(&["measure", "--containerd-socket", "/no/where"]);
    assert_eq!(code, Some(2));
    assert!(
        errors.contains("--containerd-socket '/no/where': cannot be used"),
        "{errors}"
    );
}
