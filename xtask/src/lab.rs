//! `cargo xtask lab`: a command where KVM is backed by hardware.
//!
//! The machine it boots on a host without such a KVM is made by `pericarp-lab`
//! of the package `tests`, which the tests use, too. Called by `main`.

use std::process::{Command, ExitCode};

use crate::command::{self, Failure, cannot_start, cargo};
use crate::project::Project;
use crate::setup;

/// What is run when nothing is said.
const LOOK: [&str; 3] = [
    "sh",
    "-c",
    "ls -l /dev/kvm && grep -o -m 1 -w -e svm -e vmx /proc/cpuinfo",
];

/// Runs the command; its exit code is ours.
pub(crate) fn run(command: &[&str]) -> ExitCode {
    match Project::locate().and_then(|project| enter(&project, command)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("xtask: lab: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn enter(project: &Project, words: &[&str]) -> Result<u8, Failure> {
    setup::run(project)?;
    command::run(cargo().current_dir(&project.root).args([
        "build",
        "--release",
        "--package=pericarp-fs",
        "--package=pericarp-tests",
        "--bins",
    ]))?;
    let words = if words.is_empty() { &LOOK } else { words };
    let mut lab = Command::new(project.release_program("pericarp-lab"));
    lab.arg("--")
        .args(words)
        .env("PERICARP_ASSETS", project.assets());
    let status = lab.status().map_err(|error| cannot_start(&lab, &error))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}
