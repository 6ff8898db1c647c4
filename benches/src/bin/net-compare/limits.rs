//! Whether limits are kept: the load that races backends, on a `pericarp-net` that is told
//! to let less through. A burst is over when the counting begins.

use std::time::Duration;

use pericarp_benches::table::median;
use pericarp_benches::{Outcome, turns};
use pericarp_tests::parts::{Part, missing};
use serde_json::json;

use crate::Wanted;
use crate::card::BEFORE;
use crate::turn::{LARGE, turn_apart};

/// By how much a rate may differ from what was set.
const OFF: f64 = 0.05;
/// What has to get through without a limit for one to be held against it.
const ENOUGH: f64 = 1.2;
/// Bytes and packets a second.
const BYTES: [u64; 3] = [10_000_000, 100_000_000, 1_000_000_000];
const PACKETS: [u64; 3] = [1_000, 10_000, 100_000];
/// The options, what they are set to, and the case whose load they meet.
const LIMITS: [(&str, [u64; 3], &str); 4] = [
    ("--tx-bandwidth", BYTES, "out-64k"),
    ("--rx-bandwidth", BYTES, "in-64k"),
    ("--tx-packets", PACKETS, "out-64"),
    ("--rx-packets", PACKETS, "in-64"),
];

/// What became of a limit.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Kept,
    Missed,
    /// Too little got through, but it hardly would have without a limit.
    Unreached,
}

/// Measures all of them, one after the other, and each load without a limit before.
///
/// # Errors
/// When one is not kept or not reached, after all have been measured.
pub(crate) fn keep(wanted: &Wanted) -> Outcome<()> {
    if let Some(part) = missing(&[Part::PERICARP_NET]) {
        return Err(part.into());
    }
    let program = Part::PERICARP_NET.find().ok_or("it was there")?;
    let length = Duration::from_secs(wanted.seconds);
    let (mut raw, mut missed, mut unreached) = (Vec::new(), Vec::new(), Vec::new());
    println!(
        "{:<16} {:>14} {:>14} {:>9} {:>20}",
        "limit", "set", "measured", "of it", "min .. max"
    );
    for (option, values, case) in LIMITS {
        if !wanted.has(case) {
            continue;
        }
        let measure = |more: &[String]| -> Outcome<Vec<f64>> {
            let turns = (0..wanted.rounds).map(|_| turn_apart(&program, case, length, more));
            turns
                .map(|turn| Ok(of_the_limit(case, turn?.rate)))
                .collect()
        };
        let free = measure(&[])?;
        println!("{option:<16} {:>14} {:>14.0}", "-", median(free.clone()));
        for set in values {
            let rates = measure(&[option.to_owned(), set.to_string()])?;
            let of = |rate: f64| rate / set as f64;
            let middle = median(rates.clone());
            let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
            let most = rates.iter().copied().fold(0.0, f64::max);
            println!(
                "{option:<16} {set:>14} {middle:>14.0} {:>9.3} {:>20}",
                of(middle),
                format!("{:.3} .. {:.3}", of(least), of(most)),
            );
            let limit = format!("{option} {set}");
            match verdict(middle, set, median(free.clone())) {
                Verdict::Kept => {}
                Verdict::Missed => missed.push(limit),
                Verdict::Unreached => unreached.push(limit),
            }
            raw.push(
                json!({"option": option, "set": set, "case": case, "measured": rates,
                "without": free}),
            );
        }
    }
    if let Some(path) = &wanted.json {
        let text = json!({"bench": "net-compare --limits", "rounds": wanted.rounds,
            "seconds": wanted.seconds, "limits": raw});
        turns::write(path, &format!("{text:#}\n"))?;
    }
    let mut failed = Vec::new();
    for (what, limits) in [
        ("missed by more than 5 %", missed),
        (
            "not measured, for the machine is too slow or too busy",
            unreached,
        ),
    ] {
        if !limits.is_empty() {
            failed.push(format!("{what}: {}", limits.join(", ")));
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(failed.join("; ").into()),
    }
}

/// A rate in the unit of limits, which count whole frames: a case counts MiB of payload.
fn of_the_limit(case: &str, rate: f64) -> f64 {
    match case.ends_with("64k") {
        true => rate * f64::from(1 << 20) * (LARGE as f64 + BEFORE as f64) / LARGE as f64,
        false => rate,
    }
}

/// What to say of a rate beside what was set and what gets through without a limit.
fn verdict(rate: f64, set: u64, free: f64) -> Verdict {
    let set = set as f64;
    if (rate / set - 1.0).abs() <= OFF {
        Verdict::Kept
    } else if rate < set && free < set * ENOUGH {
        Verdict::Unreached
    } else {
        Verdict::Missed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_and_less_than_was_set_are_both_wrong() {
        for (rate, want) in [
            (1000.0, Verdict::Kept),
            (951.0, Verdict::Kept),
            (1049.0, Verdict::Kept),
            (949.0, Verdict::Missed),
            (1051.0, Verdict::Missed),
            (f64::NAN, Verdict::Missed),
        ] {
            assert_eq!(verdict(rate, 1000, 5000.0), want, "{rate}");
        }
    }

    #[test]
    fn a_limit_is_not_blamed_for_a_slow_machine() {
        assert_eq!(verdict(900.0, 1000, 1100.0), Verdict::Unreached);
        assert_eq!(verdict(1100.0, 1000, 1100.0), Verdict::Missed);
    }

    #[test]
    fn headers_count_in_a_limit_of_bytes() {
        let frames = of_the_limit("in-64k", 64_000.0 / f64::from(1 << 20));
        assert!((frames - 64_054.0).abs() < 1e-6, "{frames}");
        assert!((of_the_limit("in-64", 5.0) - 5.0).abs() < 1e-9);
    }
}
