//! How the demo calls `pericarp run`: the command lines a user would type.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use crate::project::Project;

/// What the command's root file system is made from.
pub(crate) enum Root<'a> {
    /// An OCI archive.
    Oci(&'a Path),
    /// A directory.
    Tree(&'a Path),
}

/// A plain container on this machine's kernel. The caller adds what to run.
pub(crate) fn in_container(project: &Project, root: Root<'_>) -> Command {
    let mut command = pericarp_run(project, "runc", root);
    command.arg("--");
    command
}

/// A virtual machine of its own, perhaps with a second disk that is only read.
/// Its error output says how the machine's CPU is provided. The caller adds
/// what to run.
pub(crate) fn in_machine(project: &Project, root: Root<'_>, disk: Option<&Path>) -> Command {
    let mut command = pericarp_run(project, "vm", root);
    command
        .arg("--timing")
        .arg("--assets")
        .arg(project.assets());
    if let Some(disk) = disk {
        command.arg("--disk").arg(read_only(disk));
    }
    command.arg("--");
    command
}

fn pericarp_run(project: &Project, runtime: &str, root: Root<'_>) -> Command {
    let mut command = Command::new(project.release_program("pericarp"));
    command.args(["run", "--runtime", runtime]);
    match root {
        Root::Oci(archive) => command.arg("--image").arg(archive),
        Root::Tree(tree) => command.arg("--rootfs").arg(tree),
    };
    command
}

fn read_only(image: &Path) -> OsString {
    let mut value = OsString::from(image);
    value.push(":ro");
    value
}
