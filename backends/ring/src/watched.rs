//! Memory that another crate has mapped, watched as our own regions are: what a front end cuts
//! short reads as zeros from then on and is lost, and the process goes on.
//!
//! For `pericarp-vsock`, whose session and rings are those of `vhost-user-backend`.

use std::sync::Arc;

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap};

use crate::memory::{MemoryError, page_of, seal_against_shrinking};
use crate::sigbus::Watch;

/// All the memory of one guest at a time, and the watches over it, which end first.
#[derive(Debug)]
pub struct Watched {
    watches: Vec<Watch>,
    memory: Arc<GuestMemoryMmap>,
}

impl Watched {
    /// Watches all regions until it is dropped. Their files are sealed against shrinking where
    /// they allow that. Nobody may touch the memory before.
    ///
    /// # Errors
    /// [`MemoryError`] when this process watches too many regions, or a file cannot be looked at.
    pub fn new(memory: Arc<GuestMemoryMmap>) -> Result<Self, MemoryError> {
        let mut watches = Vec::new();
        for region in memory.iter() {
            let mut len = region.size();
            if let Some(file) = region.file_offset().map(FileOffset::file) {
                seal_against_shrinking(file);
                let page = page_of(&file.metadata().map_err(MemoryError::Stat)?);
                // The kernel has mapped whole pages, and only such can be replaced.
                len = len.next_multiple_of(page as usize);
            }
            watches.push(Watch::new(region.as_ptr(), len).ok_or(MemoryError::TableFull)?);
        }
        Ok(Self { watches, memory })
    }

    /// Whether it is this memory that is watched.
    pub fn is_of(&self, memory: &Arc<GuestMemoryMmap>) -> bool {
        Arc::ptr_eq(&self.memory, memory)
    }

    /// True once the front end took away memory that it had shared.
    pub fn is_lost(&self) -> bool {
        self.watches.iter().any(Watch::lost)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::FromRawFd;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "a memfd that knows no seals")]
    fn memory_of_others_that_is_taken_away_is_lost_to_all_who_watch_it() {
        // SAFETY: the name is a C string; the descriptor is checked and owned.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(0x4000).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), 0x4000, Some(offset))];
        let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
        let watched = Watched::new(Arc::clone(&memory)).unwrap();
        // As when the next table has some of the same regions.
        let again = Watched::new(Arc::clone(&memory)).unwrap();
        assert!(watched.is_of(&memory) && !watched.is_lost());
        memory.write_obj(7_u64, GuestAddress(0x3000)).unwrap();
        file.set_len(0x1000).unwrap();
        let read: u64 = memory.read_obj(GuestAddress(0x3000)).unwrap();
        assert_eq!(read, 0);
        assert!(watched.is_lost() && again.is_lost());
    }
}
