//! Several pods at once, and the two of the article.

use std::collections::BTreeSet;
use std::thread;
use std::time::Instant;

use pericarp_tests::cri::config::ARTICLES_IMAGE;
use pericarp_tests::cri::{Pod, container, pod};

use crate::stage::{IDLE, Stage, script};

/// A number of the environment, or another one.
fn number(variable: &str, usual: usize) -> usize {
    let said = std::env::var(variable);
    said.map_or(usual, |text| text.parse().unwrap())
}

/// `PERICARP_PODS` says how many, 5 otherwise.
pub(crate) fn pods_come_and_go_together(stage: &mut Stage) {
    let stage = &*stage;
    let count = number("PERICARP_PODS", 5);
    let pods: Vec<Pod<'_>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                scope.spawn(move || {
                    let pod = stage.pod(&format!("many-{number}"));
                    let one = pod.start(&container("one", &IDLE)).unwrap();
                    assert_eq!(one.shell("hostname"), format!("many-{number}"));
                    pod
                })
            })
            .collect();
        threads.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let addresses: BTreeSet<String> = pods.iter().map(|pod| pod.address().unwrap()).collect();
    assert_eq!(addresses.len(), count);
    // Each reaches the next one.
    let last = pods[count - 1].start(&container("asks", &IDLE)).unwrap();
    last.shell(&format!(
        "ping -c 1 -W 20 {} >/dev/null",
        pods[0].address().unwrap()
    ));
    thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(move || pod.remove().unwrap());
        }
    });
    stage.node.assert_clean();
}

/// `PERICARP_POD_CYCLES` says how many, 3 otherwise. After each of them the node is as it was.
pub(crate) fn pods_one_after_the_other_leave_nothing(stage: &mut Stage) {
    for cycle in 0..number("PERICARP_POD_CYCLES", 3) {
        let begin = Instant::now();
        let (pod, one) = stage.idle(&format!("cycle-{cycle}"));
        let running = begin.elapsed();
        assert_eq!(one.shell("echo here"), "here");
        pod.remove().unwrap();
        stage.node.assert_clean();
        println!(
            "cycle {cycle}: ready after {running:?}, gone after {:?}",
            begin.elapsed()
        );
    }
}

/// `trusted-app.yaml` and `untrusted-app.yaml` as a kubelet would hand them on: they differ in
/// their names and in the handler.
pub(crate) fn the_two_pods_of_the_article(stage: &mut Stage) {
    let apply = |name: &str, handler: &str| {
        let made = stage.node.run_pod(pod(name), handler).unwrap();
        let command = ["/bin/sh", "-ec", "while :; do echo '.'; sleep 5 ; done"];
        let mut config = container(name, &command);
        config.image.mut_or_insert_default().image = ARTICLES_IMAGE.into();
        let container = made.start(&config).unwrap();
        (made, container)
    };
    let (trusted_pod, trusted) = apply("trusted", "runc");
    let (untrusted_pod, untrusted) = apply("untrusted", stage.subject.name);

    // `kubectl exec -it untrusted -- /bin/bash`, then `uname -r`.
    let release = |container: &pericarp_tests::cri::Container<'_>| {
        let mut shell = container.stream(&["/bin/bash"], true);
        shell.write(b"uname -r\nexit\n").unwrap();
        let said = shell.wait().unwrap();
        assert_eq!(said.code, 0);
        let asked = container.exec(&script("uname -r")).unwrap().text();
        assert!(said.text().contains(&asked), "{}", said.text());
        asked
    };
    let differ = release(&trusted) != release(&untrusted);
    assert_eq!(differ, stage.subject.own_kernel);

    for one in [&trusted, &untrusted] {
        let log = one.log_until(|log| log.len() > 1);
        assert!(log.iter().all(|line| line.text == "." && line.whole));
        let apart = log[1].time - log[0].time;
        assert!(
            (4_900_000_000..10_000_000_000).contains(&apart),
            "{apart} ns"
        );
    }
    trusted_pod.remove().unwrap();
    untrusted_pod.remove().unwrap();
}
