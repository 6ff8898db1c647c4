//! Four confined sidecars under attack, by front ends and drivers at native speed and by a guest,
//! for some seconds; `pericarp-attack --seconds N` goes on for longer. What is tried, and what
//! must hold meanwhile, is in `pericarp_tests::attack`.

use pericarp_tests::attack::{Plan, Report, run};
use pericarp_tests::bounded::Alone;

/// Seconds of each; `PERICARP_ATTACK_SECONDS` has it go on for longer.
fn seconds() -> u64 {
    let text = std::env::var("PERICARP_ATTACK_SECONDS").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(20)
}

/// Nothing gave way; what was done is printed.
fn withstood(test: &str, native: bool, guest: bool) -> Option<Report> {
    let _alone = Alone::turn();
    let plan = Plan {
        seconds: seconds(),
        // The same in every run; another is tried by hand.
        seed: 20,
        native,
        guest,
    };
    let report = run(test, &plan).unwrap_or_else(|error| panic!("{error}"))?;
    println!("{}", report.table());
    assert_eq!(report.faults, Vec::<String>::new());
    for device in ["block", "fs", "net", "vsock"] {
        let rounds = report.witnesses.get(device).map(|witness| witness.rounds);
        assert!(rounds > Some(0), "nobody bore witness at {device}");
    }
    Some(report)
}

#[test]
fn hostile_front_ends_and_drivers_harm_nobody() {
    let test = "hostile_front_ends_and_drivers_harm_nobody";
    let Some(report) = withstood(test, true, false) else {
        return;
    };
    for device in ["block", "fs", "net", "vsock"] {
        let siege = &report.sieges[device];
        // Each kind was tried, and some of what was right was done.
        assert_eq!(siege.acts.len(), 8, "{device}: {siege:?}");
        let answered: u64 = siege.acts.values().map(|tally| tally.answered).sum();
        assert!(answered > 0 && siege.probes > 0, "{device}: {siege:?}");
    }
}

#[test]
fn a_hostile_guest_on_four_devices_harms_nobody() {
    let test = "a_hostile_guest_on_four_devices_harms_nobody";
    let Some(report) = withstood(test, false, true) else {
        return;
    };
    let machines = report.machines.expect("a machine was booted");
    assert!(machines.pokes > 0 && machines.doorbells > 0, "{machines:?}");
}
