//! One split virtqueue on raw pointers that were checked once.
//!
//! A worker calls `pop`, `push_used`, `publish` and the two notification
//! switches; nobody else touches a queue while a worker has it. The layout is
//! resolved and bounds-checked in [`SplitQueue::new`]; every access after that
//! is an index below `size` from one of three base pointers.
//!
//! One `used.idx` store covers all elements pushed since the last one, which
//! is what makes a batch cost one fence and one signal.
#![expect(unsafe_code)]
// UNSAFETY: guest memory is shared with a running guest, so it can only be
// read and written through raw pointers, volatile or atomic.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;

use crate::inflight::cut;
use crate::memory::GuestMemory;
use crate::shared::{self, Fence};

/// The largest queue this implementation serves.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.3, 2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY (virtio 1.3, 2.7.8).
const USED_F_NO_NOTIFY: u16 = 1;

/// Why a queue cannot be set up, or can no longer be served.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QueueError {
    /// Not a power of two, or above [`MAX_QUEUE_SIZE`].
    #[error("queue size {0} is not a power of two between 1 and {MAX_QUEUE_SIZE}")]
    BadSize(u16),
    /// A ring is misaligned or not wholly inside one memory region.
    #[error(
        "the {ring} ring at front-end address {address:#x} is not in shared memory or not aligned"
    )]
    BadAddress {
        /// Which of the three rings.
        ring: &'static str,
        /// The address the front end gave.
        address: u64,
    },
    /// The driver claims more available chains than the queue can hold.
    #[error("the driver moved avail.idx {0} entries ahead, more than the queue holds")]
    AvailJump(u16),
    /// A head index beyond the descriptor table.
    #[error("the driver made descriptor {0} available, which is beyond the table")]
    BadHead(u16),
    /// The front end took away memory the queue lives in.
    #[error("the front end truncated the memory it had shared")]
    MemoryLost,
    /// A head that is already in flight.
    #[error("the driver made descriptor {0} available twice")]
    DuplicateHead(u16),
}

/// Where a queue's three rings lie, in front-end virtual addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLayout {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table, 16 bytes each.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// One descriptor, copied out of guest memory (virtio 1.3, 2.7.5).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    /// All its bytes, to be compared.
    pub(crate) fn words(self) -> [u64; 2] {
        let low = u64::from(self.len);
        let high = u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        [self.address, low | high]
    }
}

/// A split virtqueue, device side.
#[derive(Debug)]
pub struct SplitQueue {
    memory: Arc<GuestMemory>,
    descriptors: *const Descriptor,
    available: *mut u8,
    used: *mut u8,
    size: u16,
    event_idx: bool,
    /// The next entry of the available ring to pop.
    next_avail: u16,
    /// avail.idx as last read; entries up to here may be popped.
    avail_seen: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// used.idx as last stored.
    published: u16,
    /// The driver is called at least once after every start: a predecessor may
    /// have published completions and died before its call.
    must_signal: bool,
}

// SAFETY: the pointers lead into mappings that `memory` keeps alive, and the
// queue is used by one thread at a time (every method that moves an index takes
// `&mut self`).
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// Resolves and checks the rings. `next_avail` is the front end's
    /// SET_VRING_BASE; the used index is read from the ring itself.
    ///
    /// # Errors
    /// [`QueueError::BadSize`] and [`QueueError::BadAddress`].
    pub fn new(
        memory: Arc<GuestMemory>,
        layout: QueueLayout,
        next_avail: u16,
        event_idx: bool,
    ) -> Result<Self, QueueError> {
        let size = layout.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::BadSize(size));
        }
        let resolve = |ring, address: u64, len: u64, align: u64| {
            memory
                .user_pointer(address, len)
                .filter(|p| (*p as u64).is_multiple_of(align))
                .ok_or(QueueError::BadAddress { ring, address })
        };
        // The two trailing bytes of avail and used are used_event and
        // avail_event; they exist whether or not EVENT_IDX was negotiated.
        let n = u64::from(size);
        let descriptors = resolve("descriptor", layout.descriptors, 16 * n, 16)?;
        let available = resolve("available", layout.available, 6 + 2 * n, 2)?;
        let used = resolve("used", layout.used, 6 + 8 * n, 4)?;
        let mut queue = Self {
            memory,
            descriptors: descriptors.cast_const().cast(),
            available,
            used,
            size,
            event_idx,
            next_avail,
            avail_seen: next_avail,
            next_used: 0,
            published: 0,
            must_signal: true,
        };
        queue.next_used = queue.load_used_idx();
        queue.published = queue.next_used;
        Ok(queue)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The memory the queue lives in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The index GET_VRING_BASE answers with.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Takes the next available head, or `None` when the ring is empty.
    ///
    /// # Errors
    /// [`QueueError::AvailJump`] and [`QueueError::BadHead`]. The queue cannot
    /// be trusted after either and must be stopped.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, QueueError> {
        if self.next_avail == self.avail_seen && !self.refresh()? {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        // SAFETY: slot < size, and the available ring holds 4 + 2 * size bytes
        // before used_event.
        let head = u16::from_le(unsafe { shared::read_u16(self.available.add(4 + 2 * slot)) });
        if head >= self.size {
            return Err(QueueError::BadHead(head));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// True when [`pop`](Self::pop) would not say that the ring is empty: for
    /// a poller, who looks again and again and touches nothing.
    #[inline]
    pub fn has_available(&self) -> bool {
        self.load_avail_idx() != self.next_avail
    }

    /// Pops `next_avail` next, which is what a record of requests in flight says.
    pub(crate) fn resume_at(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
        self.avail_seen = next_avail;
    }

    /// The driver's index, now.
    pub(crate) fn driver_index(&self) -> u16 {
        self.load_avail_idx()
    }

    /// used.idx as last stored.
    pub(crate) fn published(&self) -> u16 {
        self.published
    }

    /// How many chains may be popped: reads avail.idx anew.
    ///
    /// # Errors
    /// [`QueueError::AvailJump`].
    pub fn available(&mut self) -> Result<u16, QueueError> {
        self.refresh()?;
        Ok(self.avail_seen.wrapping_sub(self.next_avail))
    }

    /// Takes the last `count` pops back.
    pub(crate) fn undo_pops(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_sub(count);
    }

    /// Re-reads avail.idx; true when there is something to pop.
    fn refresh(&mut self) -> Result<bool, QueueError> {
        let seen = self.load_avail_idx();
        let ahead = seen.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(QueueError::AvailJump(ahead));
        }
        self.avail_seen = seen;
        Ok(ahead > 0)
    }

    /// Records a finished chain. The driver sees it after [`publish`].
    ///
    /// [`publish`]: Self::publish
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: slot < size, and the used ring holds 4 + 8 * size bytes
        // before avail_event; the ring is 4-byte aligned.
        unsafe {
            let element = self.used.add(4 + 8 * slot);
            shared::write_u32(element, u32::from(head).to_le());
            shared::write_u32(element.add(4), written.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes all pushed elements visible with one index store. True when the
    /// driver asked to be called for them (virtio 1.3, 2.7.7.2 and 2.7.10).
    #[inline]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        let new = self.next_used;
        if old != new {
            self.store_used_idx(new);
            cut();
            self.published = new;
        }
        if std::mem::take(&mut self.must_signal) {
            return true;
        }
        if old == new {
            return false;
        }
        // The index store must be visible before we read what the driver
        // wants, or both sides could decide to sleep.
        shared::full_fence(Fence::BeforeCall);
        if self.event_idx {
            let event = self.read_avail(4 + 2 * usize::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.read_avail(0) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to kick for the next chain. True when chains became
    /// available meanwhile: the caller pops again instead of sleeping.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        if self.event_idx {
            let avail_event = 4 + 8 * usize::from(self.size);
            self.write_used(avail_event, self.next_avail);
        } else {
            self.write_used(0, 0);
        }
        // The request must be visible before the index is read again.
        shared::full_fence(Fence::BeforeSleep);
        self.refresh()
    }

    /// Asks the driver not to kick, also where it was asked to before and did
    /// not yet. Under EVENT_IDX that is an avail_event that lies behind.
    pub fn disable_kicks(&mut self) {
        if self.event_idx {
            let avail_event = 4 + 8 * usize::from(self.size);
            self.write_used(avail_event, self.next_avail.wrapping_sub(1));
        } else {
            self.write_used(0, USED_F_NO_NOTIFY);
        }
    }

    /// Copies descriptor `index` out of the table.
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: index < size, the table holds size descriptors and is 16-byte
        // aligned. The guest may write it meanwhile: each field is used only
        // from this copy.
        Some(unsafe { ptr::read_volatile(self.descriptors.add(usize::from(index))) })
    }

    fn read_avail(&self, offset: usize) -> u16 {
        debug_assert!(offset <= 4 + 2 * usize::from(self.size));
        // SAFETY: offset is 0 or that of used_event, both inside the ring.
        u16::from_le(unsafe { shared::read_u16(self.available.add(offset)) })
    }

    fn write_used(&mut self, offset: usize, value: u16) {
        debug_assert!(offset <= 4 + 8 * usize::from(self.size));
        // SAFETY: offset is 0 or that of avail_event, both inside the ring.
        unsafe { shared::write_u16(self.used.add(offset), value.to_le()) };
    }

    fn load_avail_idx(&self) -> u16 {
        // Acquire: the entries and descriptors were written before the index.
        // SAFETY: two bytes into the ring, 2-byte aligned, alive as long as
        // `memory`; the guest accesses it atomically.
        u16::from_le(unsafe { shared::load_index(self.available.add(2), Ordering::Acquire) })
    }

    fn load_used_idx(&self) -> u16 {
        // SAFETY: as for avail_idx, in the used ring.
        u16::from_le(unsafe { shared::load_index(self.used.add(2), Ordering::Relaxed) })
    }

    fn store_used_idx(&mut self, value: u16) {
        // Release: the elements are visible before the index.
        // SAFETY: as for avail_idx, in the used ring.
        unsafe { shared::store_index(self.used.add(2), value.to_le(), Ordering::Release) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{AVAILABLE, Guest, MEMORY, USED, USER};

    #[test]
    fn layouts_that_do_not_fit_are_refused() {
        let guest = Guest::new(8);
        let make = |layout| SplitQueue::new(Arc::clone(&guest.memory), layout, 0, false).map(drop);
        let good = guest.layout();
        assert_eq!(make(good), Ok(()));
        for size in [0, 3, 12, 2048] {
            assert_eq!(
                make(QueueLayout { size, ..good }),
                Err(QueueError::BadSize(size))
            );
        }
        let end = USER + MEMORY;
        for bad in [
            QueueLayout {
                descriptors: good.descriptors + 8,
                ..good
            },
            QueueLayout {
                descriptors: end - 64,
                ..good
            },
            QueueLayout {
                descriptors: u64::MAX - 15,
                ..good
            },
            QueueLayout {
                available: good.available + 1,
                ..good
            },
            QueueLayout {
                available: end - 20,
                ..good
            },
            QueueLayout {
                used: good.used + 2,
                ..good
            },
            QueueLayout {
                used: end - 68,
                ..good
            },
            QueueLayout { used: 0, ..good },
        ] {
            assert!(matches!(make(bad), Err(QueueError::BadAddress { .. })));
        }
        // used_event and avail_event count as part of their rings.
        let last = QueueLayout {
            available: end - 22,
            ..good
        };
        assert_eq!(make(last), Ok(()));
    }

    #[test]
    fn pop_follows_the_driver_across_the_wrap() {
        let mut guest = Guest::new(4);
        guest.set_avail_idx(0xfffe);
        let layout = guest.layout();
        let mut queue = SplitQueue::new(Arc::clone(&guest.memory), layout, 0xfffe, true).unwrap();
        assert_eq!(queue.pop(), Ok(None));
        for head in [3, 1, 0] {
            guest.offer(head);
        }
        for head in [3, 1, 0] {
            assert_eq!(queue.pop(), Ok(Some(head)));
        }
        assert_eq!(queue.pop(), Ok(None));
        assert_eq!(queue.next_avail(), 1);
    }

    #[test]
    fn a_jump_of_the_available_index_is_an_error() {
        let mut guest = Guest::new(4);
        let mut queue = guest.queue(false);
        guest.set_avail_idx(5);
        assert_eq!(queue.pop(), Err(QueueError::AvailJump(5)));
        guest.set_avail_idx(0xffff);
        assert_eq!(queue.pop(), Err(QueueError::AvailJump(0xffff)));
    }

    #[test]
    fn a_head_beyond_the_table_is_an_error() {
        let mut guest = Guest::new(4);
        let mut queue = guest.queue(false);
        guest.offer(4);
        assert_eq!(queue.pop(), Err(QueueError::BadHead(4)));
    }

    #[test]
    fn used_elements_appear_with_publish_and_not_before() {
        let guest = Guest::new(4);
        let mut queue = guest.queue(false);
        queue.push_used(2, 17);
        queue.push_used(0, 0xffff_fffe);
        assert_eq!(guest.used_idx(), 0);
        assert!(queue.publish());
        assert_eq!(guest.used_idx(), 2);
        assert_eq!(guest.used(0), (2, 17));
        assert_eq!(guest.used(1), (0, 0xffff_fffe));
        assert!(!queue.publish(), "nothing new, nobody to call");
    }

    #[test]
    fn the_used_index_goes_on_where_a_predecessor_left_it() {
        let guest = Guest::new(4);
        guest.put(USED + 2, &7u16.to_le_bytes());
        let mut queue = guest.queue(false);
        queue.push_used(1, 0);
        queue.publish();
        assert_eq!(guest.used_idx(), 8);
        assert_eq!(guest.used(7), (1, 0));
    }

    #[test]
    fn no_interrupt_is_honoured_without_event_idx() {
        let guest = Guest::new(4);
        let mut queue = guest.queue(false);
        queue.publish();
        guest.put(AVAILABLE, &AVAIL_F_NO_INTERRUPT.to_le_bytes());
        queue.push_used(0, 0);
        assert!(!queue.publish());
        guest.put(AVAILABLE, &0u16.to_le_bytes());
        queue.push_used(0, 0);
        assert!(queue.publish());
    }

    #[test]
    fn kicks_are_asked_for_and_a_late_chain_is_not_lost() {
        for event_idx in [false, true] {
            let mut guest = Guest::new(4);
            let mut queue = guest.queue(event_idx);
            queue.disable_kicks();
            assert_eq!(guest.get_u16(USED), u16::from(!event_idx));
            guest.offer(0);
            assert_eq!(queue.pop(), Ok(Some(0)));
            assert_eq!(queue.enable_kicks(), Ok(false));
            assert_eq!(guest.get_u16(USED), 0);
            if event_idx {
                assert_eq!(guest.avail_event(), 1);
            }
            guest.offer(1);
            assert_eq!(queue.enable_kicks(), Ok(true));
            assert_eq!(queue.pop(), Ok(Some(1)));
        }
    }
}
