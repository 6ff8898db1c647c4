//! Carries a plan out: the steps common to both runtimes.
//!
//! Called by `main` with a valid plan. Whatever is created belongs to a value here or below, so
//! that returning, on any path, removes it.

use crate::{
    failure::Failure,
    input::check::{Plan, RuntimePlan},
    report::Timing,
    runc,
    signals::Signals,
    vm,
};

/// The command's search path and home, the same in both runtimes.
pub(crate) const ENVIRONMENT: [(&str, &str); 2] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/root"),
];
/// Host name seen by the command.
pub(crate) const HOSTNAME: &str = "pericarp";

/// Runs the command and returns its exit code.
pub(crate) fn run(plan: Plan, timing: &mut Timing) -> Result<i32, Failure> {
    let mut signals = Signals::block()?;
    let Plan {
        root,
        limits,
        command,
        runtime,
        ..
    } = plan;
    match runtime {
        RuntimePlan::Vm(vm_plan) => vm::run(*vm_plan, root, limits, command, &mut signals, timing),
        RuntimePlan::Runc => runc::run(root, limits, command, &mut signals, timing),
    }
}
