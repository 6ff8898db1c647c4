//! What a successor needs of a share, in a file that outlives the process: which
//! nodes the guest knows and where they were seen last, what it has open, what
//! was agreed on, and what was being done.
//!
//! `table` and `handles` write records as they change, a few words each, into a
//! shared mapping: what was stored before the process is killed is there after
//! it. It is not made durable, since no guest outlives the host. `restore` reads
//! it once. Whoever runs the program opens the file and sees to it that nobody
//! else has it.
//!
//! A record counts once its first word is set, which is stored last and cleared
//! first. A process stops between two instructions, so that it is the compiler
//! alone that must keep the order.
#![expect(unsafe_code)]
// UNSAFETY: a file is mapped, and used as a slice of atomic words.

mod intents;
mod records;

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use thiserror::Error;

pub use intents::{Intent, Phase, Slot};
pub(crate) use records::{Move, Noted, OpenRecord, Spot, Stored};

/// "PericFsS". Zero is a file that nobody formatted.
const MAGIC: u64 = u64::from_le_bytes(*b"PericFsS");
/// Counts changes of anything below.
const VERSION: u64 = 1;
/// Bytes that tell one share from another.
pub const IDENTITY_BYTES: usize = 64;

/// Everything is in units of this many bytes.
const WORD: usize = 8;
const PAGE: usize = 4096;
/// Most nodes, and open files, that there is room for. The file has holes where
/// there are none.
pub(crate) const MOST_NODES: u32 = 1 << 23;
pub(crate) const MOST_OPEN: u32 = 1 << 18;
/// Names that change at the same time: more than there are threads.
const MOVES: usize = 256;

/// Words of a record of each kind.
const NODE: usize = 48;
const MOVE: usize = 40;
const OPEN: usize = 4;
const SLOT: usize = 16;

/// Words of the header.
const IDENTITY_AT: usize = 2;
const SHAPE_AT: usize = 10;
const SESSION_AT: usize = 16;
/// How many records of nodes and of open files have room, and how often slots of
/// each shard, and of the open files, were used at most.
const NODES_RESERVED: usize = 17;
const OPEN_RESERVED: usize = 18;
const OPEN_GENERATION: usize = 19;
const GENERATIONS: usize = 32;

/// Bytes that are reserved at once.
const CHUNK: u64 = 256 << 10;

/// Why a file cannot keep the state of a share.
#[derive(Debug, Error)]
pub enum StateError {
    /// Something else is there, or another share's.
    #[error("it holds something else than the state of these directories")]
    Other,
    /// The file system has no room for it, or cannot keep any free.
    #[error("no room can be reserved in it ({0})")]
    Room(io::Error),
    /// It cannot be mapped.
    #[error("it cannot be mapped ({0})")]
    Map(io::Error),
}

/// The mapping. It is never made smaller, and unmapped at the end.
#[derive(Debug)]
struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: it is memory that both ends of a move may use; all accesses are atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, offset: u64, bytes: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes, of nothing of ours.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let words = bytes / WORD;
        Ok(Self { start, words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped as long as this is there, page
        // aligned, and used as atomics by everybody.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is ours, and nobody borrows from it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.words * WORD) };
    }
}

/// The state of one share.
#[derive(Debug)]
pub struct State {
    mapping: Mapping,
    file: File,
    offset: u64,
    queues: u16,
    queue_size: u16,
    areas: Areas,
    growth: Mutex<()>,
    /// Places for moves that nobody uses.
    moves: Mutex<Vec<u16>>,
}

/// Where the areas of a share's part begin, in words.
#[derive(Debug, Clone, Copy)]
struct Areas {
    moves: usize,
    slots: usize,
    open: usize,
    nodes: usize,
    end: usize,
}

impl Areas {
    fn of(queues: u16, queue_size: u16) -> Self {
        let page = |words: usize| words.next_multiple_of(PAGE / WORD);
        let moves = PAGE / WORD;
        let slots = page(moves + MOVES * MOVE);
        let open = page(slots + usize::from(queues) * usize::from(queue_size) * SLOT);
        let nodes = page(open + MOST_OPEN as usize * OPEN);
        let end = page(nodes + MOST_NODES as usize * NODE);
        Self {
            moves,
            slots,
            open,
            nodes,
            end,
        }
    }
}

impl State {
    /// Bytes of the file that a share takes whose requests come from so many
    /// queues of this size. Almost all of it is a hole.
    pub fn bytes(queues: u16, queue_size: u16) -> u64 {
        (Areas::of(queues, queue_size).end * WORD) as u64
    }

    /// The part of `file` that begins at `offset` and has
    /// [`bytes`](Self::bytes) bytes. One that is all zero is formatted.
    ///
    /// # Errors
    /// [`StateError`]; what is in the file is unchanged then.
    pub fn open(
        file: File,
        offset: u64,
        (queues, queue_size): (u16, u16),
        identity: [u8; IDENTITY_BYTES],
    ) -> Result<Self, StateError> {
        let areas = Areas::of(queues, queue_size);
        // Memory that faults for want of room would be the end of us.
        let all = FallocateFlags::empty();
        fallocate(&file, all, offset, (areas.open * WORD) as u64)
            .map_err(|e| StateError::Room(e.into()))?;
        let mapping = Mapping::new(&file, offset, areas.end * WORD).map_err(StateError::Map)?;
        let state = Self {
            mapping,
            file,
            offset,
            queues,
            queue_size,
            areas,
            growth: Mutex::default(),
            moves: Mutex::new((0..MOVES as u16).collect()),
        };
        let shape = u64::from(queues) << 16 | u64::from(queue_size);
        match state.word(0).load(Ordering::Acquire) {
            0 => {
                state.put_bytes(IDENTITY_AT, &identity);
                state.set(1, VERSION);
                state.set(SHAPE_AT, shape);
                // Last: what is half formatted is formatted again.
                state.set(0, MAGIC);
            }
            MAGIC => {
                let same = state.get(1) == VERSION
                    && state.get(SHAPE_AT) == shape
                    && state.bytes_at(IDENTITY_AT, IDENTITY_BYTES) == identity;
                if !same {
                    return Err(StateError::Other);
                }
            }
            _ => return Err(StateError::Other),
        }
        Ok(state)
    }

    /// What was agreed on with the guest, in the caller's own form; 0 if nothing.
    pub fn session(&self) -> u64 {
        self.get(SESSION_AT)
    }

    /// Notes what was agreed on.
    pub fn set_session(&self, session: u64) {
        self.set(SESSION_AT, session);
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.mapping.words()[at]
    }

    fn get(&self, at: usize) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    fn set(&self, at: usize, value: u64) {
        self.word(at).store(value, Ordering::Release);
    }

    /// Clears a word that makes others count, before these change.
    fn unset(&self, at: usize) {
        self.set(at, 0);
        compiler_fence(Ordering::SeqCst);
    }

    fn put_bytes(&self, at: usize, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(WORD).enumerate() {
            let mut word = [0; WORD];
            word[..chunk.len()].copy_from_slice(chunk);
            self.set(at + index, u64::from_le_bytes(word));
        }
    }

    fn bytes_at(&self, at: usize, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(WORD)).flat_map(|n| self.get(at + n).to_le_bytes());
        let mut bytes: Vec<u8> = words.collect();
        bytes.truncate(len);
        bytes
    }

    /// Makes sure that the record `index` of an area has room; `counter` says
    /// how many have.
    fn reserve(&self, counter: usize, area: usize, size: usize, index: usize) -> Result<(), Errno> {
        if (index as u64) < self.get(counter) {
            return Ok(());
        }
        let _growing = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        let have = self.get(counter);
        if (index as u64) < have {
            return Ok(());
        }
        let size = (size * WORD) as u64;
        let want = (index as u64 + 1).max(have + CHUNK / size);
        let start = self.offset + (area * WORD) as u64 + have * size;
        fallocate(
            &self.file,
            FallocateFlags::empty(),
            start,
            (want - have) * size,
        )?;
        self.set(counter, want);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
