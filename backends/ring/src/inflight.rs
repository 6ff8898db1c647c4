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

mod record;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

use crate::queue::MAX_QUEUE_SIZE;
use crate::sigbus::Watch;
pub use record::{Found, QueueRecord, Recovered};

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
        // SAFETY: `bytes` counts this many parts, so it is inside.
        let base = unsafe { self.mapping.as_ptr().add(offset) };
        Some(QueueRecord::new(base, Arc::clone(self)))
    }
}

// SAFETY: the pointer inside the mapping is only used for atomic and volatile
// accesses, and stays valid wherever the value goes.
unsafe impl Send for InflightMemory {}
// SAFETY: shared references offer nothing but such accesses.
unsafe impl Sync for InflightMemory {}

/// A place where a kill may strike; the tests strike at each.
#[inline(always)]
pub(crate) fn cut() {
    #[cfg(test)]
    tests::strike();
}

#[cfg(test)]
mod tests;
