//! `pericarp-lab -- COMMAND ...`: runs a command where KVM is backed by hardware,
//! with what it writes on stdout and its exit code as our own. `cargo xtask lab`
//! builds and starts this.

use std::process::ExitCode;
use std::time::Duration;

use pericarp_tests::lab::{Lab, quoted};

/// Whoever waits at a terminal can end it sooner.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let dashes = words.next();
    let words: Vec<String> = words.map(|word| quoted(&word)).collect();
    if dashes.as_deref() != Some("--") || words.is_empty() {
        eprintln!("pericarp-lab: takes a command after '--'");
        return ExitCode::from(2);
    }
    let mut lab = Lab::new(&words.join(" "));
    lab.live = true;
    lab.limit = LIMIT;
    for name in ["PERICARP_ASSETS", "PERICARP_REQUIRE_ALL", "RUST_BACKTRACE"] {
        if let Ok(value) = std::env::var(name) {
            lab.variables.push((name.to_owned(), value));
        }
    }
    if Lab::is_here() {
        eprintln!("pericarp-lab: KVM is backed by hardware here");
    } else {
        eprintln!("pericarp-lab: boots a machine with an emulated CPU that has SVM");
    }
    match lab.run() {
        Ok(report) => ExitCode::from(u8::try_from(report.code).unwrap_or(1)),
        Err(error) => {
            eprintln!("pericarp-lab: {error}");
            ExitCode::FAILURE
        }
    }
}
