//! From the first call to the last: how pods and containers start, end and are taken away.

use std::time::{Duration, Instant};

use pericarp_tests::cri::proto::{ContainerState, PodSandboxState};
use pericarp_tests::cri::{container, pod};

use crate::stage::{IDLE, Stage, script};

pub(crate) fn a_container_ends_with_its_code(stage: &mut Stage) {
    let client = stage.node.client();
    let pod = stage.pod("codes");
    let status = client.pod_status(&pod.id).unwrap();
    assert_eq!(status.state, PodSandboxState::SANDBOX_READY.into());
    assert_eq!(status.metadata.name, "codes");
    assert!(status.network.ip.starts_with("10.88.0."), "{status:?}");
    assert_eq!(client.pods(Some(("app", "codes"))).unwrap().len(), 1);
    assert_eq!(client.pods(Some(("app", "other"))).unwrap().len(), 0);

    for (name, text, code, reason) in [
        ("fine", "true", 0, "Completed"),
        ("seven", "exit 7", 7, "Error"),
        ("killed", "sh -c 'kill -9 $$'; exit $?", 137, "Error"),
    ] {
        let one = pod.create(&container(name, &script(text))).unwrap();
        let status = one.status().unwrap();
        assert_eq!(status.state, ContainerState::CONTAINER_CREATED.into());
        assert_eq!(status.started_at, 0);
        one.start().unwrap();
        let status = one.ended();
        assert_eq!(
            (status.exit_code, &*status.reason),
            (code, reason),
            "{name}"
        );
        // When it started is written down afterwards, which may be after its end.
        assert!(status.created_at < status.started_at, "{status:?}");
        assert!(status.created_at < status.finished_at, "{status:?}");
    }
    let all = client.containers(&pod.id).unwrap();
    assert_eq!(all.len(), 3);

    client.stop_pod(&pod.id).unwrap();
    let status = client.pod_status(&pod.id).unwrap();
    assert_eq!(status.state, PodSandboxState::SANDBOX_NOTREADY.into());
    // Both may be asked for again.
    client.stop_pod(&pod.id).unwrap();
    client.remove_pod(&pod.id).unwrap();
    client.remove_pod(&pod.id).unwrap();
    assert!(client.pod_status(&pod.id).is_err());
    assert!(client.containers(&pod.id).unwrap().is_empty());
}

pub(crate) fn a_command_that_is_not_there_is_an_error(stage: &mut Stage) {
    let pod = stage.pod("nothing");
    let one = pod.create(&container("one", &["/bin/nothing"])).unwrap();
    let error = one.start().unwrap_err();
    assert!(error.message().contains("/bin/nothing"), "{error}");
    let status = one.ended();
    assert_eq!(status.reason, "StartError");
    assert_eq!(status.exit_code, 128);

    // The pod is none the worse for it.
    let other = pod.start(&container("other", &IDLE)).unwrap();
    let error = other.exec(&["/bin/nothing"]).unwrap_err();
    assert!(error.message().contains("/bin/nothing"), "{error}");
    assert_eq!(other.shell("echo here"), "here");

    let mut config = container("third", &IDLE);
    config.image.mut_or_insert_default().image = "localhost/nothing:1".into();
    let error = pod.create(&config).unwrap_err();
    assert!(error.message().contains("not found"), "{error}");
}

pub(crate) fn containers_have_time_to_end_and_no_more(stage: &mut Stage) {
    let pod = stage.pod("grace");
    let polite = "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done";
    let polite = pod.start(&container("polite", &script(polite))).unwrap();
    let deaf = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let deaf = pod.start(&container("deaf", &script(deaf))).unwrap();
    for one in [&polite, &deaf] {
        one.log_until(|log| log.iter().any(|line| line.text == "ready"));
    }

    let begun = Instant::now();
    polite.stop(20).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15));
    assert_eq!(polite.status().unwrap().exit_code, 9);
    // What it said last is there.
    assert_eq!(polite.log().last().unwrap().text, "bye");

    let begun = Instant::now();
    deaf.stop(1).unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert_eq!(deaf.status().unwrap().exit_code, 137);
    // What has ended may be stopped.
    deaf.stop(1).unwrap();
    polite.remove().unwrap();
    assert!(polite.status().is_err());
    polite.remove().unwrap();
}

pub(crate) fn one_container_of_a_pod_is_started_again(stage: &mut Stage) {
    let pod = stage.pod("again");
    let address = pod.address().unwrap();
    let stays = pod.start(&container("stays", &IDLE)).unwrap();
    stays.shell("echo kept > /tmp/mark");
    let first = stays.shell("cat /proc/sys/kernel/random/boot_id");

    let mut config = container(
        "comes",
        &script("test ! -e /tmp/x && touch /tmp/x && exit 3"),
    );
    for attempt in 0..3 {
        config.metadata.mut_or_insert_default().attempt = attempt;
        config.log_path = format!("comes-{attempt}.log");
        let one = pod.start(&config).unwrap();
        // Each time with a file system as new.
        assert_eq!(one.ended().exit_code, 3);
        // The same name and attempt is the same container.
        let error = pod.create(&config).unwrap_err();
        assert!(error.message().contains("reserved"), "{error}");
        one.remove().unwrap();
    }
    assert_eq!(pod.address().unwrap(), address);
    assert_eq!(stays.shell("cat /tmp/mark"), "kept");
    assert_eq!(stays.shell("cat /proc/sys/kernel/random/boot_id"), first);
}

pub(crate) fn what_is_removed_need_not_have_ended(stage: &mut Stage) {
    let client = stage.node.client();
    let pod = stage.pod("early");
    let runs = pod.start(&container("runs", &IDLE)).unwrap();
    pod.create(&container("waits", &IDLE)).unwrap();
    runs.remove().unwrap();
    assert!(runs.status().is_err());
    // With one that has not been started, and one that is running.
    pod.start(&container("other", &IDLE)).unwrap();
    client.remove_pod(&pod.id).unwrap();
    assert!(client.pods(None).unwrap().is_empty());
    stage.node.assert_clean();
}

pub(crate) fn a_pod_that_cannot_be_is_refused_with_the_reason(stage: &mut Stage) {
    let error = stage.node.run_pod(pod("typo"), "kata-mhsv-vm-isolation");
    let error = error.unwrap_err();
    assert!(
        error.message().contains("kata-mhsv-vm-isolation"),
        "{error}"
    );
    assert!(stage.node.client().pods(None).unwrap().is_empty());

    let mut config = pod("late");
    let linux = config.linux.mut_or_insert_default();
    linux.sysctls.insert("net.nothing".into(), "1".into());
    let refused = stage.node.run_pod(config, stage.subject.name);
    let error = refused.unwrap_err();
    assert!(error.message().contains("nothing"), "{error}");
    stage.node.assert_clean();

    // A name that is taken.
    let config = pod("twice");
    let kept = stage.node.run_pod(config.clone(), stage.subject.name);
    let kept = kept.unwrap();
    let error = stage.node.run_pod(config, stage.subject.name).unwrap_err();
    assert!(error.message().contains("reserved"), "{error}");
    kept.remove().unwrap();
}
