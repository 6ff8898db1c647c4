//! What the programs that race machine monitors have in common: they take a number of
//! rounds, and run where KVM is backed by hardware. Used by `boot-compare`, `pod-compare`,
//! `cri-compare` and `front-compare`.

use std::process::ExitCode;
use std::time::Duration;

use pericarp_tests::lab::Lab;
use serde_json::{Value, json};

use crate::Outcome;

/// Reads the arguments and runs so many rounds, `default` when nothing is said. The exit code
/// is 2 for wrong arguments, 1 for a race that came to no end.
pub fn race(program: &str, default: usize, compare: fn(usize) -> Outcome<()>) -> ExitCode {
    race_anywhere(program, default, |rounds| match Lab::is_here() {
        true => compare(rounds),
        false => Err(format!(
            "KVM is not backed by hardware here: cargo xtask lab -- target/release/{program}"
        )
        .into()),
    })
}

/// The same where KVM need not be.
pub fn race_anywhere(
    program: &str,
    default: usize,
    compare: impl Fn(usize) -> Outcome<()>,
) -> ExitCode {
    let mut words = std::env::args().skip(1);
    let rounds = match (words.next().as_deref(), words.next()) {
        (None, None) => Some(default),
        (Some("--rounds"), Some(text)) => text.parse().ok().filter(|n| (1..=100).contains(n)),
        _ => None,
    };
    let Some(rounds) = rounds.filter(|_| words.next().is_none()) else {
        eprintln!("{program}: takes --rounds N, 1 to 100, and nothing else");
        return ExitCode::from(2);
    };
    match compare(rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A time as these programs print it.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The smallest of some numbers and the largest.
pub fn range(numbers: &[f64]) -> String {
    let least = numbers.iter().copied().fold(f64::INFINITY, f64::min);
    let most = numbers.iter().copied().fold(0.0, f64::max);
    format!("{least:.0} .. {most:.0}")
}

/// Prints the raw numbers as one line, since there is no place for a file in the laboratory.
pub fn print_raw(results: &[Value]) {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "));
    let raw = json!({ "machine": { "cpu": cpu }, "results": results });
    println!("\n{raw}");
}
