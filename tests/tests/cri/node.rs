//! The rig itself: it sees what pods leave, and outlives its containerd.

use pericarp_tests::cri::proto::{ContainerState, PodSandboxState};

use crate::stage::Stage;

pub(crate) fn what_a_pod_leaves_is_seen(stage: &mut Stage) {
    assert!(stage.node.left().is_empty(), "{:?}", stage.node.left());
    let (pod, _) = stage.idle("seen");
    let left = stage.node.left();
    let root = if stage.subject.own_kernel {
        "/shared/containers/"
    } else {
        "/rootfs "
    };
    for (kind, part) in [
        ("process ", "shim"),
        ("mount ", root),
        ("cgroup ", ""),
        ("interface ", "veth"),
        ("entry /run/netns/", ""),
        ("entry /run/containerd/s/", ""),
        ("entry addresses/pods/", "10.88.0."),
    ] {
        let seen = |trace: &String| trace.starts_with(kind) && trace.contains(part);
        assert!(left.iter().any(seen), "{kind}{part}: {left:#?}");
    }
    pod.remove().unwrap();
    stage.node.assert_clean();
}

pub(crate) fn containerd_is_killed_and_pods_go_on(stage: &mut Stage) {
    let (pod, one) = stage.idle("survivor");
    one.shell("echo kept > /tmp/mark");
    let (pod, one) = (pod.id, one.id);
    stage.node.restart();
    let client = stage.node.client();
    let status = client.pod_status(&pod).unwrap();
    assert_eq!(status.state, PodSandboxState::SANDBOX_READY.into());
    let status = client.container_status(&one).unwrap();
    assert_eq!(status.state, ContainerState::CONTAINER_RUNNING.into());
    let seen = client.exec_sync(&one, &["cat", "/tmp/mark"], 30).unwrap();
    assert_eq!(seen.text(), "kept");
    client.stop(&one, 20).unwrap();
    assert_eq!(client.container_status(&one).unwrap().exit_code, 0);
    client.stop_pod(&pod).unwrap();
    client.remove_pod(&pod).unwrap();
    stage.node.assert_clean();
}
