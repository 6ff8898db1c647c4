//! QEMU as a pod has it, taken over: what its own sandbox refuses, what the walls around its files
//! refuse, and what stays open, because QEMU's filter lets all through that it does not name. Each
//! act is held against a table, so that nothing opens unseen.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use libc::{ECONNREFUSED, EINVAL, ENOSYS, ENOTTY, EPERM};
use pericarp_hypervisor::{
    ConsoleSpec, HostFacts, Hypervisor, Machine, MachineSpec, Wanted, select,
};
use pericarp_tests::parts::{Part, have, skip};
use pericarp_tests::puppet::{Outcome, Puppet};
use rustix::fs::{Mode, OFlags};

use crate::attempts::ATTEMPTS;
use crate::programs::{Scene, Target, sleeping_kernel};
use crate::{End, HELD, NO, in_words, judge};

/// What QEMU's own filter does not kill for.
const QEMU: &[(&str, End)] = &[
    // Landlock: files that were not named, and signals to others.
    ("read a file by its path", HELD),
    ("read a file through /proc/self/root", HELD),
    ("read a file through another's root", HELD),
    ("read a file upwards", HELD),
    ("read a file with openat2", HELD),
    ("read a file of the directory that was left open", HELD),
    ("remove a file", HELD),
    ("remove a file of the directory that was left open", HELD),
    ("make a file", HELD),
    ("make a directory", HELD),
    ("make a device", HELD),
    ("link to a file", HELD),
    ("rename a file", HELD),
    ("write to memory past the descriptors of the process", HELD),
    ("open a device", HELD),
    ("write to memory through /proc", HELD),
    ("signal another", NO),
    ("signal the first process", NO),
    ("signal a thread of another", NO),
    (
        "a socket of the host without a path",
        End::Error(&[EPERM, ECONNREFUSED]),
    ),
    // Our filter.
    ("change the mode of a file", NO),
    ("give a file away", NO),
    ("a handle of a file", NO),
    ("a file by its handle", NO),
    ("change the root", NO),
    ("swap the root", NO),
    ("unmount", NO),
    ("mount the new way", NO),
    ("copy a mount", NO),
    ("move a mount", NO),
    ("trace another", NO),
    ("read the memory of another", NO),
    ("write the memory of another", NO),
    ("hold another by its descriptor", NO),
    ("limits of another", NO),
    ("compare with another", NO),
    ("a program in a segment of System V", NO),
    ("all that is read is executable", NO),
    ("faults that are answered by oneself", NO),
    ("a connection to the host", NO),
    ("packets of any kind", NO),
    ("the kernel's network settings", NO),
    ("listen for others", NO),
    ("a name for a socket", NO),
    ("a ring of one's own", NO),
    ("the rights of others for a ring", NO),
    ("memory of a ring's own", NO),
    ("the buffers of another ring", NO),
    ("asynchronous transfers of the old kind", NO),
    ("a program for the kernel", NO),
    ("counters of the processor", NO),
    ("a key for the kernel", NO),
    ("keys of others", NO),
    ("ask for a key", NO),
    ("watch files", NO),
    ("watch and answer for files", NO),
    ("other rules for files", NO),
    ("a module", NO),
    ("a module of a file", NO),
    ("no module", NO),
    ("another time", NO),
    ("another clock", NO),
    ("another speed of time", NO),
    ("another host name", NO),
    ("another domain name", NO),
    ("quotas", NO),
    ("accounts of processes", NO),
    ("ports of the machine", NO),
    ("segments of the processor", NO),
    // Nobody but the want of capabilities, or QEMU's filter by an error.
    ("higher limits", NO),
    ("processors of another", NO),
    ("a turn before all others", NO),
    ("a capability for programs", NO),
    ("all capabilities", NO),
    ("clone a process the new way", End::Error(&[ENOSYS])),
    // QEMU's filter by a signal that a tracer holds back.
    ("a namespace of one's own", End::Waits),
    ("the namespace of another", End::Waits),
    ("execute what is in memory", End::Waits),
    // What is open is no terminal and no device.
    ("what a terminal is to have typed", End::Error(&[ENOTTY])),
    ("a device's command", End::Error(&[ENOTTY])),
    // Where there is no Yama, everybody of the same rights may trace anyway.
    ("to be traced by anybody", End::Error(&[EINVAL])),
    // Open: names and sizes of files, and where one stands among them; sockets by their path;
    // memory that is executed, which an emulated CPU is made of; to be dumped, for which the limit
    // leaves no room; and a signal to all whom it reaches, who are its own threads.
    ("look at a file", End::Works),
    ("change the directory", End::Works),
    ("enter the directory that was left open", End::Works),
    ("datagrams between processes", End::Works),
    ("a socket of the host by its path", End::Works),
    ("memory to be written and executed", End::Works),
    ("memory made executable", End::Works),
    ("the same with a key", End::Works),
    ("to be dumped", End::Works),
    ("signal everybody", End::Works),
];

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
        if !matches!(outcome, Outcome::Returned(_)) {
            held = None;
        }
    }
    let tried: usize = seen.values().sum();
    let seen: Vec<String> = seen.iter().map(|(how, n)| format!("{n} {how}")).collect();
    println!("QEMU: {tried} attempts: {}", seen.join(", "));
    assert!(wrong.is_empty(), "QEMU:\n{}", wrong.join("\n"));
}
