//! A guest in this process, whose driver offers the same batch of 4 KiB reads
//! again and again. Used by the benches `ring` and `engine`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use pericarp_ring::{GuestMemory, QueueLayout, Region, RegionSpec, RequestQueue, SplitQueue};
use rustix::fs::{MemfdFlags, memfd_create};

const SIZE: u16 = 256;
const MEMORY: u64 = 16 << 20;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xc000;
const TABLES: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
/// Bytes of three descriptors.
const CHAIN: u64 = 48;

/// How a read is laid out by the driver.
#[derive(Clone, Copy)]
pub(crate) enum Layout {
    /// Header, data and status in the ring itself.
    Direct,
    /// The same three behind one indirect descriptor, as Linux does it.
    #[allow(dead_code, reason = "the bench engine does not ask for it")]
    Indirect,
}

/// Memory that a file stands for.
pub(crate) fn memory(size: u64) -> File {
    let file = File::from(memfd_create("bench", MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(size).expect("memory");
    file
}

/// The driver's half.
pub(crate) struct Guest {
    memory: File,
    batch: u16,
    /// The available index.
    index: u16,
}

impl Guest {
    /// One whose driver has `batch` reads of different blocks, on heads 0, 3, 6,
    /// ..., and the queue they are offered on.
    pub(crate) fn new<R: Default>(batch: u16, layout: Layout) -> (Self, RequestQueue<R>) {
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
        let spec = RegionSpec {
            guest_address: 0,
            size: MEMORY,
            user_address: 0,
            file_offset: 0,
        };
        let file = guest.memory.try_clone().expect("descriptor");
        let region = Region::map(file, spec).expect("mapping");
        let memory = Arc::new(GuestMemory::new(vec![region]).expect("one region"));
        let layout = QueueLayout {
            size: SIZE,
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
        };
        let queue = SplitQueue::new(memory, layout, 0, true).expect("valid layout");
        (guest, RequestQueue::new(queue))
    }

    /// Offers the whole batch, by one system call.
    pub(crate) fn offer(&mut self) {
        self.index = self.index.wrapping_add(self.batch);
        self.put(&self.index.to_le_bytes(), AVAILABLE + 2);
    }

    fn lay_out(&self, n: u16, layout: Layout) {
        let data = DATA + u64::from(n) * 0x2000;
        let in_ring = u64::from(n) * CHAIN;
        let (base, first) = match layout {
            Layout::Direct => (in_ring, 3 * n),
            Layout::Indirect => {
                let table = TABLES + u64::from(n) * CHAIN;
                self.descriptor(in_ring, (table, CHAIN as u32, 4, 0));
                (table, 0)
            }
        };
        let parts = [
            (data, 16, 1),
            (data + 0x1000, 4096, 3),
            (data + 0x800, 1, 2),
        ];
        for (i, (address, len, flags)) in (0..).zip(parts) {
            let at = base + 16 * u64::from(i);
            self.descriptor(at, (address, len, flags, first + i + 1));
        }
        // struct virtio_blk_req: type IN, reserved, sector.
        self.put(&(8 * u64::from(n)).to_le_bytes(), data + 8);
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
