//! Programs from crates.io that only tests run: built once, each at its version,
//! into `target/tools/bin`. They are tools as QEMU and fio are: nothing of
//! theirs is part of ours.
//!
//! Called by `setup`.

use std::path::Path;

use crate::apt;
use crate::command::{self, Failure, cargo};
use crate::project::Project;

/// Crate, version, and what it is for.
const TOOLS: &[(&str, &str, &str)] = &[
    (
        "pjdfstest",
        "0.2.2",
        "asks a file system for what POSIX says of names, modes and errors",
    ),
    (
        "fsx",
        "0.3.2",
        "reads, writes, maps and cuts a file at random and compares",
    ),
];

/// What pjdfstest is linked with, and the package it comes in.
const LIBRARY: (&str, &str) = ("/usr/include/sys/acl.h", "libacl1-dev");

/// Builds what is missing.
pub(crate) fn prepare(project: &Project) -> Result<(), Failure> {
    let root = project.target.join("tools");
    let missing: Vec<_> = TOOLS
        .iter()
        .filter(|(name, version, _)| !is_there(&root, name, version))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !Path::new(LIBRARY.0).exists() {
        apt::install(&[LIBRARY.1])?;
    }
    for (name, version, why) in missing {
        println!("setup: builds {name} {version}: {why}");
        command::run(
            cargo()
                // Where this tree's own settings do not reach.
                .current_dir("/")
                .args(["install", "--quiet", "--locked", "--force", name])
                .args(["--version", version, "--root"])
                .arg(&root)
                .arg("--target-dir")
                .arg(root.join("build")),
        )?;
    }
    // Ten times as large as what came of it.
    std::fs::remove_dir_all(root.join("build"))
        .map_err(|error| format!("cannot remove {}/build: {error}", root.display()).into())
}

/// Whether cargo has noted that it installed this version, and the program is
/// there.
fn is_there(root: &Path, name: &str, version: &str) -> bool {
    let noted = std::fs::read_to_string(root.join(".crates.toml")).unwrap_or_default();
    noted.contains(&format!("\"{name} {version} (")) && root.join("bin").join(name).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_built_anew() {
        let root = std::env::temp_dir().join(format!("xtask-tools-{}", std::process::id()));
        std::fs::create_dir_all(root.join("bin")).unwrap();
        let noted = "[v1]\n\"fsx 0.3.2 (registry+https://example.org/)\" = [\"fsx\"]\n";
        std::fs::write(root.join(".crates.toml"), noted).unwrap();
        let before = is_there(&root, "fsx", "0.3.2");
        std::fs::write(root.join("bin/fsx"), "").unwrap();
        let there = ["0.3.2", "0.3.20", "0.3"].map(|version| is_there(&root, "fsx", version));
        std::fs::remove_dir_all(&root).unwrap();
        assert!(!before);
        assert_eq!(there, [true, false, false]);
    }
}
