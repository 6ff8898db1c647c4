//! What code can still do that has taken over a program which faces a guest: the real
//! programs are started, confined as always, and a thread of each is made to try some
//! hundred forbidden acts ([`attempts`]). Each act must end as is written here: the
//! filter kills the process, unless another end is named.
//!
//! That an act is one at all is seen beside it: what a confined program is refused with an
//! error must work in the same program with `--no-confine`.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod attempts;
mod programs;
mod qemu;

use std::collections::BTreeMap;

use libc::{EACCES, EAFNOSUPPORT, EBADF, ECONNREFUSED, ENOENT, ENOSYS, EPERM, EROFS, SIGSYS};
use pericarp_tests::network::Network;
use pericarp_tests::parts::{Part, absent, have, skip};
use pericarp_tests::puppet::Outcome;

use attempts::{ATTEMPTS, Attempt, TREE};
use programs::{Scene, Target};

/// How an attempt may end.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The filter kills the process. It is so where nothing is said.
    Killed,
    /// With one of these errors.
    Error(&'static [i32]),
    /// It is allowed; why is said beside it.
    Works,
    /// It does not return.
    Waits,
}

type Ends = &'static [(&'static str, End)];

const NO: End = End::Error(&[EPERM]);
const GONE: End = End::Error(&[ENOENT]);
/// Landlock's answer.
const HELD: End = End::Error(&[EACCES]);
const FIXED: End = End::Error(&[EROFS]);

/// Of all programs but threads of CPUs, where nothing else is said.
const ALL: Ends = &[
    ("read a file by its path", NO),
    ("read a file through /proc/self/root", NO),
    ("read a file through another's root", NO),
    ("read a file upwards", NO),
    ("read a file with openat2", End::Error(&[ENOSYS])),
    ("read a file of the directory that was left open", NO),
    ("write to memory past the descriptors of the process", NO),
    ("look at a file", GONE),
    ("remove a file", GONE),
    ("remove a file of the directory that was left open", HELD),
    ("make a file", NO),
    ("open a device", NO),
    ("write to memory through /proc", NO),
    ("clone a process the new way", End::Error(&[ENOSYS])),
    ("a connection to the host", NO),
    ("packets of any kind", NO),
    ("the kernel's network settings", NO),
    ("datagrams between processes", NO),
    ("a socket of the host without a path", NO),
    ("a socket of the host by its path", NO),
    ("a ring of one's own", NO),
];

/// Of the block server, which opens its own memory files anew: Landlock stands before all
/// others.
const BLOCK: Ends = &[("write to memory past the descriptors of the process", HELD)];

/// Of programs that connect to unix sockets in one directory, which the host's are not in.
/// The filter kills for sockets of other kinds. The names without a path are those of
/// a network of the process's own.
const CONNECTING: Ends = &[
    (
        "a socket of the host without a path",
        End::Error(&[EPERM, ECONNREFUSED]),
    ),
    ("a socket of the host by its path", GONE),
];

/// And of these, sockets of other kinds.
const KILLED_SOCKETS: Ends = &[
    ("a connection to the host", End::Killed),
    ("packets of any kind", End::Killed),
    ("the kernel's network settings", End::Killed),
    ("datagrams between processes", End::Killed),
];

/// And of the monitor, which goes to the directories of its backends. The one that the test
/// has left open is none that it has.
const MONITOR: Ends = &[("enter the directory that was left open", End::Works)];

const CPU: Ends = &[
    ("read a file by its path", NO),
    ("read a file through /proc/self/root", NO),
    ("read a file through another's root", NO),
    ("read a file upwards", NO),
    ("read a file of the directory that was left open", NO),
    ("write to memory past the descriptors of the process", NO),
    ("make a file", NO),
    ("open a device", NO),
    ("write to memory through /proc", NO),
];

/// Of the file server, which opens and makes files as it is asked: there is nothing but
/// its trees, of which the scene's own files are none.
const SHARING: Ends = &[
    ("read a file by its path", GONE),
    ("read a file through /proc/self/root", GONE),
    ("read a file through another's root", GONE),
    ("read a file upwards", GONE),
    ("read a file with openat2", GONE),
    ("read a file of the directory that was left open", HELD),
    ("write to memory past the descriptors of the process", GONE),
    ("make a file", GONE),
    ("open a device", GONE),
    ("write to memory through /proc", GONE),
    ("a handle of a file", GONE),
    ("a file by its handle", NO),
    ("all capabilities", NO),
    // Out of the tree.
    ("climb out of the tree", GONE),
    ("a link that leads out", GONE),
    ("a link that leads up", GONE),
];

/// Where it may change its tree. It acts as any user of its guest's, root among them,
/// with the capabilities that count for files.
const CHANGING: Ends = &[
    ("make a directory", GONE),
    ("make a device", GONE),
    ("link to a file", GONE),
    ("rename a file", GONE),
    ("change the mode of a file", GONE),
    ("give a file away", GONE),
    ("to be root in all respects", End::Works),
    ("a device in the tree", HELD),
    ("change a file of the tree", End::Works),
    ("remove a file of the tree", End::Works),
];

/// Where it may not.
const READING: Ends = &[
    ("make a directory", FIXED),
    ("make a device", FIXED),
    ("link to a file", FIXED),
    ("rename a file", FIXED),
    ("change the mode of a file", FIXED),
    ("give a file away", FIXED),
    ("to be root in all respects", NO),
    ("a device in the tree", FIXED),
    ("change a file of the tree", End::Error(&[EROFS, EACCES])),
    ("remove a file of the tree", End::Error(&[EROFS, EACCES])),
];

/// Not tried without confinement: the handle is none, and a clone of the program goes on
/// as a second one.
const WITHOUT_CONTROL: [&str; 2] = ["a file by its handle", "clone a process the new way"];

fn ends(target: Target) -> Vec<Ends> {
    match target {
        Target::Block => vec![BLOCK, ALL],
        Target::Net => vec![ALL],
        Target::Vsock => vec![CONNECTING, KILLED_SOCKETS, ALL],
        Target::Monitor => vec![CONNECTING, MONITOR, KILLED_SOCKETS, ALL],
        Target::Cpu => vec![CPU],
        Target::Fs => vec![SHARING, CHANGING, ALL],
        Target::FsReading => vec![SHARING, READING, ALL],
    }
}

/// What the tables say of an act; the first that names it counts.
fn expected(target: Target, act: &str) -> End {
    let lists = ends(target);
    let mut found = lists.iter().flat_map(|list| list.iter());
    let end = found.find(|(name, _)| *name == act).map(|(_, end)| *end);
    end.unwrap_or(End::Killed)
}

fn attempts(target: Target) -> impl Iterator<Item = &'static Attempt> {
    let tree: &[Attempt] = match target {
        Target::Fs | Target::FsReading => TREE,
        _ => &[],
    };
    ATTEMPTS.iter().chain(tree)
}

/// Plays all attempts; everything that ended in another way is in the panic.
fn besiege(target: Target) {
    let scene = Scene::new();
    let started = scene.start(target, true);
    let line = started.1.output().find("confined: ").unwrap_or_default();
    let missing = line
        .split_once("not applied: ")
        .map_or("", |(_, what)| what);
    if ["landlock", "seccomp", "empty root"]
        .iter()
        .any(|need| missing.contains(need))
    {
        skip("escape", &format!("{target:?} is not held here: {line}"));
        return;
    }
    let mut held = Some(started);
    let (mut wrong, mut seen) = (Vec::new(), BTreeMap::<String, usize>::new());
    named_once(target);
    for (act, attempt) in attempts(target) {
        let (puppet, _) = held.get_or_insert_with(|| scene.start(target, true));
        scene.renew();
        let outcome = attempt(puppet, &scene).unwrap_or_else(|e| panic!("{target:?}: {act}: {e}"));
        if !judge(expected(target, act), outcome) {
            wrong.push(format!(
                "{act}: {outcome:?}, not {:?}",
                expected(target, act)
            ));
        }
        *seen.entry(in_words(outcome)).or_default() += 1;
        if !matches!(outcome, Outcome::Returned(_)) {
            held = None;
        }
    }
    let tried: usize = seen.values().sum();
    let seen: Vec<String> = seen.iter().map(|(how, n)| format!("{n} {how}")).collect();
    println!("{target:?}: {tried} attempts: {}", seen.join(", "));
    assert!(wrong.is_empty(), "{target:?}:\n{}", wrong.join("\n"));
    unconfined(target, &scene);
}

/// What is refused with an error works where nothing is refused.
fn unconfined(target: Target, scene: &Scene) {
    let mut started = scene.start(target, false);
    let puppet = &mut started.0;
    let mut wrong = Vec::new();
    for (act, attempt) in attempts(target) {
        let refused = matches!(expected(target, act), End::Error(_));
        if !refused || WITHOUT_CONTROL.contains(act) {
            continue;
        }
        scene.renew();
        let outcome = attempt(puppet, scene).unwrap();
        // Some kernels have no sockets of some kind.
        if outcome.value().is_none() && outcome.error() != Some(EAFNOSUPPORT) {
            wrong.push(format!("{act}: {outcome:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{target:?} without confinement can do no more:\n{}",
        wrong.join("\n")
    );
}

/// A name in a table that is no attempt's would be of no use.
fn named_once(target: Target) {
    for (name, _) in ends(target).iter().flat_map(|list| list.iter()) {
        let count = ATTEMPTS.iter().chain(TREE).filter(|(act, _)| act == name);
        assert_eq!(count.count(), 1, "{name}");
    }
}

/// Whether an attempt ended as it should.
fn judge(expected: End, outcome: Outcome) -> bool {
    match expected {
        End::Killed => outcome == Outcome::Killed(SIGSYS),
        End::Error(errors) => outcome.error().is_some_and(|error| errors.contains(&error)),
        End::Works => outcome.value().is_some(),
        End::Waits => outcome == Outcome::Waits,
    }
}

fn in_words(outcome: Outcome) -> String {
    match outcome {
        Outcome::Killed(SIGSYS) => "killed by the filter".into(),
        Outcome::Killed(signal) => format!("killed by signal {signal}"),
        Outcome::Waits => "waiting".into(),
        Outcome::Returned(_) => match outcome.error() {
            None => "allowed".into(),
            Some(EPERM) => "EPERM".into(),
            Some(EACCES) => "EACCES".into(),
            Some(ENOENT) => "ENOENT".into(),
            Some(EROFS) => "EROFS".into(),
            Some(ENOSYS) => "ENOSYS".into(),
            Some(EBADF) => "EBADF".into(),
            Some(error) => format!("error {error}"),
        },
    }
}

/// Whether the suite can be run here: the programs are started as the shim starts them.
fn ready(test: &str, program: &'static str) -> bool {
    if !have(test, &[Part::Ours(program)]) {
        return false;
    }
    rustix::process::geteuid().is_root()
        || skip(test, "takes root, as whom a node starts these programs")
}

#[test]
fn block_taken_over_gets_nowhere() {
    if ready("block_taken_over_gets_nowhere", "pericarp-block") {
        besiege(Target::Block);
    }
}

#[test]
fn net_taken_over_gets_nowhere() {
    let test = "net_taken_over_gets_nowhere";
    if ready(test, "pericarp-net") && Network::here(test, &[Part::PERICARP_NET], 1).is_some() {
        besiege(Target::Net);
    }
}

#[test]
fn vsock_taken_over_gets_nowhere() {
    if ready("vsock_taken_over_gets_nowhere", "pericarp-vsock") {
        besiege(Target::Vsock);
    }
}

#[test]
fn fs_taken_over_keeps_to_its_trees() {
    if ready("fs_taken_over_keeps_to_its_trees", "pericarp-fs") {
        besiege(Target::Fs);
    }
}

#[test]
fn fs_taken_over_changes_nothing_read_only() {
    if ready("fs_taken_over_changes_nothing_read_only", "pericarp-fs") {
        besiege(Target::FsReading);
    }
}

#[test]
fn monitor_taken_over_gets_nowhere() {
    let test = "monitor_taken_over_gets_nowhere";
    if ready(test, "pericarp-vmm") && has_kvm(test) {
        besiege(Target::Monitor);
    }
}

#[test]
fn cpu_of_the_monitor_gets_nowhere() {
    let test = "cpu_of_the_monitor_gets_nowhere";
    if ready(test, "pericarp-vmm") && has_kvm(test) {
        besiege(Target::Cpu);
    }
}

/// Any will do, also one that no hardware backs: the guest does nothing.
fn has_kvm(test: &str) -> bool {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    file.is_ok() || absent(test, "there is no /dev/kvm here")
}
