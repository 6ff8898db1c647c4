//! Running other programs, and the error every command ends with.
//!
//! Called by all modules that start a process. Nothing here interprets output;
//! callers do.

use std::ffi::OsStr;
use std::fmt;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// Why a command could not be finished: one sentence for the person at the
/// terminal.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<String> for Failure {
    fn from(sentence: String) -> Self {
        Self(sentence)
    }
}

impl From<&str> for Failure {
    fn from(sentence: &str) -> Self {
        Self(sentence.to_owned())
    }
}

/// The cargo that runs us, so that a nested call uses the same toolchain.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs `command` with our own output streams; anything but success is an error.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .map_err(|error| cannot_start(command, &error))?;
    succeeded(command, status)
}

/// Runs `command` and returns what it wrote to its standard output. What it
/// wrote to its standard error is part of the error when it fails.
pub(crate) fn capture(command: &mut Command) -> Result<String, Failure> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| cannot_start(command, &error))?;
    if !output.status.success() {
        // With our own streams the reader would have seen it: show it.
        let _ = std::io::stderr().write_all(&output.stderr);
    }
    succeeded(command, output.status)?;
    String::from_utf8(output.stdout)
        .map_err(|_| format!("{} did not print text", words(command)).into())
}

/// Turns an unsuccessful end of `command` into an error.
pub(crate) fn succeeded(command: &Command, status: ExitStatus) -> Result<(), Failure> {
    if status.success() {
        return Ok(());
    }
    let words = words(command);
    Err(match status.code() {
        Some(code) => format!("`{words}` failed with exit code {code}"),
        None => format!("`{words}` was ended by a signal"),
    }
    .into())
}

/// The error for a program that could not even be started.
pub(crate) fn cannot_start(command: &Command, error: &std::io::Error) -> Failure {
    format!("cannot start `{}`: {error}", words(command)).into()
}

/// The full path of `program` in the search path. The administrator's
/// directories count too: a plain user's path often lacks them.
pub(crate) fn find_program(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .map(|dir| dir.join(program))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The program's name and its first arguments, short enough for one line.
fn words(command: &Command) -> String {
    let name = Path::new(command.get_program())
        .file_name()
        .unwrap_or_else(|| command.get_program());
    let mut words: Vec<&OsStr> = vec![name];
    words.extend(command.get_args());
    let mut line = words
        .iter()
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
        .replace('\n', " ");
    if line.chars().count() > 120 {
        line = line.chars().take(117).collect::<String>() + "...";
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captures_what_a_program_prints() {
        let text = capture(Command::new("sh").args(["-c", "echo one"])).unwrap();
        assert_eq!(text, "one\n");
    }

    #[test]
    fn a_failing_program_is_named_with_its_exit_code() {
        let failure = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err();
        assert_eq!(
            failure.to_string(),
            "`sh -c exit 3` failed with exit code 3"
        );
    }

    #[test]
    fn a_long_command_line_is_cut() {
        let mut command = Command::new("true");
        command.args(std::iter::repeat_n("argument", 100));
        assert_eq!(words(&command).chars().count(), 120);
    }

    #[test]
    fn finds_a_program_every_machine_has() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-anywhere").is_none());
    }
}
