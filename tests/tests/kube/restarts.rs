//! The server and containerd end and begin under running pods; two servers beside each other.

use std::io::{BufRead as _, BufReader};
use std::process::{ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use serde_json::Value;

use crate::stage::{Stage, idle, pod, until};

/// A pod whose log grows.
const BEATS: &str = "trap 'exit 0' TERM; while :; do echo beat; sleep 0.2; done";

/// Counts lines as they come, until there are no more.
fn count(output: ChildStdout) -> (Arc<AtomicUsize>, JoinHandle<()>) {
    let lines = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&lines);
    let reader = thread::spawn(move || {
        for _ in BufReader::new(output).lines().map_while(Result::ok) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    (lines, reader)
}

fn status(stage: &Stage, pod: &str) -> Value {
    stage.get(&["pod", pod])["status"]["containerStatuses"][0].clone()
}

/// Kills the server and then containerd under a pod that beats: it is the same container, it can be
/// spoken to, and who follows its log goes on, or ends when the server does.
pub(crate) fn a_pod_outlives_both(stage: &mut Stage, pod: &str) {
    let before = status(stage, pod);
    let follow = |stage: &Stage| {
        let mut follow = stage
            .kubectl_command(&["logs", "-f", "--tail=1", pod])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (lines, reader) = count(follow.stdout.take().unwrap());
        until("the log is followed", || lines.load(Ordering::Relaxed) > 2);
        (follow, lines, reader)
    };
    let (mut first, _, reader) = follow(stage);
    stage.kill_server();
    until("who followed the log ends with the server", || {
        first.try_wait().unwrap().is_some()
    });
    reader.join().unwrap();
    stage.serve();
    let spoken_to = |stage: &Stage, when: &str| {
        until(&format!("exec works after {when}"), || {
            stage.try_kubectl(&["exec", pod, "--", "true"]).code == Some(0)
        });
    };
    spoken_to(stage, "the server's restart");
    let (mut second, lines, reader) = follow(stage);
    stage.node.restart();
    spoken_to(stage, "containerd's restart");
    let seen = lines.load(Ordering::Relaxed);
    until("the log goes on", || {
        lines.load(Ordering::Relaxed) > seen + 5
    });
    second.kill().unwrap();
    second.wait().unwrap();
    reader.join().unwrap();
    let after = status(stage, pod);
    for field in ["containerID", "restartCount", "state"] {
        assert_eq!(after[field], before[field], "{after}");
    }
    assert_eq!(after["restartCount"], 0);
}

/// The server is killed, and so is containerd, under a pod that goes on.
pub(crate) fn a_restart_loses_nothing(stage: &mut Stage) {
    stage.kubectl(&["create", "configmap", "kept", "--from-literal=a=b"]);
    stage.apply(&pod("goes-on", BEATS));
    stage.ready("goes-on");
    let uid = stage.get(&["pod", "goes-on"])["metadata"]["uid"].clone();
    a_pod_outlives_both(stage, "goes-on");
    assert_eq!(stage.get(&["cm", "kept"])["data"]["a"], "b");
    assert_eq!(stage.get(&["pod", "goes-on"])["metadata"]["uid"], uid);
    stage.kubectl(&["delete", "cm", "kept"]);
}

/// Two servers on one containerd, each with a pod of the same name.
pub(crate) fn two_servers_keep_apart(stage: &mut Stage) {
    stage.apply(&idle("same"));
    let other = stage.serve_another();
    let ask = |arguments: &[&str]| {
        let said = stage.ask(&other, arguments);
        assert_eq!(said.code, Some(0), "{arguments:?}: {said:?}");
        said.out
    };
    ask(&["apply", "-f", "manifest.yaml"]);
    stage.ready("same");
    ask(&["wait", "--for=condition=Ready", "pod/same", "--timeout=60s"]);
    let seen = |text: &str| -> (Value, Value, usize) {
        let list: Value = serde_json::from_str(text).unwrap();
        let items = list["items"].as_array().unwrap();
        let pod = &items[0];
        let node = pod["spec"]["nodeName"].clone();
        (pod["metadata"]["uid"].clone(), node, items.len())
    };
    let pods = ["get", "pods", "-A", "-o", "json"];
    let (mine, theirs) = (seen(&stage.kubectl(&pods)), seen(&ask(&pods)));
    assert_ne!(mine.0, theirs.0);
    assert_eq!((&mine.1, mine.2), (&Value::from("here"), 1));
    assert_eq!((&theirs.1, theirs.2), (&Value::from("there"), 1));
    assert_eq!(stage.node.client().pods(None).unwrap().len(), 2);
    ask(&["exec", "same", "--", "touch", "/tmp/theirs"]);
    let said = stage.try_kubectl(&["exec", "same", "--", "test", "-e", "/tmp/theirs"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    // One's end and its pod's are nothing to the other.
    ask(&["delete", "pod", "same", "--now", "--timeout=60s"]);
    drop(other);
    assert_eq!(seen(&stage.kubectl(&pods)), mine);
    stage.kubectl(&["exec", "same", "--", "true"]);
    assert_eq!(stage.node.client().pods(None).unwrap().len(), 1);
}
