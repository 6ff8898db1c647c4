//! What a program that shares directories keeps: capabilities that count for
//! files, and the call that opens by file handle. Called by
//! [`crate::enter_sharing`]; it decides and changes nothing.

use std::os::fd::OwnedFd;

use rustix::thread::{CapabilitySet, capabilities};

use crate::report::{Confinement, Measure};
use crate::tree::Tree;
use crate::{ConfineError, step};

/// What a program needs beyond its [`Profile`](crate::Profile) to share
/// directories.
#[derive(Debug)]
pub struct Sharing<'a> {
    /// An open `/proc/self/fd`, through which files are opened by the number of
    /// an O_PATH descriptor. It becomes a mount of its own under the same
    /// number, where that can be; copies made before stay as they were.
    pub descriptors: &'a mut OwnedFd,
    /// Those to keep of [`Sharing::CAPABILITIES`], where the process has them.
    /// Where all trees are read-only, those of [`Sharing::READING`].
    pub capabilities: CapabilitySet,
    /// Whether files are opened by handle (`open_by_handle_at`). It is granted
    /// where each tree is a whole file system, with all that is mounted below:
    /// a handle leads to any file of its file system, past Landlock and past
    /// the root of the mount. Without it CAP_DAC_READ_SEARCH is kept for
    /// read-only trees alone, since CAP_DAC_OVERRIDE gives as much.
    pub handles: bool,
}

impl Sharing<'_> {
    /// All that can be kept.
    pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
        .union(CapabilitySet::DAC_OVERRIDE)
        .union(CapabilitySet::DAC_READ_SEARCH)
        .union(CapabilitySet::FOWNER)
        .union(CapabilitySet::FSETID)
        .union(CapabilitySet::SETGID)
        .union(CapabilitySet::SETUID)
        .union(CapabilitySet::MKNOD)
        .union(CapabilitySet::SETFCAP);

    /// The same for trees that are read-only.
    pub const READING: CapabilitySet = CapabilitySet::DAC_READ_SEARCH;
}

/// What is kept, from what was asked for and what there is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    pub(crate) wanted: CapabilitySet,
    pub(crate) capabilities: CapabilitySet,
    pub(crate) handles: bool,
}

impl Kept {
    pub(crate) const NOTHING: Self = Self {
        wanted: CapabilitySet::empty(),
        capabilities: CapabilitySet::empty(),
        handles: false,
    };

    /// Before namespaces are left: those of a new user namespace do not count
    /// for files of others.
    pub(crate) fn plan(sharing: &Sharing<'_>, trees: &[Tree]) -> Result<Self, ConfineError> {
        let most = match trees.iter().any(|tree| !tree.is_read_only()) {
            true => Sharing::CAPABILITIES,
            false => Sharing::READING,
        };
        let wanted = sharing.capabilities & most;
        let own = step("read the capabilities", capabilities(None))?.permitted;
        Ok(Self {
            wanted,
            capabilities: wanted & own,
            handles: sharing.handles,
        })
    }

    /// Takes away what would lead out of the trees as they have become.
    pub(crate) fn bound(&mut self, trees: &[Tree], report: &mut Confinement) {
        let reader = CapabilitySet::DAC_READ_SEARCH;
        if self.handles {
            let part = trees.iter().find(|tree| !tree.is_whole());
            self.handles = part.is_none() && self.capabilities.contains(reader);
            let words = match part {
                _ if self.handles => "file handles".to_owned(),
                Some(tree) if self.capabilities.contains(reader) => {
                    format!(
                        "no file handles ({:?} is not a whole file system)",
                        tree.path()
                    )
                }
                _ => "no file handles".to_owned(),
            };
            report.holds(Measure::Trees, words);
        }
        let writable = trees.iter().any(|tree| !tree.is_read_only());
        if writable && !self.handles {
            self.wanted.remove(reader);
            self.capabilities.remove(reader);
        }
        let mknod = CapabilitySet::MKNOD;
        if self.capabilities.contains(mknod) && !trees.iter().all(Tree::forbids_devices) {
            // It must not make a disk of the host and open it.
            self.capabilities.remove(mknod);
        }
    }
}

/// Reports what became of the trees.
pub(crate) fn account(trees: &[Tree], descriptors: bool, report: &mut Confinement) {
    let (own, plain): (Vec<&Tree>, Vec<&Tree>) = trees.iter().partition(|tree| tree.is_detached());
    if !own.is_empty() {
        let fixed = own.iter().filter(|tree| tree.is_read_only()).count();
        let words = match (own.len(), fixed) {
            (count, 0) => format!("{count} on own mounts"),
            (count, fixed) => format!("{count} on own mounts, {fixed} read-only"),
        };
        report.holds(Measure::Trees, format!("trees ({words})"));
    }
    if !plain.is_empty() {
        let reason = format!("own mounts of trees ({})", plain.len());
        report.lacks(Measure::Trees, reason);
    }
    if !descriptors && !own.is_empty() {
        report.lacks(Measure::Trees, "own mount of /proc/self/fd");
    }
    for tree in own {
        if let Some(error) = tree.attributes_missing() {
            let what = match tree.is_read_only() {
                true => "read-only mount without devices",
                false => "mount without devices",
            };
            report.lacks(Measure::Trees, format!("{what} ({error})"));
        }
    }
}
