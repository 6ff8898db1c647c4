//! What was being done when the process was killed: a slot for each descriptor
//! head of each queue, which says of the request there what it was about to
//! change, and what came of it. `pericarp-fs` writes it around a call, and reads
//! it when a request of a predecessor's is done again.
//!
//! A slot is never cleared: it counts for the request whose number it has, and
//! that is over when its head is used again.

use super::{SLOT, State};

const PHASE: usize = 1;
const DIGEST: usize = 2;
const TIME: usize = 3;
const SUBJECT: usize = 4;
const OTHER: usize = 6;
const NODE: usize = 8;
const HANDLE: usize = 9;
const PROGRESS: usize = 10;
const ERRNO: usize = 11;

/// How far a request had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Nothing is known of it.
    #[default]
    Unknown,
    /// It may have been done.
    Begun,
    /// It was done, and this is what came of it.
    Done,
}

/// A request, before it is done and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Intent {
    /// The guest's number for it.
    pub unique: u64,
    /// What it wants.
    pub opcode: u32,
    /// How far it has come.
    pub phase: Phase,
    /// What it says, in short.
    pub digest: u64,
    /// When it began, in nanoseconds.
    pub time: u64,
    /// Device and inode of the file it is about; 0 for none.
    pub subject: (u64, u64),
    /// The same of a second one.
    pub other: (u64, u64),
    /// The node that it was answered with.
    pub node: u64,
    /// What was opened.
    pub handle: u64,
    /// The size of the file before it, or how much of it is done.
    pub progress: u64,
    /// What went wrong; 0 for nothing.
    pub errno: i32,
}

/// The slot of one head.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    state: &'a State,
    at: usize,
}

impl State {
    /// The slot of a request; `None` beyond the last.
    pub fn slot(&self, queue: u16, head: u16) -> Option<Slot<'_>> {
        if queue >= self.queues || head >= self.queue_size {
            return None;
        }
        let number = usize::from(queue) * usize::from(self.queue_size) + usize::from(head);
        Some(Slot {
            state: self,
            at: self.areas.slots + number * SLOT,
        })
    }
}

impl Slot<'_> {
    fn set(&self, word: usize, value: u64) {
        self.state.set(self.at + word, value);
    }

    fn get(&self, word: usize) -> u64 {
        self.state.get(self.at + word)
    }

    /// What it says of this request, if it does.
    pub fn read(&self, unique: u64, opcode: u32) -> Option<Intent> {
        let phase = self.get(PHASE);
        if self.get(0) != unique || (phase >> 32) as u32 != opcode {
            return None;
        }
        let phase = match phase & 0xff {
            1 => Phase::Begun,
            2 => Phase::Done,
            _ => return None,
        };
        Some(Intent {
            unique,
            opcode,
            phase,
            digest: self.get(DIGEST),
            time: self.get(TIME),
            subject: (self.get(SUBJECT), self.get(SUBJECT + 1)),
            other: (self.get(OTHER), self.get(OTHER + 1)),
            node: self.get(NODE),
            handle: self.get(HANDLE),
            progress: self.get(PROGRESS),
            errno: self.get(ERRNO) as i32,
        })
    }

    /// Says what is about to be done.
    pub fn begin(&self, intent: &Intent) {
        self.state.unset(self.at + PHASE);
        self.set(0, intent.unique);
        self.set(DIGEST, intent.digest);
        self.set(TIME, intent.time);
        self.set(SUBJECT, intent.subject.0);
        self.set(SUBJECT + 1, intent.subject.1);
        self.set(OTHER, intent.other.0);
        self.set(OTHER + 1, intent.other.1);
        self.set(PROGRESS, intent.progress);
        self.set(PHASE, u64::from(intent.opcode) << 32 | 1);
    }

    /// Says how far it has come.
    pub fn progress(&self, done: u64) {
        self.set(PROGRESS, done);
    }

    /// Says what came of it: number, opcode, digest, node, handle and errno. The
    /// rest stays as it was begun with.
    pub fn done(&self, intent: &Intent) {
        // What was begun counts until this does.
        if self.read(intent.unique, intent.opcode).is_none() {
            self.state.unset(self.at + PHASE);
            self.set(0, intent.unique);
            self.set(DIGEST, intent.digest);
        }
        self.set(NODE, intent.node);
        self.set(HANDLE, intent.handle);
        self.set(ERRNO, intent.errno.unsigned_abs().into());
        self.set(PHASE, u64::from(intent.opcode) << 32 | 2);
    }
}
