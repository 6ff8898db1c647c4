//! `cargo xtask bench compare`: fio against runc. Builds `bench-compare`, installs
//! the programs it calls, and runs it.
//!
//! Called by `main` with the arguments, which are the bench's own. They are
//! checked first, by the bench: a mistake in them changes nothing here. What it
//! makes outside `target` goes away with us, Ctrl-C or not.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::command::{self, Failure, cannot_start, cargo};
use crate::janitor::Janitor;
use crate::project::Project;
use crate::setup;

/// What the bench starts besides our own programs.
const PROGRAMS: &[&str] = &[
    "fio",
    "runc",
    "linux.uml",
    "qemu-storage-daemon",
    "mkfs.ext4",
];

/// How the bench calls its containers; its process's number follows.
const CONTAINERS: &str = "pericarp-bench-";

/// Runs the bench; its exit code is ours.
pub(crate) fn run(arguments: &[&str]) -> ExitCode {
    match Project::locate().and_then(|project| compare(&project, arguments)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn compare(project: &Project, arguments: &[&str]) -> Result<u8, Failure> {
    command::run(cargo().current_dir(&project.root).args([
        "build",
        "--release",
        "--package=pericarp-block",
        "--package=pericarp-fs",
        "--package=pericarp-benches",
        "--bins",
    ]))?;
    let bench = || {
        let mut command = Command::new(project.release_program("bench-compare"));
        // Its defaults are below the build directory of the source tree.
        command.current_dir(&project.root).args(arguments);
        command
    };
    if only_asks(arguments) {
        return end(&mut bench());
    }
    let checked = end(bench().arg("--plan").stdout(Stdio::null()))?;
    if checked != 0 {
        return Ok(checked);
    }
    setup::install(PROGRAMS)?;
    let mut janitor = Janitor::start()?;
    let scratch = scratch();
    janitor.directory(&scratch)?;
    janitor.control_groups(CONTAINERS)?;
    end(bench().env("PERICARP_TEST_DIR", scratch))
}

/// True where nothing would be measured.
fn only_asks(arguments: &[&str]) -> bool {
    let asks = |word: &&str| ["--help", "-h", "--plan"].contains(word);
    arguments.iter().any(asks)
}

/// Where sockets and reports of this run are: a short name, since that of a
/// socket may not be long, and a disk, since `/tmp` may be memory.
fn scratch() -> PathBuf {
    Path::new("/var/tmp").join(format!("pericarp-bench-{}", std::process::id()))
}

/// Runs `command` on our own terminal; a signal's end counts as a failure.
fn end(command: &mut Command) -> Result<u8, Failure> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .map_err(|error| cannot_start(command, &error))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_measures_nothing() {
        assert!(only_asks(&["--quick", "--help"]));
        assert!(only_asks(&["-h"]) && only_asks(&["--plan"]));
        assert!(!only_asks(&["--quick", "--json", "help"]) && !only_asks(&[]));
    }

    #[test]
    fn every_program_is_one_that_setup_knows() {
        assert!(PROGRAMS.iter().all(|program| setup::knows(program)));
    }
}
