//! The share: what is common to all operations, lookups and attributes. The
//! rest is in the files of this folder, by kind.

mod change;
mod create;
pub(crate) mod directories;
mod files;
mod hand_over;
pub(crate) mod locks;
mod namespace;
pub(crate) mod restore;
mod unopened;
pub(crate) mod xattrs;

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, fstatvfs, openat, openat2,
    readlinkat, statx,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::thread::CapabilitySet;

use crate::attributes::{WANTED, born, identity, kind};
use crate::calls;
use crate::credentials::{As, Caller};
use crate::handles::{Handle, Handles};
use crate::mounts::Mount;
use crate::name;
use crate::nodes::{Found, Nodes};
use crate::state::Spot;
use crate::table::{Budget, Identity, NodeId, Permit};
use crate::{Attributes, Entry, FileSystem, ShareError, ShareOptions};
use locks::Owners;
use unopened::Unopened;

/// How often a call is made again that raced with a change on the host.
const ATTEMPTS: usize = 16;

/// Nothing leads out of the directory that a name is looked up in.
pub(crate) const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);

/// The directory that a name is looked up in.
#[derive(Debug, Clone, Copy)]
struct Within {
    node: NodeId,
    identity: Identity,
}

impl Within {
    fn of(found: &Found) -> Self {
        Self {
            node: found.id,
            identity: found.identity,
        }
    }
}

/// A directory tree that is passed on. One serves all threads.
#[derive(Debug)]
pub struct Share {
    nodes: Nodes,
    handles: Handles,
    unopened: Unopened,
    owners: Owners,
    /// What security.capability is called, if a map has another name for it.
    capability: Option<CString>,
    options: ShareOptions,
    writeback: AtomicBool,
    /// For directories that are being read.
    batches: Arc<Budget>,
}

impl Share {
    /// Says whether the tree below `root` can be passed on, a directory open in
    /// whatever way. Keeps nothing open.
    ///
    /// # Errors
    /// [`ShareError`] if not.
    pub fn check(root: BorrowedFd<'_>, options: &ShareOptions) -> Result<(), ShareError> {
        options.check()?;
        let stat = statx(root, c"", AtFlags::EMPTY_PATH, WANTED)
            .map_err(|errno| ShareError::Root(errno.into()))?;
        if kind(&stat) != FileType::Directory {
            return Err(ShareError::NotADirectory);
        }
        Self::check_openat2(root)
    }

    fn check_openat2(root: BorrowedFd<'_>) -> Result<(), ShareError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let opened = openat2(root, c".", flags, Mode::empty(), CONFINED);
        opened.map(drop).map_err(|errno| match errno {
            Errno::NOSYS | Errno::PERM => ShareError::NoOpenat2(errno.into()),
            _ => ShareError::Root(errno.into()),
        })
    }

    /// The directory of this process's own descriptors, `/proc/self/fd`, open
    /// for [`open_with`](Self::open_with).
    ///
    /// # Errors
    /// [`ShareError::NoProc`].
    pub fn own_descriptors() -> Result<OwnedFd, ShareError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, c"/proc/self/fd", flags, Mode::empty())
            .map_err(|errno| ShareError::NoProc(errno.into()))
    }

    /// Passes the tree below `root` on. See the crate's own page for when to
    /// call it.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn open(root: OwnedFd, options: ShareOptions) -> Result<Self, ShareError> {
        Self::check(root.as_fd(), &options)?;
        Self::open_with(root, Self::own_descriptors()?, options)
    }

    /// As [`open`](Self::open), in a process that reaches no path any more and
    /// has opened its [`own_descriptors`](Self::own_descriptors) before; root and
    /// options have passed [`check`](Self::check). One open
    /// `/proc/self/fd` does for many shares, as duplicates.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn open_with(
        root: OwnedFd,
        descriptors: OwnedFd,
        options: ShareOptions,
    ) -> Result<Self, ShareError> {
        let nodes = Nodes::new(&root, descriptors, &options)?;
        Self::check_openat2(nodes.root().as_fd())?;
        Ok(Self {
            nodes,
            handles: Handles::new(options.open_files),
            unopened: Unopened::new(options.open_files),
            owners: Owners::default(),
            capability: Self::stored_capability(&options),
            options,
            writeback: AtomicBool::new(false),
            batches: Budget::new(directories::BATCHES),
        })
    }

    /// Whether the guest caches writes, from the next open on.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Relaxed);
    }

    /// What it was made with.
    pub fn options(&self) -> &ShareOptions {
        &self.options
    }

    /// The tree is on a file system that is served by another process or machine:
    /// every call may take long.
    pub fn waits(&self) -> bool {
        self.nodes.root_waits()
    }

    /// Descriptors that nodes have, nodes, and open files, for statistics.
    pub fn counts(&self) -> (u32, u32, u32) {
        let (descriptors, nodes) = self.nodes.counts();
        (descriptors, nodes, self.handles.count())
    }

    /// Who `name` is in `parent`.
    ///
    /// # Errors
    /// The host's; ESTALE for an unknown parent, ENFILE at a limit.
    pub fn lookup(&self, parent: NodeId, name: &CStr) -> Result<Entry, Errno> {
        let name = name::check(name)?;
        let parent = self.directory(parent)?;
        self.lookup_in(parent.as_fd(), Within::of(&parent), name, None)
    }

    /// Takes `count` lookups of a node back. The root is never forgotten.
    pub fn forget(&self, node: NodeId, count: u64) {
        self.nodes.forget(node, count);
        self.unopened.forget(node);
    }

    /// Nobody is there any more: every node but the root and every handle is
    /// gone. I/O that is under way keeps its file to its end.
    pub fn reset(&self) {
        self.handles.clear();
        self.unopened.clear();
        self.owners.clear();
        self.nodes.clear();
        self.set_writeback(false);
    }

    /// Attributes of the file that is open as `handle`, else of a node.
    ///
    /// # Errors
    /// The host's; ESTALE, EBADF.
    pub fn attributes(&self, node: NodeId, handle: Option<Handle>) -> Result<Attributes, Errno> {
        let Some(handle) = handle else {
            return self.stat(&self.nodes.get(node)?);
        };
        let file = self.handles.file(handle)?;
        let stat = statx(&*file, c"", AtFlags::EMPTY_PATH, WANTED)?;
        Ok(self.shown(&stat, &file.mount))
    }

    /// Where a symbolic link points to.
    ///
    /// # Errors
    /// EINVAL for anything else.
    pub fn read_link(&self, node: NodeId) -> Result<Vec<u8>, Errno> {
        let node = self.nodes.get(node)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        Ok(readlinkat(&node, c"", Vec::new())?.into_bytes())
    }

    /// Whether the caller may do what `mask` says (R_OK, W_OK, X_OK).
    ///
    /// # Errors
    /// EACCES, or EROFS.
    pub fn access(&self, caller: &Caller, node: NodeId, mask: i32) -> Result<(), Errno> {
        if mask & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 {
            return Err(Errno::INVAL);
        }
        let node = self.nodes.get(node)?;
        if mask & libc::W_OK != 0 && self.options.read_only {
            return Err(Errno::ROFS);
        }
        let _caller = self.act_as(caller, false)?;
        calls::access(node.as_fd(), mask)
    }

    /// Figures of a node's file system.
    ///
    /// # Errors
    /// The host's.
    pub fn statistics(&self, node: NodeId) -> Result<FileSystem, Errno> {
        let figures = fstatvfs(&self.nodes.get(node)?)?;
        let size = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        Ok(FileSystem {
            blocks: figures.f_blocks,
            blocks_free: figures.f_bfree,
            blocks_available: figures.f_bavail,
            files: figures.f_files,
            files_free: figures.f_ffree,
            block_size: size(figures.f_bsize),
            name_length: size(figures.f_namemax),
            fragment_size: size(figures.f_frsize),
        })
    }

    /// EROFS where nothing may change.
    fn writable(&self) -> Result<(), Errno> {
        match self.options.read_only {
            true => Err(Errno::ROFS),
            false => Ok(()),
        }
    }

    fn directory(&self, node: NodeId) -> Result<Found, Errno> {
        let node = self.nodes.get(node)?;
        match node.kind {
            FileType::Directory => Ok(node),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// The thread as this caller, in ids of the host.
    fn act_as(&self, caller: &Caller, override_access: bool) -> Result<As, Errno> {
        let (uids, gids) = (&self.options.uid_map, &self.options.gid_map);
        // What the kernel says of an id that an idmapped mount has no other for.
        let uid = uids.to_host(caller.uid).ok_or(Errno::OVERFLOW)?;
        let gid = gids.to_host(caller.gid).ok_or(Errno::OVERFLOW)?;
        let group = caller.group.and_then(|group| gids.to_host(group));
        As::caller(uid, gid, group, override_access)
    }

    fn stat(&self, node: &Found) -> Result<Attributes, Errno> {
        let stat = statx(node, c"", AtFlags::EMPTY_PATH, WANTED)?;
        Ok(self.shown(&stat, &node.mount))
    }

    /// Attributes as the guest is to see them.
    fn shown(&self, stat: &Statx, mount: &Mount) -> Attributes {
        let mut attributes = Attributes::of(stat);
        attributes.ino = mount.shown(attributes.ino);
        attributes.uid = self.options.uid_map.to_guest(attributes.uid);
        attributes.gid = self.options.gid_map.to_guest(attributes.gid);
        attributes
    }

    /// The entry of `name`, which is checked, in a directory of that identity.
    ///
    /// No AT_STATX_DONT_SYNC: local file systems ignore it, and with it one on
    /// the network would show the size a file had when it was seen first.
    fn lookup_in(
        &self,
        parent: BorrowedFd<'_>,
        within: Within,
        name: &CStr,
        mut permit: Option<Permit>,
    ) -> Result<Entry, Errno> {
        let spot = Some(Spot {
            parent: within.node,
            name,
        });
        for _ in 0..ATTEMPTS {
            let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
            let stat = statx(parent, name, flags, WANTED)?;
            if let Some((node, mount)) = self.nodes.known(&identity(&stat), spot) {
                return Ok(self.entry(node, &mount, &stat, &within.identity));
            }
            let right = match permit.take() {
                Some(right) => right,
                None => self.nodes.permit()?,
            };
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = match openat2(parent, name, flags, Mode::empty(), CONFINED) {
                Ok(file) => file,
                // Moved away while it was looked at: who is there now?
                Err(Errno::XDEV | Errno::AGAIN) => {
                    permit = Some(right);
                    continue;
                }
                Err(errno) => return Err(errno),
            };
            return self.intern(file, right, &within.identity, spot);
        }
        Err(Errno::AGAIN)
    }

    /// A lookup of what an O_PATH descriptor names.
    fn intern(
        &self,
        file: OwnedFd,
        permit: Permit,
        within: &Identity,
        spot: Option<Spot<'_>>,
    ) -> Result<Entry, Errno> {
        let stat = statx(&file, c"", AtFlags::EMPTY_PATH, WANTED)?;
        let what = (identity(&stat), kind(&stat), born(&stat));
        let (node, mount) = self.nodes.intern(file, permit, what, spot)?;
        Ok(self.entry(node, &mount, &stat, within))
    }

    fn entry(&self, node: NodeId, mount: &Mount, stat: &Statx, within: &Identity) -> Entry {
        let identity = identity(stat);
        let elsewhere = (identity.mount, identity.device) != (within.mount, within.device);
        Entry {
            node,
            generation: node.generation().into(),
            attributes: self.shown(stat, mount),
            submount: elsewhere && kind(stat) == FileType::Directory,
            // Not by the device: an overlay's files have others than its directories.
            crosses: identity.mount != within.mount,
        }
    }

    /// Opens what a node's descriptor names, for real. Only regular files and
    /// directories: opening a fifo waits, opening a device does something.
    fn reopen(&self, node: &Found, flags: OFlags) -> Result<OwnedFd, Errno> {
        match node.kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        self.reopen_fd(node.as_fd(), flags)
    }

    fn reopen_fd(&self, file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        openat(
            self.nodes.proc(),
            DecInt::from_fd(file),
            flags,
            Mode::empty(),
        )
    }

    /// Whether this thread keeps setuid and setgid bits that others would lose.
    fn keeps_suid() -> bool {
        rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(CapabilitySet::FSETID))
    }
}
