//! Nodes that a predecessor had: put into the table as they were written down,
//! and found again when somebody asks for one, by handle or by name below the
//! root. A file is the same one if device, inode number, kind and, where its
//! file system says it, the time of its making are.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, fstatfs, openat2, statx};
use rustix::io::Errno;

use super::{Found, Nodes};
use crate::attributes::{WANTED, born, identity, kind};
use crate::mounts::OVERLAY;
use crate::share::CONFINED;
use crate::state::{Spot, State, Stored};
use crate::table::{Held, Hold, Identity, NodeId, Record};

/// The deepest that a node is looked for.
const DEEPEST: usize = 1 << 14;

impl Nodes {
    /// Writes down from now on what a successor needs.
    pub(crate) fn remember(&mut self, state: Arc<State>) {
        self.table.remember(state);
    }

    /// Knows all nodes that a predecessor had. Few are opened. How many there are.
    pub(crate) fn put_back(&self, state: &State) -> u32 {
        let mut elsewhere = Vec::new();
        for (index, stored) in state.stored() {
            if self.put_back_one(&stored) {
                if stored.mount != 0 {
                    elsewhere.push(stored);
                }
            } else {
                state.clear_node(index);
            }
        }
        self.table.put_back_all(|shard| state.generation(shard));
        // Most are at their places from the beginning.
        self.crowded.store(true, Ordering::Relaxed);
        self.settle_moves(state.take_moves());
        state.clear_moves();
        self.find_mounts(&elsewhere);
        self.table.len()
    }

    fn put_back_one(&self, stored: &Stored) -> bool {
        let root = &self.root;
        let here = stored.mount == 0 && stored.device == root.identity.device;
        let handle = stored.handle.as_ref();
        let handle = handle.filter(|_| here && root.mount.has_handles());
        let record = Record {
            identity: Identity {
                // Of other mounts it is not known yet.
                mount: if here { root.identity.mount } else { 0 },
                device: stored.device,
                ino: stored.ino,
            },
            kind: stored.kind,
            mount: root.mount.clone(),
            hold: match handle {
                Some(handle) => Hold::Handle(Arc::new(handle.clone())),
                None => Hold::Place,
            },
        };
        self.table.put_back(stored.id, stored.lookups, record)
    }

    /// Finds out of nodes that were being moved whether they were. One may be
    /// below another.
    fn settle_moves(&self, moves: Vec<(NodeId, NodeId, CString)>) {
        let mut left = moves;
        for _ in 0..=left.len() {
            left.retain(|(node, parent, name)| {
                // A handle leads there anyway, and the name is for the next time.
                let record = self.table.get(*node);
                let lost = record.is_some_and(|record| matches!(record.hold, Hold::Place));
                if lost && self.get(*node).is_ok() {
                    return false;
                }
                let spot = Spot {
                    parent: *parent,
                    name,
                };
                !self.is_there(*node, spot)
            });
            if left.is_empty() {
                break;
            }
        }
    }

    /// Whether the node is there, which is then written down.
    fn is_there(&self, node: NodeId, spot: Spot<'_>) -> bool {
        let Some(record) = self.table.get(node) else {
            return false;
        };
        let Ok(parent) = self.get(spot.parent) else {
            return false;
        };
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let Ok(stat) = statx(&parent, spot.name, flags, WANTED) else {
            return false;
        };
        let is = identity(&stat);
        let same = (is.device, is.ino) == (record.identity.device, record.identity.ino)
            && self.still(node, &stat, parent.as_fd());
        if same && let Some(state) = self.table.state() {
            // The move stands beside it until all are settled.
            state.put_spot(node.index(), spot);
        }
        same
    }

    /// Finds mounts below the root again, by any node on each: lookups know nodes
    /// by mount, and inode numbers are mixed with the mount's.
    pub(super) fn find_mounts(&self, elsewhere: &[Stored]) {
        let mut known = Vec::new();
        for stored in elsewhere {
            if known.iter().any(|(number, _, _)| *number == stored.mount) {
                continue;
            }
            if let Ok(found) = self.get(stored.id) {
                known.push((stored.mount, found.identity, found.mount));
            }
        }
        for stored in elsewhere {
            let mount = known
                .iter()
                .find(|(number, is, _)| *number == stored.mount && is.device == stored.device);
            if let Some((_, is, mount)) = mount {
                let identity = Identity {
                    ino: stored.ino,
                    ..*is
                };
                self.table.place_on(stored.id, identity, mount);
            }
        }
    }

    /// Finds a node at its place again, with the directories above it.
    pub(super) fn regain(&self, id: NodeId) -> Result<Found, Errno> {
        let mut way = Vec::new();
        let mut at = id;
        let mut found = loop {
            if at == NodeId::ROOT {
                break self.root.clone();
            }
            let record = self.table.get(at).ok_or(Errno::STALE)?;
            if !matches!(record.hold, Hold::Place) {
                break self.get(at)?;
            }
            let (parent, name) = self.table.spot(at).ok_or(Errno::STALE)?;
            way.push((at, record, name));
            if way.len() > DEEPEST {
                return Err(Errno::STALE);
            }
            at = parent;
        };
        while let Some((id, record, name)) = way.pop() {
            found = self.regain_in(&found, id, record, &name)?;
        }
        Ok(found)
    }

    fn regain_in(
        &self,
        parent: &Found,
        id: NodeId,
        record: Record,
        name: &CStr,
    ) -> Result<Found, Errno> {
        if parent.kind != FileType::Directory {
            return Err(Errno::STALE);
        }
        let permit = self.permit()?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat2(parent, name, flags, Mode::empty(), CONFINED);
        let file = file.map_err(|errno| match errno {
            Errno::NFILE | Errno::MFILE | Errno::NOMEM | Errno::IO => errno,
            _ => Errno::STALE,
        })?;
        let stat = statx(&file, c"", AtFlags::EMPTY_PATH, WANTED)?;
        let is = identity(&stat);
        if (is.device, is.ino) != (record.identity.device, record.identity.ino)
            || !self.still(id, &stat, file.as_fd())
        {
            return Err(Errno::STALE);
        }
        if let Some(number) = self.table.mount_number(id) {
            self.mounts.number(&is, number);
        }
        let mount = self.mounts.of(&is, file.as_fd(), record.kind, &self.proc);
        let held = Held::new(file, Some(permit));
        self.table.found(id, is, &mount, &held);
        Ok(Found {
            id,
            identity: is,
            kind: record.kind,
            mount,
            held,
        })
    }

    /// Whether a file that has a node's device and inode number is the node's, by its kind and the
    /// time of its making, which of some files is another by now. `near` is on the same file system.
    pub(super) fn still(&self, id: NodeId, stat: &Statx, near: BorrowedFd<'_>) -> bool {
        if self.table.still(id, kind(stat), born(stat)) {
            return true;
        }
        let overlay = fstatfs(near).is_ok_and(|figures| figures.f_type == OVERLAY);
        let same = overlay && self.table.still(id, kind(stat), 0);
        if same {
            self.table.set_born(id, born(stat));
        }
        same
    }

    /// The state, if there is one.
    pub(crate) fn state(&self) -> Option<&Arc<State>> {
        self.table.state()
    }
}
