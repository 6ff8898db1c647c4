//! Guest memory with a shadow: what the guest knows of its own memory.
//!
//! Every write of the guest goes to both. Whatever differs afterwards was
//! written by the device, and [`Memory::changes`] hands it to the judge.
#![expect(unsafe_code)]
// UNSAFETY: a second mapping of the guest's files is read and written here.

use std::fs::File;
use std::sync::Arc;

use pericarp_ring::{GuestMemory, Region, RegionSpec};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

/// Where the second region touches the first.
pub(crate) const SEAM: u64 = 0x4000;
/// Bytes of the second and third region.
pub(crate) const SMALL: u64 = 0x2000;
/// Where the second region ends.
pub(crate) const END: u64 = SEAM + SMALL;
/// Where the third region lies.
pub(crate) const FAR: u64 = 1 << 30;
/// Front-end addresses are guest addresses plus this.
pub(crate) const USER: u64 = 0x7000_0000_0000;

/// Guest address and bytes of each region, the third of which has so many.
fn places(far: u64) -> [(u64, u64); 3] {
    [(0, SEAM), (SEAM, SMALL), (FAR, far)]
}

/// An anonymous file of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(size).expect("a sized memfd");
    file
}

/// The guest's memory, kept from script to script.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Guest address and bytes of each region.
    pub(crate) places: [(u64, u64); 3],
    maps: Vec<MmapRegion>,
    shadow: [Vec<u8>; 3],
    /// What a session would make of it: all regions, and without the second or
    /// the third one.
    pub(crate) tables: [Arc<GuestMemory>; 3],
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self::with(SMALL)
    }

    /// With so many bytes in the third region.
    pub(crate) fn with(far: u64) -> Self {
        let places = places(far);
        let files = places.map(|(_, size)| memfd(size));
        let duplicate = |file: &File| file.try_clone().expect("a descriptor");
        let regions: Vec<Region> = files
            .iter()
            .zip(places)
            .map(|(file, (start, size))| {
                let spec = RegionSpec {
                    guest_address: start,
                    size,
                    user_address: USER + start,
                    file_offset: 0,
                };
                Region::map(duplicate(file), spec).expect("a region")
            })
            .collect();
        let maps = files.iter().zip(places).map(|(file, (_, size))| {
            MmapRegion::from_file(FileOffset::new(duplicate(file), 0), size as usize)
                .expect("a mapping")
        });
        let table = |which: &[usize]| {
            let some = which.iter().map(|&n| regions[n].clone()).collect();
            Arc::new(GuestMemory::new(some).expect("a table"))
        };
        Self {
            places,
            maps: maps.collect(),
            shadow: places.map(|(_, size)| vec![0; size as usize]),
            tables: [table(&[0, 1, 2]), table(&[0, 2]), table(&[0, 1])],
        }
    }

    /// All zeros again.
    pub(crate) fn clear(&mut self) {
        for (map, shadow) in self.maps.iter().zip(&mut self.shadow) {
            shadow.fill(0);
            // SAFETY: the mapping is as long as its shadow, and no device runs.
            unsafe { map.as_ptr().write_bytes(0, shadow.len()) };
        }
    }

    /// The region with all of `[at, at + len)`, and the offset in it.
    fn find(&self, at: u64, len: usize) -> Option<(usize, usize)> {
        self.places
            .iter()
            .enumerate()
            .find_map(|(n, (start, size))| {
                let offset = at.checked_sub(*start)?;
                let end = offset.checked_add(len as u64)?;
                (end <= *size).then_some((n, offset as usize))
            })
    }

    /// The guest writes; outside its memory nothing happens.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        if let Some((n, offset)) = self.find(at, bytes.len()) {
            self.shadow[n][offset..offset + bytes.len()].copy_from_slice(bytes);
            // SAFETY: `find` checked the range; the device runs in this thread.
            unsafe {
                let to = self.maps[n].as_ptr().add(offset);
                to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            }
        }
    }

    /// The guest writes, over the seam of two regions perhaps.
    pub(crate) fn put_over(&mut self, at: u64, bytes: &[u8]) {
        let here = SEAM.saturating_sub(at).min(bytes.len() as u64) as usize;
        let (first, second) = bytes.split_at(here);
        self.put(at, first);
        self.put(at + here as u64, second);
    }

    /// What the guest knows.
    pub(crate) fn get(&self, at: u64, len: usize) -> Option<&[u8]> {
        let (n, offset) = self.find(at, len)?;
        Some(&self.shadow[n][offset..offset + len])
    }

    pub(crate) fn get_u16(&self, at: u64) -> u16 {
        let bytes = self.get(at, 2).and_then(|b| b.first_chunk().copied());
        u16::from_le_bytes(bytes.expect("a field of the rings"))
    }

    /// A field as it is, whoever wrote it.
    pub(crate) fn now_u16(&self, at: u64) -> u16 {
        let (n, offset) = self.find(at, 2).expect("a field of the rings");
        // SAFETY: `find` checked the range; the device runs in this thread.
        unsafe {
            self.maps[n]
                .as_ptr()
                .add(offset)
                .cast::<u16>()
                .read_unaligned()
        }
    }

    /// Shows each byte that is not as the guest left it, and learns it.
    pub(crate) fn changes(&mut self, judge: impl FnMut(u64, u8)) {
        self.changes_in(self.places.len(), judge);
    }

    /// The same of the first regions.
    pub(crate) fn changes_in(&mut self, regions: usize, mut judge: impl FnMut(u64, u8)) {
        for (n, (start, _)) in self.places.into_iter().take(regions).enumerate() {
            let shadow = &mut self.shadow[n];
            // SAFETY: the mapping is as long as its shadow, and nothing writes
            // to it while the slice lives: the device runs in this thread.
            let now = unsafe { std::slice::from_raw_parts(self.maps[n].as_ptr(), shadow.len()) };
            for (page, (old, new)) in shadow.chunks_mut(512).zip(now.chunks(512)).enumerate() {
                if old == new {
                    continue;
                }
                for (offset, (old, new)) in old.iter_mut().zip(new).enumerate() {
                    if *old != *new {
                        judge(start + (page * 512 + offset) as u64, *new);
                        *old = *new;
                    }
                }
            }
        }
    }
}
