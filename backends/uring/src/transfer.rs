//! Reads and writes of a ring's files. [`crate::Engine`] calls them.
//!
//! A request in one segment names its memory in the entry itself: with a list
//! the kernel copies and checks that list first. Where that memory is
//! registered, the entry says so, and the kernel need not look up its pages.
#![expect(unsafe_code)]
// UNSAFETY: submission entries carry raw pointers the kernel follows.

use io_uring::{opcode, squeue};
use libc::iovec;

use crate::Transfer;
use crate::files::{Place, on};
use crate::ring::Ring;

/// The most bytes the kernel moves at a time (MAX_RW_COUNT). An entry's length
/// has 32 bits, a segment may be longer: the rest is asked for again, as after
/// any short transfer.
const MOST: usize = 0x7fff_f000;

impl Ring {
    /// # Safety
    /// As [`crate::Engine::read`].
    pub(crate) unsafe fn read(&mut self, t: Transfer<'_>) {
        let entry = on!(t.file, |file| match t.segments {
            [only] => match self.registered(&t, only) {
                Some(slot) =>
                    opcode::ReadFixed::new(file, only.iov_base.cast(), length(only), slot)
                        .offset(t.offset)
                        .rw_flags(t.flags)
                        .build(),
                None => opcode::Read::new(file, only.iov_base.cast(), length(only))
                    .offset(t.offset)
                    .rw_flags(t.flags)
                    .build(),
            },
            list => opcode::Readv::new(file, list.as_ptr(), list.len() as u32)
                .offset(t.offset)
                .rw_flags(t.flags)
                .build(),
        });
        // SAFETY: the caller keeps list and memory in place.
        unsafe { self.transfer(entry, &t) };
    }

    /// # Safety
    /// As [`crate::Engine::write`].
    pub(crate) unsafe fn write(&mut self, t: Transfer<'_>) {
        // SAFETY: the caller's promise covers the length of a call.
        if t.file.place() == Place::Here && unsafe { self.write_here(&t) } {
            return;
        }
        let entry = on!(t.file, |file| match t.segments {
            [only] => match self.registered(&t, only) {
                Some(slot) =>
                    opcode::WriteFixed::new(file, only.iov_base.cast(), length(only), slot)
                        .offset(t.offset)
                        .rw_flags(t.flags)
                        .build(),
                None => opcode::Write::new(file, only.iov_base.cast(), length(only))
                    .offset(t.offset)
                    .rw_flags(t.flags)
                    .build(),
            },
            list => opcode::Writev::new(file, list.as_ptr(), list.len() as u32)
                .offset(t.offset)
                .rw_flags(t.flags)
                .build(),
        });
        // SAFETY: the caller keeps list and memory in place.
        unsafe { self.transfer(entry, &t) };
    }

    /// A write that has to be durable waits for more than the device's answer to
    /// it, and so for interrupts.
    fn is_polled(&self, t: &Transfer<'_>) -> bool {
        let polled = self.polled.as_ref();
        t.flags == 0 && polled.is_some_and(|polled| polled.serves(t.file))
    }

    /// The registered memory that has the segment, where the ring that the
    /// transfer goes to is the one that has the table.
    fn registered(&self, t: &Transfer<'_>, segment: &iovec) -> Option<u16> {
        if self.is_polled(t) != self.polled.is_some() {
            return None;
        }
        self.buffers.find(segment)
    }

    /// # Safety
    /// The memory the entry names stays valid until its completion.
    unsafe fn transfer(&mut self, entry: squeue::Entry, t: &Transfer<'_>) {
        if self.is_polled(t)
            && let Some(polled) = &mut self.polled
        {
            let entry = entry.flags(squeue::Flags::FIXED_FILE).user_data(t.token);
            // SAFETY: the caller's promise.
            if let Err(error) = unsafe { polled.push(&entry) } {
                self.broken = Some(error);
            }
            return;
        }
        let entry = entry.flags(self.willing(t.file));
        // SAFETY: the caller's promise.
        unsafe { self.operate(entry, t.token) };
    }
}

fn length(segment: &iovec) -> u32 {
    segment.iov_len.min(MOST) as u32
}
