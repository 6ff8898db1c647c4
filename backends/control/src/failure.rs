//! How a sidecar's program ends: what went wrong before or while serving, the
//! one line that says so, and the exit code. Called by each `main`.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use crate::command_line::bad;

/// How the text of an error ends that says ENOMEM, ENFILE or EMFILE.
const WANTS: [&str; 3] = ["(os error 12)", "(os error 23)", "(os error 24)"];

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

    /// The operator's to mend: an option whose value breaks a rule. Where the rule is that the
    /// kernel has no memory or descriptors left, no other value would do: that is the system's.
    pub fn mistake(option: &str, value: impl Display, rule: impl Display) -> Self {
        let rule = rule.to_string();
        let lacks = WANTS.iter().any(|want| rule.contains(want));
        let line = bad(option, value, rule);
        match lacks {
            true => Self::run_time(line),
            false => Self::input(line),
        }
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

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn what_the_kernel_lacks_is_no_mistake_of_the_operators() {
        let code = |errno| {
            let rule = format!("it cannot be opened ({})", Error::from_raw_os_error(errno));
            Failure::mistake("--blk-file", "disk", rule).code
        };
        assert_eq!([libc::ENOMEM, libc::ENFILE, libc::EMFILE].map(code), [1; 3]);
        assert_eq!([libc::ENOENT, libc::EACCES, libc::ENOSPC].map(code), [2; 3]);
    }
}
