//! `pericarp verify` and `pericarp why`, asked on the node as its operator asks: a pod is in a machine of
//! its own or it is not, and what goes wrong is said in the words that containerd was told.

use std::fs;
use std::path::Path;

use pericarp_tests::cri::{container, mount, pod};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::limits::{MIB, limited};
use crate::machines::process;
use crate::stage::{Stage, script, until};

fn asked(stage: &Stage, command: &str, pod: &str) -> (Option<i32>, Value) {
    let (code, said, errors) = stage.node.pericarp(&[command, pod, "--json"]);
    let said = serde_json::from_str(&said);
    (
        code,
        said.unwrap_or_else(|_| panic!("{command} {pod}: {errors}")),
    )
}

/// Waits until the cause is of this kind, and says it.
fn cause(stage: &Stage, pod: &str, kind: &str) -> Value {
    let mut found = Value::Null;
    until(&format!("the cause is {kind}"), || {
        let (code, said) = asked(stage, "why", pod);
        assert_eq!(code, Some(0));
        found = said["cause"].clone();
        found["kind"] == kind
    });
    found
}

fn sentence(cause: &Value) -> &str {
    cause["sentence"].as_str().unwrap()
}

/// What the audit stream says of a pod: the events, each with its line.
fn audited(stage: &Stage, pod: &str) -> Vec<(String, Value)> {
    let text = fs::read_to_string(stage.node.scratch().path("audit/audit.jsonl")).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_pod = lines.filter(|line| line["pod"] == pod);
    of_pod
        .map(|line| (line["event"].as_str().unwrap().to_owned(), line))
        .collect()
}

pub(crate) fn a_pod_is_verified_and_what_goes_wrong_in_it_is_said(stage: &mut Stage) {
    let scratch = stage.node.scratch();
    let more = scratch.path("pericarp.toml.d");
    fs::create_dir(&more).unwrap();
    let audit = scratch.path("audit").display().to_string();
    let said = format!("[profiles.pericarp]\naudit-directory = \"{audit}\"\n");
    fs::write(more.join("audit.toml"), said).unwrap();
    let (pod, idle) = stage.idle("broken");
    let (code, said) = asked(stage, "verify", "broken");
    assert_eq!((code, &said["isolated"]), (Some(0), &true.into()), "{said}");
    let checks = said["checks"].as_array().unwrap();
    let boot = checks.iter().find(|one| one["name"] == "boot id").unwrap();
    assert_eq!(
        boot["pod"],
        *idle.shell("cat /proc/sys/kernel/random/boot_id")
    );
    assert_ne!(boot["pod"], boot["host"]);
    // How long its start took is known, and that of its container, which has said nothing yet.
    let (code, said) = asked(stage, "why", "broken");
    let parts = said["start"].as_array().unwrap();
    let phases = |id: &str| -> Vec<&str> {
        let of = parts.iter().filter(|part| part["id"] == *id);
        of.map(|part| part["phase"].as_str().unwrap()).collect()
    };
    assert_eq!(
        (code, phases(&pod.id)),
        (
            Some(0),
            vec![
                "shim",
                "call",
                "prepare",
                "network",
                "image",
                "sidecars",
                "machine",
                "kernel",
                "agent",
                "configure"
            ]
        )
    );
    assert_eq!(phases(&idle.id), ["show", "create", "start"], "{said}");
    // A plain pod is found out, and one that is not there is bad input.
    let plain = stage
        .node
        .run_pod(pericarp_tests::cri::pod("plain"), "runc")
        .unwrap();
    let (code, said) = asked(stage, "verify", "default/plain");
    assert_eq!(
        (code, &said["isolated"]),
        (Some(1), &false.into()),
        "{said}"
    );
    plain.remove().unwrap();
    assert_eq!(stage.node.pericarp(&["verify", "nobody"]).0, Some(2));
    let (code, said) = asked(stage, "why", "broken");
    assert_eq!((code, &said["cause"]), (Some(0), &Value::Null));

    // Its image has no such program.
    let refused = pod.start(&container("missing", &["/no/such/program"]));
    let error = refused.unwrap_err();
    let found = cause(stage, "broken", "refused");
    assert_eq!(found["container"], "missing");
    assert!(
        error.message().contains(sentence(&found)),
        "{error}: {found}"
    );

    // It wants more memory than it may have.
    let greedy = script("exec tail -c 200000000 /dev/zero");
    let greedy = limited(container("greedy", &greedy), 24 * MIB, 0);
    pod.start(&greedy).unwrap().ended();
    let found = cause(stage, "broken", "out-of-memory");
    assert_eq!(found["container"], "greedy");
    assert!(sentence(&found).contains("its limit is 24 MiB"), "{found}");

    // It writes where there is no room.
    let full = "mkdir /run/full && mount -t tmpfs -o size=256k full /run/full";
    let node = |text: &str| {
        let (code, _, errors) = stage.node.program(Path::new("/bin/sh"), &["-c", text]);
        assert_eq!(code, Some(0), "{errors}");
    };
    node(full);
    let write = script("cat /dev/zero > /data/file; exit 3");
    let mut filler = container("filler", &write);
    filler.mounts = vec![mount(Path::new("/run/full"), "/data", false)];
    let filler = pod.start(&filler).unwrap();
    assert_eq!(filler.ended().exit_code, 3);
    let found = cause(stage, "broken", "disk-full");
    assert!(sentence(&found).contains("ended with code 3"), "{found}");
    assert!(
        sentence(&found).contains("the file system at /data is full"),
        "{found}"
    );
    // The rest is known, too.
    let (_, all) = asked(stage, "why", "default/broken");
    assert_eq!(all["causes"][0]["container"], "missing", "{all}");
    assert_eq!(all["running"], true);
    pod.remove().unwrap();
    node("umount /run/full && rmdir /run/full");
    // Who keeps watch has seen all of it.
    let seen = audited(stage, "default/broken");
    let of = |event: &str| -> Vec<&Value> {
        let all = seen.iter().filter(|(name, _)| name == event);
        all.map(|(_, line)| line).collect()
    };
    assert_eq!(of("pod").len(), 1, "{seen:?}");
    let names: Vec<_> = of("container").iter().map(|line| &line["name"]).collect();
    assert_eq!(names, ["idle", "missing", "greedy", "filler"]);
    let boot = |line: &&Value| line["args"][2] == "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(of("exec").into_iter().filter(boot).count(), 1, "{seen:?}");
    assert!(!of("out-of-memory").is_empty(), "{seen:?}");
    let data = |line: &&Value| line["destination"] == "/data" && line["source"] == "/run/full";
    assert_eq!(of("mount").into_iter().filter(data).count(), 1, "{seen:?}");
    assert!(!of("kill").is_empty(), "{seen:?}");
}

pub(crate) fn what_ends_a_machine_is_said_after_it_has_gone(stage: &mut Stage) {
    // The guest's kernel.
    let mut config = pod("panicked");
    let linux = config.linux.mut_or_insert_default();
    linux.security_context.mut_or_insert_default().privileged = true;
    let panicked = stage.node.run_pod(config, stage.subject.name).unwrap();
    let mut crash = container("crash", &script("echo c > /proc/sysrq-trigger; sleep 100"));
    let linux = crash.linux.mut_or_insert_default();
    linux.security_context.mut_or_insert_default().privileged = true;
    panicked.start(&crash).unwrap().ended();
    let found = cause(stage, "panicked", "machine");
    for part in ["kernel panicked", "sysrq triggered crash"] {
        assert!(sentence(&found).contains(part), "{found}");
    }
    // The last lines of its console, which are those of a trace.
    assert!(!found["evidence"].as_array().unwrap().is_empty(), "{found}");
    panicked.remove().unwrap();

    // A process beside the machine.
    let (killed, idle) = stage.idle("killed");
    kill_process(process(&killed.id, "pericarp-vsock"), Signal::KILL).unwrap();
    idle.ended();
    let found = cause(stage, "killed", "machine");
    let part = "a sidecar of the machine died (pericarp-vsock: killed by signal 9";
    assert!(sentence(&found).contains(part), "{found}");
    killed.remove().unwrap();

    // A pod that was never there.
    let mut config = pod("odd");
    config
        .annotations
        .insert("io.pericarp/memory".into(), "1M".into());
    let error = stage.node.run_pod(config, stage.subject.name).unwrap_err();
    let found = cause(stage, "odd", "refused");
    assert!(
        error.message().contains(sentence(&found)),
        "{error}: {found}"
    );
    // All of them are remembered without their pods.
    assert_eq!(cause(stage, "default/panicked", "machine")["phase"], "run");
}

/// Of the group that all pods of the node are in: what its processes have of memory, and
/// the file with the most that they may.
fn memory_of_pods(stage: &Stage) -> (u64, std::path::PathBuf) {
    let parent = stage.node.parent();
    let versions = [
        ("memory/", "memory.usage_in_bytes", "memory.limit_in_bytes"),
        ("", "memory.current", "memory.max"),
    ];
    let found = versions.iter().find_map(|(hierarchy, used, most)| {
        let group = Path::new("/sys/fs/cgroup").join(hierarchy).join(&parent);
        let used = fs::read_to_string(group.join(used)).ok()?;
        Some((used.trim().parse().unwrap(), group.join(most)))
    });
    found.expect("the pods' group holds memory to account")
}

/// The guest may have more memory than the group that its pod is in: the host's kernel kills,
/// and not the guest's.
pub(crate) fn a_pod_that_the_host_has_no_memory_for_is_ended_and_it_is_said(stage: &mut Stage) {
    let (starved, idle) = stage.idle("starved");
    let (used, most) = memory_of_pods(stage);
    let limit = used + 24 * MIB.cast_unsigned();
    fs::write(&most, limit.to_string()).unwrap();
    let greedy = container(
        "greedy",
        &script("tail -c 120000000 /dev/zero; sleep 100000"),
    );
    // Its machine may be gone before it is said to have started.
    let _ = starved.start(&greedy);
    assert_ne!(idle.ended().exit_code, 0);
    let found = cause(stage, "starved", "host-out-of-memory");
    for part in [
        "the host's kernel has killed",
        "for want of memory",
        "its group may hold",
    ] {
        assert!(sentence(&found).contains(part), "{found}");
    }
    starved.remove().unwrap();
    // Where there is memory again a pod runs.
    fs::write(&most, (8_u64 << 30).to_string()).unwrap();
    let (fed, idle) = stage.idle("fed");
    assert_eq!(idle.shell("echo here"), "here");
    fed.remove().unwrap();
}
