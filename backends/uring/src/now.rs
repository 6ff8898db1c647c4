//! Reads and writes that are done or refused at once, by the calling thread: packets
//! from and to a device that keeps a queue of them. One packet costs a plain call
//! less than a way through the ring (PERF.md, "One packet"), and what is done at once
//! is never in flight. [`crate::Engine`]'s own methods.
//!
//! The descriptors are open with O_NONBLOCK. RWF_NOWAIT would say the same, but taps
//! know it since Linux 6.4 only.
#![expect(unsafe_code)]
// UNSAFETY: preadv2 and pwritev2 follow the caller's segments.

use std::io;
use std::os::fd::RawFd;

use libc::{c_int, iovec};

use crate::{Engine, FileSlot};

/// No place in the file: a device has none.
const NO_OFFSET: i64 = -1;

impl Engine {
    /// Reads from a device: the number of bytes, or a negative errno, which is
    /// EAGAIN where there is nothing in a file that is open with O_NONBLOCK.
    ///
    /// # Safety
    /// The memory of the segments is valid, for the length of the call.
    pub unsafe fn read_now(&self, file: FileSlot, segments: &[iovec]) -> i32 {
        let count = segments.len() as c_int;
        self.at_once(file, |fd| {
            // SAFETY: the caller's promise.
            unsafe { libc::preadv2(fd, segments.as_ptr(), count, NO_OFFSET, 0) }
        })
    }

    /// Writes to a device, as [`read_now`](Self::read_now) reads.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn write_now(&self, file: FileSlot, segments: &[iovec]) -> i32 {
        let count = segments.len() as c_int;
        self.at_once(file, |fd| {
            // SAFETY: the caller's promise.
            unsafe { libc::pwritev2(fd, segments.as_ptr(), count, NO_OFFSET, 0) }
        })
    }

    fn at_once(&self, file: FileSlot, call: impl Fn(RawFd) -> isize) -> i32 {
        let files = match self {
            Self::Uring(ring) => &ring.files,
            Self::Sync(blocking) => &blocking.files,
        };
        let Some(fd) = files.get(file) else {
            return -libc::EBADF;
        };
        loop {
            let done = call(fd);
            if done >= 0 {
                return i32::try_from(done).unwrap_or(i32::MAX);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return -error.raw_os_error().unwrap_or(libc::EIO);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::{Completion, EngineKind};

    fn segment(bytes: &mut [u8]) -> iovec {
        iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }
    }

    #[test]
    fn input_is_reported_once_until_it_was_taken_and_taken_by_the_caller() {
        for kind in [EngineKind::Uring, EngineKind::Sync] {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let mut engine = Engine::new(kind, 8, 4).unwrap();
            engine.start().unwrap();
            let file = engine.add_file(ours.as_raw_fd()).unwrap();
            engine.watch_input(file, 7);
            engine.submit(false).unwrap();
            for _ in 0..2 {
                theirs.send(b"one").unwrap();
                engine.submit(true).unwrap();
                let mut completions = Vec::new();
                engine.completions(&mut completions);
                let tokens: Vec<_> = completions.iter().map(|c: &Completion| c.token).collect();
                assert_eq!(tokens, [7]);
                engine.submit(false).unwrap();
                completions.clear();
                engine.completions(&mut completions);
                assert!(completions.is_empty());
                let mut bytes = [0; 8];
                let (head, tail) = bytes.split_at_mut(2);
                let list = [segment(head), segment(tail)];
                // SAFETY: both segments are ours.
                let (read, again) =
                    unsafe { (engine.read_now(file, &list), engine.read_now(file, &list)) };
                assert_eq!((read, again), (3, -libc::EAGAIN));
                assert_eq!(&bytes[..3], b"one");
                engine.taken(7);
            }
            let mut bytes = *b"back";
            // SAFETY: the segment is ours.
            let written = unsafe { engine.write_now(file, &[segment(&mut bytes)]) };
            assert_eq!(written, 4);
            let mut got = [0; 8];
            assert_eq!(theirs.recv(&mut got).unwrap(), 4);
        }
    }
}
