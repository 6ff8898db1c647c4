//! Programs from crates.io that only tests run: built once, each at its version,
//! into `target/tools/bin`. They are tools as QEMU and fio are: nothing of
//! theirs is part of ours.
//!
//! Called by `test`, which also serves `setup`. The demo needs none of them.

use std::path::Path;

use crate::apt;
use crate::command::{self, Failure, cargo};
use crate::project::Project;

/// A program of a crate of the same name.
struct Tool {
    name: &'static str,
    version: &'static str,
    why: &'static str,
    /// Whether its speed is nobody's concern: the compiler then spends little time on it.
    plain: bool,
    /// What it is built with: a header, and the package that has it.
    needs: &'static [(&'static str, &'static str)],
}

const TOOLS: &[Tool] = &[
    Tool {
        name: "pjdfstest",
        version: "0.2.2",
        why: "asks a file system for what POSIX says of names, modes and errors",
        plain: true,
        needs: &[("/usr/include/sys/acl.h", "libacl1-dev")],
    },
    Tool {
        name: "fsx",
        version: "0.3.2",
        why: "reads, writes, maps and cuts a file at random and compares",
        plain: true,
        needs: &[],
    },
    Tool {
        name: "virtiofsd",
        version: "1.14.0",
        why: "the peer whose answers are compared with those of our file server",
        plain: false,
        needs: &[
            ("/usr/include/cap-ng.h", "libcap-ng-dev"),
            ("/usr/include/seccomp.h", "libseccomp-dev"),
        ],
    },
];

/// Builds what is missing.
pub(crate) fn prepare(project: &Project) -> Result<(), Failure> {
    let root = project.target.join("tools");
    let missing: Vec<_> = TOOLS
        .iter()
        .filter(|tool| !is_there(&root, tool.name, tool.version))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing
        .iter()
        .flat_map(|tool| tool.needs)
        .filter(|(header, _)| !Path::new(header).exists())
        .map(|(_, package)| *package)
        .collect();
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    for tool in missing {
        let (name, version) = (tool.name, tool.version);
        println!("setup: builds {name} {version}: {}", tool.why);
        let mut command = cargo();
        if tool.plain {
            command
                .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
                .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
        }
        command::run(
            command
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
