//! The in-flight requests of one queue: a slab indexed by descriptor head.
//!
//! A head can be in flight once at most, so it is the key: finding a request is
//! an index, a duplicate is one flag. Slots keep their segment storage between
//! requests, so nothing is allocated once a queue is warm. Requests whose
//! buffers the disk cannot take as they are borrow an aligned bounce buffer
//! from a small pool; when it is empty they wait their turn, so that a guest
//! cannot make us allocate without bound.
//!
//! A worker owns the queue, pops with [`RequestQueue::pop`] and ends every
//! request with [`RequestQueue::finish`]; a popped request is never dropped in
//! silence, and the queue is not taken apart while `in_flight` is not zero.

use std::collections::VecDeque;

use libc::iovec;

use crate::chain::{Chain, ChainError, Segments};
use crate::inflight::{QueueRecord, Recovered};
use crate::queue::{QueueError, SplitQueue};

/// Bytes of one bounce buffer; longer requests go in several steps.
const BOUNCE_SIZE: usize = 128 * 1024;
/// Bounce buffers one queue may hold.
const BOUNCE_COUNT: usize = 16;
/// Alignment that satisfies every O_DIRECT file.
const BOUNCE_ALIGN: usize = 4096;

/// Where the bytes of an I/O operation are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer {
    /// In the guest's own segments: no copy.
    Chain,
    /// In an aligned buffer of ours.
    Bounce,
}

#[derive(Debug, Default)]
struct Slot<R> {
    busy: bool,
    segments: Segments,
    state: R,
    bounce: Option<Bounce>,
}

/// A queue and the requests it has in flight. `R` is the device's own state of
/// one request.
#[derive(Debug)]
pub struct RequestQueue<R> {
    queue: SplitQueue,
    slots: Box<[Slot<R>]>,
    in_flight: u16,
    idle_bounce: Vec<Bounce>,
    bounce_made: usize,
    /// Heads waiting for a bounce buffer, first come first served.
    waiting: VecDeque<u16>,
    /// For a successor, where one is provided for.
    record: Option<QueueRecord>,
    /// What a predecessor left in flight, the oldest last.
    again: Vec<u16>,
}

impl<R: Default> RequestQueue<R> {
    /// Wraps a queue that has nothing in flight.
    pub fn new(queue: SplitQueue) -> Self {
        let slots = (0..queue.size()).map(|_| Slot::default()).collect();
        Self {
            queue,
            slots,
            in_flight: 0,
            idle_bounce: Vec::new(),
            bounce_made: 0,
            waiting: VecDeque::new(),
            record: None,
            again: Vec::new(),
        }
    }

    /// Keeps this record from now on. What it says was in flight comes out of
    /// [`pop_again`](Self::pop_again), which must be emptied before the first pop.
    #[must_use]
    pub fn with_record(mut self, recovered: Option<Recovered>) -> Self {
        if let Some(Recovered { record, again }) = recovered {
            self.record = Some(record);
            self.again = again;
        }
        self
    }

    /// The next request of a predecessor, oldest first, as if popped just now.
    pub fn pop_again(&mut self) -> Option<(u16, Result<(), ChainError>)> {
        let head = self.again.pop()?;
        Some((head, self.load(head)))
    }

    fn load(&mut self, head: u16) -> Result<(), ChainError> {
        let slot = &mut self.slots[usize::from(head)];
        slot.busy = true;
        slot.state = R::default();
        self.in_flight += 1;
        slot.segments.load(&self.queue, head)
    }

    /// Makes all finished requests visible; see [`SplitQueue::publish`].
    #[inline]
    pub fn publish(&mut self) -> bool {
        let call = self.queue.publish();
        if let Some(record) = &mut self.record {
            record.published(self.queue.published());
        }
        call
    }

    /// Requests popped and not yet finished.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The ring below.
    pub fn ring(&mut self) -> &mut SplitQueue {
        &mut self.queue
    }

    /// Pops the next chain and loads it into its slot. The inner error says
    /// that the chain is malformed; it is in flight all the same and must be
    /// finished.
    ///
    /// # Errors
    /// [`QueueError`] when the ring itself is broken.
    #[expect(clippy::type_complexity, reason = "two layers of failure, both local")]
    pub fn pop(&mut self) -> Result<Option<(u16, Result<(), ChainError>)>, QueueError> {
        let Some(head) = self.queue.pop()? else {
            return Ok(None);
        };
        if self.slots[usize::from(head)].busy {
            self.queue.undo_pops(1);
            return Err(QueueError::DuplicateHead(head));
        }
        // Before anything of it is done.
        if let Some(record) = &mut self.record
            && let Some(descriptor) = self.queue.descriptor(head)
        {
            record.submitted(head, descriptor);
        }
        Ok(Some((head, self.load(head))))
    }

    /// The chain and state of an in-flight request.
    pub fn request(&mut self, head: u16) -> (Chain<'_>, &mut R) {
        let slot = &mut self.slots[usize::from(head)];
        debug_assert!(slot.busy);
        (Chain::new(&mut slot.segments), &mut slot.state)
    }

    /// Ends a request: its element is pushed and is visible with the next
    /// publish. Returns a request that may now start because it waited for the
    /// bounce buffer this one held.
    pub fn finish(&mut self, head: u16, written: u32) -> Option<u16> {
        let slot = &mut self.slots[usize::from(head)];
        debug_assert!(slot.busy);
        slot.busy = false;
        slot.segments.trim();
        self.in_flight -= 1;
        self.queue.push_used(head, written);
        if let Some(record) = &mut self.record {
            record.completed(head);
        }
        let bounce = slot.bounce.take()?;
        let next = self.waiting.pop_front();
        match next {
            Some(waiter) => self.slots[usize::from(waiter)].bounce = Some(bounce),
            None => self.idle_bounce.push(bounce),
        }
        next
    }

    /// Makes sure that the request holds a bounce buffer. False when none is
    /// left: the request is queued and [`finish`](Self::finish) names it later.
    #[must_use]
    pub fn take_bounce(&mut self, head: u16) -> bool {
        let slot = &mut self.slots[usize::from(head)];
        if slot.bounce.is_some() {
            return true;
        }
        if let Some(bounce) = self.idle_bounce.pop() {
            slot.bounce = Some(bounce);
        } else if self.bounce_made < BOUNCE_COUNT {
            self.bounce_made += 1;
            slot.bounce = Some(Bounce::new());
        } else {
            self.waiting.push_back(head);
            return false;
        }
        true
    }

    /// The segments a read from the file goes to: all that is unconsumed, or
    /// what fits into the bounce buffer. The memory stays valid and the slice
    /// in place until the request is finished or its chain advanced.
    pub fn read_target(&mut self, head: u16, buffer: Buffer) -> &[iovec] {
        let slot = &mut self.slots[usize::from(head)];
        match (buffer, &mut slot.bounce) {
            (Buffer::Bounce, Some(bounce)) => bounce.sized(slot.segments.writable()),
            _ => slot.segments.writable(),
        }
    }

    /// The segments a write to the file comes from; a bounce buffer is filled
    /// from the chain here.
    pub fn write_source(&mut self, head: u16, buffer: Buffer) -> &[iovec] {
        let slot = &mut self.slots[usize::from(head)];
        match (buffer, &mut slot.bounce) {
            (Buffer::Bounce, Some(bounce)) => {
                bounce.sized(slot.segments.readable());
                let filled = Chain::new(&mut slot.segments).peek(bounce.bytes());
                debug_assert!(filled, "sized from the same segments");
                &bounce.iov
            }
            _ => slot.segments.readable(),
        }
    }

    /// Takes note that a read delivered `bytes`: copies them out of the bounce
    /// buffer if they went there, and consumes that much of the chain.
    pub fn read_done(&mut self, head: u16, buffer: Buffer, bytes: u64) {
        let slot = &mut self.slots[usize::from(head)];
        let mut chain = Chain::new(&mut slot.segments);
        match (buffer, &mut slot.bounce) {
            (Buffer::Bounce, Some(bounce)) => {
                let got = bounce.bytes();
                let n = got.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
                chain.write(&got[..n]);
            }
            _ => chain.advance_writable(bytes),
        }
    }

    /// Takes note that a write stored `bytes`.
    pub fn write_done(&mut self, head: u16, bytes: u64) {
        Chain::new(&mut self.slots[usize::from(head)].segments).advance_readable(bytes);
    }
}

/// An aligned buffer of [`BOUNCE_SIZE`] bytes.
#[derive(Debug)]
struct Bounce {
    storage: Vec<u8>,
    start: usize,
    iov: [iovec; 1],
}

#[expect(unsafe_code, reason = "iovec holds a raw pointer into our own storage")]
// SAFETY: the pointer leads into the heap block that `storage` owns, which is
// never resized and moves between threads only together with it.
unsafe impl Send for Bounce {}

impl Bounce {
    fn new() -> Self {
        let mut storage = vec![0; BOUNCE_SIZE + BOUNCE_ALIGN];
        let start = storage.as_ptr().align_offset(BOUNCE_ALIGN);
        let iov_base = storage[start..].as_mut_ptr().cast();
        Self {
            storage,
            start,
            iov: [iovec {
                iov_base,
                iov_len: BOUNCE_SIZE,
            }],
        }
    }

    /// Sets the length to that of `segments`, at most the buffer's size.
    fn sized(&mut self, segments: &[iovec]) -> &[iovec] {
        let total: usize = segments.iter().map(|s| s.iov_len).sum();
        self.iov[0].iov_len = total.min(BOUNCE_SIZE);
        &self.iov
    }

    fn bytes(&mut self) -> &mut [u8] {
        let len = self.iov[0].iov_len;
        &mut self.storage[self.start..self.start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Guest;

    const DATA: u64 = 0x1_0000;

    /// A queue with `count` chains of `readable` and `writable` bytes offered.
    fn queue(count: u16, readable: u32, writable: u32) -> (Guest, RequestQueue<u32>) {
        let mut guest = Guest::new(64);
        for n in 0..count {
            let head = 2 * n;
            guest.descriptor(head, (DATA, readable, 1, head + 1));
            guest.descriptor(head + 1, (DATA + 0x8000, writable, 2, 0));
            guest.offer(head);
        }
        let queue = RequestQueue::new(guest.queue(false));
        (guest, queue)
    }

    fn pop(queue: &mut RequestQueue<u32>) -> u16 {
        let (head, loaded) = queue.pop().unwrap().unwrap();
        loaded.unwrap();
        head
    }

    #[test]
    fn a_head_in_flight_cannot_come_again() {
        let (mut guest, mut queue) = queue(1, 16, 16);
        let head = pop(&mut queue);
        guest.offer(head);
        assert_eq!(queue.pop().unwrap_err(), QueueError::DuplicateHead(head));
        assert_eq!(queue.in_flight(), 1);
    }

    #[test]
    fn a_finished_head_may_come_again_with_fresh_state() {
        let (mut guest, mut queue) = queue(1, 16, 16);
        let head = pop(&mut queue);
        *queue.request(head).1 = 7;
        assert_eq!(queue.finish(head, 3), None);
        queue.publish();
        assert_eq!(guest.used(0), (u32::from(head), 3));
        guest.offer(head);
        assert_eq!(pop(&mut queue), head);
        assert_eq!(*queue.request(head).1, 0);
    }

    #[test]
    fn bytes_are_consumed_from_the_front_and_the_status_from_the_end() {
        let (guest, mut queue) = queue(1, 6, 5);
        guest.put(DATA, b"header");
        let head = pop(&mut queue);
        let (mut chain, _) = queue.request(head);
        let mut four = [0; 4];
        assert!(chain.read(&mut four));
        assert_eq!(&four, b"head");
        assert!(!chain.read(&mut four), "two bytes are left");
        assert_eq!(chain.readable_len(), 2);
        assert!(chain.take_status());
        assert_eq!(chain.writable_len(), 4);
        assert_eq!(chain.write(b"abcdef"), 4);
        assert_eq!(chain.writable_len(), 0);
        assert!(chain.write_status(9));
        assert_eq!(&guest.get::<5>(DATA + 0x8000), b"abcd\x09");
    }

    #[test]
    fn a_broken_chain_keeps_its_status_byte_and_nothing_else() {
        let mut guest = Guest::new(8);
        guest.descriptor(0, (u64::MAX - 100, 16, 1, 1));
        guest.descriptor(1, (DATA, 32, 3, 2));
        guest.descriptor(2, (DATA + 64, 1, 2, 0));
        guest.offer(0);
        let mut queue = RequestQueue::<()>::new(guest.queue(false));
        let (head, loaded) = queue.pop().unwrap().unwrap();
        assert_eq!(loaded, Err(ChainError::BadAddress(u64::MAX - 100)));
        let (mut chain, ()) = queue.request(head);
        assert_eq!((chain.readable_len(), chain.writable_len()), (0, 0));
        assert_eq!(chain.write(b"x"), 0);
        assert!(chain.write_status(1));
        assert_eq!(guest.get::<1>(DATA + 64), [1]);
    }

    #[test]
    fn bounce_buffers_are_bounded_and_handed_on_in_order() {
        let count = BOUNCE_COUNT as u16 + 2;
        let (guest, mut queue) = queue(count, 600, 600);
        guest.put(DATA, &[0xab; 600]);
        let heads: Vec<u16> = (0..count).map(|_| pop(&mut queue)).collect();
        for (n, &head) in heads.iter().enumerate() {
            assert_eq!(queue.take_bounce(head), n < BOUNCE_COUNT);
        }
        let source = queue.write_source(heads[0], Buffer::Bounce);
        assert_eq!(source[0].iov_len, 600);
        assert_eq!(source[0].iov_base as usize % BOUNCE_ALIGN, 0);
        assert_eq!(queue.finish(heads[5], 0), Some(heads[BOUNCE_COUNT]));
        assert_eq!(queue.finish(heads[0], 0), Some(heads[BOUNCE_COUNT + 1]));
        assert_eq!(queue.finish(heads[1], 0), None);
        assert!(queue.take_bounce(heads[BOUNCE_COUNT]), "it holds one now");
    }

    #[test]
    fn a_bounced_read_arrives_in_the_chain() {
        let (guest, mut queue) = queue(1, 16, 600);
        let head = pop(&mut queue);
        assert!(queue.take_bounce(head));
        assert_eq!(queue.read_target(head, Buffer::Bounce)[0].iov_len, 600);
        let slot = &mut queue.slots[usize::from(head)];
        slot.bounce.as_mut().unwrap().bytes()[..5].copy_from_slice(b"hello");
        queue.read_done(head, Buffer::Bounce, 5);
        assert_eq!(&guest.get::<5>(DATA + 0x8000), b"hello");
        assert_eq!(queue.request(head).0.writable_len(), 595);
    }
}
