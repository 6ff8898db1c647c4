//! `cargo xtask audit`: what holds the processes of pods, as the kernel reports it, beside
//! what `SECURITY.md` promises of them.
//!
//! The looking is done by `pericarp-audit` of the package `tests`, which the tests use,
//! too; it also starts a pod where none is named. Called by `main`.

use std::os::fd::AsFd;
use std::process::{Command, ExitCode};

use crate::command::{self, Failure, cannot_start, cargo};
use crate::project::Project;

/// What a pod is made of, and who looks.
const PACKAGES: [&str; 7] = [
    "pericarp",
    "pericarp-block",
    "pericarp-fs",
    "pericarp-net",
    "pericarp-vsock",
    "pericarp-vmm",
    "pericarp-tests",
];

/// Looks; the exit code is that of who looked.
pub(crate) fn run(words: &[&str]) -> ExitCode {
    match Project::locate().and_then(|project| look(&project, words)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("xtask: audit: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Sets the machine up. What that says goes to the other stream: on this one is what was found,
/// and nothing else, for programs that read it.
fn set_up() -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let other = std::io::stderr().as_fd().try_clone_to_owned();
    let other = other.map_err(|e| format!("cannot share the error stream: {e}"))?;
    command::run(Command::new(program).arg("setup").stdout(other))
}

fn look(project: &Project, words: &[&str]) -> Result<u8, Failure> {
    let starts = !words
        .iter()
        .any(|word| matches!(*word, "--pod" | "--running"));
    if starts {
        set_up()?;
    }
    let packages = match starts {
        true => &PACKAGES[..],
        // Those that run are there.
        false => &PACKAGES[PACKAGES.len() - 1..],
    };
    command::run(
        cargo()
            .current_dir(&project.root)
            .args(["build", "--quiet", "--release", "--bins"])
            .args(packages.iter().flat_map(|name| ["--package", name])),
    )?;
    let mut audit = Command::new(project.release_program("pericarp-audit"));
    audit.args(words).env("PERICARP_ASSETS", project.assets());
    let status = audit
        .status()
        .map_err(|error| cannot_start(&audit, &error))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}
