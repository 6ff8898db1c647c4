//! What goes wrong in pods in machines: `pericarp why` says it in one sentence first, and `kubectl
//! describe pod` has that very sentence.

use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::cri::Handler;
use pericarp_tests::cri::config::IMAGE;
use pericarp_tests::cri::node::STEP;
use serde_json::Value;

use crate::stage::{MACHINES, Stage, machines, until};

/// For a machine to boot on an emulated CPU, and for what goes wrong in it.
const LIMIT: Duration = Duration::from_secs(200);

/// A pod in a machine with one container that runs a script.
fn pod(name: &str, script: &str, container: &str, spec: &str) -> String {
    let script = Value::from(script);
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  annotations: \
         {{io.pericarp/memory: 256M}}\nspec:\n  runtimeClassName: pericarp\n  restartPolicy: \
         Never\n  terminationGracePeriodSeconds: 1\n{spec}  containers:\n  - name: main\n    image: \
         {IMAGE}\n    command: [/bin/sh, -c, {script}]\n{container}"
    )
}

/// Waits until `pericarp why` begins with a sentence that has these parts, and kubectl says it, too.
fn is_said_by_both(stage: &Stage, pod: &str, parts: &[&str]) -> String {
    let mut said = String::new();
    let found = poll(LIMIT, || {
        let (_, out, errors) = stage.node.pericarp(&["why", pod]);
        said = out + &errors;
        let all = parts.iter().all(|part| first(&said).contains(part));
        all.then_some(())
    });
    assert!(found.is_some(), "{parts:?}: {said}");
    let begin = format!("default/{pod}: ");
    let sentence = first(&said).strip_prefix(&begin);
    let sentence = sentence.unwrap_or_else(|| panic!("{said}"));
    let mut described = String::new();
    let seen = poll(STEP, || {
        described = stage.kubectl(&["describe", "pod", pod]);
        described.contains(sentence).then_some(())
    });
    assert!(seen.is_some(), "{sentence}\nis not in\n{described}");
    println!("{said}");
    said
}

fn first(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn ended(stage: &Stage, pod: &str) -> Value {
    let status = &stage.get(&["pod", pod])["status"]["containerStatuses"][0];
    status["state"]["terminated"].clone()
}

pub(crate) fn play() {
    let handlers = vec![Handler::runc("runc"), machines()];
    let Some(mut stage) = Stage::start("what_goes_wrong_is_said", handlers, &MACHINES) else {
        return;
    };
    for (name, case) in [
        ("an image", an_image as fn(&mut Stage)),
        ("memory", memory),
        ("a full disk", a_full_disk),
        ("an emptyDir's limit", a_limit),
        ("a sidecar", a_sidecar),
        ("the guest's kernel", a_panic),
    ] {
        println!("case: {name}");
        case(&mut stage);
        stage.delete_all_pods();
    }
    stage.end();
}

fn an_image(stage: &mut Stage) {
    let manifest = pod("imageless", "true", "", "").replace(IMAGE, "127.0.0.1:9/none:1");
    stage.apply(&manifest);
    let image = "Failed to pull image \"127.0.0.1:9/none:1\": ";
    let said = is_said_by_both(stage, "imageless", &[image, "connection refused"]);
    assert!(said.contains("  container main\n"), "{said}");
    assert!(said.contains("  the pod   runs\n"), "{said}");
}

fn memory(stage: &mut Stage) {
    let limit = "    resources: {limits: {memory: 24Mi}}\n";
    stage.apply(&pod(
        "greedy",
        "exec tail -c 200000000 /dev/zero",
        limit,
        "",
    ));
    let sentence = "container main: the guest's kernel killed its command for want of memory; its \
                    limit is 24 MiB";
    is_said_by_both(stage, "greedy", &[sentence]);
    until("its state has it, too", || {
        ended(stage, "greedy")["message"] == sentence
    });
    let ended = ended(stage, "greedy");
    assert_eq!(ended["reason"], "OOMKilled", "{ended}");
    assert_eq!(ended["exitCode"], 137, "{ended}");
}

/// The host's own: a small file system of it, which the pod has as a volume.
fn a_full_disk(stage: &mut Stage) {
    let node = |text: &str| stage.node.run(&["sh", "-c", text]);
    node("mkdir /run/full && mount -t tmpfs -o size=256k full /run/full");
    let script = "cat /dev/zero > /data/file; exit 3";
    let mount = "    volumeMounts: [{name: data, mountPath: /data}]\n";
    let volume = "  volumes: [{name: data, hostPath: {path: /run/full}}]\n";
    stage.apply(&pod("filler", script, mount, volume));
    let sentence = "container main: its command ended with code 3, and the file system at /data is \
                    full (0 KiB of 256 KiB are left)";
    is_said_by_both(stage, "filler", &[sentence]);
    until("its state has it, too", || {
        ended(stage, "filler")["message"] == sentence
    });
    stage.delete_all_pods();
    node("umount /run/full && rmdir /run/full");
}

/// The pod's own, which it fills beyond what it may have.
fn a_limit(stage: &mut Stage) {
    let script = "dd if=/dev/zero of=/data/file bs=1M count=3; sleep 100000";
    let mount = "    volumeMounts: [{name: data, mountPath: /data}]\n";
    let volume = "  volumes: [{name: data, emptyDir: {sizeLimit: 1Mi}}]\n";
    stage.apply(&pod("large", script, mount, volume));
    let sentence = "Usage of EmptyDir volume \"data\" exceeds the limit \"1Mi\".";
    is_said_by_both(stage, "large", &[sentence]);
    let status = stage.get(&["pod", "large"])["status"].clone();
    assert_eq!(status["reason"], "Evicted", "{status}");
}

/// The pod is to go on, and so it does, in another machine.
fn a_sidecar(stage: &mut Stage) {
    let script = "trap 'exit 0' TERM; sleep 100000 & wait";
    stage.apply(&pod("killed", script, "", "").replace("Never", "Always"));
    stage.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "pod/killed",
        "--timeout=220s",
    ]);
    let base = stage.node.root().join("run/pericarp/k8s.io");
    let record = std::fs::read_dir(base).unwrap().flatten().find_map(|pod| {
        let record = std::fs::read(pod.path().join("pod.json")).ok()?;
        let record: Value = serde_json::from_slice(&record).ok()?;
        (record["name"] == "default/killed").then_some(record)
    });
    let record = record.unwrap();
    let processes = record["processes"].as_array().unwrap();
    let vsock = processes.iter().find(|one| one["role"] == "pericarp-vsock");
    let pid = vsock.unwrap_or_else(|| panic!("{record}"))["pid"].to_string();
    stage.node.run(&["kill", "-KILL", &pid]);
    let part = "a sidecar of the machine died (pericarp-vsock: killed by signal 9";
    is_said_by_both(stage, "killed", &[part]);
    let until_ready = ["wait", "--for=condition=Ready", "pod/killed"];
    let again = poll(LIMIT, || {
        let status = &stage.get(&["pod", "killed"])["status"]["containerStatuses"][0];
        (status["restartCount"] == 1).then_some(())
    });
    assert!(again.is_some(), "it is started again");
    stage.kubectl(&[&until_ready[..], &["--timeout=220s"]].concat());
    let said = is_said_by_both(stage, "killed", &[part]);
    assert!(
        said.contains("  the pod   runs, in another machine by now\n"),
        "{said}"
    );
}

fn a_panic(stage: &mut Stage) {
    let script = "echo c > /proc/sysrq-trigger; sleep 100";
    let privileged = "    securityContext: {privileged: true}\n";
    stage.apply(&pod("panicked", script, privileged, ""));
    let parts = ["kernel panicked", "sysrq triggered crash"];
    let said = is_said_by_both(stage, "panicked", &parts);
    assert!(said.contains("\n  evidence  "), "{said}");
    until("its state has it, too", || {
        let message = &ended(stage, "panicked")["message"];
        message.as_str().is_some_and(|text| text.contains(parts[0]))
    });
}
