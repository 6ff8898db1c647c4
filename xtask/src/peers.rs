//! Programs of others that our tests compare ours with and no Debian 12 package
//! has. `setup` and `test` call this; they are started, never linked.

use std::path::Path;

use crate::apt;
use crate::command::{self, Failure, cargo, find_program};
use crate::project::Project;

/// The version whose answers the test of the file server knows.
const VIRTIOFSD: &str = "1.14.0";

/// Has `virtiofsd` built into the assets directory where it is nowhere, which
/// takes a minute or two, once.
pub(crate) fn prepare(project: &Project) -> Result<(), Failure> {
    let root = project.assets().join("peers");
    if find_program("virtiofsd").is_some() || root.join("bin/virtiofsd").is_file() {
        println!("setup: virtiofsd is there");
        return Ok(());
    }
    println!("setup: builds virtiofsd {VIRTIOFSD}: the peer our file server is compared with");
    let headers = ["/usr/include/cap-ng.h", "/usr/include/seccomp.h"];
    if !headers.iter().all(|header| Path::new(header).exists()) {
        apt::install(&["libcap-ng-dev", "libseccomp-dev"])?;
    }
    let mut install = cargo();
    install
        .args(["install", "--quiet", "--locked", "--version", VIRTIOFSD])
        .arg("--root")
        .arg(&root)
        .arg("--target-dir")
        .arg(project.target.join("peers"))
        .arg("virtiofsd");
    command::run(&mut install)
}
