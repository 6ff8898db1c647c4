//! Memory that another crate has mapped, watched as our own regions are: what a front end cuts
//! short reads as zeros from then on and is lost, and the process goes on.
//!
//! For `pericarp-vsock`, whose session and rings are those of `vhost-user-backend`.

use std::sync::Arc;

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap};

use crate::memory::{MemoryError, seal_against_shrinking};
use crate::sigbus::Watch;

/// What memory is mapped in.
const PAGE: usize = 4096;

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
                // The kernel has mapped whole pages, and only such can be replaced. No larger ones:
                // behind the last is somebody else's memory, unlike behind our own regions, and a
                // region of huge pages that is not a number of them cannot be unmapped either.
                len = len.next_multiple_of(PAGE);
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
