//! Whether the processes of a pod are held as `SECURITY.md` promises, by what the kernel
//! says of them; and that a process which is not held is found.

use std::time::Duration;

use pericarp_tests::audit::{Audit, Example, Member, PARTS, Pod, table};
use pericarp_tests::bounded::poll;
use pericarp_tests::guest::Assets;
use pericarp_tests::parts::{Part, beside_us, have, skip};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;

const LIMIT: Duration = Duration::from_secs(60);

fn root(test: &str) -> bool {
    rustix::process::geteuid().is_root()
        || skip(test, "root alone sees what confined processes have open")
}

#[test]
fn a_pods_processes_are_held_as_promised() {
    let test = "a_pods_processes_are_held_as_promised";
    let more = [Part::PERICARP_NET, Part::Ip, Part::Cni];
    let Some(assets) = Assets::for_test(test, &[&PARTS[..], &more].concat()) else {
        return;
    };
    if !root(test) {
        return;
    }
    let example = Example::start(assets.dir()).unwrap();
    assert_eq!(example.without_card, None);
    let audit = Audit::of(example.pod().unwrap()).unwrap();
    let audits = [audit];
    println!("{}", table(&audits));
    assert_eq!(audits[0].looser(), Vec::<String>::new());
    let programs = audits[0].findings.iter();
    let programs: Vec<&str> = programs
        .map(|found| found.member.program.as_str())
        .collect();
    for program in [
        "pericarp-block",
        "pericarp-fs",
        "pericarp-net",
        "pericarp-vsock",
    ] {
        assert!(programs.contains(&program), "{programs:?}");
    }
    // And a machine.
    let machine = |program: &&str| matches!(*program, "qemu-system-x86_64" | "pericarp-vmm");
    assert!(programs.iter().any(machine), "{programs:?}");
}

#[test]
fn a_process_that_is_not_held_is_found() {
    let test = "a_process_that_is_not_held_is_found";
    if !have(test, &[Part::PERICARP_BLOCK]) || !root(test) {
        return;
    }
    let scratch = Scratch::new();
    let looser = |confine: &[&str], said: &str| {
        let disk = scratch.sparse("disk", 1 << 20);
        let mut block = command(&beside_us().join("pericarp-block"));
        block.args(["--log-level", "info", "--blk-file"]).arg(disk);
        block.arg("--socket-path").arg(scratch.path("socket"));
        let mut process = Process::start(block.args(confine), LIMIT).unwrap();
        let ready = poll(LIMIT, || {
            let ready = process.output().find(said).is_some();
            (ready || process.ended().is_some()).then_some(ready)
        });
        assert_eq!(ready, Some(true), "{}", process.output().last(9));
        let member = |pid: i32, program: &str| Member {
            pid,
            program: program.to_owned(),
            line: String::new(),
        };
        let pod = Pod {
            // As if the test were its shim.
            first: member(std::process::id().cast_signed(), "test"),
            members: vec![member(process.pid(), "pericarp-block")],
        };
        Audit::of(pod).unwrap().looser()
    };
    assert_eq!(looser(&[], "confined: "), Vec::<String>::new());
    let found = looser(&["--no-confine"], "not confined, as asked").join("\n");
    for what in [
        "namespace",
        "capabilities",
        "gain",
        "filter",
        "root",
        "core",
    ] {
        assert!(found.contains(what), "{what}: {found}");
    }
}
