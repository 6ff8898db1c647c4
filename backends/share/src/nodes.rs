//! Nodes with their files: the table, the budget of descriptors, and the calls
//! that turn a descriptor into a handle and back. Called by `share`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, statx};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::attributes::{WANTED, identity, kind};
use crate::calls::handle_of;
use crate::mounts::{Mount, Mounts};
use crate::state::{Noted, Spot};
use crate::table::{Budget, Held, Hold, Identity, Interned, NodeId, Permit, Record, Table};
use crate::{ShareError, ShareOptions};

/// The place of a slot has 28 bits.
const MOST_NODES: u32 = 1 << 27;

/// A node in use: its descriptor stays open as long as this is there.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) id: NodeId,
    pub(crate) identity: Identity,
    pub(crate) kind: FileType,
    pub(crate) mount: Arc<Mount>,
    held: Arc<Held>,
}

impl AsFd for Found {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.as_fd()
    }
}

/// The root and all others.
#[derive(Debug)]
pub(crate) struct Nodes {
    root: Found,
    table: Table,
    budget: Arc<Budget>,
    mounts: Mounts,
    /// `/proc/self/fd`; see the crate's own page.
    proc: OwnedFd,
    /// Most descriptors are taken, or were at some time.
    crowded: AtomicBool,
}

mod hand_over;
mod places;
mod regain;

impl Nodes {
    pub(crate) fn new(
        root: &OwnedFd,
        proc: OwnedFd,
        options: &ShareOptions,
    ) -> Result<Self, ShareError> {
        let refused = |errno: Errno| ShareError::Root(errno.into());
        let stat = statx(root, c"", AtFlags::EMPTY_PATH, WANTED).map_err(refused)?;
        if kind(&stat) != FileType::Directory {
            return Err(ShareError::NotADirectory);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = openat(&proc, DecInt::from_fd(root), flags, Mode::empty())
            .map_err(|errno| ShareError::NoProc(errno.into()))?;
        let mounts = Mounts::new(options.file_handles);
        let identity = identity(&stat);
        let root = Found {
            id: NodeId::ROOT,
            identity,
            kind: FileType::Directory,
            mount: mounts.of(&identity, path.as_fd(), FileType::Directory, &proc),
            held: Held::new(path, None),
        };
        Ok(Self {
            root,
            table: Table::new(options.nodes.min(MOST_NODES)),
            budget: Budget::new(options.descriptors),
            mounts,
            proc,
            crowded: AtomicBool::new(false),
        })
    }

    /// `/proc/self/fd`.
    pub(crate) fn proc(&self) -> &OwnedFd {
        &self.proc
    }

    pub(crate) fn root(&self) -> &Found {
        &self.root
    }

    /// The mount that a file is on.
    pub(crate) fn mount_of(
        &self,
        identity: &Identity,
        file: BorrowedFd<'_>,
        kind: FileType,
    ) -> Arc<Mount> {
        self.mounts.of(identity, file, kind, &self.proc)
    }

    /// Any call on the root's file system may wait for somebody else.
    pub(crate) fn root_waits(&self) -> bool {
        self.root.mount.waits()
    }

    /// Descriptors held now, and nodes there are.
    pub(crate) fn counts(&self) -> (u32, u32) {
        (self.budget.taken(), self.table.len())
    }

    /// A node by the id that a guest gives.
    pub(crate) fn get(&self, id: NodeId) -> Result<Found, Errno> {
        if id == NodeId::ROOT {
            return Ok(self.root.clone());
        }
        let record = self.table.get(id).ok_or(Errno::STALE)?;
        let held = match &record.hold {
            Hold::Place => return self.regain(id),
            Hold::Descriptor(held) => held.clone(),
            Hold::Handle(handle) => {
                let permit = self.permit()?;
                // ENOENT would be said of the name, which nobody asked for.
                let file = record.mount.open(handle).map_err(|errno| match errno {
                    Errno::NOENT => Errno::STALE,
                    other => other,
                })?;
                let held = Held::new(file, Some(permit));
                self.table.promote(id, &held);
                held
            }
        };
        Ok(Found {
            id,
            identity: record.identity,
            kind: record.kind,
            mount: record.mount,
            held,
        })
    }

    /// One lookup more of a node that has a descriptor, seen at this place.
    pub(crate) fn known(
        &self,
        identity: &Identity,
        spot: Option<Spot<'_>>,
    ) -> Option<(NodeId, Arc<Mount>)> {
        self.table.known(identity, spot)
    }

    /// The right to open one descriptor more for a node. Nodes that were not
    /// used for longest lose theirs for it; where none can, ENFILE.
    pub(crate) fn permit(&self) -> Result<Permit, Errno> {
        loop {
            if let Some(permit) = self.budget.take() {
                if self.budget.is_short() {
                    self.crowded.store(true, Ordering::Relaxed);
                }
                return Ok(permit);
            }
            let (id, record) = self.table.oldest().ok_or(Errno::NFILE)?;
            if let Hold::Descriptor(held) = record.hold {
                // A node with neither handle nor place keeps its descriptor from
                // now on and is not asked again.
                match record.mount.handle(held.as_fd()) {
                    Ok(handle) => self.table.demote(id, handle),
                    Err(_) => self.leave(id, &held),
                }
            }
        }
    }

    /// One lookup more of this file, which was made at that time and seen at that
    /// place.
    pub(crate) fn intern(
        &self,
        file: OwnedFd,
        permit: Permit,
        (identity, kind, born): (Identity, FileType, u64),
        spot: Option<Spot<'_>>,
    ) -> Result<(NodeId, Arc<Mount>), Errno> {
        let mount = self.mounts.of(&identity, file.as_fd(), kind, &self.proc);
        let held = Held::new(file, Some(permit));
        let record = Record {
            identity,
            kind,
            mount: mount.clone(),
            hold: Hold::Descriptor(held.clone()),
        };
        let mut noted = Noted {
            spot,
            handle: None,
            born,
            mount: mount.number(),
        };
        if self.table.state().is_some() && mount.has_handles() {
            noted.handle = handle_of(&*held).ok();
        }
        if mount.copies_up()
            && let Some(id) = self.table.find(&identity)
        {
            self.table.set_born(id, born);
        }
        let mut interned = self.table.intern(&record, None, &noted)?;
        if interned == Interned::Compare {
            let handle = handle_of(&*held);
            let handle = handle.as_ref().map_err(|errno| *errno);
            interned = self.table.intern(&record, Some(handle), &noted)?;
        }
        match interned {
            Interned::Node(id) => Ok((id, mount)),
            Interned::Compare => Err(Errno::IO),
        }
    }

    pub(crate) fn forget(&self, id: NodeId, count: u64) {
        self.table.forget(id, count);
    }

    pub(crate) fn clear(&self) {
        self.table.clear();
    }
}
