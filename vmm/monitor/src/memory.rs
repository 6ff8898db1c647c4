//! Guest memory: one sealed memfd, mapped here and by every backend.
//!
//! Made by [`crate::machine`] once for the life of the process. What lies above
//! the hole for devices is the same file further on, so that a backend gets two
//! regions at most.
//!
//! A guest's first touch of a page is an exit that its CPU waits for. Files in
//! memory come in pages of 4 KiB, unless the host's administrator allows more
//! (`transparent_hugepage/shmem_enabled`), so that the start of a stock kernel
//! would take 15,000 of these exits: what is known to be touched by every start
//! is made of 2 MiB pages beforehand, see [`Ram::prepare`].

// UNSAFETY: guest memory is mapped at addresses that huge pages fit, and taken back
// from a mapping with `madvise`; KVM is told of the mapping's address elsewhere.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use thiserror::Error;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use crate::layout;

/// Sizes are multiples of this, as huge pages want it.
pub const GRAIN: u64 = 2 << 20;

/// Why there is no memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The kernel does not give it.
    #[error("{step}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It cannot be mapped.
    #[error("cannot map {0} bytes of guest memory")]
    Map(u64, #[source] vm_memory::mmap::MmapRegionError),
    /// Regions that overlap.
    #[error("cannot lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backing {
    /// 2 MiB pages of the host's reserve, which must be large enough.
    pub huge_pages: bool,
    /// Every page is touched before the guest starts, by this many threads.
    pub populate: usize,
}

/// The memory of a guest.
#[derive(Debug)]
pub struct Ram {
    // Before what it points into.
    mmap: GuestMemoryMmap,
    file: FileOffset,
    _room: Vec<Room>,
}

/// Address space whose start is a multiple of [`GRAIN`], unmapped in the end.
#[derive(Debug)]
struct Room {
    start: usize,
    size: usize,
}

impl Room {
    /// Maps a part of a file.
    fn map(size: u64, part: &FileOffset) -> io::Result<Self> {
        let (size, grain) = (size as usize, GRAIN as usize);
        let map = |at: usize, size: usize, protection, flags, fd, offset| {
            // SAFETY: either the kernel chooses the address, or it is within what it has just
            // chosen for us, which nobody uses.
            let start = unsafe { libc::mmap(at as *mut _, size, protection, flags, fd, offset) };
            match start {
                libc::MAP_FAILED => Err(io::Error::last_os_error()),
                start => Ok(start as usize),
            }
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let all = map(0, size + grain, libc::PROT_NONE, flags, -1, 0)?;
        let start = all.next_multiple_of(grain);
        let unmap = |from: usize, to: usize| {
            // SAFETY: at either end of what was chosen for us, beside what is kept.
            unsafe { libc::munmap(from as *mut _, to - from) };
        };
        unmap(all, start);
        unmap(start + size, all + size + grain);
        let room = Self { start, size };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let fd = part.file().as_raw_fd();
        map(
            start,
            size,
            protection,
            flags,
            fd,
            part.start().cast_signed(),
        )?;
        Ok(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: `Ram` drops the regions, which alone refer to it, before.
        unsafe { libc::munmap(self.start as *mut _, self.size) };
    }
}

impl Ram {
    /// `bytes` of memory, a multiple of [`GRAIN`] and no more than
    /// [`layout::MEMORY_MAX`].
    ///
    /// # Errors
    /// What the kernel says: no huge pages are left, or no address space.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, MemoryError> {
        let failed = |step| {
            move |e: rustix::io::Errno| MemoryError::Kernel {
                step,
                source: e.into(),
            }
        };
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if backing.huge_pages {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let memfd = memfd_create("guest", flags).map_err(failed("cannot make a memory file"))?;
        ftruncate(&memfd, bytes).map_err(failed("cannot size the memory file"))?;
        // Nobody who maps it can be made to touch what is no longer there.
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&memfd, seals).map_err(failed("cannot seal the memory file"))?;
        let file = FileOffset::new(File::from(memfd), 0);
        let (mut regions, mut rooms) = (Vec::new(), Vec::new());
        for (start, size, offset) in ranges(bytes) {
            let part = FileOffset::from_arc(std::sync::Arc::clone(file.arc()), offset);
            let room = Room::map(size, &part).map_err(|source| MemoryError::Kernel {
                step: "cannot map guest memory",
                source,
            })?;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the room is as long as said, mapped so, and outlives the region.
            let builder = unsafe {
                MmapRegionBuilder::new(size as usize)
                    .with_mmap_prot(protection)
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .with_file_offset(part)
                    .with_raw_mmap_pointer(room.start as *mut u8)
            };
            let mapped = builder.build().map_err(|e| MemoryError::Map(size, e))?;
            rooms.push(room);
            let region = GuestRegionMmap::new(mapped, GuestAddress(start));
            // None where the region would end beyond the address space, which `bytes` excludes.
            regions.extend(region);
        }
        let mmap = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
        let ram = Self {
            mmap,
            file,
            _room: rooms,
        };
        for region in ram.mmap.iter() {
            // Where the host lets files in memory have huge pages, each first touch gets one.
            let _ = ram.advise(region, 0, region.len(), libc::MADV_HUGEPAGE);
        }
        if backing.populate > 0 {
            ram.populate(backing.populate)?;
        }
        Ok(ram)
    }

    /// The mapping.
    pub fn mmap(&self) -> &GuestMemoryMmap {
        &self.mmap
    }

    /// All bytes of it.
    pub fn size(&self) -> u64 {
        self.mmap.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Guest address, size and our address of each part.
    pub fn slots(&self) -> Vec<(u64, u64, u64)> {
        let slot = |region: &GuestRegionMmap| {
            (
                region.start_addr().raw_value(),
                region.len(),
                region.as_ptr() as u64,
            )
        };
        self.mmap.iter().map(slot).collect()
    }

    /// The parts as a backend is told of them. Ring addresses are sent as guest
    /// addresses plus [`RING_BASE`], so a back end that skips the translation
    /// fails at once instead of reading something else.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let info = |region: &GuestRegionMmap| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: RING_BASE + region.start_addr().raw_value(),
            mmap_offset: region.file_offset().map_or(0, FileOffset::start),
            mmap_handle: self.file.file().as_raw_fd(),
        };
        self.mmap.iter().map(info).collect()
    }

    /// True where `size` bytes at `address` are guest memory, all of them.
    pub fn holds(&self, address: u64, size: u64) -> bool {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        self.mmap.check_range(GuestAddress(address), size)
    }

    /// Makes this part of huge pages, as far as the host has them: for what is
    /// about to be filled, or is touched by every guest. Whole pages of 2 MiB
    /// around it become resident.
    pub fn prepare(&self, start: u64, size: u64) {
        let (mut at, end) = (start / GRAIN * GRAIN, start.saturating_add(size));
        while at < end {
            let Some((region, offset)) = self.mmap.to_region_addr(GuestAddress(at)) else {
                return;
            };
            let there = (region.len() - offset.0) / GRAIN;
            let pages = there.min((end - at).div_ceil(GRAIN));
            if pages == 0 {
                return;
            }
            // One page must be there in each, or there is nothing to enlarge. It is no error where
            // this cannot be done (before Linux 6.1, without memory in one piece): then all of it
            // is touched in small pages as ever. All at once, since each call has every CPU of the
            // host bring its lists of pages in order first.
            let grown = (0..pages)
                .try_for_each(|page| {
                    let offset = offset.0 + page * GRAIN;
                    self.advise(region, offset, 4096, libc::MADV_POPULATE_WRITE)
                })
                .and_then(|()| self.advise(region, offset.0, pages * GRAIN, libc::MADV_COLLAPSE));
            if grown.is_err() {
                return;
            }
            at += pages * GRAIN;
        }
    }

    /// Gives every page back, so that all of it reads as zero: the next guest
    /// finds nothing of the one before.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear(&self) -> Result<(), MemoryError> {
        for region in self.mmap.iter() {
            self.advise(region, 0, region.len(), libc::MADV_REMOVE)
                .map_err(|source| MemoryError::Kernel {
                    step: "cannot clear guest memory",
                    source,
                })?;
        }
        Ok(())
    }

    /// Touches every page, with `threads` threads.
    fn populate(&self, threads: usize) -> Result<(), MemoryError> {
        let mut pieces = Vec::new();
        for region in self.mmap.iter() {
            let pages = region.len().div_ceil(GRAIN);
            let each = pages.div_ceil(threads as u64).max(1) * GRAIN;
            let mut offset = 0;
            while offset < region.len() {
                let size = each.min(region.len() - offset);
                pieces.push((region, offset, size));
                offset += size;
            }
        }
        let done: io::Result<()> = std::thread::scope(|scope| {
            let touch = |(region, offset, size)| {
                scope.spawn(move || self.advise(region, offset, size, libc::MADV_POPULATE_WRITE))
            };
            let threads: Vec<_> = pieces.into_iter().map(touch).collect();
            threads.into_iter().try_for_each(|thread| {
                let panicked = |_| Err(io::Error::other("a thread panicked"));
                thread.join().unwrap_or_else(panicked)
            })
        });
        done.map_err(|source| MemoryError::Kernel {
            step: "cannot touch guest memory",
            source,
        })
    }

    fn advise(
        &self,
        region: &GuestRegionMmap,
        offset: u64,
        size: u64,
        advice: libc::c_int,
    ) -> io::Result<()> {
        let start = region
            .get_host_address(MemoryRegionAddress(offset))
            .map_err(io::Error::other)?;
        // SAFETY: the range is within the region's own mapping, which lives as long as `self`; the
        // advice used here keeps the mapping and changes contents only, which are shared memory
        // that others write to at any time.
        let code = unsafe { libc::madvise(start.cast(), size as usize, advice) };
        match code {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// What is added to a guest address in the front end's address space as a
/// backend knows it.
pub const RING_BASE: u64 = 1 << 52;

/// Start, size and place in the file of each part of `bytes`.
fn ranges(bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = bytes.min(layout::HOLE);
    let mut ranges = vec![(0, low, 0)];
    if bytes > low {
        ranges.push((layout::ABOVE, bytes - low, low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn the_hole_is_left_out() {
        assert_eq!(ranges(GRAIN), [(0, GRAIN, 0)]);
        assert_eq!(ranges(layout::HOLE), [(0, layout::HOLE, 0)]);
        let above = (layout::ABOVE, GRAIN, layout::HOLE);
        assert_eq!(ranges(layout::HOLE + GRAIN), [(0, layout::HOLE, 0), above]);
    }

    #[test]
    fn memory_is_sealed_shared_and_cleared() {
        let ram = Ram::new(2 * GRAIN, Backing::default()).unwrap();
        let seals = rustix::fs::fcntl_get_seals(ram.file.file()).unwrap();
        assert!(seals.contains(SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL));
        ram.mmap().write_obj(7u64, GuestAddress(GRAIN)).unwrap();
        ram.clear().unwrap();
        assert_eq!(ram.mmap().read_obj::<u64>(GuestAddress(GRAIN)).unwrap(), 0);
        assert!(ram.holds(0, 2 * GRAIN) && !ram.holds(1, 2 * GRAIN));
        assert!(!ram.holds(u64::MAX, 2));
        let region = ram.regions()[0];
        assert_eq!(region.userspace_addr, RING_BASE);
        assert_eq!(region.memory_size, 2 * GRAIN);
    }

    #[test]
    fn what_is_prepared_keeps_its_content_and_no_more_is_touched() {
        let ram = Ram::new(4 * GRAIN, Backing::default()).unwrap();
        let starts: Vec<u64> = ram.slots().iter().map(|slot| slot.2 % GRAIN).collect();
        assert_eq!(starts, [0], "huge pages fit");
        ram.mmap().write_obj(7u64, GuestAddress(GRAIN + 8)).unwrap();
        ram.prepare(GRAIN + 4096, 1);
        // Some of it is no memory.
        ram.prepare(4 * GRAIN - 1, u64::MAX);
        assert_eq!(
            ram.mmap().read_obj::<u64>(GuestAddress(GRAIN + 8)).unwrap(),
            7
        );
        let blocks = rustix::fs::fstat(ram.file.file()).unwrap().st_blocks;
        assert!(blocks.unsigned_abs() * 512 <= 2 * GRAIN, "{blocks}");
    }

    #[test]
    fn every_page_can_be_there_before_the_guest() {
        let backing = Backing {
            populate: 3,
            ..Backing::default()
        };
        let ram = Ram::new(5 * GRAIN, backing).unwrap();
        let blocks = rustix::fs::fstat(ram.file.file()).unwrap().st_blocks;
        assert_eq!(blocks.unsigned_abs() * 512, 5 * GRAIN);
    }
}
