//! `cargo xtask test`: everything a change has to pass, on any machine.
//!
//! Sets the machine up, runs `check`, builds all programs and runs all tests
//! with nothing allowed to be skipped. What the test programs print goes
//! through unchanged. Why tests failed is printed again at the end, where whoever
//! opens a long log looks first; the last line is the sum of the summary lines.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use crate::assets;
use crate::check;
use crate::command::{self, Failure, cannot_start, cargo};
use crate::project::Project;
use crate::setup;
use crate::tools;

/// Runs the whole test command.
pub(crate) fn run(project: &Project) -> Result<(), Failure> {
    setup::run(project)?;
    prepare(project)?;
    let checked = check::run(project);
    if let Err(failure) = &checked {
        // The tests still run: one call should show everything.
        eprintln!("test: {failure}");
    }
    // The tests start the programs themselves, so these must be there first.
    command::run(
        cargo()
            .current_dir(&project.root)
            .args(["build", "--workspace", "--bins"]),
    )?;
    let (total, tests_passed) = run_tests(project)?;
    if !total.why.is_empty() {
        println!("\nonce more, why tests failed:\n{}", total.why);
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if !tests_passed {
        return Err("tests failed".into());
    }
    if total.passed == 0 {
        return Err("no test was run".into());
    }
    checked
}

/// What tests need and the demo does not.
pub(crate) fn prepare(project: &Project) -> Result<(), Failure> {
    tools::prepare(project)?;
    assets::prepare_older(project)
}

/// All tests of the workspace, with nothing skipped.
fn run_tests(project: &Project) -> Result<(Total, bool), Failure> {
    let mut command = cargo();
    command
        .current_dir(&project.root)
        .args(["test", "--workspace", "--no-fail-fast"])
        .env("PERICARP_REQUIRE_ALL", "1")
        .env("PERICARP_ASSETS", project.assets());
    count(&mut command)
}

/// Runs `cargo test`, passes its output on and adds up the summary lines.
pub(crate) fn count(command: &mut Command) -> Result<(Total, bool), Failure> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|error| cannot_start(command, &error))?;
    let mut total = Total::default();
    if let Some(output) = child.stdout.take() {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        // Bytes, not text: a test may print anything.
        while reader
            .read_until(b'\n', &mut line)
            .map_err(|e| format!("cannot read what cargo test prints: {e}"))?
            > 0
        {
            // Nobody may be reading our own output any more.
            let _ = std::io::stdout().write_all(&line);
            total.add_line(&String::from_utf8_lossy(&line));
            line.clear();
        }
    }
    let status = child
        .wait()
        .map_err(|e| format!("cannot wait for cargo test: {e}"))?;
    Ok((total, status.success()))
}

/// How much of what a failed test wrote is printed again, in lines.
const AGAIN: usize = 40;

/// True of a line of a backtrace, which takes more room than it tells.
fn is_frame(line: &str) -> bool {
    let line = line.trim();
    let (number, rest) = line.split_once(": ").unwrap_or_default();
    let numbered = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    numbered && rest.contains("::") || line.starts_with("at ") || line == "stack backtrace:"
}

/// The sum over all test programs.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Total {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// What the failed tests wrote, each under its name.
    pub(crate) why: String,
    /// What belongs there of the test whose turn it is.
    said: Vec<String>,
}

impl Total {
    /// What a test said last is why it failed.
    fn tell(&mut self) {
        let said = std::mem::take(&mut self.said);
        let left_out = said.len().saturating_sub(AGAIN).max(1);
        for line in said.iter().take(1).chain(said.iter().skip(left_out)) {
            self.why += line;
        }
    }

    /// Adds a summary line, and keeps what a failed test wrote; other lines count
    /// for nothing. The standard harness writes `test result: ok. 3 passed; 0
    /// failed; ...`, others may leave out the verdict; what a failed test wrote
    /// comes before that, after `---- its name stdout ----`.
    fn add_line(&mut self, line: &str) {
        let begins = line.starts_with("---- ") && line.trim_end().ends_with(" ----");
        let ends = line == "failures:\n" || line.starts_with("test result: ");
        if begins || ends {
            self.tell();
        }
        if begins || !(ends || self.said.is_empty() || is_frame(line)) {
            self.said.push(line.to_owned());
        }
        if line.starts_with("test ") && line.trim_end().ends_with("... FAILED") {
            self.why += line;
        }
        let Some(summary) = line.strip_prefix("test result: ") else {
            return;
        };
        let words: Vec<&str> = summary
            .split([' ', ';', '.'])
            .map(str::trim)
            .filter(|word| !word.is_empty())
            .collect();
        for pair in words.windows(2) {
            match (pair[0].parse::<u64>(), pair[1]) {
                (Ok(count), "passed") => self.passed += count,
                (Ok(count), "failed") => self.failed += count,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_lines_are_added_up() {
        let mut total = Total::default();
        for line in [
            "running 4 tests\n",
            "test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n",
            "test result: 10 passed; 20 failed\n",
            "a test that prints test result: ok. 9 passed; 9 failed\n",
        ] {
            total.add_line(line);
        }
        assert_eq!(
            total,
            Total {
                passed: 15,
                failed: 22,
                ..Total::default()
            }
        );
    }

    #[test]
    fn frames_are_told_from_words() {
        let output = "stack backtrace:\n   0: core::panicking::panic\n             at ./main.rs:75:28\n\
                      note: 1: it is late at ten\n  2: two words\n";
        let words: Vec<&str> = output.lines().filter(|line| !is_frame(line)).collect();
        assert_eq!(words, ["note: 1: it is late at ten", "  2: two words"]);
    }

    #[test]
    fn what_failed_tests_wrote_is_kept_and_is_bounded() {
        let mut total = Total::default();
        let much = "much\n".repeat(500);
        let output = format!(
            "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\n{much}why a\n\
             ---- b stdout ----\nwhy b\n\nfailures:\n    a\n    b\n\n\
             test result: FAILED. 0 passed; 2 failed; 0 ignored\nafter it\n"
        );
        for line in output.split_inclusive('\n') {
            total.add_line(line);
        }
        let much = "much\n".repeat(AGAIN - 1);
        let want = format!(
            "test a ... FAILED\n---- a stdout ----\n{much}why a\n---- b stdout ----\nwhy b\n\n"
        );
        assert_eq!(total.why, want);
        assert_eq!((total.passed, total.failed), (0, 2));
    }
}
