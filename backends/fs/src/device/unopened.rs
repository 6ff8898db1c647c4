//! Guests that open nothing. A directory that cannot change, and of which the
//! guest keeps all it has seen, need not hear of every open and close: OPEN and
//! OPENDIR are answered with ENOSYS once, and from then on Linux sends neither
//! them nor RELEASE, and names nodes with handle 0. A file that is read again
//! from the guest's cache then costs no request at all.
//!
//! The price: an open for writing succeeds in a guest that has mounted the
//! directory for writing, and the write is what fails with EROFS. O_TRUNC is
//! still told, as a change of size.

use std::ffi::CStr;
use std::sync::Arc;

use pericarp_share::{Errno, Handle, NodeId, OpenDirectory, OpenFile};

use super::{Cache, FsDevice};
use crate::wire::{ENTRY, Reply, feature, open};

/// Both or neither: one answer for files and directories.
pub(super) const OPENS_NOTHING: u64 = feature::NO_OPEN | feature::NO_OPENDIR;

/// What both sides agreed on, without what goes with nothing else of it.
pub(super) fn settled(agreed: u64) -> u64 {
    if agreed & OPENS_NOTHING == OPENS_NOTHING {
        agreed
    } else {
        agreed & !OPENS_NOTHING
    }
}

impl FsDevice {
    /// A guest that can may open nothing. O_DIRECT and locks are those of an open file;
    /// where a call may wait a read must not begin with an open on the worker.
    pub(super) fn could_open_nothing(&self) -> bool {
        let options = self.share.options();
        self.settings.cache == Cache::Always
            && options.read_only
            && !options.direct_io
            && !options.locks
            && !self.share.waits()
    }

    pub(super) fn opens_nothing(&self) -> bool {
        self.session.has(OPENS_NOTHING)
    }

    /// The file of a request: by its handle, or by its node.
    pub(super) fn file(&self, node: u64, handle: u64) -> Result<Arc<OpenFile>, Errno> {
        if handle == 0 && self.opens_nothing() {
            return self.share.unopened_file(NodeId(node));
        }
        self.share.file(Handle(handle))
    }

    /// The directory of a request.
    pub(super) fn directory(&self, node: u64, handle: u64) -> Result<Arc<OpenDirectory>, Errno> {
        if handle == 0 && self.opens_nothing() {
            return self.share.unopened_directory(NodeId(node));
        }
        self.share.open_directory(Handle(handle))
    }

    /// CREATE of a name that is there after all. A handle would never be given
    /// back: such a guest sends no RELEASE.
    pub(super) fn create_nothing(
        &self,
        parent: NodeId,
        name: &CStr,
        flags: i32,
    ) -> Result<Reply, Errno> {
        let entry = self
            .share
            .lookup(parent, name)
            .map_err(|errno| match errno {
                Errno::NOENT => Errno::ROFS,
                other => other,
            })?;
        let refusal = if flags & libc::O_EXCL != 0 {
            Some(Errno::EXIST)
        } else if flags & (libc::O_ACCMODE | libc::O_TRUNC) != libc::O_RDONLY {
            Some(Errno::ROFS)
        } else {
            None
        };
        if let Some(errno) = refusal {
            self.share.forget(entry.node, 1);
            return Err(errno);
        }
        let mut reply = self.entry(&entry);
        debug_assert_eq!(reply.0.len(), ENTRY);
        reply.u64(0).u32(open::KEEP_CACHE).u32(0);
        Ok(reply)
    }
}
