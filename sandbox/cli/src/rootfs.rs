//! The disks that a machine's container starts from, for each kind of root.
//!
//! An OCI image becomes a read-only EROFS disk, kept for the next run, with an empty disk for what
//! the container writes. A directory becomes an ext4 disk of this run. A disk image is used as it
//! is. What is made for one run has no name (see `scratch`) and goes with it.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    failure::{Failure, during},
    helper, images,
    input::check::Root,
    scratch::{Unnamed, mkfs_ext4},
    signals::Signals,
};

/// Room for what the command writes.
const FREE: u64 = 2 << 30;
const FREE_INODES: u64 = 65_536;
const BLOCK: u64 = 4096;

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

/// What the container's root is made of.
#[derive(Debug)]
pub(crate) struct Disks {
    pub(crate) root: Disk,
    pub(crate) fs_type: &'static str,
    /// Takes what the container writes, where the root takes nothing.
    pub(crate) scratch: Option<Disk>,
    /// Keeps them there.
    _unnamed: Option<Unnamed>,
}

/// Makes what the root needs.
pub(crate) fn for_machine(root: &Root, signals: &mut Signals) -> Result<Disks, Failure> {
    match root {
        Root::Oci(image) => {
            let disk = images::disk(image, signals)?;
            let writable = Unnamed::writable(signals)?;
            Ok(Disks {
                root: Disk {
                    path: disk,
                    read_only: true,
                },
                fs_type: "erofs",
                scratch: Some(Disk {
                    path: writable.path(),
                    read_only: false,
                }),
                _unnamed: Some(writable),
            })
        }
        Root::Image(image) => Ok(Disks {
            root: Disk {
                path: image.path.clone(),
                read_only: image.read_only,
            },
            fs_type: "ext4",
            scratch: None,
            _unnamed: None,
        }),
        Root::Directory(directory) => {
            let image = directory_image(directory, signals)?;
            Ok(Disks {
                root: Disk {
                    path: image.path(),
                    read_only: false,
                },
                fs_type: "ext4",
                scratch: None,
                _unnamed: Some(image),
            })
        }
    }
}

/// What a tree takes in a file system.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tree {
    bytes: u64,
    inodes: u64,
}

/// An image with the contents of a directory. Made by `mkfs.ext4 -d`; sparse, so its size costs
/// nothing until it is used.
fn directory_image(directory: &Path, signals: &mut Signals) -> Result<Unnamed, Failure> {
    let tree = measure(directory)?;
    // Inodes take 256 bytes each, block maps and directories a little; a tenth covers them.
    let inodes = tree.inodes + FREE_INODES;
    let size = (tree.bytes + tree.bytes / 10 + inodes * 256 + FREE).next_multiple_of(BLOCK);
    let image = Unnamed::new(size)?;
    let mut command = mkfs_ext4();
    command
        .args([
            "-E",
            "lazy_itable_init=1,root_owner=0:0",
            "-N",
            &inodes.to_string(),
            "-d",
        ])
        .arg(directory)
        .arg(image.path());
    helper::run_to_end("mkfs.ext4", command, signals)?;
    Ok(image)
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
