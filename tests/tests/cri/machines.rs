//! What only pods in machines have: their size, what they are refused, and what happens when a
//! process of theirs is killed. runc's pods have none of it.

use std::fs;

use pericarp_tests::cri::proto::{NamespaceMode, PodSandboxState};
use pericarp_tests::cri::{Container, SMALL, container, pod};
use pericarp_tests::usage::proportional_kib;
use rustix::process::{Pid, Signal, kill_process};

use crate::stage::{IDLE, Stage, until};

/// The process of this pod whose command line has these words.
pub(crate) fn process(pod: &str, words: &str) -> Pid {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let found = all.filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        (line.contains(pod) && line.contains(words)).then_some(pid)
    });
    let found: Vec<Pid> = found.collect();
    assert_eq!(found.len(), 1, "{words}: {found:?}");
    found[0]
}

fn kill(pid: Pid) {
    kill_process(pid, Signal::KILL).unwrap();
}

pub(crate) fn a_machine_has_the_size_of_its_limits(stage: &mut Stage) {
    let mut config = pod("sized");
    let linux = config.linux.mut_or_insert_default();
    let resources = linux.resources.mut_or_insert_default();
    resources.cpu_period = 100_000;
    resources.cpu_quota = 50_000;
    resources.memory_limit_in_bytes = 64 << 20;
    let small = config.annotations.remove(SMALL.0).unwrap();
    let run = |config| stage.node.run_pod(config, stage.subject.name);
    let total = |idle: &Container<'_>| -> u64 {
        let total = "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo";
        idle.shell(total).parse().unwrap()
    };
    let pod = run(config.clone()).unwrap();
    let idle = pod.start(&container("idle", &IDLE)).unwrap();
    assert_eq!(idle.shell("nproc"), "2");
    // The kernel keeps some for itself.
    let seen = total(&idle);
    assert!((2000..=2112).contains(&seen), "{seen} MiB");
    pod.remove().unwrap();

    // As the pod says, as far as its profile lets it.
    config.annotations.insert(SMALL.0.into(), small);
    let cpus = ("io.pericarp/vcpus", "1");
    config.annotations.insert(cpus.0.into(), cpus.1.into());
    let pod = run(config.clone()).unwrap();
    let idle = pod.start(&container("idle", &IDLE)).unwrap();
    assert_eq!(idle.shell("nproc"), "1");
    let seen = total(&idle);
    assert!((200..=256).contains(&seen), "{seen} MiB");
    pod.remove().unwrap();

    for (name, value, said) in [
        (
            "io.pericarp/sizing",
            "kata",
            "is not allowed by the profile",
        ),
        ("io.pericarp/memory", "1M", "io.pericarp/memory"),
        ("io.pericarp/memroy", "1G", "memory"),
    ] {
        let mut config = config.clone();
        config.annotations.insert(name.into(), value.into());
        let error = run(config).unwrap_err();
        assert!(error.message().contains(said), "{error}");
        stage.node.assert_clean();
    }
}

pub(crate) fn what_is_the_hosts_is_refused_by_name(stage: &mut Stage) {
    for (name, said) in [
        ("network", "hostNetwork"),
        ("pid", "hostPID"),
        ("ipc", "hostIPC"),
    ] {
        let mut config = pod(name);
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        let namespaces = security.namespace_options.mut_or_insert_default();
        let host = NamespaceMode::NODE.into();
        match name {
            "network" => namespaces.network = host,
            "pid" => namespaces.pid = host,
            _ => namespaces.ipc = host,
        }
        let refused = stage.node.run_pod(config, stage.subject.name);
        let error = refused.unwrap_err();
        assert!(error.message().contains(said), "{error}");
        stage.node.assert_clean();
    }
}

/// Manifests for AKS and Kata name handlers of theirs; ours go by those names, too.
pub(crate) fn other_names_of_the_handler_mean_it(stage: &mut Stage) {
    for handler in ["kata-mshv-vm-isolation", "kata-vm-isolation", "kata"] {
        let pod = stage.node.run_pod(pod("alias"), handler).unwrap();
        let idle = pod.start(&container("idle", &IDLE)).unwrap();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_ne!(idle.shell("uname -r"), kernel.trim(), "{handler}");
        pod.remove().unwrap();
    }
}

/// What a pod's processes take of the host, by process, beside the guest's memory.
pub(crate) fn an_idle_pod_takes_little(stage: &mut Stage) {
    let (pod, idle) = stage.idle("idle");
    idle.shell("true");
    let (mut sidecars, mut all) = (0, 0);
    for words in [
        "containerd-shim",
        "pericarp-fs",
        "pericarp-net",
        "pericarp-vsock",
        "/initramfs",
    ] {
        let pid = process(&pod.id, words).as_raw_nonzero();
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        let kib = proportional_kib(&maps);
        println!("{words}: {kib} KiB");
        all += kib;
        if words.starts_with("pericarp-") {
            sidecars += kib;
        }
    }
    println!("all sidecars: {sidecars} KiB; the pod: {all} KiB");
    assert!(sidecars <= 20 << 10, "{sidecars} KiB");
}

/// What the host's root user does for a pod must not be led elsewhere by the pod: what it is shown
/// lies in a directory that even the server of its files can change nothing in.
pub(crate) fn a_guest_changes_nothing_above_what_it_is_shown(stage: &mut Stage) {
    let (pod, idle) = stage.idle("above");
    idle.shell("touch /new");
    let server = process(&pod.id, "pericarp-fs").as_raw_nonzero();
    let mounts = fs::read_to_string(format!("/proc/{server}/mountinfo")).unwrap();
    let top = format!("{}/places ", pod.id);
    let top: Vec<&str> = mounts.lines().filter(|line| line.contains(&top)).collect();
    assert!(!top.is_empty(), "{mounts}");
    for line in top {
        let options = line.split(' ').nth(5).unwrap();
        assert!(options.split(',').any(|option| option == "ro"), "{line}");
    }
}

/// Kills one process of a pod that has a container, and sees that containerd gets rid of both.
fn killed(stage: &mut Stage, words: &str, code: i32, reason: Option<&str>) {
    let (pod, idle) = stage.idle("killed");
    kill(process(&pod.id, words));
    let status = idle.ended();
    assert_eq!(status.exit_code, code, "{status:?}");
    let client = stage.node.client();
    until("the pod is not ready", || {
        let status = client.pod_status(&pod.id).unwrap();
        status.state == PodSandboxState::SANDBOX_NOTREADY.into()
    });
    let error = idle.exec(&["true"]).unwrap_err();
    assert!(!error.message().is_empty());
    if let Some(reason) = reason {
        assert!(stage.node.log().contains(reason), "{}", stage.node.log());
    }
    pod.remove().unwrap();
    stage.node.assert_clean();
    // The next has a machine of its own.
    let (pod, idle) = stage.idle("next");
    assert_eq!(idle.shell("echo here"), "here");
    pod.remove().unwrap();
}

pub(crate) fn a_killed_shim_takes_its_machine_along(stage: &mut Stage) {
    // What containerd says of a container whose shim does not answer.
    killed(stage, "containerd-shim-pericarp-v2", 255, None);
}

pub(crate) fn a_killed_file_server_ends_the_pod(stage: &mut Stage) {
    let reason = "a sidecar of the machine died (pericarp-fs: killed by signal 9";
    killed(stage, "pericarp-fs", 137, Some(reason));
}

pub(crate) fn a_killed_vsock_ends_the_pod(stage: &mut Stage) {
    let reason = "a sidecar of the machine died (pericarp-vsock: killed by signal 9";
    killed(stage, "pericarp-vsock", 137, Some(reason));
}

/// A guest that stands still answers nothing: as one does that will not.
pub(crate) fn a_guest_that_ends_nothing_is_ended(stage: &mut Stage) {
    let (pod, idle) = stage.idle("still");
    kill_process(process(&pod.id, "/initramfs"), Signal::STOP).unwrap();
    // It is asked, and does not answer.
    idle.stop(1).unwrap_err();
    // Nor does it obey.
    let _ = idle.stop(0);
    assert_eq!(idle.ended().exit_code, 137);
    until("the reason is told", || {
        stage
            .node
            .log()
            .contains("ended: the guest does not end container")
    });
    pod.remove().unwrap();
    stage.node.assert_clean();
}

pub(crate) fn a_killed_machine_ends_the_pod(stage: &mut Stage) {
    killed(stage, "/initramfs", 137, Some("the virtual machine died"));
}
