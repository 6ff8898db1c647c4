//! The disk: bytes in memory that arrive when the script says so.
#![expect(unsafe_code)]
// UNSAFETY: it does what the kernel does with segment lists: follows pointers.

use libc::iovec;

/// Bytes of the disk.
pub(super) const DISK: usize = 64 * 1024;

/// The content every script begins with.
pub(super) fn content() -> Vec<u8> {
    (0..DISK).map(|n| (n / 512 * 7 + n) as u8).collect()
}

/// Fills segments from the disk, up to `limit` bytes.
pub(super) fn read(disk: &[u8], offset: usize, segments: &[iovec], limit: usize) -> usize {
    let mut done = 0;
    for segment in segments {
        let count = segment
            .iov_len
            .min(limit - done)
            .min(disk.len() - offset - done);
        // SAFETY: the queue vouches for its segments until the request is
        // finished, which it is not; that is what is being tested.
        unsafe {
            let from = disk.as_ptr().add(offset + done);
            from.copy_to(segment.iov_base.cast(), count);
        }
        done += count;
    }
    done
}

/// Takes bytes from segments, up to `limit`.
pub(super) fn write(disk: &mut [u8], offset: usize, segments: &[iovec], limit: usize) -> usize {
    let mut done = 0;
    for segment in segments {
        let count = segment
            .iov_len
            .min(limit - done)
            .min(disk.len() - offset - done);
        // SAFETY: as for `read`.
        unsafe {
            let to = disk.as_mut_ptr().add(offset + done);
            to.copy_from(segment.iov_base.cast(), count);
        }
        done += count;
    }
    done
}
