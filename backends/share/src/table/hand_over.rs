//! All nodes, for the table of another process, and a table that is filled so.
//! `nodes::hand_over` calls it, while nobody asks for anything.

use std::ffi::CString;
use std::sync::atomic::Ordering;

use super::places::Place;
use super::{Hold, NodeId, Record, SHARDS, Table};

/// A node as one process knows it and the next is to.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) id: NodeId,
    pub(crate) lookups: u64,
    pub(crate) record: Record,
    /// Where it was seen last, and when it was made.
    pub(crate) place: Option<(NodeId, CString)>,
    pub(crate) born: u64,
    /// The number of its mount.
    pub(crate) mount: u64,
}

impl Table {
    /// All nodes. One whose number is another file's by now comes before that file's, so that the
    /// number leads to the same node in the other table as here; if it has nothing but its place, it
    /// is gone, as after a kill.
    pub(crate) fn all(&self) -> Vec<Known> {
        let mut replaced = Vec::new();
        let mut all = Vec::with_capacity(self.len() as usize);
        for index in 0..SHARDS {
            let shard = self.shard(index);
            for (slot, entry) in shard.slots.iter().enumerate() {
                let Some(node) = &entry.node else { continue };
                let found = shard.by_identity.get(&node.record.identity);
                let is_found = found == Some(&(slot as u32));
                if !is_found && matches!(node.record.hold, Hold::Place) {
                    continue;
                }
                let id = NodeId::of(index, slot as u32, entry.generation);
                let known = Known {
                    id,
                    lookups: node.lookups,
                    record: node.record.clone(),
                    place: self.spot_of(node, id),
                    born: self.born(node, id),
                    mount: node.record.mount.number(),
                };
                match is_found {
                    true => all.push(known),
                    false => replaced.push(known),
                }
            }
        }
        replaced.append(&mut all);
        replaced
    }

    /// How often slots of each shard were used at most.
    pub(crate) fn generations(&self) -> [u32; SHARDS] {
        std::array::from_fn(|index| {
            let shard = self.shard(index);
            let used = shard.slots.iter().map(|slot| slot.generation).max();
            used.unwrap_or(0).max(shard.first.saturating_sub(1))
        })
    }

    /// Puts a node where it was in the other table. False where it cannot have
    /// been.
    pub(crate) fn put_back_known(&self, known: Known) -> bool {
        let (id, born, mount) = (known.id, known.born, known.mount);
        if !self.put_back(id, known.lookups, known.record) {
            return false;
        }
        let Some((index, slot, generation)) = id.place() else {
            return false;
        };
        let mut shard = self.shard(index);
        // A state has it already: that is the predecessor's own.
        if self.state.is_none()
            && let Some((parent, name)) = known.place
            && let Some(node) = shard.node(slot, generation)
        {
            self.places.store(true, Ordering::Relaxed);
            node.place = Some(Box::new(Place {
                parent,
                name,
                born,
                mount,
            }));
        }
        self.used(&mut shard, id, slot as u32);
        true
    }
}
