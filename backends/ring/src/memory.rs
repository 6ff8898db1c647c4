//! Guest memory as a front end shares it: a handful of mapped regions.
//!
//! The vhost-user session builds a [`GuestMemory`] from SET_MEM_TABLE and the
//! memory slot messages; queues hold it by `Arc` and turn guest physical and
//! front-end virtual addresses into pointers. Nothing here reads or writes the
//! memory itself.
#![expect(unsafe_code)]
// UNSAFETY: `user_pointer` hands out raw pointers into mappings; the
// pointer arithmetic below is the only unsafe operation.

use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

use crate::sigbus::Watch;

/// The most regions one guest may have, the count offered as GET_MAX_MEM_SLOTS.
pub const MAX_REGIONS: usize = 32;

/// Why a memory table was refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A region of length zero, or one whose end wraps around.
    #[error("memory region at guest address {0:#x} has size {1:#x}, which is empty or wraps")]
    BadSize(u64, u64),
    /// The file behind a region ends before the region does.
    #[error(
        "memory region needs {need:#x} bytes of its file, which has {have:#x}: \
         touching the rest would be fatal"
    )]
    PastEndOfFile {
        /// Bytes from the start of the file to the end of the region.
        need: u64,
        /// Size of the file.
        have: u64,
    },
    /// Two regions claim the same guest or front-end addresses.
    #[error("memory regions overlap at guest address {0:#x}")]
    Overlap(u64),
    /// More than [`MAX_REGIONS`].
    #[error("{0} memory regions, the limit is {MAX_REGIONS}")]
    TooMany(usize),
    /// The process watches too many regions already, over all its devices.
    #[error("this process maps too many memory regions")]
    TableFull,
    /// The file's size could not be read.
    #[error("cannot look at the memory file")]
    Stat(#[source] std::io::Error),
    /// The kernel refused the mapping.
    #[error("cannot map the memory region")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
}

/// Where a region lies, in the words of the vhost-user memory table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub size: u64,
    /// First address in the front end's own address space. Ring addresses in
    /// SET_VRING_ADDR are given in this space.
    pub user_address: u64,
    /// Where the region starts in its file.
    pub file_offset: u64,
}

/// One mapped region. Cloning shares the mapping.
#[derive(Debug, Clone)]
pub struct Region {
    spec: RegionSpec,
    mapping: Arc<Mapping>,
    /// Bytes between the start of the mapping and the start of the region: the
    /// file offset need not be a multiple of the page size.
    skip: usize,
}

/// A mapping and the watch over it, which ends first.
#[derive(Debug)]
struct Mapping {
    watch: Watch,
    memory: MmapRegion,
}

impl Region {
    /// Maps a region of `file`, shared and writable.
    ///
    /// The file is sealed against shrinking where it allows that. Where it does
    /// not, and the front end truncates it later, the region is lost: it reads
    /// as zeros, and [`GuestMemory::is_lost`] says so.
    ///
    /// # Errors
    /// [`MemoryError`] when the region is empty, wraps, is longer than its file
    /// or cannot be mapped.
    pub fn map(file: File, spec: RegionSpec) -> Result<Self, MemoryError> {
        let bad = MemoryError::BadSize(spec.guest_address, spec.size);
        let ends = [spec.guest_address, spec.user_address, spec.file_offset]
            .map(|start| start.checked_add(spec.size));
        let [Some(_), Some(_), Some(need)] = ends else {
            return Err(bad);
        };
        seal_against_shrinking(&file);
        let metadata = file.metadata().map_err(MemoryError::Stat)?;
        let page = page_of(&metadata);
        let skip = spec.file_offset % page;
        let Some(length) = spec
            .size
            .checked_add(skip)
            .and_then(|n| n.checked_next_multiple_of(page))
            .and_then(|n| usize::try_from(n).ok())
        else {
            return Err(bad);
        };
        if spec.size == 0 {
            return Err(bad);
        }
        let have = metadata.len();
        if have < need {
            return Err(MemoryError::PastEndOfFile { need, have });
        }
        let offset = FileOffset::new(file, spec.file_offset - skip);
        let memory = MmapRegion::from_file(offset, length).map_err(MemoryError::Map)?;
        let watch = Watch::new(memory.as_ptr(), length).ok_or(MemoryError::TableFull)?;
        Ok(Self {
            spec,
            mapping: Arc::new(Mapping { watch, memory }),
            skip: skip as usize,
        })
    }

    /// Where the region lies.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// The file behind it.
    pub fn file(&self) -> Option<&File> {
        self.mapping.memory.file_offset().map(FileOffset::file)
    }

    /// Where the region is in this process, and its length. It stays there for
    /// as long as a clone of the region does.
    pub fn host_range(&self) -> (*mut u8, usize) {
        (self.at(0), self.spec.size as usize)
    }

    /// The host address of the byte `offset` bytes into the region.
    fn at(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.spec.size);
        // SAFETY: callers pass an offset below the region's size, and the
        // mapping is `skip + size` bytes long, so the result stays inside it.
        unsafe {
            self.mapping
                .memory
                .as_ptr()
                .add(self.skip + offset as usize)
        }
    }
}

/// Mappings begin and end at whole pages of the file, which are large on hugetlbfs: a shorter
/// mapping could be neither replaced nor undone. There the preferred block size is the page size;
/// elsewhere a larger one does no harm.
fn page_of(metadata: &Metadata) -> u64 {
    let block = metadata.blksize();
    match block.is_power_of_two() && block > 4096 {
        true => block,
        false => 4096,
    }
}

/// Best effort: plain files, such as UML's, know no seals.
pub(crate) fn seal_against_shrinking(file: &File) {
    // SAFETY: F_ADD_SEALS takes an integer and touches no memory of ours; the
    // descriptor is open for the length of the call.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
}

/// All the memory of one guest, immutable once built: a changed memory table is
/// a new value, and the old one is unmapped when its last queue lets go.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest address.
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Builds the map.
    ///
    /// # Errors
    /// [`MemoryError`] when there are too many regions or two of them overlap.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany(regions.len()));
        }
        for start in [
            (|s: &RegionSpec| s.user_address) as fn(&RegionSpec) -> u64,
            |s: &RegionSpec| s.guest_address,
        ] {
            regions.sort_by_key(|r| start(&r.spec));
            for pair in regions.windows(2) {
                if start(&pair[0].spec) + pair[0].spec.size > start(&pair[1].spec) {
                    return Err(MemoryError::Overlap(pair[1].spec.guest_address));
                }
            }
        }
        Ok(Self { regions })
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// True once the front end took away memory that it had shared.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.watch.lost())
    }

    /// The host pointer and length of the longest piece of
    /// `[address, address + len)` that starts at guest address `address` and
    /// lies in one region. Public for a bench.
    #[doc(hidden)]
    pub fn piece(&self, address: u64, len: u64) -> Option<(*mut u8, u64)> {
        let after = self
            .regions
            .partition_point(|r| r.spec.guest_address <= address);
        let region = &self.regions[after.checked_sub(1)?];
        let offset = address - region.spec.guest_address;
        let room = region.spec.size.checked_sub(offset).filter(|&n| n > 0)?;
        Some((region.at(offset), room.min(len)))
    }

    /// The host pointer for `len` bytes at guest address `address`, all in one
    /// region.
    pub(crate) fn contiguous(&self, address: u64, len: u64) -> Option<*mut u8> {
        self.piece(address, len)
            .filter(|&(_, got)| got == len)
            .map(|(pointer, _)| pointer)
    }

    /// The host pointer for `len` bytes at front-end virtual address `address`,
    /// all in one region.
    pub(crate) fn user_pointer(&self, address: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = address.checked_sub(r.spec.user_address)?;
            let room = r.spec.size.checked_sub(offset)?;
            (room >= len && room > 0).then(|| r.at(offset))
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    /// An anonymous shared file of `size` bytes.
    pub(crate) fn memfd(size: u64) -> File {
        // SAFETY: the name is a C string; the result is checked below.
        let fd = unsafe {
            libc::memfd_create(
                c"guest".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        assert!(fd >= 0);
        // SAFETY: fd is a descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).unwrap();
        file
    }

    fn spec(guest_address: u64, size: u64, user_address: u64, file_offset: u64) -> RegionSpec {
        RegionSpec {
            guest_address,
            size,
            user_address,
            file_offset,
        }
    }

    #[test]
    fn region_longer_than_its_file_is_refused() {
        let error = Region::map(memfd(0x1000), spec(0, 0x2000, 0, 0)).unwrap_err();
        assert!(matches!(
            error,
            MemoryError::PastEndOfFile {
                need: 0x2000,
                have: 0x1000
            }
        ));
    }

    #[test]
    fn empty_and_wrapping_regions_are_refused() {
        for s in [
            spec(0, 0, 0, 0),
            spec(u64::MAX - 10, 0x1000, 0, 0),
            spec(0, 0x1000, u64::MAX - 10, 0),
            spec(0, u64::MAX - 0x100, 0, 0x200),
        ] {
            assert!(matches!(
                Region::map(memfd(0x1000), s),
                Err(MemoryError::BadSize(..))
            ));
        }
    }

    #[test]
    fn the_file_cannot_shrink_once_mapped() {
        let file = memfd(0x2000);
        let _region = Region::map(file.try_clone().unwrap(), spec(0, 0x2000, 0, 0)).unwrap();
        assert!(file.set_len(0x1000).is_err());
    }

    #[test]
    fn memory_that_is_taken_away_reads_as_zeros_and_is_lost() {
        // Without MFD_ALLOW_SEALING the file cannot be protected.
        // SAFETY: the name is a C string; the descriptor is checked and owned.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(0x4000).unwrap();
        let region = Region::map(file.try_clone().unwrap(), spec(0, 0x4000, 0, 0)).unwrap();
        let other = Region::map(memfd(0x1000), spec(0x10000, 0x1000, 0x10000, 0)).unwrap();
        let memory = GuestMemory::new(vec![region, other]).unwrap();
        let pointer = memory.contiguous(0x3000, 8).unwrap().cast::<u64>();
        // SAFETY: a mapped, aligned address, in use by nobody else.
        unsafe { pointer.write_volatile(7) };
        assert!(!memory.is_lost());
        file.set_len(0x1000).unwrap();
        // SAFETY: as above; the handler keeps the address mapped.
        assert_eq!(unsafe { pointer.read_volatile() }, 0);
        assert!(memory.is_lost());
    }

    #[test]
    fn a_part_of_a_huge_page_is_mapped_whole_and_survives_being_empty() {
        // SAFETY: the name is a C string; the descriptor is checked and owned.
        let file = unsafe {
            let fd = libc::memfd_create(c"huge".as_ptr(), libc::MFD_HUGETLB);
            if fd < 0 {
                return; // a kernel without hugetlbfs
            }
            File::from_raw_fd(fd)
        };
        file.set_len(2 << 20).unwrap();
        let Ok(region) = Region::map(file, spec(0, 0x1000, 0, 0)) else {
            return; // no huge pages can be reserved
        };
        assert!(region.mapping.memory.size() >= 2 << 20);
        let memory = GuestMemory::new(vec![region]).unwrap();
        let pointer = memory.contiguous(0, 8).unwrap().cast::<u64>();
        // SAFETY: a mapped, aligned address. With no huge page to be had this
        // is a SIGBUS, which the handler must outlive.
        assert_eq!(unsafe { pointer.read_volatile() }, 0);
    }

    #[test]
    fn overlap_is_refused_in_either_address_space() {
        let map = |g, u| Region::map(memfd(0x1000), spec(g, 0x1000, u, 0)).unwrap();
        assert!(GuestMemory::new(vec![map(0, 0), map(0x800, 0x8000)]).is_err());
        assert!(GuestMemory::new(vec![map(0, 0), map(0x8000, 0x800)]).is_err());
        assert!(GuestMemory::new(vec![map(0x1000, 0), map(0, 0x1000)]).is_ok());
    }

    #[test]
    fn addresses_are_found_and_bounded() {
        let low = Region::map(memfd(0x3000), spec(0x1000, 0x2000, 0x7000_0000, 0x200)).unwrap();
        let high = Region::map(memfd(0x1000), spec(0x3000, 0x1000, 0x6000_0000, 0)).unwrap();
        let memory = GuestMemory::new(vec![high, low]).unwrap();
        assert!(memory.contiguous(0xfff, 1).is_none());
        assert!(memory.contiguous(0x1000, 0x2000).is_some());
        assert!(memory.contiguous(0x1000, 0x2001).is_none());
        let (_, got) = memory.piece(0x2fff, 10).unwrap();
        assert_eq!(got, 1);
        assert!(memory.piece(0x4000, 1).is_none());
        assert!(memory.piece(u64::MAX, 1).is_none());
        assert!(memory.user_pointer(0x7000_1fff, 1).is_some());
        assert!(memory.user_pointer(0x7000_1fff, 2).is_none());
        assert!(memory.user_pointer(0x5fff_ffff, 1).is_none());
        assert_eq!(
            memory.user_pointer(0x7000_0010, 1),
            memory.contiguous(0x1010, 1)
        );
    }
}
