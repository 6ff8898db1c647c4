//! Registered memory: pieces of the caller's address space whose pages the
//! kernel pins once, so that it need not look them up for every transfer.
//! [`crate::Engine`] calls this; transfers look here for each segment.
//!
//! The kernel's table is made empty with the ring and filled while it runs. A
//! piece is found by address: it stays mapped for as long as it is here, so an
//! address belongs to one piece at most. The kernel checks each transfer
//! against the piece it names, and would write to the pages that were there
//! when it was registered: that is why nothing may be mapped in its place.
#![expect(unsafe_code)]
// UNSAFETY: registering hands the kernel raw pointers.

use std::io;

use libc::iovec;

use crate::EngineError;
use crate::ring::Ring;

/// The most bytes of one piece, a limit of the kernel's.
pub const MAX_BUFFER: usize = 1 << 30;

/// The most pieces of one ring, a limit of the kernel's.
pub const MAX_BUFFERS: u32 = 1 << 14;

/// A registered piece of memory.
#[derive(Debug, PartialEq, Eq)]
pub struct BufferSlot(u16);

/// Which slot of the kernel's table has which piece.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    count: u32,
    free: Vec<u16>,
    /// In the order of their addresses.
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Piece {
    start: usize,
    end: usize,
    slot: u16,
}

impl Buffers {
    /// A table of `count` empty slots; none at all for 0.
    pub(crate) fn new(count: u32) -> Self {
        Self {
            count,
            free: (0..count.min(MAX_BUFFERS) as u16).rev().collect(),
            pieces: Vec::new(),
        }
    }

    pub(crate) fn exist(&self) -> bool {
        self.count > 0
    }

    /// The slot of the piece that has the whole segment.
    pub(crate) fn find(&self, segment: &iovec) -> Option<u16> {
        let start = segment.iov_base as usize;
        let after = self.pieces.partition_point(|piece| piece.start <= start);
        let piece = &self.pieces[after.checked_sub(1)?];
        (segment.iov_len <= piece.end.saturating_sub(start)).then_some(piece.slot)
    }

    fn place(&mut self, piece: Piece) {
        let after = self.pieces.partition_point(|p| p.start <= piece.start);
        self.pieces.insert(after, piece);
    }

    fn take(&mut self, slot: u16) {
        self.pieces.retain(|piece| piece.slot != slot);
        self.free.push(slot);
    }
}

impl Ring {
    /// # Safety
    /// As [`crate::Engine::add_buffer`].
    pub(crate) unsafe fn add_buffer(
        &mut self,
        start: *mut u8,
        len: usize,
    ) -> Result<BufferSlot, EngineError> {
        let count = self.buffers.count;
        let slot = self.buffers.free.last();
        let slot = *slot.ok_or(EngineError::TooManyBuffers(count))?;
        let segment = iovec {
            iov_base: start.cast(),
            iov_len: len,
        };
        // SAFETY: the caller keeps the memory mapped until it is taken out.
        unsafe { self.update_buffer(slot, segment) }.map_err(|source| EngineError::Setup {
            step: "register memory",
            source,
        })?;
        self.buffers.free.pop();
        self.buffers.place(Piece {
            start: start as usize,
            end: start as usize + len,
            slot,
        });
        Ok(BufferSlot(slot))
    }

    pub(crate) fn remove_buffer(&mut self, BufferSlot(slot): BufferSlot) {
        self.buffers.take(slot);
        let nothing = iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        // Failing leaves the pages pinned until the slot is used again; no
        // transfer names it until then.
        // SAFETY: an empty slot refers to no memory.
        let _ = unsafe { self.update_buffer(slot, nothing) };
    }

    /// # Safety
    /// The memory stays mapped until the slot is changed again.
    unsafe fn update_buffer(&self, slot: u16, segment: iovec) -> io::Result<()> {
        let ring = self.polled.as_ref().map_or(&self.ring, |p| &p.ring);
        let submitter = ring.submitter();
        // SAFETY: the caller's promise; the list is read within the call.
        unsafe { submitter.register_buffers_update(slot.into(), &[segment], None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: usize, len: usize) -> iovec {
        iovec {
            iov_base: start as *mut _,
            iov_len: len,
        }
    }

    #[test]
    fn a_segment_is_found_only_where_one_piece_has_all_of_it() {
        let mut buffers = Buffers::new(3);
        for (slot, start) in [(0, 0x3000), (1, 0x1000), (2, 0x2000)] {
            let end = start + 0x1000;
            buffers.place(Piece { start, end, slot });
        }
        let find = |start, len| buffers.find(&segment(start, len));
        assert_eq!(find(0xfff, 1), None);
        assert_eq!(find(0x1000, 0x1000), Some(1));
        assert_eq!(find(0x2fff, 1), Some(2));
        assert_eq!(find(0x2fff, 2), None, "across two pieces");
        assert_eq!(find(0x3800, 0x800), Some(0));
        assert_eq!(find(0x3800, 0x801), None);
        assert_eq!(find(0x4000, 0), Some(0), "names nothing, touches nothing");
        assert_eq!(find(0x4000, 1), None);
        assert_eq!(find(usize::MAX, usize::MAX), None);
        buffers.take(2);
        assert_eq!(buffers.find(&segment(0x2000, 1)), None);
        assert_eq!(buffers.free.last(), Some(&2));
    }
}
