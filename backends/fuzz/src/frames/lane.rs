//! A queue as its driver sees it: where it lies, what is offered, and which descriptors
//! are free.

use std::collections::VecDeque;

use crate::chain::{Named, Table};
use crate::memory::{Memory, USER};
use pericarp_ring::{QueueLayout, SplitQueue};

/// Bytes from one queue's rings to the next one's.
pub(super) const STRIDE: u64 = 0x400;
/// Where the other rings lie from the first.
const AVAILABLE: u64 = 0x200;
const USED: u64 = 0x280;
/// Flags of a descriptor.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A piece of memory, and whether the device may write it.
pub(super) type Piece = (u64, u32, bool);

/// A chain that was offered.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) head: u16,
    pub(super) descriptors: Vec<u16>,
    /// Its indirect table.
    pub(super) table: Option<usize>,
    /// What it names, as the device may have read it.
    pub(super) named: Option<Named>,
}

/// The queue.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) number: u16,
    pub(super) size: u16,
    event_idx: bool,
    /// The next index of the available ring, and the used index as it was seen.
    pub(super) avail: u16,
    pub(super) used: u16,
    /// Where the device goes on.
    pub(super) base: u16,
    pub(super) running: bool,
    /// The device said that its ring is broken.
    pub(super) broken: bool,
    /// The driver broke it, or somebody for it.
    pub(super) poisoned: bool,
    pub(super) entries: VecDeque<Entry>,
    free: Vec<u16>,
}

impl Lane {
    pub(super) fn new(number: u16, size: u16, event_idx: bool) -> Self {
        Self {
            number,
            size,
            event_idx,
            avail: 0,
            used: 0,
            base: 0,
            running: false,
            broken: false,
            poisoned: false,
            entries: VecDeque::new(),
            free: (0..size).rev().collect(),
        }
    }

    /// Its place in guest memory.
    pub(super) fn at(&self) -> u64 {
        STRIDE * u64::from(self.number)
    }

    fn used_end(&self) -> u64 {
        self.at() + USED + 6 + 8 * u64::from(self.size)
    }

    /// Whether the device may write there, as to the used ring.
    pub(super) fn is_used_ring(&self, at: u64) -> bool {
        (self.at() + USED..self.used_end()).contains(&at)
    }

    /// True where descriptors end.
    pub(super) fn is_ring(&self, at: u64) -> bool {
        (self.at() + AVAILABLE..self.used_end()).contains(&at)
    }

    /// For the device.
    pub(super) fn open(&self, memory: &Memory, table: Table) -> SplitQueue {
        let at = USER + self.at();
        let layout = QueueLayout {
            size: self.size,
            descriptors: at,
            available: at + AVAILABLE,
            used: at + USED,
        };
        let memory = memory.tables[table].clone();
        let opened = SplitQueue::new(memory, layout, self.base, self.event_idx);
        opened.expect("the first region is in every table")
    }

    /// Writes a chain of these and offers it, if there are descriptors for it.
    pub(super) fn offer(
        &mut self,
        memory: &mut Memory,
        pieces: &[Piece],
        table: Option<(usize, u64)>,
    ) -> Option<u16> {
        let needed = if table.is_some() { 1 } else { pieces.len() };
        let full = self.entries.len() >= usize::from(self.size);
        if full || pieces.is_empty() || self.free.len() < needed {
            return None;
        }
        let descriptors = self.free.split_off(self.free.len() - needed);
        let (to, place): (u64, Vec<u16>) = match table {
            Some((_, at)) => (at, (0..pieces.len() as u16).collect()),
            None => (self.at(), descriptors.clone()),
        };
        for (n, &(address, len, write)) in pieces.iter().enumerate() {
            let next = place.get(n + 1).copied();
            let more = NEXT * u16::from(next.is_some());
            let flags = more | if write { WRITE } else { 0 };
            let at = to + 16 * u64::from(place[n]);
            put(memory, at, (address, len, flags, next.unwrap_or(0)));
        }
        let head = descriptors[0];
        if let Some((_, at)) = table {
            let len = 16 * pieces.len() as u32;
            let to = self.at() + 16 * u64::from(head);
            put(memory, to, (at, len, INDIRECT, 0));
        }
        let entry = Entry {
            head,
            descriptors,
            table: table.map(|(number, _)| number),
            named: None,
        };
        self.give(memory, entry);
        Some(head)
    }

    /// Offers a head, whatever it leads to.
    pub(super) fn give(&mut self, memory: &mut Memory, entry: Entry) {
        let ring = self.at() + AVAILABLE;
        let slot = u64::from(self.avail % self.size);
        memory.put(ring + 4 + 2 * slot, &entry.head.to_le_bytes());
        self.entries.push_back(entry);
        self.avail = self.avail.wrapping_add(1);
        memory.put(ring + 2, &self.avail.to_le_bytes());
    }

    /// Moves the available index, as no driver may.
    pub(super) fn jump(&mut self, memory: &mut Memory, by: i8) {
        let index = self.avail.wrapping_add_signed(by.into());
        memory.put(self.at() + AVAILABLE + 2, &index.to_le_bytes());
        self.poisoned = true;
    }

    /// Whether the device asked for a kick after what was offered last (virtio 1.3,
    /// 2.7.10 and 2.7.9).
    pub(super) fn wants_kick(&self, memory: &Memory) -> bool {
        if self.event_idx {
            let event = memory.get_u16(self.at() + USED + 4 + 8 * u64::from(self.size));
            event == self.avail.wrapping_sub(1)
        } else {
            memory.get_u16(self.at() + USED) & 1 == 0
        }
    }

    pub(super) fn used_index(&self, memory: &Memory) -> u16 {
        memory.get_u16(self.at() + USED + 2)
    }

    /// The used index, as it is in memory and may not be known yet.
    pub(super) fn used_now(&self, memory: &Memory) -> u16 {
        memory.now_u16(self.at() + USED + 2)
    }

    /// An element of the used ring: head and length.
    pub(super) fn element(&self, memory: &Memory, index: u16) -> (u16, u32) {
        let at = self.at() + USED + 4 + 8 * u64::from(index % self.size);
        let word = |at| memory.get_u16(at);
        let high = |at| u32::from(word(at + 2)) << 16;
        let head = u32::from(word(at)) | high(at);
        let len = u32::from(word(at + 4)) | high(at + 4);
        (head.try_into().unwrap_or(u16::MAX), len)
    }

    /// The driver has seen what is used up to here, and wants to be called for more.
    pub(super) fn saw(&mut self, memory: &mut Memory, used: u16) {
        self.used = used;
        let at = self.at() + AVAILABLE + 4 + 2 * u64::from(self.size);
        memory.put(at, &used.to_le_bytes());
    }

    /// What a chain names now.
    pub(super) fn walk(&self, memory: &Memory, table: Table, head: u16) -> Named {
        Named::walk_at(memory, table, (self.at(), self.size), head)
    }

    /// Descriptors of a chain that came back are free.
    pub(super) fn reclaim(&mut self, entry: &Entry) {
        self.free.extend(&entry.descriptors);
    }
}

/// Writes a descriptor.
pub(super) fn put(memory: &mut Memory, at: u64, (to, len, flags, next): (u64, u32, u16, u16)) {
    let mut raw = to.to_le_bytes().to_vec();
    raw.extend(len.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw.extend(next.to_le_bytes());
    memory.put(at, &raw);
}
