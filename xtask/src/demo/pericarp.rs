//! How the demo calls `pericarp run`: the same command line a user would type.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use crate::project::Project;

/// Where a command runs.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Runtime {
    /// A plain container on this machine's kernel.
    Runc,
    /// A virtual machine of its own.
    Vm,
}

/// `pericarp run` up to the `--`; the caller adds what to run.
pub(crate) fn pericarp_run(
    project: &Project,
    runtime: Runtime,
    root: &Path,
    disk: Option<&Path>,
) -> Command {
    let mut command = Command::new(project.release_program("pericarp"));
    command
        .env("PERICARP_ASSETS", project.assets())
        .args(["run", "--runtime"])
        .arg(match runtime {
            Runtime::Runc => "runc",
            Runtime::Vm => "vm",
        })
        .arg("--rootfs-image")
        .arg(root);
    if let Some(disk) = disk {
        let mut value = OsString::from(disk);
        value.push(":ro");
        command.arg("--disk").arg(value);
    }
    command.arg("--");
    command
}
