//! `cargo xtask bench regress`: is this tree slower than the commit before it?
//!
//! Builds the data plane of both, measures both in turns in the same run, and
//! fails when a number of this tree is beyond its limit. `verdict` has the
//! limits and why they are what they are. `.ci/run` calls it.
//!
//! What cannot be compared (no parent in a shallow clone, a base that does not
//! build, a machine that forbids tracing) is said loudly and is no failure.

mod history;
mod measure;
mod side;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::command::Failure;
use crate::project::Project;
use crate::setup;
use history::{Against, History};
use measure::Bench;
use side::Side;
use verdict::{Report, Samples, Verdict};

const HELP: &str = "\
cargo xtask bench regress [--base REV] [--seconds-budget N] [--json FILE]

Is the data plane of this tree slower than that of its parent commit? With
uncommitted changes: than that of HEAD. Exit code 1 if it is.

  --base REV          compare with this commit instead
  --seconds-budget N  what is in doubt is measured again while less than that has
                      passed, builds included (default 480)
  --json FILE         all values of all rounds

A commit that is slower on purpose says so in a trailer of its message, once for
each metric; a * at the end stands for all that begin so:

  Accepts-slower: instructions/pop checks each head against the new bitmap
";

/// Rounds of everything that has a spread.
const ROUNDS: usize = 3;
/// How often as many are added while something is in doubt.
const MORE: usize = 4;

/// What was asked for.
#[derive(Debug, PartialEq)]
struct Options {
    base: Option<String>,
    budget: Duration,
    json: Option<PathBuf>,
}

impl Options {
    /// The error is the line for the operator.
    fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            base: None,
            budget: Duration::from_secs(480),
            json: None,
        };
        for pair in words.chunks(2) {
            let [option, value] = *pair else {
                return Err(format!("'{}': needs a value; see --help", pair[0]));
            };
            match option {
                "--base" => options.base = Some(value.to_owned()),
                "--seconds-budget" => {
                    let number = value.parse().ok().filter(|n| (1..=86_400).contains(n));
                    let rule = "must be from 1 to 86400 seconds; give such a number";
                    let seconds = number.ok_or(format!("--seconds-budget '{value}': {rule}"))?;
                    options.budget = Duration::from_secs(seconds);
                }
                "--json" => options.json = Some(writable(value)?),
                other => {
                    return Err(format!(
                        "'{other}': no such option; use --base, --seconds-budget or --json"
                    ));
                }
            }
        }
        Ok(options)
    }
}

/// A path that a file can be written to, absolute.
fn writable(value: &str) -> Result<PathBuf, String> {
    let path = std::path::absolute(value).map_err(|e| format!("--json '{value}': {e}"))?;
    if path.is_dir() {
        return Err(format!("--json '{value}': is a directory; name a file"));
    }
    if !path.parent().is_some_and(Path::is_dir) {
        return Err(format!(
            "--json '{value}': its directory is not there; make it"
        ));
    }
    Ok(path)
}

/// The whole command, with the words after `bench regress`.
pub(crate) fn run(words: &[&str]) -> ExitCode {
    if let ["--help" | "-h", ..] = words {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(words) {
        Ok(options) => options,
        Err(line) => return bad_input(&line),
    };
    let outcome = Project::locate().and_then(|project| {
        let history = History::of(&project.root);
        match history.against(options.base.as_deref()) {
            Against::Commit(base) => compare(&project, &history, &base, &options),
            Against::Nothing(why) => {
                println!("regress: NOTHING COMPARED: {why}");
                Ok(ExitCode::SUCCESS)
            }
            Against::Mistake(line) => Ok(bad_input(&line)),
        }
    });
    outcome.unwrap_or_else(|failure| {
        eprintln!("xtask: bench regress: {failure}");
        ExitCode::FAILURE
    })
}

fn bad_input(line: &str) -> ExitCode {
    eprintln!("xtask: bench regress: {line}");
    ExitCode::from(2)
}

fn compare(
    project: &Project,
    history: &History,
    base: &str,
    options: &Options,
) -> Result<ExitCode, Failure> {
    let start = Instant::now();
    setup::install(&["valgrind", "strace"])?;
    println!(
        "regress: {} against {}",
        history.here()?,
        history.name(base)?
    );
    let dir = project.target.join("regress");
    let tree = history.check_out(base, &dir.join("base"))?;
    let this = Side::this(project, &dir)?;
    let base_side = match Side::base(project, &tree, &dir) {
        Ok(side) => side,
        Err(failure) => {
            println!("regress: NOTHING COMPARED: the base does not build here: {failure}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let bench = Bench::new(project, &dir, base_side, this)?;
    println!("regress: built in {} s", start.elapsed().as_secs());

    let accepted = history.accepted(base)?;
    let mut samples = Samples::default();
    bench.exact(&mut samples)?;
    for more in 0..=MORE {
        for _ in 0..ROUNDS {
            bench.round(&mut samples)?;
        }
        let report = Report::of(&samples, &accepted);
        if !report.is_in_doubt() {
            break;
        }
        if more == MORE || start.elapsed() >= options.budget {
            break;
        }
        println!("regress: measures again: {}", report.doubts());
    }
    let report = Report::of(&samples, &accepted);
    print!("{report}");
    for idle in report.idle(&accepted) {
        println!(
            "regress: {} accepts '{}', which is no metric above",
            idle.commit, idle.metric
        );
    }
    if let Some(file) = &options.json {
        let raw = json!({
            "this": history.here()?, "base": history.name(base)?,
            "seconds": start.elapsed().as_secs(), "metrics": report.json(&samples),
        });
        std::fs::write(file, format!("{raw:#}\n"))
            .map_err(|e| format!("cannot write {}: {e}", file.display()))?;
    }
    let (took, budget) = (start.elapsed().as_secs(), options.budget.as_secs());
    if took > budget {
        println!("regress: took {took} s, more than the {budget} s of --seconds-budget");
    }
    match report.verdict() {
        Verdict::Slower(lines) => {
            for line in lines {
                eprintln!("xtask: bench regress: {line}");
            }
            Ok(ExitCode::FAILURE)
        }
        Verdict::Fine(line) => {
            println!("regress: {line}, in {took} s");
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_or_refused() {
        let options = Options::parse(&["--base", "v1", "--seconds-budget", "9"]).unwrap();
        assert_eq!(options.base.as_deref(), Some("v1"));
        assert_eq!(options.budget, Duration::from_secs(9));
        for bad in [
            &["--base"][..],
            &["--seconds-budget", "0"],
            &["--seconds-budget", "soon"],
            &["--json", "/"],
            &["--json", "/no/such/directory/file"],
            &["--quick", "1"],
        ] {
            assert!(Options::parse(bad).is_err(), "{bad:?}");
        }
    }
}
