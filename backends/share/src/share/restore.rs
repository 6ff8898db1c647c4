//! A share that goes on where a predecessor was killed, and what its caller has
//! to know to do the predecessor's last requests again.

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, statx};
use rustix::io::Errno;

use super::{Share, Within};
use crate::attributes::{WANTED, born, changed, identity, kind};
use crate::handles::{Handle, Open};
use crate::name;
use crate::nodes::Found;
use crate::state::{OpenRecord, State};
use crate::table::NodeId;
use crate::{Caller, Entry};

/// What a share found of its predecessor's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restored {
    /// Nodes that the guest knows. Each is looked for when it is used.
    pub nodes: u32,
    /// Files and directories that are open again.
    pub open: u32,
    /// Those that are not to be had any more.
    pub lost: u32,
}

/// Who has a name at the moment; no lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Glimpse {
    /// Device and inode number.
    pub identity: (u64, u64),
    /// Kind, as in a mode.
    pub kind: u32,
    /// When it was made, in nanoseconds; 0 where nobody knows.
    pub born: u64,
    /// When it changed last.
    pub changed: u64,
}

impl Share {
    /// Writes down in `state` what a successor needs, and goes on with what a
    /// predecessor wrote there. Called before anything else is.
    pub fn remember(self, state: State) -> (Self, Restored) {
        let share = self.keep(state);
        let restored = share.recall();
        (share, restored)
    }

    /// Writes down in `state` what a successor needs, where a predecessor that
    /// lives does so until [`unpack`](Self::unpack) is called.
    #[must_use]
    pub fn keep(mut self, state: State) -> Self {
        let state = Arc::new(state);
        self.nodes.remember(Arc::clone(&state));
        self.handles.remember(state);
        self
    }

    fn recall(&self) -> Restored {
        let Some(state) = self.state() else {
            return Restored::default();
        };
        if state.session() == 0 {
            // It was killed while it forgot all of it, or had nothing.
            state.clear();
        }
        let nodes = self.nodes.put_back(state);
        let mut restored = Restored {
            nodes,
            ..Restored::default()
        };
        let mut opened = Vec::new();
        for (_, record) in state.stored_open() {
            let open = self.open_again(record).ok();
            match &open {
                Some(_) => restored.open += 1,
                None => restored.lost += 1,
            }
            opened.push((record, open));
        }
        self.handles.put_back(opened);
        restored
    }

    /// What is written down, where something is.
    pub fn state(&self) -> Option<&State> {
        self.nodes.state().map(AsRef::as_ref)
    }

    fn open_again(&self, record: OpenRecord) -> Result<Open, Errno> {
        if record.directory {
            let directory = self.opened_dir(record.node)?;
            return Ok(Open::Directory(Arc::new(directory)));
        }
        let node = self.nodes.get(record.node)?;
        if node.kind != FileType::RegularFile {
            return Err(Errno::STALE);
        }
        let permit = self.handles.permit()?;
        // It was cut off when it was opened.
        let flags = OFlags::from_bits_retain(record.flags) - OFlags::TRUNC;
        let file = self.reopen(&node, flags)?;
        let file = Self::open_of(file, permit, node.id, flags, node.mount);
        Ok(Open::File(file))
    }

    /// The entry of a node that a lookup or a creation in `parent` was answered
    /// with before; no lookup more.
    ///
    /// # Errors
    /// ESTALE, or the host's.
    pub fn entry_again(&self, parent: NodeId, node: NodeId) -> Result<Entry, Errno> {
        let within = Within::of(&self.nodes.get(parent)?);
        let node = self.nodes.get(node)?;
        let stat = statx(&node, c"", AtFlags::EMPTY_PATH, WANTED)?;
        Ok(self.entry(node.id, &node.mount, &stat, &within.identity))
    }

    /// Whether this is open.
    pub fn is_open(&self, handle: Handle) -> bool {
        self.handles.get(handle).is_ok()
    }

    /// Who has a name in a directory.
    ///
    /// # Errors
    /// The host's; ENOENT for nobody.
    pub fn glimpse(&self, parent: NodeId, name: &CStr) -> Result<Glimpse, Errno> {
        let name = name::check(name)?;
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        self.glimpsed(&self.directory(parent)?, name, flags)
    }

    /// The same of a node.
    ///
    /// # Errors
    /// The host's; ESTALE.
    pub fn glimpse_node(&self, node: NodeId) -> Result<Glimpse, Errno> {
        self.glimpsed(&self.nodes.get(node)?, c"", AtFlags::EMPTY_PATH)
    }

    fn glimpsed(&self, at: &Found, name: &CStr, flags: AtFlags) -> Result<Glimpse, Errno> {
        let stat = statx(at, name, flags, WANTED)?;
        let is = identity(&stat);
        // The clock of another machine is not ours.
        let here = !at.mount.waits();
        Ok(Glimpse {
            identity: (is.device, is.ino),
            kind: kind(&stat).as_raw_mode(),
            born: if here { born(&stat) } else { 0 },
            changed: if here { changed(&stat) } else { 0 },
        })
    }

    /// The bytes of an open file from `offset` on, as many as there are, up to
    /// the buffer's.
    ///
    /// # Errors
    /// The host's; EBADF where it cannot be read at all.
    pub fn read_again(&self, node: NodeId, offset: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
        let node = self.nodes.get(node)?;
        let file = self.reopen(&node, OFlags::RDONLY)?;
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            match rustix::io::pread(&file, &mut bytes[done..], at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    /// Opens a file that a creation of a predecessor's made, with the flags of
    /// that creation.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_again(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: i32,
    ) -> Result<(Entry, crate::Opened), Errno> {
        let flags = flags & !(libc::O_EXCL | libc::O_TRUNC);
        self.create(caller, parent, name, flags, 0, 0, false)
    }
}

#[cfg(test)]
mod tests;
