//! Which requests of a queue are in flight, kept where a successor finds it.
//!
//! The memory outlives a killed backend: a memfd that the front end keeps, or a
//! file. Each queue's part begins with the layout of the vhost-user
//! specification ("Inflight I/O tracking", split virtqueue); behind it comes
//! what lets a successor see that the record is about this very ring: where the
//! ring lay, and a copy of each head's first descriptor.
//!
//! [`RequestQueue`](crate::RequestQueue) writes the record as it pops and
//! publishes; the session opens it and calls [`QueueRecord::recover`] when it
//! starts a queue. A process can be killed between any two stores. It stops
//! between two instructions and every store before that lands, so it is the
//! compiler alone that must keep the order.
//!
//! The other end writes to this memory as it likes. Nothing read from it is
//! used before it was checked, only [`QueueRecord::recover`] reads at all, and
//! the worst a lie can do is to have the guest's own requests done again.
#![expect(unsafe_code)]
// UNSAFETY: memory shared with another process is read and written through
// raw pointers only.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

use crate::queue::{Descriptor, MAX_QUEUE_SIZE, QueueLayout, SplitQueue};
use crate::sigbus::Watch;

/// "PericIFL", the mark of formatted memory. Zero is memory nobody formatted.
const MAGIC: u64 = u64::from_le_bytes(*b"PericIFL");
/// Counts changes of anything below.
const VERSION: u32 = 1;
/// Magic, version, queues, queue size, identity.
const HEADER: usize = 128;
const IDENTITY_AT: usize = 64;
/// Bytes that tell one device from another.
pub const IDENTITY_BYTES: usize = 64;
/// Every queue's part starts at a multiple of this.
const ALIGN: usize = 64;

/// `struct QueueRegionSplit` before its array: features u64, version u16,
/// desc_num u16, last_batch_head u16, used_idx u16.
const REGION: usize = 16;
const REGION_VERSION: u16 = 1;
/// `struct DescStateSplit`: inflight u8, padding, next u16, counter u64.
const ENTRY: usize = 16;
/// Ours: ring size and the three addresses.
const RING: usize = 32;
/// A copy of a descriptor.
const COPY: usize = 16;

/// Why memory cannot hold the records of a device.
#[derive(Debug, Error)]
pub enum InflightError {
    /// No queues, too many, or a size no queue can have.
    #[error("{queues} queues of {size} descriptors")]
    BadGeometry {
        /// Queues asked for.
        queues: u16,
        /// Descriptors of each.
        size: u16,
    },
    /// The file is too short for it.
    #[error("it needs {need} bytes and has {have}")]
    Short {
        /// End of the records in the file.
        need: u64,
        /// Size of the file.
        have: u64,
    },
    /// Something else is there.
    #[error("it holds something else than records of requests in flight")]
    Foreign,
    /// Records of another shape or device.
    #[error("it holds the records of another device, or of one with other queues")]
    Mismatch,
    /// The file's size could not be read.
    #[error("cannot look at it")]
    Stat(#[source] std::io::Error),
    /// The kernel refused.
    #[error("cannot map it")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// The process watches too many mappings already.
    #[error("this process maps too much memory")]
    TableFull,
}

/// The records of all queues of one device, mapped.
#[derive(Debug)]
pub struct InflightMemory {
    watch: Watch,
    mapping: MmapRegion,
    queues: u16,
    size: u16,
}

/// Bytes of one queue's part.
fn stride(size: u16) -> usize {
    let size = usize::from(size);
    (REGION + ENTRY * size).next_multiple_of(ALIGN) + RING + COPY * size
}

impl InflightMemory {
    /// Bytes that `queues` queues of `size` descriptors take.
    pub fn bytes(queues: u16, size: u16) -> u64 {
        (HEADER + usize::from(queues) * stride(size).next_multiple_of(ALIGN)) as u64
    }

    /// Maps the records at `offset`, a multiple of the page size. Memory that is
    /// all zero is formatted; anything else must have been formatted for the
    /// same queues and identity.
    ///
    /// # Errors
    /// [`InflightError`]; the memory is untouched then.
    pub fn open(
        file: File,
        offset: u64,
        queues: u16,
        size: u16,
        identity: [u8; IDENTITY_BYTES],
    ) -> Result<Self, InflightError> {
        if queues == 0 || size == 0 || size > MAX_QUEUE_SIZE || !offset.is_multiple_of(4096) {
            return Err(InflightError::BadGeometry { queues, size });
        }
        let len = Self::bytes(queues, size);
        let have = file.metadata().map_err(InflightError::Stat)?.size();
        let need = offset.checked_add(len);
        let need = need.ok_or(InflightError::BadGeometry { queues, size })?;
        if have < need {
            return Err(InflightError::Short { need, have });
        }
        let len = (len as usize).next_multiple_of(4096);
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len)
            .map_err(InflightError::Map)?;
        let watch = Watch::new(mapping.as_ptr(), len).ok_or(InflightError::TableFull)?;
        let this = Self {
            watch,
            mapping,
            queues,
            size,
        };
        this.check_or_format(identity)?;
        Ok(this)
    }

    fn check_or_format(&self, identity: [u8; IDENTITY_BYTES]) -> Result<(), InflightError> {
        // SAFETY: the header is inside the mapping, which is page-aligned; the
        // other end may write to it at any time, hence atomic or volatile.
        let (magic, version, queues, size) = unsafe {
            let base = self.mapping.as_ptr();
            (
                AtomicU64::from_ptr(base.cast()),
                AtomicU32::from_ptr(base.add(8).cast()),
                AtomicU16::from_ptr(base.add(12).cast()),
                AtomicU16::from_ptr(base.add(14).cast()),
            )
        };
        // SAFETY: as above; bytes need no alignment.
        let name: *mut [u8; IDENTITY_BYTES] =
            unsafe { self.mapping.as_ptr().add(IDENTITY_AT).cast() };
        match magic.load(Ordering::Acquire) {
            0 => {
                // SAFETY: as above.
                unsafe { ptr::write_volatile(name, identity) };
                version.store(VERSION, Ordering::Relaxed);
                queues.store(self.queues, Ordering::Relaxed);
                size.store(self.size, Ordering::Relaxed);
                // Last: what is half formatted is formatted again.
                magic.store(MAGIC, Ordering::Release);
                Ok(())
            }
            MAGIC => {
                // SAFETY: as above.
                let found = unsafe { ptr::read_volatile(name) };
                let same = version.load(Ordering::Relaxed) == VERSION
                    && queues.load(Ordering::Relaxed) == self.queues
                    && size.load(Ordering::Relaxed) == self.size
                    && found == identity;
                if same {
                    Ok(())
                } else {
                    Err(InflightError::Mismatch)
                }
            }
            _ => Err(InflightError::Foreign),
        }
    }

    /// The file and where in it the records begin.
    pub fn place(&self) -> Option<(&File, u64)> {
        let place = self.mapping.file_offset()?;
        Some((place.file(), place.start()))
    }

    /// Queues and descriptors of each.
    pub fn geometry(&self) -> (u16, u16) {
        (self.queues, self.size)
    }

    /// True once the memory was taken away: nothing is recorded any more.
    pub fn is_lost(&self) -> bool {
        self.watch.lost()
    }

    /// The record of one queue; `None` beyond the last.
    pub fn queue(self: &Arc<Self>, index: u16) -> Option<QueueRecord> {
        if index >= self.queues {
            return None;
        }
        let offset = HEADER + usize::from(index) * stride(self.size).next_multiple_of(ALIGN);
        Some(QueueRecord {
            // SAFETY: `bytes` counts this many parts, so it is inside.
            base: unsafe { self.mapping.as_ptr().add(offset) },
            memory: Arc::clone(self),
            counter: 0,
            last_batch_head: 0,
            batch: Vec::new(),
        })
    }
}

// SAFETY: the pointer inside the mapping is only used for atomic and volatile
// accesses, and stays valid wherever the value goes.
unsafe impl Send for InflightMemory {}
// SAFETY: shared references offer nothing but such accesses.
unsafe impl Sync for InflightMemory {}

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

/// A place where a kill may strike; the tests strike at each.
#[inline(always)]
pub(crate) fn cut() {
    #[cfg(test)]
    tests::strike();
}

#[cfg(test)]
mod tests;
