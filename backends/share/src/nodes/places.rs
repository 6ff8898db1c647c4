//! Nodes that are left to the place where they were seen last when descriptors
//! run out: whether one is there, and what keeps those that are about to lose
//! their place by a guest's own doing. What others do on the host is found out
//! when the node is wanted: it is stale then, as a name would be.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, Mode, OFlags, openat2, statx};
use rustix::io::Errno;

use super::{Found, Nodes};
use crate::attributes::{WANTED, born, identity};
use crate::share::CONFINED;
use crate::state::{Move, Spot};
use crate::table::{Held, Hold, Identity, NodeId};

/// A node deeper than this below one that is open keeps its descriptor: finding
/// out where it is would take too long.
const DEEPEST: usize = 64;

/// A node that is being given another place.
#[derive(Debug)]
pub(crate) struct Moving<'a> {
    node: NodeId,
    to: Spot<'a>,
    written: Option<Move>,
}

/// A directory on the way to a node, open for as long as it is looked at.
#[derive(Debug)]
enum Step {
    Held(Arc<Held>),
    Passing(OwnedFd),
}

impl AsFd for Step {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Held(held) => held.as_fd(),
            Self::Passing(file) => file.as_fd(),
        }
    }
}

impl Nodes {
    /// Leaves a node to its place, if it is there.
    pub(super) fn leave(&self, id: NodeId, held: &Arc<Held>) {
        self.crowded.store(true, Ordering::Relaxed);
        // Who takes the name away meanwhile either has been seen by this look, or
        // sees what was left here: see `taken_away`.
        if self.table.leave(id) && !self.is_in_place(id, held) {
            self.table.keep(id, held);
        }
    }

    pub(super) fn is_in_place(&self, id: NodeId, held: &Arc<Held>) -> bool {
        let (Some(record), Some((parent, name))) = (self.table.look(id), self.table.spot(id))
        else {
            return false;
        };
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let there = self
            .pass_to(parent)
            .and_then(|parent| statx(parent, &*name, flags, WANTED));
        let here = statx(held, c"", AtFlags::EMPTY_PATH, WANTED);
        let (Ok(there), Ok(here)) = (there, here) else {
            return false;
        };
        let is = identity(&here);
        let same = identity(&there) == is && record.identity == is && born(&here) != 0;
        if same {
            // Overlayfs says another time once it has copied a file up.
            self.table.set_born(id, born(&here));
        }
        same
    }

    /// A directory for a moment, without a permit: asking for one is what leads
    /// here. Nothing becomes open for longer by that.
    fn pass_to(&self, directory: NodeId) -> Result<Step, Errno> {
        let mut way: Vec<(NodeId, Identity, CString)> = Vec::new();
        let mut at = directory;
        let mut step = loop {
            if at == NodeId::ROOT {
                break Step::Held(self.root.held.clone());
            }
            let record = self.table.look(at).ok_or(Errno::STALE)?;
            match record.hold {
                Hold::Descriptor(held) => break Step::Held(held),
                Hold::Handle(handle) => break Step::Passing(record.mount.open(&handle)?),
                Hold::Place => {}
            }
            let (parent, name) = self.table.spot(at).ok_or(Errno::STALE)?;
            way.push((at, record.identity, name));
            if way.len() > DEEPEST {
                return Err(Errno::STALE);
            }
            at = parent;
        };
        while let Some((id, known, name)) = way.pop() {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat2(&step, name, flags, Mode::empty(), CONFINED)?;
            let stat = statx(&file, c"", AtFlags::EMPTY_PATH, WANTED)?;
            let is = identity(&stat);
            if (is.device, is.ino) != (known.device, known.ino)
                || !self.still(id, &stat, file.as_fd())
            {
                return Err(Errno::STALE);
            }
            step = Step::Passing(file);
        }
        Ok(step)
    }

    /// Nodes are at their places, so that what becomes of these matters.
    fn minds_places(&self) -> bool {
        self.table.has_places() && self.crowded.load(Ordering::Relaxed)
    }

    /// The node that has this name, which is about to be taken away: give it to
    /// [`taken_away`](Self::taken_away) after that. `None` where none can be lost.
    pub(crate) fn to_be_taken_away(&self, parent: &Found, name: &CStr) -> Option<Found> {
        if !self.minds_places() {
            return None;
        }
        self.get(self.named(parent, name)?).ok()
    }

    /// It lives by its descriptor alone, perhaps.
    pub(crate) fn taken_away(&self, found: Option<Found>) {
        if let Some(found) = found {
            self.table.keep(found.id, &found.held);
        }
    }

    /// The node that has this name, if there is one.
    fn named(&self, parent: &Found, name: &CStr) -> Option<NodeId> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(parent, name, flags, WANTED).ok()?;
        self.table.find(&identity(&stat))
    }

    /// What has this name is about to be somewhere else: `None` where nobody
    /// needs to know.
    pub(crate) fn begin_move<'a>(
        &self,
        parent: &Found,
        name: &CStr,
        to: Spot<'a>,
    ) -> Option<Moving<'a>> {
        let state = self.table.state();
        if state.is_none() && !self.table.has_places() {
            return None;
        }
        let node = self.named(parent, name)?;
        let written = state.and_then(|state| state.begin_move(node, to));
        Some(Moving { node, to, written })
    }

    /// It is there now, or was not moved.
    pub(crate) fn end_move(&self, moving: Moving<'_>, moved: bool) {
        if let Some(written) = moving.written {
            self.table.end_move(written, moved);
        }
        if moved {
            self.table.moved(moving.node, moving.to);
        }
    }
}
