//! `pericarp-vmm` where KVM is backed by hardware: stock kernels, devices with
//! ours and foreign backends, the control socket, and guests and backends that
//! misbehave.
//!
//! Where this machine is no such place, two tests boot a laboratory each and run
//! the others there, half of them in either: a laboratory has one CPU, and few
//! machines have only one. Here the others pass by themselves; there they count.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod boot;
mod devices;
mod hostile;
mod rig;
mod run;

use std::sync::Mutex;
use std::time::Duration;

use pericarp_tests::lab::{Lab, quoted};
use pericarp_tests::parts::skip;

/// What the tests of either half begin with.
const MACHINE: &[&str] = &["boot::"];
const DEVICES: &[&str] = &["devices::", "hostile::", "run::"];

/// Half the tests in a laboratory, whose CPU is emulated and whose guests' CPUs are emulated
/// twice: minutes. After this long it hangs.
const LIMIT: Duration = Duration::from_secs(1800);

/// Held by the only laboratory there may be where memory is short.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn all_of_the_machine_passes_in_the_laboratory() {
    pass_in_the_laboratory("all_of_the_machine_passes_in_the_laboratory", MACHINE);
}

#[test]
fn all_of_the_devices_passes_in_the_laboratory() {
    pass_in_the_laboratory("all_of_the_devices_passes_in_the_laboratory", DEVICES);
}

/// Runs the tests there whose names begin with one of these.
fn pass_in_the_laboratory(test: &str, modules: &[&str]) {
    if Lab::is_here() {
        return;
    }
    if let Some(why) = Lab::lacks() {
        skip(test, &why);
        return;
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    // Whoever asked for these tests alone asked for all of them there.
    let chosen = words
        .iter()
        .filter(|word| !word.starts_with('-') && !word.starts_with("all_"));
    let mut chosen: Vec<String> = chosen.map(|word| quoted(word)).collect();
    if chosen.is_empty() {
        chosen.extend(modules.iter().map(|&module| module.to_owned()));
    }
    let program = std::env::current_exe().unwrap();
    let mut lab = Lab::new(&format!(
        "{} --test-threads=1 --nocapture {} 2>&1",
        quoted(&program.to_string_lossy()),
        chosen.join(" ")
    ));
    lab.limit = LIMIT + rig::life();
    lab.live = true;
    for name in [
        "PERICARP_ASSETS",
        "PERICARP_REQUIRE_ALL",
        "PERICARP_POKE_SECONDS",
        "RUST_BACKTRACE",
    ] {
        if let Ok(value) = std::env::var(name) {
            lab.variables.push((name.to_owned(), value));
        }
    }
    let short_of_memory = available_mib() < 3 * Lab::MEMORY_MIB;
    let _alone = short_of_memory.then(|| ALONE.lock());
    let report = lab.run().unwrap_or_else(|error| panic!("{error}"));
    let why = failures(&report.output);
    assert_eq!(report.code, 0, "a test failed in the laboratory:\n{why}");
    let passed = report.output.contains("test result: ok.") && !report.output.contains(" 0 passed");
    assert!(passed, "no test ran in the laboratory");
}

/// What this machine could give without taking it from others.
fn available_mib() -> u32 {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u32 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib / 1024
}

/// Each panic and the lines that follow it, without the frames: all else was
/// printed while it came.
fn failures(output: &str) -> String {
    let mut why = String::new();
    let mut room = 0;
    for line in output.lines() {
        if line.contains(" panicked at ") {
            room = 40;
        }
        // What counts tests would count these once more.
        if line == "failures:" || line.starts_with("test result: ") {
            room = 0;
        }
        let frame = line.trim_start();
        let frame = frame.starts_with("at ") || frame.contains(": core::");
        if room > 0 && !frame {
            room -= 1;
            why = why + line + "\n";
        }
    }
    why
}
