//! `cargo xtask check`: formatting, clippy, documentation, the house rules, harnesses, whether
//! the tests that documents name exist, and what may be depended on.
//!
//! Every step runs even when an earlier one found something, so that one call
//! shows all there is to mend. The last line is the summary.

use std::process::Command;

use crate::command::{self, Failure, cargo};
use crate::deny;
use crate::harness;
use crate::house;
use crate::named;
use crate::project::Project;

/// Runs all checks.
pub(crate) fn run(project: &Project) -> Result<(), Failure> {
    let mut failed = Vec::new();
    let mut step = |name: &'static str, outcome: Result<(), Failure>| {
        if let Err(failure) = outcome {
            eprintln!("check: {name}: {failure}");
            failed.push(name);
        }
    };
    let in_tree = |mut command: Command| {
        command.current_dir(&project.root);
        command
    };

    let mut fmt = in_tree(cargo());
    step(
        "formatting",
        command::run(fmt.args(["fmt", "--all", "--check"])),
    );

    let mut clippy = in_tree(cargo());
    clippy.args([
        "clippy",
        "--quiet",
        "--keep-going",
        "--workspace",
        "--all-targets",
        "--",
    ]);
    step("clippy", command::run(clippy.args(["-D", "warnings"])));

    let mut doc = in_tree(cargo());
    doc.env("RUSTDOCFLAGS", "-D warnings")
        .args(["doc", "--quiet", "--workspace", "--no-deps"]);
    step("documentation", command::run(&mut doc));

    step("house rules", house::inspect(&project.root));
    step("harnesses", harness::inspect(&project.root));
    step("names of tests", named::inspect(&project.root));
    step("dependencies", deny::inspect(&project.root));

    if failed.is_empty() {
        println!(
            "check: formatting, clippy, documentation, house rules, harnesses, names \
             of tests and dependencies are clean"
        );
        Ok(())
    } else {
        Err(format!("check found something in: {}", failed.join(", ")).into())
    }
}
