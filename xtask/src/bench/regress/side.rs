//! The two builds: `pericarp-block`, and the gate program on the same data plane.
//!
//! Each is built in a small workspace with the manifest of its side's tree, in
//! which that tree's crates have absolute paths. The gate program's source is
//! copied there, that of this tree on both sides.
//!
//! Both sides share one build directory below `target/regress`, so that outside
//! crates are built once; it is kept for the next run. The tree's own workspace
//! must never be built there: cargo names what it builds by the path within the
//! workspace, and would take the other side's for it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::command::{self, Failure, cargo};
use crate::project::Project;

/// Where the gate program's source is in a tree.
const GATE: &str = "benches/gate";
/// The directory of a workspace's only member.
const MEMBER: &str = "member";
const USER_OF_BLOCK: &str = "\
[package]
name = \"user-of-block\"
version = \"0.0.0\"
edition = \"2024\"

[dependencies]
pericarp-block.workspace = true
";

/// One of the two.
pub(super) struct Side {
    /// Its name in messages.
    pub(super) name: &'static str,
    /// Its build of `pericarp-block`.
    pub(super) block: PathBuf,
    /// Its build of `pericarp-gate`, if there is one.
    pub(super) gate: Option<PathBuf>,
}

impl Side {
    /// The tree we are in.
    pub(super) fn this(project: &Project, dir: &Path) -> Result<Self, Failure> {
        let name = "this tree";
        println!("regress: builds {name}");
        let side = dir.join("this-side");
        let block = block(&project.root, dir, &side)?;
        let gate = gate(&project.root, &project.root, dir, &side)?;
        Ok(Self {
            name,
            block,
            gate: Some(gate),
        })
    }

    /// The base in its work tree; fails when its `pericarp-block` does not build.
    pub(super) fn base(project: &Project, tree: &Path, dir: &Path) -> Result<Self, Failure> {
        let name = "the base";
        println!("regress: builds {name}");
        let side = dir.join("base-side");
        let block = block(tree, dir, &side)?;
        let gate = match gate(tree, &project.root, dir, &side) {
            Ok(gate) => Some(gate),
            Err(_) if tree.join(GATE).is_dir() => {
                println!(
                    "regress: this tree's gate program does not build on the base (above); \
                     takes the base's own, and compares the pieces both have"
                );
                gate(tree, tree, dir, &side).ok()
            }
            Err(_) => None,
        };
        if gate.is_none() {
            println!(
                "regress: NO GATE PROGRAM builds on the base: \
                 the pieces of the data plane are not compared"
            );
        }
        Ok(Self { name, block, gate })
    }
}

/// Builds `pericarp-block` of the tree at `root`, and keeps it at `side`.
fn block(root: &Path, dir: &Path, side: &Path) -> Result<PathBuf, Failure> {
    // A workspace has to have a member.
    let workspace = side.join("block");
    let member = workspace.join(MEMBER);
    fs::create_dir_all(member.join("src"))
        .and_then(|()| write(&member.join("Cargo.toml"), USER_OF_BLOCK.as_bytes()))
        .and_then(|()| write(&member.join("src/lib.rs"), b""))
        .map_err(|e| format!("cannot make {}: {e}", member.display()))?;
    set_up(root, &workspace)?;
    build(&workspace, dir, "pericarp-block")?;
    keep(dir, side, "pericarp-block")
}

/// Builds the gate program whose source is in the tree at `source` on the data
/// plane of the tree at `root`.
fn gate(root: &Path, source: &Path, dir: &Path, side: &Path) -> Result<PathBuf, Failure> {
    let workspace = side.join("gate");
    mirror(&source.join(GATE), &workspace.join(MEMBER))
        .map_err(|e| format!("cannot copy {GATE}: {e}"))?;
    set_up(root, &workspace)?;
    build(&workspace, dir, "pericarp-gate")?;
    keep(dir, side, "pericarp-gate")
}

/// Gives a workspace the manifest and the lock file of the tree at `root`.
fn set_up(root: &Path, workspace: &Path) -> Result<(), Failure> {
    let manifest = manifest(&read(&root.join("Cargo.toml"))?, root);
    let lock = read(&root.join("Cargo.lock"))?;
    for (name, text) in [("Cargo.toml", manifest), ("Cargo.lock", lock)] {
        let file = workspace.join(name);
        write(&file, text.as_bytes()).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    Ok(())
}

fn build(root: &Path, dir: &Path, package: &str) -> Result<(), Failure> {
    let mut command = cargo();
    command
        .current_dir(root)
        .args(["build", "--quiet", "--release", "--package", package])
        .arg("--target-dir")
        .arg(dir.join("build"));
    command::run(&mut command)
}

/// Both sides build programs of the same name.
fn keep(dir: &Path, side: &Path, program: &str) -> Result<PathBuf, Failure> {
    let (from, to) = (dir.join("build/release").join(program), side.join(program));
    fs::create_dir_all(side)
        .and_then(|()| fs::copy(&from, &to))
        .map_err(|e| format!("cannot copy {}: {e}", from.display()))?;
    Ok(to)
}

/// The manifest of a workspace of one member: the tree's own, so that versions
/// and profile are the tree's, with the crates at `root`.
fn manifest(text: &str, root: &Path) -> String {
    let mut made = String::new();
    let mut in_members = false;
    for line in text.lines() {
        if line.starts_with("members") {
            made.push_str(&format!("members = [\"{MEMBER}\"]\n"));
            in_members = !line.contains(']');
        } else if in_members {
            in_members = !line.starts_with(']');
        } else {
            let absolute = format!("path = \"{}/", root.display());
            made.push_str(&line.replace("path = \"", &absolute));
            made.push('\n');
        }
    }
    made
}

/// Makes `to` a copy of `from`. What is the same already is not touched, or
/// cargo would build it again.
fn mirror(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if !from.join(entry.file_name()).exists() {
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let copy = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            mirror(&entry.path(), &copy)?;
        } else {
            write(&copy, &fs::read(entry.path())?)?;
        }
    }
    Ok(())
}

fn write(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if fs::read(file).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::write(file, bytes)
}

fn read(file: &Path) -> Result<String, Failure> {
    fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_has_one_member_and_crates_elsewhere() {
        let tree = "[workspace]\nmembers = [\n    \"a\",\n]\n\n[workspace.dependencies]\n\
                    pericarp-ring = { path = \"backends/ring\" }\n\
                    libc = \"0.2\"\n";
        assert_eq!(
            manifest(tree, Path::new("/tree")),
            "[workspace]\nmembers = [\"member\"]\n\n[workspace.dependencies]\n\
             pericarp-ring = { path = \"/tree/backends/ring\" }\nlibc = \"0.2\"\n"
        );
    }

    #[test]
    fn a_mirror_loses_what_its_source_lost_and_leaves_the_rest_alone() {
        let dir = std::env::temp_dir().join(format!("xtask-mirror-{}", std::process::id()));
        let (from, to) = (dir.join("from"), dir.join("to"));
        fs::create_dir_all(from.join("deep")).unwrap();
        fs::write(from.join("deep/kept"), "1").unwrap();
        fs::write(from.join("gone"), "1").unwrap();
        mirror(&from, &to).unwrap();
        let time = |name| fs::metadata(to.join(name)).unwrap().modified().unwrap();
        let before = time("deep/kept");
        fs::remove_file(from.join("gone")).unwrap();
        fs::write(from.join("new"), "2").unwrap();
        mirror(&from, &to).unwrap();
        assert_eq!(time("deep/kept"), before);
        assert!(!to.join("gone").exists());
        assert_eq!(fs::read(to.join("new")).unwrap(), b"2");
        fs::remove_dir_all(dir).unwrap();
    }
}
