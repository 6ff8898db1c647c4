//! A disk image with the contents of a directory, for `--rootfs DIR` in a virtual machine.
//!
//! The image lives in the run's own directory and goes with it, so what the command writes is
//! discarded. Made by `mkfs.ext4 -d`; sparse, so its size costs nothing until it is used.

use std::{
    collections::HashSet,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use pericarp_hypervisor::{Confinement, Process};
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    failure::{Failure, during},
    rundir::RunDir,
    signals::Signals,
};

/// Room for what the command writes.
const FREE: u64 = 2 << 30;
const FREE_INODES: u64 = 65_536;
const BLOCK: u64 = 4096;

/// What a tree takes in a file system.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tree {
    bytes: u64,
    inodes: u64,
}

/// Makes the image and returns its path.
pub(crate) fn image(
    directory: &Path,
    run_dir: &RunDir,
    signals: &mut Signals,
) -> Result<PathBuf, Failure> {
    let tree = measure(directory)?;
    let path = run_dir.join("root.img");
    // Inodes take 256 bytes each, block maps and directories a little; a tenth covers them.
    let inodes = tree.inodes + FREE_INODES;
    let size = (tree.bytes + tree.bytes / 10 + inodes * 256 + FREE).next_multiple_of(BLOCK);
    let file = File::create_new(&path).map_err(during("the root image"))?;
    file.set_len(size).map_err(during("the root image"))?;
    drop(file);
    let mut command = Command::new(system_program("mkfs.ext4"));
    command
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal"])
        .args([
            "-E",
            "lazy_itable_init=1,root_owner=0:0",
            "-N",
            &inodes.to_string(),
            "-d",
        ])
        .args([directory, path.as_path()])
        .stdout(Stdio::null());
    run_to_end("mkfs.ext4", command, signals)?;
    Ok(path)
}

/// Runs a program that has to succeed; a signal to us ends it.
pub(crate) fn run_to_end(
    name: &'static str,
    command: Command,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let mut process = Process::spawn(name, command, Confinement::default()).map_err(|source| {
        Failure::Program {
            program: name.into(),
            source,
            cure: "`cargo xtask setup` installs what is missing",
        }
    })?;
    loop {
        if let Some(status) = process.exited() {
            return if status.success() {
                Ok(())
            } else {
                Err(Failure::Helper {
                    program: name.into(),
                    end: process.describe_end(),
                })
            };
        }
        {
            let exit = process.exit_fd();
            let mut fds = [
                PollFd::new(&exit, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ];
            // An interrupted wait goes round again.
            let _ = poll(&mut fds, None);
        }
        signals.check()?;
    }
}

/// Where a program of the system's administration is: a plain user's search path leaves its
/// directory out.
fn system_program(name: &str) -> PathBuf {
    ["/usr/sbin", "/sbin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| name.into())
}

fn measure(directory: &Path) -> Result<Tree, Failure> {
    let mut tree = Tree::default();
    let mut linked = HashSet::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(path) = pending.pop() {
        let failed = || during(format!("'{}' cannot be read", path.display()));
        tree.inodes += 1;
        tree.bytes += BLOCK;
        for entry in fs::read_dir(&path).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let metadata = entry.metadata().map_err(failed())?;
            if metadata.is_dir() {
                pending.push(entry.path());
                continue;
            }
            if metadata.nlink() > 1 && !linked.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            tree.inodes += 1;
            // Holes may be filled by the copy, so the length counts and not the blocks.
            tree.bytes += metadata.len().next_multiple_of(BLOCK);
        }
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_measured_in_blocks_and_links_count_once() {
        let dir = std::env::temp_dir().join(format!("pericarp-tree-{}", std::process::id()));
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/a"), [0; 5000]).unwrap();
        fs::hard_link(dir.join("sub/a"), dir.join("b")).unwrap();
        std::os::unix::fs::symlink("/nonexistent", dir.join("c")).unwrap();
        let tree = measure(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(
            tree,
            Tree {
                bytes: 2 * BLOCK + 2 * BLOCK + BLOCK,
                inodes: 4
            }
        );
    }
}
