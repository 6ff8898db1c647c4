//! `pericarp-attack [--seconds N] [--seed S] [--way native|guest|both] [--json]`: attacks four
//! confined sidecars at once, as front ends and drivers and as a guest of QEMU's, with the innocent
//! beside them. See [`pericarp_tests::attack`]. Takes root, for a network of its own.
//!
//! Exit codes: 0 where nothing gave way, 1 where something did, or where it cannot be done here,
//! 2 for bad input.

use std::io::Write;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use pericarp_tests::attack::{Plan, run};

const PROGRAM: &str = "pericarp-attack";
const USAGE: &str =
    "use --seconds N (1 to 86400), --seed N, --way native, guest or both, and --json";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match parse(&words) {
        Ok((plan, json)) => attack(&plan, json),
        Err(line) => Err((2, line)),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err((code, line)) => {
            eprintln!("{PROGRAM}: {line}");
            ExitCode::from(code)
        }
    }
}

fn parse(words: &[String]) -> Result<(Plan, bool), String> {
    let mut plan = Plan {
        seconds: 20,
        seed: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |since| since.as_secs()),
        native: true,
        guest: true,
    };
    let mut json = false;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--json" {
            json = true;
            continue;
        }
        if !["--seconds", "--seed", "--way"].contains(&word.as_str()) {
            return Err(format!("'{word}' is no option: {USAGE}"));
        }
        let value = words
            .next()
            .ok_or_else(|| format!("{word} takes a value: {USAGE}"))?;
        let wrong = || format!("{word} '{value}' is none: {USAGE}");
        match word.as_str() {
            "--seconds" => {
                let seconds = value.parse().ok();
                let seconds = seconds.filter(|seconds| (1..=86_400).contains(seconds));
                plan.seconds = seconds.ok_or_else(wrong)?;
            }
            "--seed" => plan.seed = value.parse().map_err(|_| wrong())?,
            _ => {
                (plan.native, plan.guest) = match value.as_str() {
                    "native" => (true, false),
                    "guest" => (false, true),
                    "both" => (true, true),
                    _ => return Err(wrong()),
                }
            }
        }
    }
    Ok((plan, json))
}

fn attack(plan: &Plan, json: bool) -> Result<bool, (u8, String)> {
    eprintln!("{PROGRAM}: seed {}, {} s", plan.seed, plan.seconds);
    let report = run(PROGRAM, plan).map_err(|line| (1, line))?;
    // Why not was said.
    let report = report.ok_or((1, "it cannot be done here".to_owned()))?;
    let text = match json {
        true => format!("{}\n", report.json()),
        false => report.table(),
    };
    // Whoever has closed the pipe wants no more.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(report.faults.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood_or_refused_in_a_line() {
        let parse = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            parse(&words)
        };
        let (plan, json) = parse(&["--seed", "7", "--json", "--way", "native"]).unwrap();
        assert_eq!(
            (plan.seed, plan.native, plan.guest, json),
            (7, true, false, true)
        );
        assert_eq!(parse(&["--seconds", "1800"]).unwrap().0.seconds, 1800);
        for words in [
            &["--seconds", "0"][..],
            &["--seconds", "90000"],
            &["--seed", "x"],
            &["--way", "none"],
            &["--seconds"],
            &["all"],
        ] {
            let line = parse(words).unwrap_err();
            assert!(line.contains(USAGE) && !line.contains('\n'), "{line}");
        }
    }
}
