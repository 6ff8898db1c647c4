//! Operations on a file's space: allocating, punching holes, discarding and
//! writing zeroes. [`crate::Engine`] calls them; they name no memory of the
//! caller's.
//!
//! None of them can block the submitting thread: io_uring does fallocate and
//! discard commands on threads of its own. The synchronous engine has only one
//! thread, and waits.
#![expect(unsafe_code)]
// UNSAFETY: submission entries and ioctls carry pointers to statics and locals.

use std::io;
use std::os::fd::RawFd;

use io_uring::{IoUring, opcode, squeue, types};

use crate::blocking::Blocking;
use crate::files::{FileSlot, on};
use crate::ring::Ring;
use crate::{Completion, Extent};

/// The most bytes one [`crate::Engine::write_zeroes`] writes.
pub const ZEROES: usize = 64 * 1024;

/// Aligned for every O_DIRECT file.
#[repr(align(4096))]
struct Page([u8; ZEROES]);

static PAGE: Page = Page([0; ZEROES]);

/// `_IO(0x12, 119)`, linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 0)`, linux/blkdev.h, since Linux 6.12.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

fn discard_entry(file: &Target, offset: u64, len: u64) -> squeue::Entry {
    // The command's only argument in the entry's tail is the length.
    let mut tail = [0; 16];
    tail[..8].copy_from_slice(&len.to_ne_bytes());
    let (command, offset) = (BLOCK_URING_CMD_DISCARD, Some(offset));
    match *file {
        Target::Descriptor(fd) => opcode::UringCmd16::new(types::Fd(fd), command),
        Target::Registered(slot) => opcode::UringCmd16::new(types::Fixed(slot.0), command),
    }
    .cmd(tail)
    .addr(offset)
    .build()
}

/// What an entry acts on: the probe has no table of registered files.
enum Target {
    Descriptor(RawFd),
    Registered(FileSlot),
}

impl Ring {
    pub(crate) fn allocate(&mut self, extent: Extent, mode: i32) {
        let entry = on!(extent.file, |target| {
            opcode::Fallocate::new(target, extent.len)
                .offset(extent.offset)
                .mode(mode)
                .build()
        });
        // SAFETY: a fallocate refers to no memory.
        unsafe { self.operate(entry, extent.token) };
    }

    pub(crate) fn discard(&mut self, extent: Extent) {
        let file = Target::Registered(extent.file);
        let entry = discard_entry(&file, extent.offset, extent.len);
        // SAFETY: the command carries its arguments by value.
        unsafe { self.operate(entry, extent.token) };
    }

    pub(crate) fn write_zeroes(&mut self, extent: Extent, flags: i32) {
        let len = extent.len.min(ZEROES as u64) as u32;
        let entry = on!(extent.file, |target| {
            opcode::Write::new(target, PAGE.0.as_ptr(), len)
                .offset(extent.offset)
                .rw_flags(flags)
                .build()
        });
        // SAFETY: the bytes are a static.
        unsafe { self.operate(entry, extent.token) };
    }
}

impl Blocking {
    pub(crate) fn allocate(&mut self, extent: Extent, mode: i32) {
        let (offset, len) = (extent.offset as i64, extent.len as i64);
        self.operate(extent, |fd| {
            // SAFETY: fallocate takes a descriptor and touches no memory.
            unsafe { libc::fallocate(fd, mode, offset, len) as isize }
        });
    }

    pub(crate) fn discard(&mut self, extent: Extent) {
        let range = [extent.offset, extent.len];
        self.operate(extent, |fd| {
            // SAFETY: BLKDISCARD reads two words, which outlive the call.
            unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) as isize }
        });
    }

    pub(crate) fn write_zeroes(&mut self, extent: Extent, flags: i32) {
        let segment = libc::iovec {
            iov_base: PAGE.0.as_ptr().cast_mut().cast(),
            iov_len: (extent.len as usize).min(ZEROES),
        };
        self.operate(extent, |fd| {
            // SAFETY: a write only reads the static behind the segment.
            unsafe { libc::pwritev2(fd, &raw const segment, 1, extent.offset as i64, flags) }
        });
    }

    /// Does one call on the spot.
    fn operate(&mut self, extent: Extent, call: impl Fn(RawFd) -> isize) {
        let Extent { file, token, .. } = extent;
        let result = self.files.get(file).map_or(-libc::EBADF, |fd| {
            loop {
                let got = call(fd);
                let error = io::Error::last_os_error();
                if got >= 0 {
                    break i32::try_from(got).unwrap_or(i32::MAX);
                }
                if error.kind() != io::ErrorKind::Interrupted {
                    break -error.raw_os_error().unwrap_or(libc::EIO);
                }
            }
        });
        self.done.push(Completion { token, result });
    }
}

/// Whether this kernel discards on a block device through a ring, and the
/// device discards at all. `fd` must be open for reading only: the kernel then
/// looks at all else before it refuses, and nothing can be discarded.
///
/// Called at open, before a program confines itself. True as well where no ring
/// can be had: the synchronous engine needs none.
pub fn can_discard(fd: RawFd, block: u32) -> bool {
    let Ok(mut ring) = IoUring::new(2) else {
        return true;
    };
    let entry = discard_entry(&Target::Descriptor(fd), 0, u64::from(block));
    // SAFETY: the command carries its arguments by value.
    let pushed = unsafe { ring.submission().push(&entry) };
    if pushed.is_err() || ring.submit_and_wait(1).is_err() {
        return false;
    }
    let result = ring.completion().next().map(|entry| entry.result());
    result == Some(-libc::EBADF)
}
