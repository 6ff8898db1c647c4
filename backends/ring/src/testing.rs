//! A guest for the unit tests of this crate: memory, rings, and a driver that
//! can put anything into them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::memory::tests::memfd;
use crate::{GuestMemory, QueueLayout, Region, RegionSpec, SplitQueue};

/// Bytes of guest memory, all of it one region at guest address 0.
pub(crate) const MEMORY: u64 = 0x2_0000;
/// Where the front end claims to have mapped it.
pub(crate) const USER: u64 = 0x7f00_0000_0000;
/// Guest addresses of the rings.
pub(crate) const DESCRIPTORS: u64 = 0;
pub(crate) const AVAILABLE: u64 = 0x4000;
pub(crate) const USED: u64 = 0x8000;

/// Guest memory seen from the driver's side, through its file.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) memory: Arc<GuestMemory>,
    size: u16,
    avail_idx: u16,
}

impl Guest {
    pub(crate) fn new(size: u16) -> Self {
        let file = memfd(MEMORY);
        let spec = RegionSpec {
            guest_address: 0,
            size: MEMORY,
            user_address: USER,
            file_offset: 0,
        };
        let region = Region::map(file.try_clone().unwrap(), spec).unwrap();
        Self {
            file,
            memory: Arc::new(GuestMemory::new(vec![region]).unwrap()),
            size,
            avail_idx: 0,
        }
    }

    pub(crate) fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: self.size,
            descriptors: USER + DESCRIPTORS,
            available: USER + AVAILABLE,
            used: USER + USED,
        }
    }

    pub(crate) fn queue(&self, event_idx: bool) -> SplitQueue {
        SplitQueue::new(Arc::clone(&self.memory), self.layout(), 0, event_idx).unwrap()
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, address).unwrap();
    }

    pub(crate) fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, address).unwrap();
        bytes
    }

    pub(crate) fn get_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.get(address))
    }

    pub(crate) fn descriptor_at(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    pub(crate) fn descriptor(&self, index: u16, fields: (u64, u32, u16, u16)) {
        self.descriptor_at(DESCRIPTORS + 16 * u64::from(index), fields);
    }

    /// Makes a head available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.put(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    pub(crate) fn set_avail_idx(&mut self, value: u16) {
        self.avail_idx = value;
        self.put(AVAILABLE + 2, &value.to_le_bytes());
    }

    pub(crate) fn set_used_event(&self, value: u16) {
        self.put(
            AVAILABLE + 4 + 2 * u64::from(self.size),
            &value.to_le_bytes(),
        );
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.get_u16(USED + 2)
    }

    pub(crate) fn used(&self, index: u16) -> (u32, u32) {
        let at = USED + 4 + 8 * u64::from(index % self.size);
        (
            u32::from_le_bytes(self.get(at)),
            u32::from_le_bytes(self.get(at + 4)),
        )
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.get_u16(USED + 4 + 8 * u64::from(self.size))
    }
}
