//! Open files: flags, what their file system can do, and what is done to one
//! besides reading and writing, which the caller does itself.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, OFlags, SeekFrom, copy_file_range, fchown, fstat, seek};
use rustix::io::Errno;

use super::Share;
use crate::calls::close;
use crate::credentials::WithoutFsetid;
use crate::handles::{Handle, Open, OpenFile, Opened, Traits};
use crate::mounts::Mount;
use crate::table::{NodeId, Permit};

/// The half of O_TMPFILE that is not O_DIRECTORY.
const UNNAMED: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// All that a guest may ask for. O_CREAT, O_EXCL, O_NOCTTY, O_NOFOLLOW and
/// O_NONBLOCK mean nothing for a node that is known to be a file; O_NOATIME is
/// the owner's, and the owner is the guest's to know. O_APPEND is of each write:
/// see the crate's own page.
const PASSED: OFlags = OFlags::RDONLY
    .union(OFlags::WRONLY)
    .union(OFlags::RDWR)
    .union(OFlags::TRUNC)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::DIRECT);

impl Share {
    /// Opens a regular file. With `kill_suid_gid` O_TRUNC takes setuid and
    /// setgid away.
    ///
    /// # Errors
    /// The host's; EISDIR, ELOOP or EACCES for what is no regular file.
    pub fn open_file(
        &self,
        node: NodeId,
        flags: i32,
        kill_suid_gid: bool,
    ) -> Result<Opened, Errno> {
        let node = self.nodes.get(node)?;
        if node.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        if flags & libc::O_DIRECTORY != 0 {
            return Err(Errno::NOTDIR);
        }
        let wanted = self.open_flags(flags)?;
        if wanted.contains(OFlags::TRUNC) {
            self.drop_capabilities(&node)?;
        }
        let permit = self.handles.permit()?;
        let file = {
            let cuts = kill_suid_gid && wanted.contains(OFlags::TRUNC);
            let _less = WithoutFsetid::when(cuts)?;
            self.reopen(&node, wanted)?
        };
        self.add_file(file, permit, node.id, wanted, node.mount)
    }

    /// A file by the handle that a guest gives.
    ///
    /// # Errors
    /// EBADF.
    pub fn file(&self, handle: Handle) -> Result<Arc<OpenFile>, Errno> {
        self.handles.file(handle)
    }

    /// Takes a handle back. The file is closed with the last that uses it.
    ///
    /// # Errors
    /// EBADF.
    pub fn close_file(&self, handle: Handle) -> Result<(), Errno> {
        self.handles.file(handle)?;
        drop(self.handles.remove(handle)?);
        Ok(())
    }

    /// Takes setuid and setgid from a file, as the kernel does for a write by
    /// somebody without CAP_FSETID. To be called before such a write that is done
    /// by a thread, or a ring, that has it. security.capability goes with any
    /// write.
    ///
    /// # Errors
    /// The host's.
    pub fn kill_privileges(&self, handle: Handle) -> Result<(), Errno> {
        self.kill_privileges_of(&*self.handles.file(handle)?)
    }

    /// The same for a file that was looked up before.
    ///
    /// # Errors
    /// The host's.
    pub fn kill_privileges_of(&self, file: &OpenFile) -> Result<(), Errno> {
        self.writable()?;
        if !Self::keeps_suid() {
            // The kernel will do it at the write.
            return Ok(());
        }
        let mode = fstat(file)?.st_mode;
        let group = libc::S_ISGID | libc::S_IXGRP;
        if mode & libc::S_ISUID != 0 || mode & group == group {
            // A change of owner to none: takes both bits under the inode's lock
            // (fs/open.c, chown_common), which reading and setting a mode would
            // not.
            fchown(file, None, None)?;
        }
        Ok(())
    }

    /// Somebody in the guest closes an open file, which others may go on using.
    /// A file system that is served from elsewhere writes back what it has of it;
    /// where neither the root nor what is below it is on one of these there is
    /// nothing to do for anybody.
    ///
    /// # Errors
    /// ENOSYS where no file needs it, the host's, EBADF.
    pub fn flush(&self, handle: Handle) -> Result<(), Errno> {
        if !self.nodes.root_waits() && !self.options.elsewhere {
            return Err(Errno::NOSYS);
        }
        let file = self.handles.file(handle)?;
        if file.traits.waits {
            // Closing a copy is what has it written back, and some say what went wrong then
            // and never again. By fcntl, which a confined server may call.
            close(rustix::io::fcntl_dupfd_cloexec(&*file, 0)?)?;
        }
        Ok(())
    }

    /// The next hole or data from `offset` on.
    ///
    /// # Errors
    /// The host's; ENXIO beyond the end, EINVAL for another `whence`.
    pub fn seek(&self, handle: Handle, offset: u64, whence: i32) -> Result<u64, Errno> {
        self.seek_in(&*self.handles.file(handle)?, offset, whence)
    }

    /// The same in a file that was looked up before.
    ///
    /// # Errors
    /// As [`seek`](Self::seek).
    pub fn seek_in(&self, file: &OpenFile, offset: u64, whence: i32) -> Result<u64, Errno> {
        within(offset, 0)?;
        // Moves the file's position, which nobody uses.
        match whence {
            libc::SEEK_DATA => seek(file, SeekFrom::Data(offset)),
            libc::SEEK_HOLE => seek(file, SeekFrom::Hole(offset)),
            _ => Err(Errno::INVAL),
        }
    }

    /// Copies between two open files on the host; as many bytes as it says.
    ///
    /// # Errors
    /// The host's.
    pub fn copy_range(
        &self,
        from: Handle,
        from_offset: u64,
        to: Handle,
        to_offset: u64,
        len: u64,
    ) -> Result<u64, Errno> {
        self.writable()?;
        let (from, to) = (self.handles.file(from)?, self.handles.file(to)?);
        within(from_offset, len)?;
        within(to_offset, len)?;
        let (mut from_offset, mut to_offset) = (from_offset, to_offset);
        self.drop_capabilities_of(&to)?;
        let copied = copy_file_range(
            &*from,
            Some(&mut from_offset),
            &*to,
            Some(&mut to_offset),
            len as usize,
        )?;
        Ok(copied as u64)
    }

    /// A guest's flags as we open with them.
    pub(super) fn open_flags(&self, flags: i32) -> Result<OFlags, Errno> {
        if flags & (libc::O_PATH | UNNAMED) != 0 || flags & libc::O_ACCMODE == libc::O_ACCMODE {
            return Err(Errno::INVAL);
        }
        let mut wanted = OFlags::from_bits_retain(flags as u32) & PASSED;
        if self.options.read_only && wanted.intersects(OFlags::RWMODE | OFlags::TRUNC) {
            return Err(Errno::ROFS);
        }
        if !self.options.direct_io {
            wanted.remove(OFlags::DIRECT);
        }
        if self.writeback.load(Ordering::Relaxed) && wanted.contains(OFlags::WRONLY) {
            wanted.remove(OFlags::WRONLY);
            wanted |= OFlags::RDWR;
        }
        Ok(wanted)
    }

    /// Gives an open file a number.
    pub(super) fn add_file(
        &self,
        file: OwnedFd,
        permit: Permit,
        node: NodeId,
        flags: OFlags,
        mount: Arc<Mount>,
    ) -> Result<Opened, Errno> {
        let file = Self::open_of(file, permit, node, flags, mount);
        let handle = self.handles.add(Open::File(file.clone()), flags.bits())?;
        Ok(Opened { handle, file })
    }

    /// What has to be known of an open file.
    pub(super) fn open_of(
        file: OwnedFd,
        permit: Permit,
        node: NodeId,
        flags: OFlags,
        mount: Arc<Mount>,
    ) -> Arc<OpenFile> {
        let direct = flags.contains(OFlags::DIRECT);
        let readable = !flags.contains(OFlags::WRONLY);
        let reads = readable && mount.reads_without_waiting(file.as_fd());
        let writable = flags.intersects(OFlags::RWMODE);
        let traits = Traits {
            readable,
            writable,
            direct,
            reads_without_waiting: reads,
            // ext4 takes the flag for direct writes and refuses it for others.
            writes_without_waiting: writable
                && match direct {
                    true => reads || mount.are_reads_known_not_to_wait(),
                    false => mount.writes_without_waiting(),
                },
            waits: mount.waits(),
        };
        Arc::new(OpenFile {
            file,
            _permit: permit,
            node,
            mount,
            traits,
        })
    }
}

/// EINVAL for what ends beyond the largest offset a file has.
fn within(offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(Errno::INVAL),
    }
}
