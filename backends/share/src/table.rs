//! The table of nodes: which ids a guest has, what each is held by, and which
//! were not used for longest. Pure bookkeeping behind short locks, no system
//! call; `nodes` does those.
//!
//! An id is the place of a slot and how often the slot has been used, so that an
//! id from an earlier use is recognised. A slot is in the shard that its file's
//! identity hashes to: one lock covers id, identity and age.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::calls::FileHandle;
use crate::mounts::Mount;
use crate::state::{Noted, Spot, State};

const SHARD_BITS: u32 = 4;
const SHARDS: usize = 1 << SHARD_BITS;
const NONE: u32 = u32::MAX;

/// A node as the guest names it. One that comes in may be anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The directory that is passed on; FUSE's number for it.
    pub const ROOT: Self = Self(1);

    fn of(shard: usize, slot: u32, generation: u32) -> Self {
        let place = (u64::from(slot) + 1) << SHARD_BITS | shard as u64;
        Self(u64::from(generation) << 32 | place)
    }

    fn place(self) -> Option<(usize, usize, u32)> {
        let place = self.0 & 0xffff_ffff;
        let slot = (place >> SHARD_BITS).checked_sub(1)?;
        Some((place as usize % SHARDS, slot as usize, self.generation()))
    }

    pub(crate) fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Where the node's record is in the state.
    pub(crate) fn index(self) -> u32 {
        (self.0 as u32).wrapping_sub(1 << SHARD_BITS)
    }
}

/// What makes two names the same file. The device is needed beside the mount
/// because btrfs has many on one mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    pub(crate) mount: u64,
    pub(crate) device: u64,
    pub(crate) ino: u64,
}

impl Identity {
    /// Without the mount, whose number is another after a restart.
    fn shard(&self) -> usize {
        let mixed = self.ino ^ self.device.rotate_left(20);
        (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SHARD_BITS)) as usize
    }
}

/// How many descriptors of a kind there may be. One is taken before a file is
/// opened and given back when it is closed, so the limit holds at every moment.
#[derive(Debug)]
pub(crate) struct Budget {
    taken: AtomicU32,
    limit: u32,
}

/// The right to one descriptor.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Budget>);

impl Budget {
    pub(crate) fn new(limit: u32) -> Arc<Self> {
        let taken = AtomicU32::new(0);
        Arc::new(Self { taken, limit })
    }

    pub(crate) fn take(self: &Arc<Self>) -> Option<Permit> {
        let more = |taken: u32| (taken < self.limit).then(|| taken + 1);
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()
            .map(|_| Permit(self.clone()))
    }

    /// Less than a quarter is left.
    pub(crate) fn is_short(&self) -> bool {
        self.taken() > self.limit - self.limit / 4
    }

    pub(crate) fn taken(&self) -> u32 {
        self.taken.load(Ordering::Relaxed)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An O_PATH descriptor of a node. While it is open the inode's number cannot be
/// used again.
#[derive(Debug)]
pub(crate) struct Held {
    // The order of the fields is that of their end: closed, then given back.
    file: OwnedFd,
    _permit: Option<Permit>,
}

impl Held {
    pub(crate) fn new(file: OwnedFd, permit: Option<Permit>) -> Arc<Self> {
        Arc::new(Self {
            file,
            _permit: permit,
        })
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What keeps a node's file.
#[derive(Debug, Clone)]
pub(crate) enum Hold {
    Descriptor(Arc<Held>),
    Handle(Arc<FileHandle>),
    /// Nothing: it is looked for where it was seen last.
    Place,
}

/// A copy of what the table knows of a node.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) identity: Identity,
    pub(crate) kind: FileType,
    pub(crate) mount: Arc<Mount>,
    pub(crate) hold: Hold,
}

#[derive(Debug)]
struct Node {
    record: Record,
    lookups: u64,
    /// Of a node that has no handle, where no state has it.
    place: Option<Box<Place>>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    node: Option<Node>,
    /// In the list of what may lose its descriptor, between these two.
    listed: bool,
    newer: u32,
    older: u32,
}

#[derive(Debug)]
struct Shard {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_identity: HashMap<Identity, u32>,
    newest: u32,
    oldest: u32,
    /// The generation of a slot that is new.
    first: u32,
}

/// What became of a file that was looked up.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Interned {
    /// Has this id now, with one lookup more.
    Node(NodeId),
    /// A node with a handle has this identity, which may be an earlier file's:
    /// say what the handle of this one is.
    Compare,
}

/// All nodes but the root.
#[derive(Debug)]
pub(crate) struct Table {
    shards: [Mutex<Shard>; SHARDS],
    nodes: AtomicU32,
    limit: u32,
    turn: AtomicUsize,
    /// What a successor needs is written there.
    state: Option<Arc<State>>,
    /// Some nodes may be left to their places.
    places: AtomicBool,
}

mod hand_over;
mod places;
mod restore;

pub(crate) use hand_over::Known;
use places::Place;

impl Table {
    pub(crate) fn new(limit: u32) -> Self {
        let shard = |_| {
            Mutex::new(Shard {
                slots: Vec::new(),
                free: Vec::new(),
                by_identity: HashMap::new(),
                newest: NONE,
                oldest: NONE,
                first: 1,
            })
        };
        Self {
            shards: std::array::from_fn(shard),
            nodes: AtomicU32::new(0),
            limit,
            turn: AtomicUsize::new(0),
            state: None,
            places: AtomicBool::new(false),
        }
    }

    fn shard(&self, index: usize) -> MutexGuard<'_, Shard> {
        // Nothing in here panics between two changes that belong together.
        self.shards[index % SHARDS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// How many nodes there are.
    pub(crate) fn len(&self) -> u32 {
        self.nodes.load(Ordering::Relaxed)
    }

    /// What is known of a node, which counts as a use of it.
    pub(crate) fn get(&self, id: NodeId) -> Option<Record> {
        let (shard, slot, generation) = id.place()?;
        let mut shard = self.shard(shard);
        let record = shard.node(slot, generation)?.record.clone();
        shard.touch(slot as u32);
        Some(record)
    }

    /// The same, which does not count as a use.
    pub(crate) fn look(&self, id: NodeId) -> Option<Record> {
        let (shard, slot, generation) = id.place()?;
        let mut shard = self.shard(shard);
        shard.node(slot, generation).map(|node| node.record.clone())
    }

    /// One lookup more of the node with this identity, if a descriptor of it is
    /// held: only then is it still the same file.
    pub(crate) fn known(
        &self,
        identity: &Identity,
        spot: Option<Spot<'_>>,
    ) -> Option<(NodeId, Arc<Mount>)> {
        let index = identity.shard();
        let mut shard = self.shard(index);
        let slot = *shard.by_identity.get(identity)?;
        let entry = &mut shard.slots[slot as usize];
        let generation = entry.generation;
        let node = entry.node.as_mut()?;
        if !matches!(node.record.hold, Hold::Descriptor(_)) {
            return None;
        }
        node.lookups = node.lookups.saturating_add(1);
        let (mount, lookups) = (node.record.mount.clone(), node.lookups);
        node.see(spot);
        let id = NodeId::of(index, slot, generation);
        self.seen(id, lookups, spot);
        self.used(&mut shard, id, slot);
        Some((id, mount))
    }

    /// Writes down that a node was looked up. Its shard is locked.
    fn seen(&self, id: NodeId, lookups: u64, spot: Option<Spot<'_>>) {
        let Some(state) = &self.state else {
            return;
        };
        state.set_lookups(id.index(), lookups);
        if let Some(spot) = spot {
            state.see(id.index(), id, spot);
        }
    }

    /// One lookup more of this file, which becomes a node if it is none.
    /// `handle` is `None` at first, then what [`Interned::Compare`] asked for.
    pub(crate) fn intern(
        &self,
        new: &Record,
        handle: Option<Result<&FileHandle, Errno>>,
        noted: &Noted<'_>,
    ) -> Result<Interned, Errno> {
        let index = new.identity.shard();
        let mut replaced = None;
        let mut shard = self.shard(index);
        if let Some(&slot) = shard.by_identity.get(&new.identity) {
            let entry = &mut shard.slots[slot as usize];
            let generation = entry.generation;
            // The map has slots with nodes only.
            let node = entry.node.as_mut().ok_or(Errno::IO)?;
            let same = match (&node.record.hold, handle) {
                (Hold::Descriptor(_), _) => true,
                (Hold::Handle(_), None) => return Ok(Interned::Compare),
                (Hold::Handle(old), Some(Ok(now))) => **old == *now,
                (Hold::Handle(_), Some(Err(_))) => false,
                (Hold::Place, _) => self.is_still(
                    node,
                    NodeId::of(index, slot, generation),
                    new.kind,
                    noted.born,
                ),
            };
            if same {
                node.lookups = node.lookups.saturating_add(1);
                let lookups = node.lookups;
                node.see(noted.spot);
                if !matches!(node.record.hold, Hold::Descriptor(_)) {
                    replaced = Some(std::mem::replace(&mut node.record.hold, new.hold.clone()));
                    node.record.mount = new.mount.clone();
                }
                let id = NodeId::of(index, slot, generation);
                self.seen(id, lookups, noted.spot);
                self.used(&mut shard, id, slot);
                drop(shard);
                drop(replaced);
                return Ok(Interned::Node(id));
            }
            // The number is another file's now. Whoever has the old id may keep
            // it; names lead to the new one, in a successor, too.
            shard.by_identity.remove(&new.identity);
            if let Some(state) = &self.state {
                state.clear_node(NodeId::of(index, slot, generation).index());
            }
        }
        let more = |nodes: u32| (nodes < self.limit).then(|| nodes + 1);
        if self
            .nodes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_err()
        {
            return Err(Errno::NFILE);
        }
        if let Some(state) = &self.state
            && let Err(errno) = state.reserve_node(NodeId::of(index, shard.next(), 0).index())
        {
            self.nodes.fetch_sub(1, Ordering::Relaxed);
            return Err(errno);
        }
        let slot = shard.add(Node {
            record: new.clone(),
            lookups: 1,
            place: self.place(new, noted),
        });
        shard.by_identity.insert(new.identity, slot);
        let generation = shard.slots[slot as usize].generation;
        let id = NodeId::of(index, slot, generation);
        if let Some(state) = &self.state {
            state.raise_generation(index, generation);
            state.put_node(id.index(), id, &new.identity, new.kind, noted);
        }
        self.used(&mut shard, id, slot);
        Ok(Interned::Node(id))
    }

    /// Takes lookups back; at none the node is gone. More than there were are as
    /// many as there were.
    pub(crate) fn forget(&self, id: NodeId, count: u64) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        let mut shard = self.shard(index);
        let Some(node) = shard.node(slot, generation) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(count);
        let lookups = node.lookups;
        if let Some(state) = &self.state {
            match lookups {
                0 => state.clear_node(id.index()),
                _ => state.set_lookups(id.index(), lookups),
            }
        }
        if lookups == 0 {
            let gone = shard.remove(slot as u32);
            self.nodes.fetch_sub(1, Ordering::Relaxed);
            drop(shard);
            // Closing a file may take long.
            drop(gone);
        }
    }

    /// Every node is gone; ids from before stay unknown.
    pub(crate) fn clear(&self) {
        for index in 0..SHARDS {
            let mut gone = Vec::new();
            let mut shard = self.shard(index);
            for slot in 0..shard.slots.len() {
                gone.extend(shard.remove(slot as u32));
            }
            self.nodes.fetch_sub(gone.len() as u32, Ordering::Relaxed);
            drop(shard);
            drop(gone);
        }
        if let Some(state) = &self.state {
            state.clear();
        }
    }

    /// Takes a node off the list that may lose its descriptor: the one of a
    /// shard, each in turn, that was not used for longest.
    pub(crate) fn oldest(&self) -> Option<(NodeId, Record)> {
        for _ in 0..SHARDS {
            let index = self.turn.fetch_add(1, Ordering::Relaxed) % SHARDS;
            let mut shard = self.shard(index);
            let slot = shard.oldest;
            if slot == NONE {
                continue;
            }
            shard.unlist(slot);
            let entry = &shard.slots[slot as usize];
            if let Some(node) = &entry.node {
                let id = NodeId::of(index, slot, entry.generation);
                return Some((id, node.record.clone()));
            }
        }
        None
    }

    /// Leaves a node nothing but its handle.
    pub(crate) fn demote(&self, id: NodeId, handle: FileHandle) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        let mut shard = self.shard(index);
        if let Some(state) = &self.state
            && shard.node(slot, generation).is_some()
        {
            state.put_handle(id.index(), &handle);
        }
        // Used or promoted meanwhile makes no difference: any descriptor of the
        // node is of the same file. A listed one is to be kept.
        let old = match shard.node(slot, generation) {
            Some(node) => std::mem::replace(&mut node.record.hold, Hold::Handle(Arc::new(handle))),
            None => return,
        };
        shard.unlist(slot as u32);
        drop(shard);
        drop(old);
    }

    /// Gives a node a descriptor again.
    pub(crate) fn promote(&self, id: NodeId, held: &Arc<Held>) {
        let Some((index, slot, generation)) = id.place() else {
            return;
        };
        let mut shard = self.shard(index);
        let Some(node) = shard.node(slot, generation) else {
            return;
        };
        if let Hold::Handle(_) = node.record.hold {
            node.record.hold = Hold::Descriptor(held.clone());
            shard.list(slot as u32);
        }
    }
}

impl Shard {
    fn node(&mut self, slot: usize, generation: u32) -> Option<&mut Node> {
        let slot = self.slots.get_mut(slot)?;
        if slot.generation != generation {
            return None;
        }
        slot.node.as_mut()
    }

    /// The slot that is used next.
    fn next(&self) -> u32 {
        let free = self.free.last().copied();
        free.unwrap_or(self.slots.len() as u32)
    }

    fn add(&mut self, node: Node) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize].node = Some(node);
            return slot;
        }
        self.slots.push(Slot {
            generation: self.first,
            node: Some(node),
            listed: false,
            newer: NONE,
            older: NONE,
        });
        // Below 2^22 nodes and more: the limit of the table.
        (self.slots.len() - 1) as u32
    }

    fn remove(&mut self, slot: u32) -> Option<Node> {
        self.unlist(slot);
        let entry = &mut self.slots[slot as usize];
        let node = entry.node.take()?;
        // A slot that has had all its generations is not used again.
        if let Some(next) = entry.generation.checked_add(1) {
            entry.generation = next;
            self.free.push(slot);
        }
        if self.by_identity.get(&node.record.identity) == Some(&slot) {
            self.by_identity.remove(&node.record.identity);
        }
        Some(node)
    }

    fn touch(&mut self, slot: u32) {
        if self.slots[slot as usize].listed && self.newest != slot {
            self.unlist(slot);
            self.list(slot);
        }
    }

    fn list(&mut self, slot: u32) {
        self.unlist(slot);
        let older = self.newest;
        let entry = &mut self.slots[slot as usize];
        (entry.listed, entry.newer, entry.older) = (true, NONE, older);
        match older {
            NONE => self.oldest = slot,
            older => self.slots[older as usize].newer = slot,
        }
        self.newest = slot;
    }

    fn unlist(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        if !std::mem::take(&mut entry.listed) {
            return;
        }
        let (newer, older) = (entry.newer, entry.older);
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older as usize].newer = newer,
        }
    }
}

#[cfg(test)]
mod tests;
