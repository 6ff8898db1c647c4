//! What a pod takes of its host is charged to the pod: each process of it, each of their threads, those
//! among them that the kernel makes for rings, and the guest's memory.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use pericarp_tests::audit::{Member, running};
use pericarp_tests::cri::{container, pod};
use pericarp_tests::usage::{astray, threads};

use crate::blocks::disk;
use crate::stage::{Stage, script, until};

/// Bytes that the guest touches and did not before.
const TOUCHED: u64 = 48 << 20;

/// A flush is one that the kernel does on a thread, and the files are many.
const WORK: &str = "
    while :; do
        dd if=/dev/zero of=/dev/xvda bs=64k count=16 conv=fsync 2>/dev/null
        for name in 1 2 3 4; do echo $name > /file-$name; done
        sync
        ping -c 1 10.88.0.1 >/dev/null
    done";

/// What the host says that a group's memory is, bytes.
fn memory(group: &str) -> u64 {
    let of = |file: &str| PathBuf::from("/sys/fs/cgroup").join(file);
    let one = of(&format!("memory/{group}/memory.usage_in_bytes"));
    let two = of(&format!("{group}/memory.current"));
    let text = fs::read_to_string(one).or_else(|_| fs::read_to_string(two));
    text.unwrap().trim().parse().unwrap()
}

/// Looks at all threads once: those of other groups, and whose threads the kernel has made.
fn look(members: &[Member], group: &str, workers: &mut BTreeSet<String>) -> usize {
    let mut seen = 0;
    for member in members {
        // One may have been there for a moment, to look at the pod.
        for thread in threads(member.pid).unwrap_or_default() {
            let wrong = astray(&thread.groups, group);
            let who = format!("{} {} ({})", member.program, thread.id, thread.name);
            assert_eq!(wrong, Vec::<String>::new(), "{who}");
            if thread.is_worker() {
                workers.insert(member.program.clone());
            }
            seen += 1;
        }
    }
    seen
}

pub(crate) fn every_thread_and_byte_of_a_pod_is_charged_to_it(stage: &mut Stage) {
    let Some(disk) = disk(stage, "charged") else {
        return;
    };
    let pod = stage
        .node
        .run_pod(pod("charged"), stage.subject.name)
        .unwrap();
    let mut config = container("works", &script(WORK));
    config.devices = vec![disk.device("/dev/xvda", "mrw")];
    let works = pod.start(&config).unwrap();
    let group = format!("{}/{}", stage.node.parent(), pod.id);
    let members = || {
        let pods = running().unwrap().into_iter();
        let own = pods.filter(|one| one.is_called(&pod.id));
        own.flat_map(|pod| pod.members).collect::<Vec<_>>()
    };
    let programs: BTreeSet<String> = members().into_iter().map(|one| one.program).collect();
    for program in [
        "containerd-shim-pericarp-v2",
        "pericarp-block",
        "pericarp-fs",
        "pericarp-net",
        "pericarp-vsock",
    ] {
        assert!(programs.contains(program), "{programs:?}");
    }
    let machine = |name: &str| matches!(name, "qemu-system-x86_64" | "pericarp-vmm");
    assert!(programs.iter().any(|one| machine(one)), "{programs:?}");

    let (mut workers, mut most) = (BTreeSet::new(), 0);
    until("a thread of the kernel's works for a ring", || {
        most = most.max(look(&members(), &group, &mut workers));
        workers.contains("pericarp-block")
    });
    println!("{most} threads of {programs:?}; the kernel's were seen for {workers:?}");

    // The guest's memory, at its first touch.
    let before = memory(&group);
    works.shell(&format!(
        "dd if=/dev/zero of=/dev/shm/touched bs=1024k count={} 2>/dev/null",
        TOUCHED >> 20
    ));
    let grown = memory(&group).saturating_sub(before);
    println!(
        "{} MiB charged before, {} more after the guest has touched {} MiB",
        before >> 20,
        grown >> 20,
        TOUCHED >> 20
    );
    assert!(grown >= TOUCHED * 3 / 4, "{grown} bytes");
    pod.remove().unwrap();
    assert!(disk.is_free());
}
