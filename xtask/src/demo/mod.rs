//! `cargo xtask demo`: what the project is for, on real input, in one command.
//!
//! Sets the machine up, builds the programs, makes a small Debian root, and
//! runs the same things under runc and in a virtual machine of its own. Nothing
//! outlives it but the files in `target/demo`: a janitor process ends and
//! removes the rest even when the demo is killed.

mod article;
mod identity;
mod image;
mod oci;
mod pericarp;
mod storage;
mod table;

use std::fs;
use std::time::Instant;

use crate::command::{self, Failure, cargo};
use crate::janitor::Janitor;
use crate::project::Project;
use crate::setup;
use image::Disks;

/// Runs the whole demo.
pub(crate) fn run(project: &Project) -> Result<(), Failure> {
    step(1, "the packages, the guest kernel and its first process");
    setup::run(project)?;

    step(2, "builds the programs");
    build(project)?;
    let started = Instant::now();

    let dir = project.target.join("demo");
    fs::create_dir_all(&dir).map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
    let mut janitor = Janitor::start()?;
    let scratch = dir.join(format!("unfinished.{}", std::process::id()));
    janitor.directory(&scratch)?;

    step(3, "makes the disks");
    let disks = Disks::prepare(&dir, &scratch, &mut janitor)?;

    step(
        4,
        "runs one command as a container and in a virtual machine",
    );
    let identities = identity::compare(project, &disks.archive, &mut janitor)?;

    step(
        5,
        "types the article's commands with kubectl, on a node without a cluster",
    );
    article::play(project)?;

    step(
        6,
        "runs the same fio job in each, in turns, for about two minutes",
    );
    let storage = storage::compare(project, &dir, &disks, &mut janitor)?;

    step(7, "the results");
    println!("\n{identities}\n{storage}");
    println!("Took {} s after the build.", started.elapsed().as_secs());
    Ok(())
}

const STEPS: usize = 7;

fn step(number: usize, what: &str) {
    println!("[{number}/{STEPS}] {what}");
}

fn build(project: &Project) -> Result<(), Failure> {
    command::run(cargo().current_dir(&project.root).args([
        "build",
        "--release",
        "--package=pericarp",
        "--package=pericarp-block",
        "--package=pericarp-fs",
        "--package=pericarp-net",
        "--package=pericarp-vsock",
        "--package=pericarp-vmm",
        "--package=pericarp-shim",
        "--package=pericarp-tests",
        "--bins",
    ]))
}
