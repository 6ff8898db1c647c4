//! Pods on CPUs of their own: every thread of a pod, whoever made it, stays there while its guest works.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use pericarp_tests::cri::proto::PodSandboxConfig;
use pericarp_tests::cri::{Container, Disk, Pod, container, pod};
use pericarp_tests::parts::absent;
use serde_json::Value;

use crate::blocks::disk;
use crate::stage::{Stage, script, until};

/// What a pod has its CPUs by.
const CPUS: &str = "io.pericarp/cpus";
/// What a pod's processes are, as its record has them, beside its shim.
const ROLES: [&str; 5] = [
    "machine",
    "pericarp-fs",
    "pericarp-net",
    "pericarp-vsock",
    "pericarp-block",
];
/// The kernel's threads for rings.
const KERNELS: &str = "iou-wrk-";
/// Files and a disk, again and again.
const WORK: &str = "trap 'exit 0' TERM; while :; do \
    dd if=/dev/zero of=/file bs=64k count=4 conv=fsync; \
    dd if=/dev/zero of=/dev/xvda bs=64k count=4 conv=fsync; done 2>/dev/null & wait";

/// The same handler, with CPUs.
fn configure(stage: &Stage, cpus: &str) {
    let state = stage.node.scratch().path("state");
    let text = format!(
        "features = [\"cpu-pinning\"]\nstate-directory = \"{}\"\n[profiles.pericarp]\n\
         annotations = [\"memory\", \"cpus\"]\ncpus = \"{cpus}\"\nboot-timeout = 200\n",
        state.display()
    );
    fs::write(config(stage), text).unwrap();
}

fn config(stage: &Stage) -> PathBuf {
    let name = format!("{}.toml", stage.subject.name);
    stage.node.scratch().path(&name)
}

fn on(name: &str, cpus: &str) -> PodSandboxConfig {
    let mut config = pod(name);
    config.annotations.insert(CPUS.into(), cpus.into());
    config
}

/// A pod's processes, as it is on record: what they are and their numbers on the node.
fn processes(stage: &Stage, pod: &Pod<'_>) -> Vec<(String, u64)> {
    let directory = stage.node.root().join("run/pericarp/k8s.io").join(&pod.id);
    let text = fs::read(directory.join("pod.json")).unwrap();
    let record: Value = serde_json::from_slice(&text).unwrap();
    let mut all = vec![("shim".to_owned(), record["shim"].as_u64().unwrap())];
    for process in record["processes"].as_array().unwrap() {
        let role = process["role"].as_str().unwrap().to_owned();
        all.push((role, process["pid"].as_u64().unwrap()));
    }
    all
}

/// What the kernel says of a pod's threads: the process, the name and the CPUs of each.
fn threads(stage: &Stage, pod: &Pod<'_>) -> BTreeSet<[String; 3]> {
    let mut seen = BTreeSet::new();
    for (role, process) in processes(stage, pod) {
        let tasks = stage.node.root().join(format!("proc/{process}/task"));
        for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
            // It may have ended.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else {
                continue;
            };
            let field = |name: &str| {
                let value = status.lines().find_map(|line| line.strip_prefix(name));
                value.unwrap_or_default().trim().to_owned()
            };
            seen.insert([role.clone(), field("Name:"), field("Cpus_allowed_list:")]);
        }
    }
    seen
}

fn all_on(cpu: &str, seen: &BTreeSet<[String; 3]>) {
    assert!(seen.iter().all(|[.., cpus]| cpus == cpu), "{cpu}: {seen:?}");
}

/// Where the kernel holds all that is in the pod's group, if it does so here.
fn held(stage: &Stage, pod: &Pod<'_>) -> Option<String> {
    let group = format!("{}/{}/cpuset.cpus", stage.node.parent(), pod.id);
    ["/sys/fs/cgroup/cpuset", "/sys/fs/cgroup"]
        .iter()
        .find_map(|top| fs::read_to_string(format!("{top}/{group}")).ok())
        .map(|text| text.trim().to_owned())
}

pub(crate) fn pods_stay_on_their_own_cpus(stage: &mut Stage) {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let online = online.trim();
    let first = |list: &str| -> Option<u32> { list.split([',', '-']).next()?.parse().ok() };
    let own = first(online).unwrap();
    let Some(other) = online.split([',', '-']).nth(1) else {
        absent("pods_stay_on_their_own_cpus", "this machine has one CPU");
        return;
    };
    // Of `0-7` the next one, of `0,2` the one that is named.
    let other = if online.starts_with(&format!("{own}-")) {
        own + 1
    } else {
        other.parse().unwrap()
    };
    let (Some(disk), Some(more)) = (disk(stage, "own"), disk(stage, "other")) else {
        return;
    };
    let (own, other) = (own.to_string(), other.to_string());
    configure(stage, &format!("{own},{other}"));
    let run = |config| stage.node.run_pod(config, stage.subject.name);

    // Not before the node is ready for it.
    let error = run(on("early", &own)).unwrap_err();
    assert!(error.message().contains("feature 'cpu-pinning'"), "{error}");
    let file = config(stage).display().to_string();
    let words = ["feature", "enable", "cpu-pinning", "--config", &file];
    let (code, said, errors) = stage.node.pericarp(&words);
    assert_eq!(code, Some(0), "{said}{errors}");

    let work = |pod: &Pod<'_>, disk: &Disk| -> String {
        let mut config = container("work", &script(WORK));
        config.devices = vec![disk.device("/dev/xvda", "mrw")];
        let made: Container<'_> = pod.start(&config).unwrap();
        made.id
    };
    let pods = [(own.as_str(), &disk), (other.as_str(), &more)].map(|(cpu, disk)| {
        let made = run(on(&format!("on-{cpu}"), cpu)).unwrap();
        work(&made, disk);
        (made, cpu)
    });
    for (made, cpu) in &pods {
        if let Some(cpus) = held(stage, made) {
            assert_eq!(cpus, *cpu);
        }
        let mut seen = BTreeSet::new();
        until("all of its threads have been seen", || {
            seen.extend(threads(stage, made));
            let has = |role: &str| seen.iter().any(|[process, ..]| process == role);
            let kernels = seen.iter().any(|[_, name, _]| name.starts_with(KERNELS));
            kernels && ROLES.iter().all(|role| has(role))
        });
        println!("{cpu}: {seen:?}");
        all_on(cpu, &seen);
    }
    // What comes in place of another is there, too.
    let (made, cpu) = &pods[0];
    for role in ["pericarp-net", "pericarp-block"] {
        let find = || {
            let all = processes(stage, made);
            all.into_iter()
                .find_map(|(is, pid)| (is == role).then_some(pid))
        };
        let before = find().unwrap();
        stage.node.run(&["sh", "-c", &format!("kill -9 {before}")]);
        until("there is another", || {
            find().is_some_and(|now| now != before)
        });
    }
    all_on(cpu, &threads(stage, made));
    for (made, _) in pods {
        made.remove().unwrap();
    }
    stage.node.assert_clean();

    // A CPU that is not there, and one of others.
    configure(stage, "1023");
    let error = run(pod("none")).unwrap_err();
    let said = format!(
        "cpus '1023': this host has no CPU 1023; name some of {}",
        online.trim()
    );
    assert!(
        error.message().contains(&said) && !error.message().contains('\n'),
        "{error}"
    );
    configure(stage, &own);
    let error = run(on("beyond", &other)).unwrap_err();
    assert!(error.message().contains(CPUS), "{error}");
    stage.node.assert_clean();
}
