//! A guest in this process, whose driver offers the same batch of requests
//! again and again. The pieces are its only callers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use pericarp_ring::{GuestMemory, QueueLayout, Region, RegionSpec, RequestQueue, SplitQueue};
use rustix::fs::{MemfdFlags, memfd_create};

const SIZE: u16 = 256;
const MEMORY: u64 = 16 << 20;
/// Regions of a guest whose memory is in many.
const REGIONS: u64 = 16;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xc000;
const TABLES: u64 = 0x1_0000;
const HEADERS: u64 = 0x8_0000;
const DATA: u64 = 0x10_0000;
/// Bytes of one descriptor.
const DESCRIPTOR: u64 = 16;
const PAGE: u64 = 4096;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// How a request is laid out by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A read of 4 KiB: header, data and status in the ring itself.
    Direct,
    /// The same three behind one indirect descriptor, as Linux does it.
    Indirect,
    /// A write of 4 KiB, indirect.
    Write,
    /// A read of 64 KiB, indirect, into 16 pages that do not touch, in memory
    /// of many regions: almost all of it is translation.
    Scattered,
}

/// Memory that a file stands for.
///
/// # Panics
/// When there is none.
pub fn memory(size: u64) -> File {
    let file = File::from(memfd_create("gate", MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(size).expect("memory");
    file
}

/// The driver's half.
#[derive(Debug)]
pub struct Guest {
    memory: File,
    batch: u16,
    /// The available index.
    index: u16,
}

impl Guest {
    /// One whose driver has `batch` requests for different blocks, on heads 0, 3,
    /// 6, ..., and the ring they are offered on. `batch` is a power of two, at
    /// most 64.
    ///
    /// # Panics
    /// When there is no memory.
    pub fn new(batch: u16, layout: Layout) -> (Self, SplitQueue) {
        let guest = Guest {
            memory: memory(MEMORY),
            batch,
            index: 0,
        };
        for n in 0..batch {
            guest.lay_out(n, layout);
        }
        for slot in 0..SIZE {
            let head = 3 * (slot % batch);
            guest.put(&head.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(slot));
        }
        let count = match layout {
            Layout::Scattered => REGIONS,
            _ => 1,
        };
        let size = MEMORY / count;
        let regions = (0..count).map(|n| {
            let spec = RegionSpec {
                guest_address: n * size,
                size,
                user_address: n * size,
                file_offset: n * size,
            };
            Region::map(guest.memory.try_clone().expect("descriptor"), spec).expect("mapping")
        });
        let memory = Arc::new(GuestMemory::new(regions.collect()).expect("apart"));
        let layout = QueueLayout {
            size: SIZE,
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
        };
        let queue = SplitQueue::new(memory, layout, 0, true).expect("valid layout");
        (guest, queue)
    }

    /// As [`new`](Self::new), with a slab around the ring.
    ///
    /// # Panics
    /// When there is no memory.
    pub fn with_requests<R: Default>(batch: u16, layout: Layout) -> (Self, RequestQueue<R>) {
        let (guest, queue) = Self::new(batch, layout);
        (guest, RequestQueue::new(queue))
    }

    /// Offers the whole batch, by one system call.
    ///
    /// # Panics
    /// When the memory cannot be written.
    pub fn offer(&mut self) {
        self.index = self.index.wrapping_add(self.batch);
        self.put(&self.index.to_le_bytes(), AVAILABLE + 2);
    }

    fn lay_out(&self, n: u16, layout: Layout) {
        let header = HEADERS + 0x40 * u64::from(n);
        let status = header + 0x20;
        let page = DATA + 2 * PAGE * u64::from(n);
        let data: Vec<u64> = match layout {
            // Page n of regions 1 to 15 in an order that is none, and one more.
            Layout::Scattered => (0..16)
                .map(|i| DATA * (1 + i * 7 % (REGIONS - 1)) + PAGE * (2 * u64::from(n) + i / 15))
                .collect(),
            _ => vec![page],
        };
        let way = if layout == Layout::Write { 0 } else { WRITE };
        let mut parts = vec![(header, 16, NEXT)];
        parts.extend(data.iter().map(|at| (*at, PAGE as u32, NEXT | way)));
        parts.push((status, 1, WRITE));

        let in_ring = 3 * DESCRIPTOR * u64::from(n);
        let (base, first) = if layout == Layout::Direct {
            (in_ring, 3 * n)
        } else {
            let bytes = DESCRIPTOR * parts.len() as u64;
            let table = TABLES + 0x400 * u64::from(n);
            self.descriptor(in_ring, (table, bytes as u32, INDIRECT, 0));
            (table, 0)
        };
        for (i, (address, len, flags)) in (0..).zip(parts) {
            let at = base + DESCRIPTOR * u64::from(i);
            self.descriptor(at, (address, len, flags, first + i + 1));
        }
        // struct virtio_blk_req: type, reserved, sector.
        let kind = u32::from(layout == Layout::Write);
        self.put(&kind.to_le_bytes(), header);
        self.put(&(8 * u64::from(n)).to_le_bytes(), header + 8);
    }

    fn descriptor(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend_from_slice(&len.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        raw.extend_from_slice(&next.to_le_bytes());
        self.put(&raw, at);
    }

    fn put(&self, bytes: &[u8], at: u64) {
        self.memory.write_all_at(bytes, at).expect("guest memory");
    }
}
