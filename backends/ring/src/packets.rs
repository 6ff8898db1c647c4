//! Queues that carry packets: chains that are emptied at once, and chains that
//! are kept until something comes to fill them.
//!
//! Nothing of such a queue is ever in flight between two turns of its worker: a
//! packet is read from a chain or written to some in one go. What is used is used
//! in the order in which it was offered, so that the used index alone says where a
//! successor goes on, and chains that nothing came for are left to it.
//!
//! A worker has a [`Departures`] or an [`Arrivals`] beside each [`SplitQueue`].

use std::collections::VecDeque;

use libc::iovec;

use crate::chain::{Chain, ChainError, MAX_SEGMENTS, Segments};
use crate::queue::{QueueError, SplitQueue};

/// Where `num_buffers` lies in the header of a packet (virtio 1.3, 5.1.6).
const NUM_BUFFERS: u64 = 10;
/// Bytes of the header that has it.
const LONG_HEADER: u64 = 12;
/// A read offers this much of the guest's memory while packets are small: each
/// piece of it costs the kernel time.
const SMALL: u64 = 2048;
/// Chains that cannot be filled, of one look at the ring.
const MANY_UNSOUND: u32 = 16;
/// So many small packets in a row after one that was not.
const PATIENCE: u8 = 64;

/// Chains that the driver fills and the device empties: some of them at a time.
#[derive(Debug, Default)]
pub struct Departures {
    /// Those that were taken, oldest first.
    taken: Vec<(u16, Result<(), ChainError>)>,
    /// Their segments, and storage for more.
    segments: Vec<Segments>,
}

impl Departures {
    /// Takes the next packets, at most `most`; they must be [finished](Self::finish)
    /// before others are taken. Gives how many there were.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`], where the first cannot be taken.
    pub fn take(&mut self, queue: &mut SplitQueue, most: usize) -> Result<usize, QueueError> {
        while self.taken.len() < most {
            let head = match queue.pop() {
                Ok(Some(head)) => head,
                Ok(None) => break,
                // Those before it go first; it will be there again.
                Err(_) if !self.taken.is_empty() => break,
                Err(error) => return Err(error),
            };
            let place = self.taken.len();
            if self.segments.len() == place {
                self.segments.push(Segments::default());
            }
            self.taken
                .push((head, self.segments[place].load(queue, head)));
        }
        Ok(self.taken.len())
    }

    /// One of them, and whether its chain is sound.
    pub fn packet(&mut self, index: usize) -> (Chain<'_>, Result<(), ChainError>) {
        let loaded = self.taken[index].1;
        (Chain::new(&mut self.segments[index]), loaded)
    }

    /// Where its bytes are. The memory stays valid until the queue is dropped.
    pub fn source(&self, index: usize) -> &[iovec] {
        self.segments[index].readable()
    }

    /// Their chains are the driver's again, with the next publish.
    pub fn finish(&mut self, queue: &mut SplitQueue) {
        for ((head, _), segments) in self.taken.drain(..).zip(&mut self.segments) {
            segments.trim();
            queue.push_used(head, 0);
        }
    }
}

/// What became of a packet that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It is the driver's, with the next publish.
    Done,
    /// It waits for more chains; [`Arrivals::waits`] is true until they are there.
    Waits,
    /// It does not fit what the driver offers, and is gone.
    TooLarge,
}

/// One chain that waits.
#[derive(Debug, Default)]
struct Held {
    head: u16,
    /// It can be filled: else it goes back empty, when its turn comes.
    sound: bool,
    segments: Segments,
}

/// Chains that the driver offers and the device fills.
#[derive(Debug)]
pub struct Arrivals {
    held: VecDeque<Held>,
    /// Storage of chains that went.
    spare: Vec<Held>,
    /// What the last target consisted of, and the bytes of it that are the guest's.
    list: Vec<iovec>,
    offered: u64,
    /// Where a packet ends that is larger than what was offered.
    tail: Box<[u8]>,
    /// Bytes a packet can have, header included, and of these the header.
    most: u64,
    header: u64,
    /// A packet may be spread over chains (VIRTIO_NET_F_MRG_RXBUF).
    merge: bool,
    /// More than [`SMALL`] is offered for so many packets.
    large: u8,
    /// Bytes of the packet that waits for more chains.
    waiting: Option<u64>,
    /// Chains that could not be filled, ever.
    unsound: u64,
}

// SAFETY: `list` leads into guest memory that the queue keeps mapped, and into
// `tail`, which is never resized; both move between threads with the queue.
#[expect(unsafe_code, reason = "iovec holds raw pointers")]
unsafe impl Send for Arrivals {}

impl Arrivals {
    /// For packets of at most `most` bytes, of which the first `header` are the
    /// header, spread over several chains if `merge`.
    pub fn new(most: usize, header: usize, merge: bool) -> Self {
        Self {
            held: VecDeque::new(),
            spare: Vec::new(),
            list: Vec::new(),
            offered: 0,
            tail: vec![0; most].into_boxed_slice(),
            most: most as u64,
            header: header as u64,
            merge,
            large: PATIENCE,
            waiting: None,
            unsound: 0,
        }
    }

    /// True while a packet waits for more chains.
    pub fn waits(&self) -> bool {
        self.waiting.is_some()
    }

    /// How many chains wait.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Chains that could not be filled, since this was asked last.
    pub fn take_unsound(&mut self) -> u64 {
        std::mem::take(&mut self.unsound)
    }

    /// Takes chains from the ring until there are enough for the next packet. False
    /// when there is none at all.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`].
    pub fn fill(&mut self, queue: &mut SplitQueue) -> Result<bool, QueueError> {
        let wanted = self.wanted();
        self.gather(queue, wanted)?;
        Ok(!self.held.is_empty())
    }

    fn wanted(&self) -> u64 {
        match (self.merge, self.large) {
            (false, _) => 1,
            (true, 0) => SMALL,
            (true, _) => self.most,
        }
    }

    /// Has at least so many bytes in sound chains, if the ring has them; gives what
    /// there is.
    fn gather(&mut self, queue: &mut SplitQueue, wanted: u64) -> Result<u64, QueueError> {
        let mut room = 0;
        for held in &self.held {
            room += held.room();
            if room >= wanted {
                return Ok(room);
            }
        }
        // A driver that offers without end is let wait after a ring full, and sooner
        // after what takes long and is good for nothing.
        let mut unsound = 0;
        for _ in 0..queue.size() {
            let full = self.held.len() >= usize::from(queue.size());
            if room >= wanted || full || unsound == MANY_UNSOUND {
                break;
            }
            let Some(head) = queue.pop()? else { break };
            let mut held = self.spare.pop().unwrap_or_default();
            held.head = head;
            held.sound = held.segments.load(queue, head).is_ok();
            let chain = Chain::new(&mut held.segments);
            held.sound &= chain.readable_len() == 0 && chain.writable_len() >= self.header;
            if !held.sound {
                self.unsound += 1;
                unsound += 1;
                // Its head is all that is still of interest.
                held.segments.trim();
                if self.held.is_empty() {
                    queue.push_used(head, 0);
                    self.spare.push(held);
                    continue;
                }
            }
            room += held.room();
            self.held.push_back(held);
        }
        Ok(room)
    }

    /// Where the next packet goes: chains, and memory of ours for what is larger
    /// than them. All of it stays valid until the next call, or until the queue is
    /// dropped.
    pub fn target(&mut self) -> &[iovec] {
        let wanted = self.wanted();
        self.list.clear();
        self.offered = 0;
        'chains: for held in self.held.iter().filter(|held| held.sound) {
            for segment in held.segments.writable() {
                if self.list.len() == MAX_SEGMENTS - 1 {
                    break 'chains;
                }
                self.offered += segment.iov_len as u64;
                self.list.push(*segment);
            }
            if self.offered >= wanted || !self.merge {
                break;
            }
        }
        self.list.push(iovec {
            iov_base: self.tail.as_mut_ptr().cast(),
            iov_len: self.tail.len(),
        });
        &self.list
    }

    /// A packet of so many bytes is where [`target`](Self::target) said.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`].
    pub fn deliver(&mut self, queue: &mut SplitQueue, bytes: u64) -> Result<Delivery, QueueError> {
        if bytes > SMALL {
            self.large = PATIENCE;
        } else {
            self.large = self.large.saturating_sub(1);
        }
        self.waiting = None;
        let room = if self.merge {
            self.gather(queue, bytes)?
        } else {
            self.held.front().map_or(0, Held::room)
        };
        if room >= bytes {
            self.hand_over(queue, bytes);
            return Ok(Delivery::Done);
        }
        if !self.merge || self.held.len() >= usize::from(queue.size()) {
            return Ok(Delivery::TooLarge);
        }
        self.waiting = Some(bytes);
        Ok(Delivery::Waits)
    }

    /// Goes on with the packet that waits.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`].
    pub fn go_on(&mut self, queue: &mut SplitQueue) -> Result<Delivery, QueueError> {
        match self.waiting {
            Some(bytes) => self.deliver(queue, bytes),
            None => Ok(Delivery::Done),
        }
    }

    fn hand_over(&mut self, queue: &mut SplitQueue, bytes: u64) {
        // How many chains, sound or not, it takes.
        let (mut count, mut sound, mut room) = (0, 0u16, 0);
        for held in &self.held {
            count += 1;
            sound += u16::from(held.sound);
            room += held.room();
            if room >= bytes {
                break;
            }
        }
        if bytes > self.offered {
            let end = (bytes - self.offered).min(self.tail.len() as u64) as usize;
            let tail = std::mem::take(&mut self.tail);
            self.put(self.offered, &tail[..end]);
            self.tail = tail;
        }
        if self.header >= LONG_HEADER {
            self.put(NUM_BUFFERS, &sound.to_le_bytes());
        }
        // The chains of a packet follow each other: those that are none go first.
        for held in self.held.iter().take(count).filter(|held| !held.sound) {
            queue.push_used(held.head, 0);
        }
        let mut left = bytes;
        for held in self.held.drain(..count) {
            if held.sound {
                let filled = left.min(held.room());
                left -= filled;
                queue.push_used(held.head, filled as u32);
            }
            let mut held = held;
            held.segments.trim();
            self.spare.push(held);
        }
        // Unsound ones are never the first.
        while let Some(held) = self.held.pop_front_if(|held| !held.sound) {
            queue.push_used(held.head, 0);
            self.spare.push(held);
        }
    }

    /// Writes into the chains as if they were one.
    fn put(&self, mut offset: u64, mut bytes: &[u8]) {
        for held in self.held.iter().filter(|held| held.sound) {
            if bytes.is_empty() {
                return;
            }
            let room = held.room();
            if offset < room {
                let n = held.segments.put(offset, bytes);
                bytes = &bytes[n..];
                offset = 0;
            } else {
                offset -= room;
            }
        }
    }

    /// Leaves the chains that nothing came for to whoever has the queue next. A
    /// packet that waits is gone. True if there was one.
    pub fn give_back(&mut self, queue: &mut SplitQueue) -> bool {
        queue.undo_pops(self.held.len() as u16);
        self.spare.extend(self.held.drain(..));
        self.waiting.take().is_some()
    }
}

impl Held {
    fn room(&self) -> u64 {
        if self.sound {
            self.segments.writable_len()
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Guest;

    const DATA: u64 = 0x1_0000;
    const MOST: usize = 4000;

    /// Offers a chain of these segments, device-writable, one after another in the
    /// guest's memory from `at`; returns where the next is.
    fn offer(guest: &mut Guest, head: u16, at: u64, lengths: &[u32]) -> u64 {
        let mut address = at;
        for (n, &len) in lengths.iter().enumerate() {
            let index = head + n as u16;
            let next = (n + 1 < lengths.len()) as u16;
            // A gap, so that segments stay apart.
            guest.descriptor(index, (address, len, 2 | next, index + 1));
            address += u64::from(len) + 1;
        }
        guest.offer(head);
        address
    }

    /// What a read of `bytes` would leave in the target.
    fn receive(arrivals: &mut Arrivals, bytes: &[u8]) {
        let mut rest = bytes;
        for segment in arrivals.target() {
            let n = rest.len().min(segment.iov_len);
            // SAFETY: the target is valid memory of this length.
            #[expect(unsafe_code, reason = "plays the kernel")]
            unsafe {
                std::ptr::copy_nonoverlapping(rest.as_ptr(), segment.iov_base.cast(), n);
            }
            rest = &rest[n..];
        }
        assert!(rest.is_empty());
    }

    fn packet(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n * 7 + len) as u8).collect()
    }

    #[test]
    fn a_packet_is_spread_over_chains_and_says_over_how_many() {
        let mut guest = Guest::new(16);
        let mut queue = guest.queue(false);
        let mut arrivals = Arrivals::new(MOST, 12, true);
        let mut at = DATA;
        for head in [0, 4, 8] {
            at = offer(&mut guest, head, at, &[5, 7, 88]);
        }
        assert!(arrivals.fill(&mut queue).unwrap());
        receive(&mut arrivals, &packet(150));
        assert_eq!(arrivals.deliver(&mut queue, 150), Ok(Delivery::Done));
        queue.publish();
        assert_eq!(guest.used_idx(), 2);
        assert_eq!((guest.used(0), guest.used(1)), ((0, 100), (4, 50)));
        assert_eq!(guest.get::<2>(DATA + 6 + 5), [2, 0], "num_buffers");
        assert_eq!(arrivals.held(), 1);
        arrivals.give_back(&mut queue);
        assert_eq!(queue.next_avail(), 2);
    }

    #[test]
    fn a_packet_waits_for_chains_and_nothing_of_it_is_seen_before() {
        let mut guest = Guest::new(16);
        let mut queue = guest.queue(false);
        let mut arrivals = Arrivals::new(MOST, 12, true);
        let next = offer(&mut guest, 0, DATA, &[100]);
        assert!(arrivals.fill(&mut queue).unwrap());
        receive(&mut arrivals, &packet(150));
        assert_eq!(arrivals.deliver(&mut queue, 150), Ok(Delivery::Waits));
        queue.publish();
        assert_eq!(guest.used_idx(), 0);
        offer(&mut guest, 1, next, &[49]);
        assert_eq!(arrivals.go_on(&mut queue), Ok(Delivery::Waits));
        offer(&mut guest, 2, next + 50, &[100]);
        assert_eq!(arrivals.go_on(&mut queue), Ok(Delivery::Done));
        queue.publish();
        assert_eq!(guest.used_idx(), 3);
        assert_eq!(guest.get::<49>(next)[..], packet(150)[100..149]);
        assert_eq!(guest.get::<1>(next + 50)[..], packet(150)[149..]);
    }

    #[test]
    fn chains_that_cannot_be_filled_go_back_empty_and_in_order() {
        let mut guest = Guest::new(16);
        let mut queue = guest.queue(false);
        let mut arrivals = Arrivals::new(MOST, 12, true);
        // Too short for a header, one the device may read, one out of memory.
        offer(&mut guest, 0, DATA, &[11]);
        let next = offer(&mut guest, 1, DATA + 20, &[60]);
        guest.descriptor(2, (next, 100, 0, 0));
        guest.offer(2);
        guest.descriptor(3, (u64::MAX - 5, 100, 2, 0));
        guest.offer(3);
        offer(&mut guest, 4, next, &[60]);
        assert!(arrivals.fill(&mut queue).unwrap());
        receive(&mut arrivals, &packet(70));
        assert_eq!(arrivals.deliver(&mut queue, 70), Ok(Delivery::Done));
        queue.publish();
        let used: Vec<_> = (0..guest.used_idx()).map(|n| guest.used(n)).collect();
        assert_eq!(used, [(0, 0), (2, 0), (3, 0), (1, 60), (4, 10)]);
        assert_eq!(guest.get::<2>(DATA + 20 + 10), [2, 0]);
        assert_eq!(arrivals.take_unsound(), 3);
    }

    #[test]
    fn without_merging_a_packet_has_one_chain_or_none() {
        let mut guest = Guest::new(16);
        let mut queue = guest.queue(false);
        let mut arrivals = Arrivals::new(MOST, 12, false);
        let next = offer(&mut guest, 0, DATA, &[100]);
        offer(&mut guest, 1, next, &[100]);
        for (bytes, want) in [(101, Delivery::TooLarge), (100, Delivery::Done)] {
            assert!(arrivals.fill(&mut queue).unwrap());
            receive(&mut arrivals, &packet(bytes));
            assert_eq!(arrivals.deliver(&mut queue, bytes as u64), Ok(want));
        }
        queue.publish();
        assert_eq!((guest.used_idx(), guest.used(0)), (1, (0, 100)));
        assert_eq!(guest.get::<2>(DATA + 10), [1, 0]);
    }

    #[test]
    fn a_ring_that_is_too_small_for_a_packet_drops_it() {
        let mut guest = Guest::new(2);
        let mut queue = guest.queue(false);
        let mut arrivals = Arrivals::new(MOST, 12, true);
        offer(&mut guest, 0, DATA, &[50]);
        offer(&mut guest, 1, DATA + 60, &[50]);
        assert!(arrivals.fill(&mut queue).unwrap());
        receive(&mut arrivals, &packet(101));
        assert_eq!(arrivals.deliver(&mut queue, 101), Ok(Delivery::TooLarge));
        receive(&mut arrivals, &packet(100));
        assert_eq!(arrivals.deliver(&mut queue, 100), Ok(Delivery::Done));
    }

    #[test]
    fn departures_are_read_and_come_back_in_order() {
        let mut guest = Guest::new(8);
        let mut queue = guest.queue(false);
        guest.put(DATA, b"a packet");
        guest.descriptor(0, (DATA, 3, 1, 1));
        guest.descriptor(1, (DATA + 3, 5, 0, 0));
        guest.descriptor(2, (DATA, 0, 0, 0));
        guest.offer(0);
        guest.offer(2);
        let mut departures = Departures::default();
        assert_eq!(departures.take(&mut queue, 1), Ok(1));
        let mut bytes = [0; 8];
        let (chain, loaded) = departures.packet(0);
        assert!(loaded.is_ok() && chain.peek(&mut bytes));
        assert_eq!(&bytes, b"a packet");
        assert_eq!(departures.source(0).len(), 1, "one piece of memory");
        departures.finish(&mut queue);
        // A broken ring behind a broken chain.
        guest.offer(77);
        assert_eq!(departures.take(&mut queue, 8), Ok(1));
        assert_eq!(departures.packet(0).1, Err(ChainError::Empty));
        departures.finish(&mut queue);
        assert_eq!(departures.take(&mut queue, 8), Err(QueueError::BadHead(77)));
        queue.publish();
        assert_eq!((guest.used(0), guest.used(1)), ((0, 0), (2, 0)));
    }

    proptest! {
        /// Whatever chains there are and whatever comes: what is seen is whole, each
        /// chain is used once and in order, and what is left is given back.
        #[test]
        fn every_packet_is_whole_or_not_there(
            chains in prop::collection::vec(prop::collection::vec(1u32..300, 1..4), 1..40),
            packets in prop::collection::vec((12usize..3000, 0usize..6), 1..40),
            merge in any::<bool>(),
        ) {
            let mut guest = Guest::new(128);
            let mut queue = guest.queue(false);
            let mut arrivals = Arrivals::new(MOST, 12, merge);
            let mut chains = chains.into_iter().enumerate();
            let mut offered = Vec::new();
            let mut at = DATA;
            let mut give = |guest: &mut Guest, count: usize, offered: &mut Vec<_>| {
                for (n, lengths) in chains.by_ref().take(count) {
                    let head = 3 * n as u16;
                    let start = at;
                    at = offer(guest, head, at, &lengths);
                    offered.push((head, start, lengths));
                }
            };
            let mut expected = Vec::new();
            for (len, count) in packets {
                give(&mut guest, count, &mut offered);
                let delivery = if arrivals.waits() {
                    arrivals.go_on(&mut queue).unwrap()
                } else if arrivals.fill(&mut queue).unwrap() {
                    receive(&mut arrivals, &packet(len));
                    expected.push(packet(len));
                    arrivals.deliver(&mut queue, len as u64).unwrap()
                } else {
                    continue;
                };
                if delivery == Delivery::TooLarge {
                    expected.pop();
                }
            }
            if arrivals.give_back(&mut queue) {
                expected.pop();
            }
            queue.publish();
            let used = usize::from(guest.used_idx());
            prop_assert_eq!(used, usize::from(queue.next_avail()));
            // As a driver reads it.
            let mut elements = (0..used as u16).map(|n| guest.used(n));
            let mut got = Vec::new();
            let contents = |(head, len): (u32, u32)| {
                let (_, start, lengths) = offered.iter().find(|(h, ..)| u32::from(*h) == head)
                    .expect("a chain that was offered");
                let mut bytes = Vec::new();
                let mut at = *start;
                for &segment in lengths {
                    for n in 0..u64::from(segment) {
                        bytes.push(guest.get::<1>(at + n)[0]);
                    }
                    at += u64::from(segment) + 1;
                }
                bytes.truncate(len as usize);
                bytes
            };
            while let Some(element) = elements.next() {
                if element.1 == 0 {
                    continue;
                }
                let mut bytes = contents(element);
                let count = u16::from_le_bytes([bytes[10], bytes[11]]);
                for _ in 1..count {
                    bytes.extend(contents(elements.next().expect("all of its chains")));
                }
                let sent = packet(bytes.len());
                bytes[10..12].copy_from_slice(&sent[10..12]);
                got.push(bytes);
            }
            prop_assert_eq!(got, expected);
            let mut heads: Vec<_> = (0..used as u16).map(|n| guest.used(n).0).collect();
            heads.sort_unstable();
            let all: Vec<_> = offered.iter().take(used).map(|(head, ..)| u32::from(*head)).collect();
            prop_assert_eq!(heads, all);
        }
    }
}
