//! Clocks that jump. The monotonic ones do for a process that takes over in another time
//! namespace. The wall clock cannot be set on a machine that others use: that nothing of a
//! sidecar is timed by it is read in its source.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::parts::{Part, absent, have};
use pericarp_tests::peer;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::verified::{BLOCK, BLOCKS, Load};

const LIMIT: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(300);
/// Twelve days.
const JUMP: i64 = 1_000_000;

/// A server whose monotonic clocks are so many seconds off.
fn serve(scratch: &Scratch, off: i64, more: &[String]) -> Process {
    let mut program = command(&Part::Unshare.find().unwrap());
    program.args(["--time", "--monotonic"]).arg(off.to_string());
    program.arg("--boottime").arg(off.to_string());
    program.arg(Part::PERICARP_BLOCK.find().unwrap());
    let path = |name: &str| scratch.path(name).display().to_string();
    program.arg(format!("--socket-path={}", path("s")));
    program.arg(format!("--blk-file={}", path("disk")));
    program.arg(format!("--control-path={}", path("c")));
    // Bounded, so that the limiter counts by the clock.
    program
        .args(["--iops=20000", "--log-level=info"])
        .args(more);
    Process::start(&mut program, 3 * LIMIT).unwrap()
}

#[test]
fn a_monotonic_clock_that_jumps_at_a_hand_over_stops_nothing() {
    let test = "a_monotonic_clock_that_jumps_at_a_hand_over_stops_nothing";
    if !have(test, &[Part::PERICARP_BLOCK, Part::Unshare]) {
        return;
    }
    if !Path::new("/proc/self/ns/time_for_children").exists() {
        absent(test, "this kernel has no time namespaces (Linux 5.6)");
        return;
    }
    let scratch = Scratch::new();
    scratch.file("disk", &vec![0; BLOCK * BLOCKS]);
    let mut serving = serve(&scratch, JUMP, &[]);
    let there = poll(LIMIT, || {
        let ended = serving.ended().is_some();
        (ended || scratch.path("c").exists()).then_some(!ended)
    });
    assert_eq!(there, Some(true), "{}", serving.output().last(9));
    let setup = Setup {
        queue_size: 256,
        ..Setup::default()
    };
    let mut driver = Driver::connect(&scratch.path("s"), &setup).unwrap();
    let mut load = Load::new(31);
    load.run(&mut driver, STEP).unwrap();
    // Back by twelve days, on by 24 days, and home again.
    for off in [0, 2 * JUMP, JUMP] {
        let takes_over = format!("--take-over={}", scratch.path("c").display());
        let new = serve(&scratch, off, &[takes_over]);
        let over = poll(LIMIT, || {
            load.run(&mut driver, STEP / 10).unwrap();
            serving.ended()
        });
        let told = || format!("{}\n{}", serving.output().last(9), new.output().last(9));
        assert_eq!(over.and_then(|status| status.code()), Some(0), "{}", told());
        serving = new;
        let before = load.done;
        load.run(&mut driver, STEP).unwrap();
        assert!(
            load.done > before,
            "{off}: nothing goes on: {}",
            serving.output().last(9)
        );
        drop(peer::connect(&scratch.path("c")).unwrap());
    }
    load.drain(&mut driver).unwrap();
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, 0);
    load.compare(&scratch.path("disk")).unwrap();
}

/// Sources of a crate.
fn sources(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|end| end == "rs") {
            all.push(path);
        }
    }
}

#[test]
fn no_sidecar_and_no_machine_is_timed_by_the_wall_clock() {
    // What is there is compared with times of files, which are the wall clock's; and the list
    // of system calls that are let through.
    const ALLOWED: [&str; 2] = ["fs/src/device/again.rs", "confine/src/filter.rs"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut all = Vec::new();
    for part in ["backends", "vmm"] {
        for entry in fs::read_dir(root.join(part)).unwrap() {
            let source = entry.unwrap().path().join("src");
            if source.is_dir() {
                sources(&source, &mut all);
            }
        }
    }
    assert!(all.len() > 100, "{} files", all.len());
    let wall = [
        "SystemTime",
        "CLOCK_REALTIME",
        "ClockId::Realtime",
        "gettimeofday",
    ];
    let timed = all.iter().filter(|path| {
        let text = fs::read_to_string(path).unwrap();
        let allowed = ALLOWED.iter().any(|end| path.ends_with(end));
        !allowed && wall.iter().any(|clock| text.contains(clock))
    });
    let timed: Vec<_> = timed.collect();
    assert!(timed.is_empty(), "{timed:?}");
}
