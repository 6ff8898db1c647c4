//! The table as a predecessor left it: filled once from the state, before
//! anybody asks, and then node by node as places are found again.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Held, Hold, Identity, NONE, Node, NodeId, Record, SHARDS, Slot, Table};
use crate::mounts::Mount;
use crate::state::{MOST_NODES, Move, State};

impl Table {
    /// Writes to this state from now on.
    pub(crate) fn remember(&mut self, state: Arc<State>) {
        self.state = Some(state);
    }

    /// Puts a predecessor's node where it was. False where it cannot have been.
    pub(crate) fn put_back(&self, id: NodeId, lookups: u64, record: Record) -> bool {
        let Some((index, slot, generation)) = id.place() else {
            return false;
        };
        if record.identity.shard() != index || slot >= MOST_NODES as usize {
            return false;
        }
        let mut shard = self.shard(index);
        while shard.slots.len() <= slot {
            shard.slots.push(Slot {
                generation: 0,
                node: None,
                listed: false,
                newer: NONE,
                older: NONE,
            });
        }
        if let Hold::Place = record.hold {
            self.places.store(true, Ordering::Relaxed);
        }
        let identity = record.identity;
        let entry = &mut shard.slots[slot];
        if entry.node.is_some() {
            return false;
        }
        entry.generation = generation;
        entry.node = Some(Node {
            record,
            lookups,
            place: None,
        });
        shard.by_identity.insert(identity, slot as u32);
        self.nodes.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// All are back: slots that nobody has are free, for ids that nobody has had,
    /// when `used` says how often slots of a shard were used at most.
    pub(crate) fn put_back_all(&self, used: impl Fn(usize) -> u32) {
        for index in 0..SHARDS {
            let next = used(index).saturating_add(1);
            let mut shard = self.shard(index);
            let shard = &mut *shard;
            shard.first = next;
            for (slot, entry) in shard.slots.iter_mut().enumerate() {
                if entry.node.is_none() {
                    entry.generation = next;
                    shard.free.push(slot as u32);
                }
            }
        }
    }

    /// A node that was left to its place has been found again.
    pub(crate) fn found(
        &self,
        id: NodeId,
        identity: Identity,
        mount: &Arc<Mount>,
        held: &Arc<Held>,
    ) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        let mut shard = self.shard(index);
        let Some(node) = shard.node(slot, generation) else {
            return;
        };
        if !matches!(node.record.hold, Hold::Place) {
            return;
        }
        let before = std::mem::replace(&mut node.record.identity, identity);
        node.record.hold = Hold::Descriptor(held.clone());
        node.record.mount = mount.clone();
        // The number of its mount may be known only now.
        if before != identity && shard.by_identity.get(&before) == Some(&(slot as u32)) {
            shard.by_identity.remove(&before);
            shard.by_identity.entry(identity).or_insert(slot as u32);
        }
        self.used(&mut shard, id, slot as u32);
    }

    /// A predecessor's node lies on this mount, wherever it is there.
    pub(crate) fn place_on(&self, id: NodeId, identity: Identity, mount: &Arc<Mount>) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        let mut shard = self.shard(index);
        let Some(node) = shard.node(slot, generation) else {
            return;
        };
        let before = std::mem::replace(&mut node.record.identity, identity);
        node.record.mount = mount.clone();
        if shard.by_identity.get(&before) == Some(&(slot as u32)) {
            shard.by_identity.remove(&before);
        }
        shard.by_identity.entry(identity).or_insert(slot as u32);
    }

    /// The number of the mount that a predecessor's node is on.
    pub(crate) fn mount_number(&self, id: NodeId) -> Option<u64> {
        if let Some(state) = &self.state {
            return Some(state.mount(id.index()));
        }
        let (index, slot, generation) = id.place()?;
        let mut shard = self.shard(index);
        let place = &shard.node(slot, generation)?.place;
        place.as_ref().map(|place| place.mount)
    }

    /// The node of a file, if there is one; no lookup more.
    pub(crate) fn find(&self, identity: &Identity) -> Option<NodeId> {
        let index = identity.shard();
        let shard = self.shard(index);
        let slot = *shard.by_identity.get(identity)?;
        let generation = shard.slots[slot as usize].generation;
        Some(NodeId::of(index, slot, generation))
    }

    /// A node's move has ended: it is there now, or where it was.
    pub(crate) fn end_move(&self, moving: Move, moved: bool) {
        let Some(state) = &self.state else {
            return;
        };
        let Some((index, slot, generation)) = moving.node.place() else {
            return;
        };
        let id = moving.node;
        let mut shard = self.shard(index);
        let there = moved && shard.node(slot, generation).is_some();
        state.end_move(moving, there.then(|| id.index()));
    }

    /// The state, for who writes to it himself.
    pub(crate) fn state(&self) -> Option<&Arc<State>> {
        self.state.as_ref()
    }
}
