//! What the programs that race machine monitors have in common: they take a number of
//! rounds, and run where KVM is backed by hardware. Used by `boot-compare` and
//! `front-compare`.

use std::process::ExitCode;

use pericarp_tests::lab::Lab;

use crate::Outcome;

/// Reads the arguments and runs so many rounds, `default` when nothing is said. The exit code
/// is 2 for wrong arguments, 1 for a race that came to no end.
pub fn race(program: &str, default: usize, compare: fn(usize) -> Outcome<()>) -> ExitCode {
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
    let raced = match Lab::is_here() {
        true => compare(rounds),
        false => Err(format!(
            "KVM is not backed by hardware here: cargo xtask lab -- target/release/{program}"
        )
        .into()),
    };
    match raced {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error}");
            ExitCode::FAILURE
        }
    }
}
