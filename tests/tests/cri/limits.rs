//! What containers may use, what happens beyond, and what they are said to have used.

use std::fs;

use pericarp_tests::cri::container;
use pericarp_tests::cri::log::Stream;
use pericarp_tests::cri::proto::{ContainerConfig, LinuxContainerResources};
use protobuf::MessageField;

use crate::stage::{IDLE, Stage, script, until};

pub(crate) const MIB: i64 = 1 << 20;
/// The limits as a container sees them, of either version of cgroups.
const MEMORY: &str =
    "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
const QUOTA: &str =
    "cut -d' ' -f1 /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us";

pub(crate) fn limited(mut config: ContainerConfig, memory: i64, quota: i64) -> ContainerConfig {
    let linux = config.linux.mut_or_insert_default();
    linux.resources = MessageField::some(resources(memory, quota));
    config
}

fn resources(memory: i64, quota: i64) -> LinuxContainerResources {
    let mut resources = LinuxContainerResources::new();
    resources.memory_limit_in_bytes = memory;
    resources.cpu_period = 100_000;
    resources.cpu_quota = quota;
    resources
}

pub(crate) fn limits_are_set_and_changed(stage: &mut Stage) {
    let pod = stage.pod("limits");
    let config = limited(container("one", &IDLE), 64 * MIB, 50_000);
    let one = pod.start(&config).unwrap();
    assert_eq!(one.shell(MEMORY), (64 * MIB).to_string());
    assert_eq!(one.shell(QUOTA), "50000");
    if stage.subject.cgroups_of_host {
        let parent = stage.node.parent();
        let group = [
            format!(
                "/sys/fs/cgroup/memory/{parent}/{}/memory.limit_in_bytes",
                one.id
            ),
            format!("/sys/fs/cgroup/{parent}/{}/memory.max", one.id),
        ];
        let seen = group.iter().find_map(|file| fs::read_to_string(file).ok());
        assert_eq!(seen.unwrap().trim(), (64 * MIB).to_string());
    }

    let client = stage.node.client();
    client.update(&one.id, resources(96 * MIB, 70_000)).unwrap();
    assert_eq!(one.shell(MEMORY), (96 * MIB).to_string());
    assert_eq!(one.shell(QUOTA), "70000");
    let other = pod.start(&container("other", &IDLE)).unwrap();
    assert_ne!(other.shell(MEMORY), (96 * MIB).to_string());
}

pub(crate) fn a_container_beyond_its_memory_is_killed_alone(stage: &mut Stage) {
    let pod = stage.pod("memory");
    let sibling = pod.start(&container("sibling", &IDLE)).unwrap();
    // tail keeps what it reads, since no line ends in it. runc's shim looks for this from a moment
    // after the start on, so it is not begun before it is said to.
    let text = "until test -e /go; do sleep 0.02; done; tail -c 200000000 /dev/zero; echo it had $?; trap 'exit 0' TERM; sleep 1000 & wait";
    let config = limited(container("greedy", &script(text)), 24 * MIB, 0);
    let greedy = pod.start(&config).unwrap();
    greedy.shell("touch /go");
    let log = greedy.log_until(|log| log.iter().any(|line| line.stream == Stream::Output));
    let said: Vec<_> = log
        .iter()
        .filter(|line| line.stream == Stream::Output)
        .collect();
    assert_eq!(said[0].text, "it had 137");
    until("it is known why", || {
        greedy.status().unwrap().reason == "OOMKilled"
    });
    greedy.stop(20).unwrap();

    // The first process itself.
    let text = "until test -e /go; do sleep 0.02; done; exec tail -c 200000000 /dev/zero";
    let config = limited(container("first", &script(text)), 24 * MIB, 0);
    let first = pod.start(&config).unwrap();
    first.shell("touch /go");
    let status = first.ended();
    assert_eq!(status.exit_code, 137);
    let lost = stage.subject.may_lose_oom && status.reason == "Error";
    assert!(status.reason == "OOMKilled" || lost, "{}", status.reason);
    assert_eq!(sibling.shell("echo here"), "here");
    assert_eq!(sibling.status().unwrap().exit_code, 0);
}

pub(crate) fn statistics_grow(stage: &mut Stage) {
    let client = stage.node.client();
    let (pod, idle) = stage.idle("statistics");
    let busy = script("while :; do :; done");
    let busy = limited(container("busy", &busy), 64 * MIB, 20_000);
    let busy = pod.start(&busy).unwrap();
    let used = |id: &str| {
        let stats = client.container_stats(id).unwrap();
        assert!(stats.memory.working_set_bytes.value > 0, "{stats:?}");
        assert_eq!(stats.attributes.id, id);
        stats.cpu.usage_core_nano_seconds.value
    };
    let (first, rest) = (used(&busy.id), used(&idle.id));
    until("it has used 50 ms more", || {
        used(&busy.id) > first + 50_000_000
    });
    // A millisecond or two is what a container costs that sleeps; its start may have cost more than
    // that of the other.
    assert!(used(&idle.id) - rest < used(&busy.id) - first);

    let stats = client.pod_stats(&pod.id).unwrap();
    assert_eq!(stats.attributes.metadata.name, "statistics");
    let linux = stats.linux;
    assert_eq!(linux.containers.len(), 2);
    assert!(linux.cpu.usage_core_nano_seconds.value >= first);
    // A machine's memory is the pod's.
    let least = if stage.subject.own_kernel {
        32 * MIB
    } else {
        1
    };
    assert!(linux.memory.usage_bytes.value >= u64::try_from(least).unwrap());
    let interface = &linux.network.default_interface;
    assert_eq!(interface.name, "eth0");
    idle.shell("ping -c 1 10.88.0.1 >/dev/null");
    until("packets are counted", || {
        let stats = client.pod_stats(&pod.id).unwrap();
        let now = stats.linux.network.default_interface.tx_bytes.value;
        now > interface.tx_bytes.value
    });
}
