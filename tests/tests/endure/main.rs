//! Processes of pods killed at random under I/O that is verified, in short. `pericarp-endure kills` does
//! the same for as long as it is told to, and with more pods.

use std::time::Duration;

use pericarp_tests::endure::{PARTS, kills};
use pericarp_tests::parts::{have, skip};

/// Each kind of process once: a pod that is replaced takes ten seconds where CPUs are emulated.
const KILLS: u64 = kills::KINDS as u64;

#[test]
fn whatever_is_killed_nothing_flushed_is_lost_and_nothing_is_left() {
    let test = "whatever_is_killed_nothing_flushed_is_lost_and_nothing_is_left";
    if !have(test, &PARTS) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        skip(test, "takes root, for pods");
        return;
    }
    let options = kills::Options {
        pods: 2,
        // `most` ends it; a pod that is replaced on a busy machine takes two minutes.
        seconds: 1800,
        most: KILLS,
        seed: 11,
        apart: Duration::from_millis(500),
        pause: Duration::from_millis(60),
    };
    let report = kills::run(&options).expect("a node with two pods");
    println!("{}", report.table());
    assert_eq!(report.faults, Vec::<String>::new());
    assert_eq!(report.killed(), KILLS);
    assert_eq!(report.rows.len(), kills::KINDS, "each kind has its turn");
    assert!(report.checked > 0 && report.compared > 0);
}
