//! The record of one queue: written as requests come and go, read once by a
//! successor. `RequestQueue` does the first, a session the second; the parent
//! module says what holds both together.
#![expect(unsafe_code)]
// UNSAFETY: memory shared with another process is read and written through
// raw pointers only.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, compiler_fence};

use super::{ALIGN, COPY, ENTRY, InflightMemory, REGION, REGION_VERSION, RING, cut};
use crate::queue::{Descriptor, QueueLayout, SplitQueue};

/// What a successor found in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing was in flight.
    Nothing,
    /// This many requests were in flight and are done again.
    Requests(u16),
    /// It does not belong to this ring, for this reason. It was dropped, and the
    /// front end's word for the next request counts.
    Stranger(&'static str),
}

/// The record of one queue.
#[derive(Debug)]
pub struct QueueRecord {
    base: *mut u8,
    /// Keeps `base` mapped.
    memory: Arc<InflightMemory>,
    /// The order of the next request.
    counter: u64,
    /// Our copy: what is in memory is only for a successor.
    last_batch_head: u16,
    /// Heads completed since the last publication.
    batch: Vec<u16>,
}

// SAFETY: `base` leads into the mapping that `memory` keeps, and one thread at
// a time has the record.
unsafe impl Send for QueueRecord {}

/// A record and the heads to pop again, in their order.
#[derive(Debug)]
pub struct Recovered {
    /// Goes on with the queue.
    pub(crate) record: QueueRecord,
    /// The oldest is last.
    pub(crate) again: Vec<u16>,
}

impl QueueRecord {
    /// The part of `memory` that begins at `base`.
    pub(super) fn new(base: *mut u8, memory: Arc<InflightMemory>) -> Self {
        Self {
            base,
            memory,
            counter: 0,
            last_batch_head: 0,
            batch: Vec::new(),
        }
    }

    /// Works out where a predecessor stood with `queue`, sets the queue there,
    /// and makes the record ready for it.
    ///
    /// `None` when the record has no room for a queue of this size.
    pub fn recover(
        mut self,
        queue: &mut SplitQueue,
        layout: &QueueLayout,
    ) -> Option<(Recovered, Found)> {
        if layout.size > self.memory.size || queue.size() != layout.size {
            return None;
        }
        self.batch.reserve_exact(usize::from(layout.size));
        let mut again = Vec::new();
        let found = match self.read(queue, layout) {
            Ok(heads) => {
                let count = heads.len() as u16;
                queue.resume_at(queue.published().wrapping_add(count));
                // Oldest last, so that `pop` takes from the end.
                again = heads;
                again.reverse();
                if count == 0 {
                    Found::Nothing
                } else {
                    Found::Requests(count)
                }
            }
            Err(reason) => Found::Stranger(reason),
        };
        if matches!(found, Found::Stranger(_)) {
            // Half dropped must not look like a record with less in flight.
            self.version().store(0, Ordering::Release);
            cut();
        }
        self.adopt(queue, layout, &again);
        Some((
            Recovered {
                record: self,
                again,
            },
            found,
        ))
    }

    /// The heads in flight, oldest first, or why the record is no good here.
    fn read(&mut self, queue: &SplitQueue, layout: &QueueLayout) -> Result<Vec<u16>, &'static str> {
        let size = layout.size;
        let entries = self.memory.size;
        let used = queue.published();
        let known = self.version().load(Ordering::Relaxed) == REGION_VERSION
            && self.desc_num().load(Ordering::Relaxed) == entries;
        let mut flags: Vec<u8> = (0..entries)
            .map(|head| self.inflight(head).load(Ordering::Relaxed))
            .collect();
        if flags.iter().all(|&flag| flag == 0) {
            return Ok(Vec::new());
        }
        if !known {
            return Err("it is not formatted");
        }
        if self.layout()
            != (
                u64::from(size),
                layout.descriptors,
                layout.available,
                layout.used,
            )
        {
            return Err("the ring has another size or lies elsewhere");
        }
        // What was published and not yet taken off (vhost-user, "Inflight I/O
        // tracking", step 1 of reconnecting). Whoever died while clearing has
        // cleared some of it.
        let behind = used.wrapping_sub(self.used_idx().load(Ordering::Relaxed));
        if behind > size {
            return Err("the used index is another");
        }
        let mut head = self.batch_head().load(Ordering::Relaxed);
        for _ in 0..behind {
            if head >= size {
                return Err("its last batch is broken");
            }
            flags[usize::from(head)] = 0;
            head = self.next(head).load(Ordering::Relaxed);
        }
        let mut heads = Vec::new();
        for (index, flag) in flags.into_iter().enumerate() {
            let head = index as u16;
            match flag {
                0 => continue,
                1 if head < size => {}
                _ => return Err("it has a flag that is none"),
            }
            if queue.descriptor(head).map(Descriptor::words) != Some(self.copied(head)) {
                return Err("a descriptor is not the one it was");
            }
            heads.push((self.counter_of(head).load(Ordering::Relaxed), head));
        }
        let ahead = queue.driver_index().wrapping_sub(used);
        if ahead > size || usize::from(ahead) < heads.len() {
            return Err("the driver has made fewer requests");
        }
        heads.sort_unstable();
        if let Some(&(last, _)) = heads.last() {
            self.counter = last.wrapping_add(1);
        }
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// Writes all that a record of this ring says, with these heads in flight.
    /// Whoever is killed in here has changed nothing that `read` looks at, or
    /// leaves fewer heads marked that were published anyway.
    fn adopt(&mut self, queue: &SplitQueue, layout: &QueueLayout, again: &[u16]) {
        for head in 0..self.memory.size {
            if !again.contains(&head) && self.inflight(head).load(Ordering::Relaxed) != 0 {
                self.inflight(head).store(0, Ordering::Release);
                cut();
            }
        }
        // Not before the batch is cleared, or the batch would be in flight again.
        compiler_fence(Ordering::SeqCst);
        self.used_idx().store(queue.published(), Ordering::Release);
        cut();
        let last = self.batch_head().load(Ordering::Relaxed);
        self.last_batch_head = if last < layout.size { last } else { 0 };
        if !again.is_empty() {
            // The rest is as it should be: it was compared.
            return;
        }
        self.set_layout((
            u64::from(layout.size),
            layout.descriptors,
            layout.available,
            layout.used,
        ));
        self.desc_num().store(self.memory.size, Ordering::Release);
        self.version().store(REGION_VERSION, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
    }

    /// Takes note that `head`, whose first descriptor is `copy`, is in flight.
    #[inline]
    pub(crate) fn submitted(&mut self, head: u16, copy: Descriptor) {
        debug_assert!(head < self.memory.size);
        // SAFETY: `head` is below the number of copies.
        unsafe { ptr::write_volatile(self.copy_at(head), copy.words()) };
        cut();
        self.counter_of(head).store(self.counter, Ordering::Release);
        cut();
        self.counter = self.counter.wrapping_add(1);
        // Release: what it says is there before it counts.
        self.inflight(head).store(1, Ordering::Release);
        cut();
    }

    /// Takes note that `head` is in the batch which is published next.
    #[inline]
    pub(crate) fn completed(&mut self, head: u16) {
        self.next(head)
            .store(self.last_batch_head, Ordering::Release);
        cut();
        self.last_batch_head = head;
        self.batch_head().store(head, Ordering::Release);
        cut();
        self.batch.push(head);
    }

    /// The used index now is `used`: the batch is off our hands.
    #[inline]
    pub(crate) fn published(&mut self, used: u16) {
        if self.batch.is_empty() {
            return;
        }
        // Not before the index store of the queue.
        compiler_fence(Ordering::SeqCst);
        for head in self.batch.drain(..) {
            // SAFETY: see `inflight`, which cannot be called during the drain.
            unsafe { AtomicU8::from_ptr(entry(self.base, head)) }.store(0, Ordering::Release);
            cut();
        }
        self.used_idx().store(used, Ordering::Release);
        cut();
    }

    // SAFETY of all of these: `base` is 64-byte aligned and begins a part with
    // room for `memory.size` entries and copies; `head` is below that. The
    // mapping lives as long as `self`.

    fn version(&self) -> &AtomicU16 {
        // SAFETY: above.
        unsafe { AtomicU16::from_ptr(self.base.add(8).cast()) }
    }

    fn desc_num(&self) -> &AtomicU16 {
        // SAFETY: above.
        unsafe { AtomicU16::from_ptr(self.base.add(10).cast()) }
    }

    fn batch_head(&self) -> &AtomicU16 {
        // SAFETY: above.
        unsafe { AtomicU16::from_ptr(self.base.add(12).cast()) }
    }

    fn used_idx(&self) -> &AtomicU16 {
        // SAFETY: above.
        unsafe { AtomicU16::from_ptr(self.base.add(14).cast()) }
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        debug_assert!(head < self.memory.size);
        // SAFETY: above.
        unsafe { AtomicU8::from_ptr(entry(self.base, head)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        debug_assert!(head < self.memory.size);
        // SAFETY: above.
        unsafe { AtomicU16::from_ptr(entry(self.base, head).add(6).cast()) }
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        debug_assert!(head < self.memory.size);
        // SAFETY: above.
        unsafe { AtomicU64::from_ptr(entry(self.base, head).add(8).cast()) }
    }

    fn ring_at(&self) -> *mut u8 {
        let offset = (REGION + ENTRY * usize::from(self.memory.size)).next_multiple_of(ALIGN);
        // SAFETY: above.
        unsafe { self.base.add(offset) }
    }

    fn copy_at(&self, head: u16) -> *mut [u64; 2] {
        debug_assert!(head < self.memory.size);
        // SAFETY: above.
        unsafe { self.ring_at().add(RING + COPY * usize::from(head)).cast() }
    }

    fn copied(&self, head: u16) -> [u64; 2] {
        // SAFETY: above; 8-byte aligned.
        unsafe { ptr::read_volatile(self.copy_at(head)) }
    }

    fn layout(&self) -> (u64, u64, u64, u64) {
        // SAFETY: above; 32 bytes, 8-byte aligned.
        let [size, descriptors, available, used] =
            unsafe { ptr::read_volatile(self.ring_at().cast::<[u64; 4]>()) };
        (size, descriptors, available, used)
    }

    fn set_layout(&mut self, (size, descriptors, available, used): (u64, u64, u64, u64)) {
        let words = [size, descriptors, available, used];
        // SAFETY: above; 32 bytes, 8-byte aligned.
        unsafe { ptr::write_volatile(self.ring_at().cast(), words) };
        cut();
    }
}

/// Where the entry of `head` is.
///
/// # Safety
/// `base` begins a part with an entry for `head`.
unsafe fn entry(base: *mut u8, head: u16) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { base.add(REGION + ENTRY * usize::from(head)) }
}
