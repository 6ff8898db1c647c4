//! Guest memory of the hostile front end: two memfds that touch in guest
//! address space, and a third far away, so that a buffer can end at an edge,
//! cross a seam or hit a hole.

use std::fs::File;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

/// Bytes of each of the first two regions.
pub const REGION: u64 = 16 << 20;
/// Where the second region begins: exactly at the end of the first.
pub const ADJACENT: u64 = REGION;
/// Where the third region of 1 MiB begins, with a hole before and behind it.
pub const FAR: u64 = 1 << 30;

/// Memory shared with the backend.
pub struct Guest {
    /// The mapped memory.
    pub memory: GuestMemoryMmap,
    /// The files behind it, in address order.
    pub files: Vec<File>,
}

impl Guest {
    /// Fresh, zeroed memory.
    ///
    /// # Panics
    /// When the host has no memory for it.
    pub fn new() -> Self {
        let places = [(0, REGION), (ADJACENT, REGION), (FAR, 1 << 20)];
        let files: Vec<File> = places
            .iter()
            .map(|(_, len)| {
                let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
                let file = File::from(fd);
                file.set_len(*len).expect("a sized memfd");
                file
            })
            .collect();
        let ranges = places.iter().zip(&files).map(|((start, len), file)| {
            let file = file.try_clone().expect("a duplicate descriptor");
            (
                GuestAddress(*start),
                *len as usize,
                Some(FileOffset::new(file, 0)),
            )
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).expect("mapped memory");
        Guest { memory, files }
    }

    /// The regions as the backend is told, in address order.
    ///
    /// # Panics
    /// Never: every region has a file.
    pub fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.memory
            .iter()
            .map(|region| {
                VhostUserMemoryRegionInfo::from_guest_region(region).expect("a region with a file")
            })
            .collect()
    }

    /// The front end's own address of a guest address, as SET_VRING_ADDR wants it.
    ///
    /// # Errors
    /// When it is outside of guest memory.
    pub fn pointer(&self, at: u64) -> Result<u64, GuestMemoryError> {
        self.memory
            .get_host_address(GuestAddress(at))
            .map(|pointer| pointer as u64)
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}
