//! `cargo xtask test`: everything a change has to pass, on any machine.
//!
//! Sets the machine up, runs `check`, builds all programs and runs all tests
//! with nothing allowed to be skipped. What the test programs print goes
//! through unchanged. Why tests failed is printed again at the end, where whoever
//! opens a long log looks first, and before that where the time went; the last
//! line is the sum of the summary lines.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::assets;
use crate::check;
use crate::command::{self, Failure, cannot_start, cargo};
use crate::project::Project;
use crate::setup;
use crate::tools;

/// Runs the whole test command.
pub(crate) fn run(project: &Project) -> Result<(), Failure> {
    let mut times = Times::default();
    times.took("setting up", || {
        setup::run(project)?;
        prepare(project)
    })?;
    let checked = times.took("checks", || check::run(project));
    if let Err(failure) = &checked {
        // The tests still run: one call should show everything.
        eprintln!("test: {failure}");
    }
    // The tests start the programs themselves, so these must be there first.
    // One call for programs and tests: what both are made of is compiled once.
    times.took("compiling", || {
        command::run(cargo().current_dir(&project.root).args([
            "build",
            "--workspace",
            "--bins",
            "--tests",
        ]))
    })?;
    let (total, tests_passed) = times.took("tests", || run_tests(project))?;
    times.say(&total);
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

/// How long each step took.
#[derive(Default)]
struct Times(Vec<(&'static str, f64)>);

impl Times {
    fn took<T>(&mut self, name: &'static str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let outcome = step();
        self.0.push((name, start.elapsed().as_secs_f64()));
        outcome
    }

    /// Says where the time went: each step, and the test programs that took longest.
    fn say(&self, total: &Total) {
        let list = |of: &[(String, f64)]| {
            let words: Vec<String> = of
                .iter()
                .map(|(name, seconds)| format!("{name} {seconds:.0} s"))
                .collect();
            words.join(", ")
        };
        let steps: Vec<_> = self.0.iter().map(|(n, s)| ((*n).to_owned(), *s)).collect();
        let mut programs = total.programs.clone();
        programs.sort_by(|a, b| b.1.total_cmp(&a.1));
        programs.truncate(LONGEST);
        println!("\ntime: {}; longest: {}", list(&steps), list(&programs));
    }
}

/// How many test programs are named with their time.
const LONGEST: usize = 12;

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
    // One pipe for both streams: cargo says on the other one which program it runs.
    let piped = || -> std::io::Result<_> {
        let (output, writer) = std::io::pipe()?;
        Ok((output, writer.try_clone()?, writer))
    };
    let (output, stdout, stderr) = piped().map_err(|e| format!("cannot make a pipe: {e}"))?;
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let mut child = command
        .spawn()
        .map_err(|error| cannot_start(command, &error))?;
    // Our own ends of the pipe, which would keep it open.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut total = Total::default();
    {
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

/// The test program that cargo says it runs: `Running tests/cri/main.rs
/// (target/debug/deps/cri-0123)` or `Doc-tests pericarp_ring`.
fn program(line: &str) -> Option<String> {
    let line = line.trim();
    if let Some(name) = line.strip_prefix("Doc-tests ") {
        return Some(format!("documentation of {name}"));
    }
    let (_, path) = line.strip_prefix("Running ")?.rsplit_once(" (")?;
    let file = path.strip_suffix(')')?.rsplit_once('/')?.1;
    Some(file.rsplit_once('-')?.0.to_owned())
}

/// The sum over all test programs.
#[derive(Debug, Default)]
pub(crate) struct Total {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// What the failed tests wrote, each under its name.
    pub(crate) why: String,
    /// What belongs there of the test whose turn it is.
    said: Vec<String>,
    /// Each test program and how long its tests took, in seconds.
    programs: Vec<(String, f64)>,
    /// The program whose turn it is.
    program: String,
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
        if let Some(name) = program(line) {
            self.program = name;
        }
        let Some(summary) = line.strip_prefix("test result: ") else {
            return;
        };
        let seconds = summary.rsplit_once("finished in ").and_then(|(_, time)| {
            let time = time.trim_end().strip_suffix('s')?;
            time.parse::<f64>().ok()
        });
        if let Some(seconds) = seconds {
            self.programs.push((self.program.clone(), seconds));
        }
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
        assert_eq!((total.passed, total.failed), (15, 22));
    }

    #[test]
    fn programs_have_their_times() {
        let mut total = Total::default();
        let output = "   Compiling one v0.1.0\n     Running tests/cri/main.rs (target/debug/deps/cri-0a1b)\n\
                      test result: ok. 1 passed; 0 failed; 0 ignored; finished in 313.20s\n\
                      \x20    Running unittests src/lib.rs (target/debug/deps/pericarp_ring-9)\n\
                      test result: ok. 2 passed; 0 failed; 0 ignored; finished in 0.01s\n\
                      \x20  Doc-tests pericarp_ring\ntest result: ok. 1 passed; finished in 1.00s\n\
                      Running what a test does (for a while)\n";
        output.split_inclusive('\n').for_each(|l| total.add_line(l));
        let of = |name: &str, seconds| (name.to_owned(), seconds);
        assert_eq!(
            total.programs,
            [
                of("cri", 313.2),
                of("pericarp_ring", 0.01),
                of("documentation of pericarp_ring", 1.0)
            ]
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
