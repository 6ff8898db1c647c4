//! The records of nodes and of what is open: `table` and `handles` write them
//! under their own locks, `restore` reads them before anybody else does.

use std::ffi::{CStr, CString};
use std::sync::PoisonError;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::{
    GENERATIONS, MOST_NODES, MOST_OPEN, MOVE, MOVES, NODE, NODES_RESERVED, OPEN, OPEN_GENERATION,
    OPEN_RESERVED, State,
};
use crate::calls::FileHandle;
use crate::table::{Identity, NodeId};

/// Words of a node's record: id, lookups, device, inode, birth, kind and mount,
/// the handle's length and kind, the handle, the place.
const LOOKUPS: usize = 1;
const DEVICE: usize = 2;
const INO: usize = 3;
const BORN: usize = 4;
const KIND: usize = 5;
const HANDLE_SHAPE: usize = 6;
const HANDLE: usize = 7;
const PARENT: usize = 14;
const LENGTH: usize = 15;
const NAME: usize = 16;
/// The longest handle that is kept; a node with a longer one goes by its name.
const HANDLE_BYTES: usize = (PARENT - HANDLE) * 8;

/// Words of a move: node, parent, length, name.
const MOVE_PARENT: usize = 1;
const MOVE_LENGTH: usize = 2;
const MOVE_NAME: usize = 4;

/// A name and the directory it is in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spot<'a> {
    pub(crate) parent: NodeId,
    pub(crate) name: &'a CStr,
}

/// What is written of a node beside what the table keeps in memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Noted<'a> {
    pub(crate) spot: Option<Spot<'a>>,
    pub(crate) handle: Option<FileHandle>,
    /// When the file was made, in nanoseconds; 0 where nobody knows.
    pub(crate) born: u64,
    /// The number of its mount.
    pub(crate) mount: u64,
}

/// A node as a predecessor left it.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) id: NodeId,
    pub(crate) lookups: u64,
    pub(crate) device: u64,
    pub(crate) ino: u64,
    pub(crate) kind: FileType,
    pub(crate) mount: u64,
    pub(crate) handle: Option<FileHandle>,
}

/// Something that was open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpenRecord {
    pub(crate) number: u64,
    pub(crate) node: NodeId,
    /// As it was opened.
    pub(crate) flags: u32,
    pub(crate) directory: bool,
}

/// A change of a node's place that is under way.
#[derive(Debug)]
pub(crate) struct Move {
    entry: u16,
    pub(crate) node: NodeId,
}

impl State {
    fn node_at(&self, index: u32) -> usize {
        self.areas.nodes + index as usize * NODE
    }

    /// Room for the record of a node.
    pub(crate) fn reserve_node(&self, index: u32) -> Result<(), Errno> {
        if index >= MOST_NODES {
            return Err(Errno::NFILE);
        }
        self.reserve(NODES_RESERVED, self.areas.nodes, NODE, index as usize)
            .map_err(|_| Errno::NFILE)
    }

    /// A node that is new, with one lookup.
    pub(crate) fn put_node(
        &self,
        index: u32,
        id: NodeId,
        identity: &Identity,
        kind: FileType,
        noted: &Noted<'_>,
    ) {
        let at = self.node_at(index);
        self.set(at + LOOKUPS, 1);
        self.set(at + DEVICE, identity.device);
        self.set(at + INO, identity.ino);
        self.set(at + BORN, noted.born);
        self.set(
            at + KIND,
            noted.mount << 16 | u64::from(kind.as_raw_mode() & 0xffff),
        );
        self.set(at + HANDLE_SHAPE, 0);
        if let Some(handle) = &noted.handle {
            self.put_handle(index, handle);
        }
        match noted.spot {
            Some(spot) => self.put_spot(index, spot),
            None => self.set(at + LENGTH, 0),
        }
        self.set(at, id.0);
    }

    /// The node's place. A kill in here leaves none.
    pub(crate) fn put_spot(&self, index: u32, spot: Spot<'_>) {
        let at = self.node_at(index);
        self.unset(at + LENGTH);
        self.set(at + PARENT, spot.parent.0);
        self.put_bytes(at + NAME, spot.name.to_bytes());
        self.set(at + LENGTH, spot.name.count_bytes() as u64);
    }

    /// A node that has no handle yet has this one.
    pub(crate) fn put_handle(&self, index: u32, handle: &FileHandle) {
        let (kind, bytes) = handle.parts();
        let at = self.node_at(index);
        if bytes.len() > HANDLE_BYTES || self.get(at + HANDLE_SHAPE) != 0 {
            return;
        }
        self.put_bytes(at + HANDLE, bytes);
        let shape = u64::from(kind.cast_unsigned()) << 32 | bytes.len() as u64;
        self.set(at + HANDLE_SHAPE, shape);
    }

    pub(crate) fn set_lookups(&self, index: u32, lookups: u64) {
        self.set(self.node_at(index) + LOOKUPS, lookups);
    }

    pub(crate) fn clear_node(&self, index: u32) {
        self.unset(self.node_at(index));
    }

    /// When the node's file was made.
    pub(crate) fn born(&self, index: u32) -> u64 {
        self.get(self.node_at(index) + BORN)
    }

    pub(crate) fn set_born(&self, index: u32, born: u64) {
        self.set(self.node_at(index) + BORN, born);
    }

    /// The number of the node's mount.
    pub(crate) fn mount(&self, index: u32) -> u64 {
        self.get(self.node_at(index) + KIND) >> 16
    }

    /// Where the node was seen last.
    pub(crate) fn spot(&self, index: u32) -> Option<(NodeId, CString)> {
        let at = self.node_at(index);
        let length = self.get(at + LENGTH) as usize;
        if !(1..=255).contains(&length) {
            return None;
        }
        let name = CString::new(self.bytes_at(at + NAME, length)).ok()?;
        Some((NodeId(self.get(at + PARENT)), name))
    }

    /// It is there already.
    fn is_at(&self, index: u32, spot: Spot<'_>) -> bool {
        let at = self.node_at(index);
        let name = spot.name.to_bytes();
        if self.get(at + PARENT) != spot.parent.0 || self.get(at + LENGTH) != name.len() as u64 {
            return false;
        }
        name.chunks(8).enumerate().all(|(n, chunk)| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.get(at + NAME + n) == u64::from_le_bytes(word)
        })
    }

    /// The node is seen here now.
    pub(crate) fn see(&self, index: u32, id: NodeId, spot: Spot<'_>) {
        if self.is_at(index, spot) {
            return;
        }
        if let Some(moving) = self.begin_move(id, spot) {
            self.end_move(moving, Some(index));
        }
    }

    /// A node is about to be at another place, too. Where it is found counts.
    pub(crate) fn begin_move(&self, node: NodeId, spot: Spot<'_>) -> Option<Move> {
        let free = self
            .moves
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let entry = free?;
        let at = self.move_at(entry);
        self.set(at + MOVE_PARENT, spot.parent.0);
        self.set(at + MOVE_LENGTH, spot.name.count_bytes() as u64);
        self.put_bytes(at + MOVE_NAME, spot.name.to_bytes());
        self.set(at, node.0);
        Some(Move { entry, node })
    }

    /// It is there, if `index` says where the node's record is; else it stayed
    /// where it was.
    pub(crate) fn end_move(&self, moving: Move, index: Option<u32>) {
        let from = self.move_at(moving.entry);
        if let Some(index) = index {
            let to = self.node_at(index);
            let length = self.get(from + MOVE_LENGTH);
            self.unset(to + LENGTH);
            self.set(to + PARENT, self.get(from + MOVE_PARENT));
            for word in 0..(length as usize).div_ceil(8) {
                self.set(to + NAME + word, self.get(from + MOVE_NAME + word));
            }
            self.set(to + LENGTH, length);
        }
        self.unset(from);
        let mut free = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(moving.entry);
    }

    fn move_at(&self, entry: u16) -> usize {
        self.areas.moves + usize::from(entry) * MOVE
    }

    /// Moves that a predecessor did not end, and forgets them.
    pub(crate) fn take_moves(&self) -> Vec<(NodeId, NodeId, CString)> {
        let mut all = Vec::new();
        for entry in 0..MOVES as u16 {
            let at = self.move_at(entry);
            let (node, length) = (self.get(at), self.get(at + MOVE_LENGTH) as usize);
            if node == 0 || !(1..=255).contains(&length) {
                continue;
            }
            if let Ok(name) = CString::new(self.bytes_at(at + MOVE_NAME, length)) {
                all.push((NodeId(node), NodeId(self.get(at + MOVE_PARENT)), name));
            }
        }
        all
    }

    /// No move of a predecessor is left.
    pub(crate) fn clear_moves(&self) {
        for entry in 0..MOVES as u16 {
            self.unset(self.move_at(entry));
        }
    }

    /// The highest use of a slot of this shard, so far.
    pub(crate) fn generation(&self, shard: usize) -> u32 {
        self.get(GENERATIONS + shard) as u32
    }

    pub(crate) fn raise_generation(&self, shard: usize, generation: u32) {
        if generation > self.generation(shard) {
            self.set(GENERATIONS + shard, generation.into());
        }
    }

    /// All nodes that a predecessor had.
    pub(crate) fn stored(&self) -> impl Iterator<Item = (u32, Stored)> + '_ {
        let reserved = self.get(NODES_RESERVED).min(MOST_NODES.into()) as u32;
        (0..reserved).filter_map(|index| Some((index, self.stored_at(index)?)))
    }

    fn stored_at(&self, index: u32) -> Option<Stored> {
        let at = self.node_at(index);
        let id = self.get(at);
        if id == 0 || NodeId(id).index() != index {
            return None;
        }
        let shape = self.get(at + HANDLE_SHAPE);
        let length = (shape & 0xff) as usize;
        let handle = (1..=HANDLE_BYTES).contains(&length).then(|| {
            let kind = ((shape >> 32) as u32).cast_signed();
            FileHandle::from_parts(kind, &self.bytes_at(at + HANDLE, length))
        });
        let kind = self.get(at + KIND);
        Some(Stored {
            id: NodeId(id),
            lookups: self.get(at + LOOKUPS),
            device: self.get(at + DEVICE),
            ino: self.get(at + INO),
            kind: FileType::from_raw_mode((kind & 0xffff) as u32),
            mount: kind >> 16,
            handle,
        })
    }

    fn open_at(&self, place: u32) -> usize {
        self.areas.open + place as usize * OPEN
    }

    /// Room for the record of something open.
    pub(crate) fn reserve_open(&self, place: u32) -> Result<(), Errno> {
        if place >= MOST_OPEN {
            return Err(Errno::NFILE);
        }
        self.reserve(OPEN_RESERVED, self.areas.open, OPEN, place as usize)
            .map_err(|_| Errno::NFILE)
    }

    pub(crate) fn put_open(&self, place: u32, record: OpenRecord) {
        let at = self.open_at(place);
        self.set(at + 1, record.node.0);
        self.set(
            at + 2,
            u64::from(record.directory) << 32 | u64::from(record.flags),
        );
        self.set(at, record.number);
    }

    pub(crate) fn clear_open(&self, place: u32) {
        self.unset(self.open_at(place));
    }

    /// All that a predecessor had open, by place.
    pub(crate) fn stored_open(&self) -> Vec<(u32, OpenRecord)> {
        let reserved = self.get(OPEN_RESERVED).min(MOST_OPEN.into()) as u32;
        let record = |place| {
            let at = self.open_at(place);
            let flags = self.get(at + 2);
            let record = OpenRecord {
                number: self.get(at),
                node: NodeId(self.get(at + 1)),
                flags: flags as u32,
                directory: flags >> 32 != 0,
            };
            let here = record.number >> 32 != 0 && record.number as u32 == place;
            here.then_some((place, record))
        };
        (0..reserved).filter_map(record).collect()
    }

    pub(crate) fn open_generation(&self) -> u32 {
        self.get(OPEN_GENERATION) as u32
    }

    pub(crate) fn raise_open_generation(&self, generation: u32) {
        if generation > self.open_generation() {
            self.set(OPEN_GENERATION, generation.into());
        }
    }

    /// Nothing is known of what a predecessor had.
    pub(crate) fn clear(&self) {
        let indices: Vec<u32> = self.stored().map(|(index, _)| index).collect();
        indices.into_iter().for_each(|index| self.clear_node(index));
        for (place, _) in self.stored_open() {
            self.clear_open(place);
        }
        self.clear_moves();
    }
}
