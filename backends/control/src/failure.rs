//! How a sidecar's program ends: what went wrong before or while serving, the
//! one line that says so, and the exit code. Called by each `main`.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use crate::command_line::bad;

/// What goes wrong before or while serving, and the exit code for it.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    line: String,
}

impl Failure {
    /// The operator's to mend.
    pub fn input(line: impl Display) -> Self {
        Self {
            code: 2,
            line: line.to_string(),
        }
    }

    /// The operator's to mend: an option whose value breaks a rule.
    pub fn mistake(option: &str, value: impl Display, rule: impl Display) -> Self {
        Self::input(bad(option, value, rule.to_string()))
    }

    /// Ours or the system's.
    pub fn run_time(line: impl Display) -> Self {
        Self {
            code: 1,
            line: line.to_string(),
        }
    }
}

/// Answers on stdout, for `--help` and its like.
///
/// # Errors
/// When stdout takes nothing.
pub fn print(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|e| Failure::run_time(format_args!("cannot write to stdout: {e}")))
}

/// The exit code of a program, after its line if it failed.
pub fn exit_code(program: &str, done: Result<(), Failure>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Not through the logger: it may be off, and this must be seen.
            let _ = writeln!(std::io::stderr(), "{program}: {}", failure.line);
            ExitCode::from(failure.code)
        }
    }
}
