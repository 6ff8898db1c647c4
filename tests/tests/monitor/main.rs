//! `pericarp-vmm` where KVM is backed by hardware: stock kernels, devices with
//! ours and foreign backends, the control socket, and guests and backends that
//! misbehave.
//!
//! Where this machine is no such place, one test boots the laboratory and runs
//! all the others in it; they pass by themselves here, and count there.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod boot;
mod devices;
mod hostile;
mod rig;
mod run;

use std::time::Duration;

use pericarp_tests::lab::{Lab, quoted};
use pericarp_tests::parts::skip;

/// All tests in the laboratory, whose CPU is emulated and whose guests' CPUs are emulated twice.
const LIMIT: Duration = Duration::from_secs(900);

#[test]
fn all_tests_pass_in_the_laboratory() {
    if Lab::is_here() {
        return;
    }
    if let Some(why) = Lab::lacks() {
        skip("all_tests_pass_in_the_laboratory", &why);
        return;
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    // Whoever asked for this test alone asked for all of them there.
    let chosen = words
        .iter()
        .filter(|word| !word.starts_with('-') && !word.starts_with("all_"));
    let chosen: Vec<String> = chosen.map(|word| quoted(word)).collect();
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
    let report = lab.run().unwrap();
    assert_eq!(report.code, 0, "a test failed in the laboratory");
    let passed = report.output.contains("test result: ok.") && !report.output.contains(" 0 passed");
    assert!(passed, "no test ran in the laboratory");
}
