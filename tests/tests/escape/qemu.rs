//! QEMU as a pod has it, taken over: what its own sandbox refuses, what the walls around its files
//! refuse, and what stays open, because QEMU's filter lets all through that it does not name. Each
//! act is held against a table, so that nothing opens unseen.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use libc::SIGSYS;
use pericarp_hypervisor::{
    ConsoleSpec, HostFacts, Hypervisor, Machine, MachineSpec, Wanted, select,
};
use pericarp_tests::parts::{Part, have, skip};
use pericarp_tests::puppet::{Outcome, Puppet};
use rustix::fs::{Mode, OFlags};

use crate::attempts::ATTEMPTS;
use crate::programs::{Scene, Target, sleeping_kernel};
use crate::{End, GONE, HELD, NO, in_words, judge};

/// What QEMU's filter lets through and is refused by something else, or by nothing.
const QEMU: &[(&str, End)] = &[];

/// A machine whose guest sleeps, with a directory left open in it.
fn start(scene: &Scene, driver: &dyn Hypervisor) -> (Puppet, Machine) {
    let spec = MachineSpec {
        kernel: scene.file("kernel", &sleeping_kernel()),
        initramfs: scene.file("initramfs", b"none"),
        cmdline: String::new(),
        cpus: 1,
        memory: 128 << 20,
        disks: vec![],
        shares: vec![],
        cards: vec![],
        vsock: None,
        spare_slots: 0,
        console: ConsoleSpec::default(),
    };
    let outside = scene.victim.parent().unwrap();
    // Inherited, as if it had been forgotten.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let left: OwnedFd = rustix::fs::open(outside, flags, Mode::empty()).unwrap();
    let machine = driver.start(&spec).unwrap();
    drop(left);
    let pid = machine.pid().cast_signed();
    (Puppet::take(pid, pid).unwrap(), machine)
}

/// Whether this kernel has what the walls are made of: a sidecar says it.
fn landlock(scene: &Scene) -> bool {
    let (_puppet, process) = scene.start(Target::Block, true);
    let line = process.output().find("confined: ").unwrap_or_default();
    let missing = line.split_once("not applied: ");
    !missing.is_some_and(|(_, what)| what.contains("landlock"))
}

#[test]
fn qemu_taken_over_has_no_files_and_starts_nothing() {
    let test = "qemu_taken_over_has_no_files_and_starts_nothing";
    if !have(test, &[Part::QemuSystem, Part::PERICARP_BLOCK]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        skip(test, "takes root, as whom a node starts it");
        return;
    }
    let scene = Scene::new();
    if !landlock(&scene) {
        skip(test, "the kernel has no Landlock");
        return;
    }
    let driver = select(Wanted::Qemu, &HostFacts::probe()).hypervisor();
    let mut held = None;
    let (mut wrong, mut seen) = (Vec::new(), BTreeMap::<String, usize>::new());
    for (name, _) in QEMU {
        assert!(ATTEMPTS.iter().any(|(act, _)| act == name), "{name}");
    }
    for (act, attempt) in ATTEMPTS {
        let (puppet, _) = held.get_or_insert_with(|| start(&scene, &*driver));
        scene.renew();
        let outcome = attempt(puppet, &scene).unwrap_or_else(|e| panic!("{act}: {e}"));
        let expected = QEMU.iter().find(|(name, _)| name == act);
        let expected = expected.map_or(End::Killed, |(_, end)| *end);
        if !judge(expected, outcome) {
            wrong.push(format!("{act}: {outcome:?}, not {expected:?}"));
        }
        *seen.entry(in_words(outcome)).or_default() += 1;
        if !matches!(outcome, Outcome::Returned(_)) || outcome == Outcome::Killed(SIGSYS) {
            held = None;
        }
    }
    let tried: usize = seen.values().sum();
    let seen: Vec<String> = seen.iter().map(|(how, n)| format!("{n} {how}")).collect();
    println!("QEMU: {tried} attempts: {}", seen.join(", "));
    assert!(wrong.is_empty(), "QEMU:\n{}", wrong.join("\n"));
}
