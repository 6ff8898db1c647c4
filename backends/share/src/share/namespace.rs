//! Names: taking them away, moving them, giving a file another. Permissions are
//! the guest's kernel's to check; the names, where they lead, and that the share
//! may be written to are ours.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, RenameFlags, linkat, renameat_with, unlinkat};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::{Share, Within};
use crate::Entry;
use crate::name;
use crate::state::Spot;
use crate::table::NodeId;

impl Share {
    /// Takes the name of anything but a directory away.
    ///
    /// # Errors
    /// The host's.
    pub fn unlink(&self, parent: NodeId, name: &CStr) -> Result<(), Errno> {
        let name = name::check(name)?;
        self.writable()?;
        self.take_name(parent, name, AtFlags::empty())
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// The host's.
    pub fn remove_dir(&self, parent: NodeId, name: &CStr) -> Result<(), Errno> {
        let name = name::check(name)?;
        self.writable()?;
        self.take_name(parent, name, AtFlags::REMOVEDIR)
    }

    fn take_name(&self, parent: NodeId, name: &CStr, flags: AtFlags) -> Result<(), Errno> {
        let parent = self.directory(parent)?;
        let node = self.nodes.to_be_taken_away(&parent, name);
        let taken = unlinkat(&parent, name, flags);
        self.nodes.taken_away(node);
        taken
    }

    /// Moves a name. `flags` are those of `renameat2`; which the host has is its
    /// own affair.
    ///
    /// # Errors
    /// The host's; EINVAL for unknown flags.
    pub fn rename(
        &self,
        parent: NodeId,
        name: &CStr,
        new_parent: NodeId,
        new_name: &CStr,
        flags: u32,
    ) -> Result<(), Errno> {
        let (name, new_name) = (name::check(name)?, name::check(new_name)?);
        self.writable()?;
        // from_bits knows no unknown ones, whatever the host would make of them.
        let all = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let flags = RenameFlags::from_bits_retain(flags);
        if !all.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.directory(parent)?, self.directory(new_parent)?);
        let there = Spot {
            parent: to.id,
            name: new_name,
        };
        let moving = self.nodes.begin_move(&from, name, there);
        let back = match flags.contains(RenameFlags::EXCHANGE) {
            true => {
                let here = Spot {
                    parent: from.id,
                    name,
                };
                self.nodes.begin_move(&to, new_name, here)
            }
            false => None,
        };
        let replaced = self.nodes.to_be_taken_away(&to, new_name);
        let renamed = renameat_with(&from, name, &to, new_name, flags);
        for moving in [moving, back].into_iter().flatten() {
            self.nodes.end_move(moving, renamed.is_ok());
        }
        self.nodes.taken_away(replaced);
        renamed
    }

    /// Gives a file one name more.
    ///
    /// # Errors
    /// The host's; EPERM for a directory.
    pub fn link(&self, node: NodeId, new_parent: NodeId, new_name: &CStr) -> Result<Entry, Errno> {
        let name = name::check(new_name)?;
        self.writable()?;
        let node = self.nodes.get(node)?;
        if node.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let parent = self.directory(new_parent)?;
        let permit = self.nodes.permit()?;
        let linked = linkat(&node, c"", &parent, name, AtFlags::EMPTY_PATH);
        match linked {
            // What the kernel says to those without CAP_DAC_READ_SEARCH.
            Err(Errno::NOENT) => {
                let number = DecInt::from_fd(&node);
                let proc = self.nodes.proc();
                linkat(proc, number, &parent, name, AtFlags::SYMLINK_FOLLOW)?;
            }
            result => result?,
        }
        self.lookup_in(parent.as_fd(), Within::of(&parent), name, Some(permit))
    }
}
