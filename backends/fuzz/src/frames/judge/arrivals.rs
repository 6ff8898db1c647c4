//! Packets that came to the guest: whole, in order, each once, in chains that are used
//! in the order in which they were offered; and none is left that had room.

use std::collections::VecDeque;

use super::{CHAIN, LENGTH, NO_ROOM, is_room};
use crate::chain::Named;
use crate::frames::lane::Entry;
use crate::frames::rules::Rules;
use crate::memory::Memory;

/// Where `num_buffers` is.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// What came to one queue.
pub(super) struct Arrived<'a> {
    pub(super) memory: &'a Memory,
    pub(super) rules: Rules,
    /// Entries of the ring.
    pub(super) size: usize,
    /// What the host sent and nobody has seen arrive.
    pub(super) sent: &'a mut VecDeque<Vec<u8>>,
    /// All chains that were there, oldest first.
    pub(super) chains: VecDeque<&'a Entry>,
    /// Drops, by reason.
    pub(super) due: &'a mut [u64; 4],
}

fn named(entry: &Entry) -> &Named {
    entry.named.as_ref().expect("it was looked at")
}

impl Arrived<'_> {
    /// The first `count` chains came back in these elements.
    pub(super) fn judge(&mut self, count: usize, elements: Vec<(u16, u32)>) {
        let rules = self.rules;
        let done: Vec<&Entry> = self.chains.iter().copied().take(count).collect();
        let parts = done.into_iter().partition(|entry| self.is_room(entry));
        let (filled, empty): (Vec<&Entry>, Vec<&Entry>) = parts;
        self.due[CHAIN] += empty.len() as u64;
        let (mut filled, mut empty) = (VecDeque::from(filled), VecDeque::from(empty));
        // Chains of one packet, and how many are still to come.
        let (mut packet, mut left) = (Vec::new(), 0);
        for (head, len) in elements {
            if empty.front().is_some_and(|entry| entry.head == head) && len == 0 {
                empty.pop_front();
                continue;
            }
            let entry = filled.pop_front().expect("a chain that was offered");
            assert_eq!(entry.head, head, "used in order: {entry:?}");
            let room = Named::bytes(&named(entry).writable);
            assert!(len > 0 && u64::from(len) <= room, "{len} of {room} bytes");
            let bytes = named(entry).written(self.memory, len as usize);
            let bytes = bytes.expect("sound");
            if left == 0 {
                left = 1;
                if rules.header() == 12 {
                    let count = bytes[NUM_BUFFERS].first_chunk().copied();
                    left = u16::from_le_bytes(count.expect("two bytes"));
                    assert!(left > 0 && (left == 1 || rules.merges()), "{left} buffers");
                }
            }
            left -= 1;
            packet.extend(bytes);
            assert!(left == 0 || u64::from(len) == room, "a gap: {entry:?}");
            if left == 0 {
                self.came(&std::mem::take(&mut packet));
                self.use_up(head);
            }
        }
        assert_eq!(left, 0, "a packet is published whole");
        self.chains.retain(|entry| {
            let gone = empty
                .iter()
                .chain(&filled)
                .any(|e| std::ptr::eq(*e, *entry));
            !gone
        });
    }

    /// This chain is used, and with it those before it that nothing can be written into.
    fn use_up(&mut self, head: u16) {
        let place = self.chains.iter().position(|entry| entry.head == head);
        self.chains.drain(..=place.expect("a chain that was there"));
    }

    /// Bytes of each chain that can be filled.
    fn rooms(&self) -> impl Iterator<Item = u64> {
        let chains = self.chains.iter().filter(|entry| self.is_room(entry));
        chains.map(|entry| Named::bytes(&named(entry).writable))
    }

    fn is_room(&self, entry: &Entry) -> bool {
        is_room(named(entry), &self.rules)
    }

    /// A packet as the driver sees it. What was sent before it was dropped, with reason.
    fn came(&mut self, packet: &[u8]) {
        loop {
            let sent = self.sent.pop_front();
            let mut sent = sent.expect("nobody sent this, or not after what came before");
            let same = sent.len() == packet.len();
            if same && self.rules.header() == 12 {
                sent[NUM_BUFFERS].copy_from_slice(&packet[NUM_BUFFERS]);
            }
            if same && sent == packet {
                return;
            }
            self.dropped(&sent);
        }
    }

    /// A packet that is not there: it was none, or there was no room for it.
    fn dropped(&mut self, sent: &[u8]) {
        if sent.len() < self.rules.least() {
            self.due[LENGTH] += 1;
            return;
        }
        let len = sent.len() as u64;
        if self.rules.merges() {
            let all: u64 = self.rooms().sum();
            // Those in front that nothing can be written into are used at once.
            let unsound = self.chains.iter().take_while(|entry| !self.is_room(entry));
            let full = self.chains.len() - unsound.count() >= self.size;
            assert!(full && all < len, "{len} bytes lost, with room for {all}");
        } else {
            let first = self.rooms().next();
            assert!(
                first.is_some_and(|room| room < len),
                "{len} bytes lost, with room for {first:?}"
            );
        }
        self.due[NO_ROOM] += 1;
    }

    /// What is still there had no room, or nobody looked at it.
    pub(super) fn rest(&mut self) {
        while let Some(sent) = self.sent.front() {
            let Some(first) = self.rooms().next() else {
                return;
            };
            let len = sent.len() as u64;
            let all: u64 = self.rooms().sum();
            let short = sent.len() < self.rules.least();
            if !short && self.rules.merges() {
                assert!(all < len, "{len} bytes wait, with room for {all}");
                if self.chains.len() < self.size {
                    return;
                }
            }
            assert!(
                short || self.rules.merges() || first < len,
                "{len} bytes wait for {first}"
            );
            let sent = self.sent.pop_front().unwrap_or_default();
            self.dropped(&sent);
        }
    }
}
