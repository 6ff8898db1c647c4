//! Nodes that no handle leads to, on file systems that have none or where one
//! would lead out of the tree: they are left to their place, the directory and
//! the name that they were seen at last, when descriptors run out. Called by
//! `nodes::places`, which looks whether a node is where its place says.

use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::FileType;

use super::{Held, Hold, Node, NodeId, Record, Shard, Table};
use crate::state::{Noted, Spot};

/// Where a file was seen last, and when it was made, in nanoseconds. Without the
/// second another file that has its number could be taken for it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) parent: NodeId,
    pub(super) name: CString,
    pub(super) born: u64,
    /// The number of its mount.
    pub(super) mount: u64,
}

impl Node {
    /// It is here now.
    pub(super) fn see(&mut self, spot: Option<Spot<'_>>) {
        if let Some(place) = &mut self.place
            && let Some(spot) = spot
        {
            place.parent = spot.parent;
            if *place.name != *spot.name {
                place.name = spot.name.to_owned();
            }
        }
    }
}

impl Table {
    /// What is kept of a new node's place.
    pub(super) fn place(&self, new: &Record, noted: &Noted<'_>) -> Option<Box<Place>> {
        // Other mounts cannot be told by their handles in a successor.
        if (new.mount.has_handles() && noted.mount == 0) || noted.born == 0 {
            return None;
        }
        self.places.store(true, Ordering::Relaxed);
        if self.state.is_some() {
            return None;
        }
        let spot = noted.spot?;
        Some(Box::new(Place {
            parent: spot.parent,
            name: spot.name.to_owned(),
            born: noted.born,
            mount: noted.mount,
        }))
    }

    /// Whether nodes may be left to their places.
    pub(crate) fn has_places(&self) -> bool {
        self.places.load(Ordering::Relaxed)
    }

    /// A node's descriptor was used: it is the last to go, if it may go at all.
    pub(super) fn used(&self, shard: &mut Shard, id: NodeId, slot: u32) {
        let Some(node) = &shard.slots[slot as usize].node else {
            return;
        };
        let may_go = match &node.record.hold {
            Hold::Descriptor(_) => node.record.mount.has_handles() || self.born(node, id) != 0,
            _ => false,
        };
        if may_go {
            shard.list(slot);
        }
    }

    /// When a node's file was made; 0 where nobody knows.
    pub(super) fn born(&self, node: &Node, id: NodeId) -> u64 {
        match (&node.place, &self.state) {
            (Some(place), _) => place.born,
            (None, Some(state)) => state.born(id.index()),
            (None, None) => 0,
        }
    }

    /// What is said now of when a node's file was made.
    pub(crate) fn set_born(&self, id: NodeId, born: u64) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        let mut shard = self.shard(index);
        match (shard.node(slot, generation), &self.state) {
            (Some(Node { place, .. }), None) => {
                if let Some(place) = place {
                    place.born = born;
                }
            }
            (Some(_), Some(state)) => state.set_born(id.index(), born),
            (None, _) => {}
        }
    }

    /// Where a node was seen last.
    pub(crate) fn spot(&self, id: NodeId) -> Option<(NodeId, CString)> {
        let (index, slot, generation) = id.place()?;
        let mut shard = self.shard(index);
        self.spot_of(shard.node(slot, generation)?, id)
    }

    pub(super) fn spot_of(&self, node: &Node, id: NodeId) -> Option<(NodeId, CString)> {
        match (&node.place, &self.state) {
            (Some(place), _) => Some((place.parent, place.name.clone())),
            (None, Some(state)) => state.spot(id.index()),
            (None, None) => None,
        }
    }

    /// A node was moved there.
    pub(crate) fn moved(&self, id: NodeId, spot: Spot<'_>) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        if let Some(node) = self.shard(index).node(slot, generation) {
            node.see(Some(spot));
        }
    }

    /// Whether a file with a node's number, of this kind and made at this time,
    /// is the node's.
    pub(super) fn is_still(&self, node: &Node, id: NodeId, kind: FileType, born: u64) -> bool {
        let known = self.born(node, id);
        node.record.kind == kind && (known == 0 || born == 0 || known == born)
    }

    /// As [`is_still`](Self::is_still), by id.
    pub(crate) fn still(&self, id: NodeId, kind: FileType, born: u64) -> bool {
        let Some((index, slot, generation)) = id.place() else {
            return false;
        };
        let mut shard = self.shard(index);
        let node = shard.node(slot, generation);
        node.is_some_and(|node| self.is_still(node, id, kind, born))
    }

    /// Leaves a node to its place. Whoever does so looks whether it is there, and
    /// has it [`kept`](Self::keep) if not. False where no place is known.
    pub(crate) fn leave(&self, id: NodeId) -> bool {
        let Some((index, slot, generation)) = id.place() else {
            return false;
        };
        let mut shard = self.shard(index);
        let Some(node) = shard.node(slot, generation) else {
            return false;
        };
        if !matches!(node.record.hold, Hold::Descriptor(_)) || self.born(node, id) == 0 {
            return false;
        }
        let old = std::mem::replace(&mut node.record.hold, Hold::Place);
        shard.unlist(slot as u32);
        drop(shard);
        drop(old);
        true
    }

    /// A node whose place leads to it no longer keeps its descriptor, until it is
    /// seen somewhere again.
    pub(crate) fn keep(&self, id: NodeId, held: &Arc<Held>) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        let mut shard = self.shard(index);
        if let Some(node) = shard.node(slot, generation)
            && let Hold::Place = node.record.hold
        {
            node.record.hold = Hold::Descriptor(held.clone());
        }
    }
}
