//! Reads and writes that are done or refused at once, by the calling thread: packets
//! from and to a device that keeps a queue of them. One packet costs a plain call
//! less than a way through the ring (PERF.md, "One packet"), and what is done at once
//! is never in flight. [`crate::Engine`]'s own methods.
//!
//! Several at a time cost less through the ring, though: it is entered once for all of
//! them and left when all are done.
//!
//! The descriptors are open with O_NONBLOCK. RWF_NOWAIT would say the same, but taps
//! know it since Linux 6.4 only.
#![expect(unsafe_code)]
// UNSAFETY: preadv2 and pwritev2 follow the caller's segments.

use std::io;
use std::os::fd::RawFd;

use io_uring::opcode;
use libc::{c_int, iovec};

use crate::files::on;
use crate::ring::Ring;
use crate::{Engine, EngineError, FileSlot, MAX_TOKEN};

/// No place in the file: a device has none.
const NO_OFFSET: i64 = -1;
/// The most writes of one call of [`Engine::write_many_now`].
pub const MANY: usize = 32;
/// The token of the first of them. No caller uses one of these.
const FIRST: u64 = MAX_TOKEN - MANY as u64;

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

    /// Writes each list to a device, in order: what [`write_now`](Self::write_now) says
    /// of each goes to `results`. At most [`MANY`].
    ///
    /// # Errors
    /// [`EngineError::Failed`] when the kernel refuses; the engine is then of no
    /// further use.
    ///
    /// # Safety
    /// As for [`write_now`](Self::write_now).
    pub unsafe fn write_many_now<'a>(
        &mut self,
        file: FileSlot,
        lists: impl ExactSizeIterator<Item = &'a [iovec]> + Clone,
        results: &mut Vec<i32>,
    ) -> Result<(), EngineError> {
        debug_assert!(lists.len() <= MANY);
        results.clear();
        // Below that the ways into the ring and out of it cost more than they spare.
        let few = lists.len() < 3;
        if let Self::Uring(ring) = self
            && ring.takes_many
            && !few
        {
            // SAFETY: the caller's promise; all are done when this returns.
            unsafe { ring.write_many(file, lists.clone().take(MANY), results)? };
            // Refused by kernels that do not know that the file never waits.
            if !results.contains(&-libc::EOPNOTSUPP) {
                return Ok(());
            }
            ring.takes_many = false;
            results.clear();
        }
        for list in lists {
            // SAFETY: the caller's promise.
            results.push(unsafe { self.write_now(file, list) });
        }
        Ok(())
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

impl Ring {
    /// # Safety
    /// The memory is valid until this returns.
    unsafe fn write_many<'a>(
        &mut self,
        file: FileSlot,
        lists: impl Iterator<Item = &'a [iovec]>,
        results: &mut Vec<i32>,
    ) -> Result<(), EngineError> {
        for (list, token) in lists.zip(FIRST..) {
            let entry = on!(file, |target| opcode::Writev::new(
                target,
                list.as_ptr(),
                list.len() as u32
            )
            .offset(u64::MAX)
            // O_NONBLOCK is not enough for the ring: it would wait in its own way.
            .rw_flags(libc::RWF_NOWAIT)
            .build());
            // SAFETY: the caller's promise, since all completions are waited for below.
            unsafe { self.operate(entry, token) };
            results.push(-libc::EINPROGRESS);
        }
        let mut left = results.len();
        // What was there before, and what came while room was made.
        let mut others = std::mem::take(&mut self.early);
        let mut look = others.len();
        while left > 0 {
            for completion in others.split_off(others.len() - look) {
                match results.get_mut(completion.token.wrapping_sub(FIRST) as usize) {
                    Some(result) if completion.token >= FIRST => {
                        *result = completion.result;
                        left -= 1;
                    }
                    _ => others.push(completion),
                }
            }
            if left == 0 {
                break;
            }
            self.submit(true)?;
            let before = others.len();
            self.completions(&mut others);
            look = others.len() - before;
        }
        others.append(&mut self.early);
        self.early = others;
        Ok(())
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

    #[test]
    fn many_are_written_in_order_and_nothing_else_is_lost() {
        for kind in [EngineKind::Uring, EngineKind::Sync] {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let (woken, waker) = UnixDatagram::pair().unwrap();
            let mut engine = Engine::new(kind, 8, 4).unwrap();
            engine.start().unwrap();
            let file = engine.add_file(ours.as_raw_fd()).unwrap();
            let other = engine.add_file(woken.as_raw_fd()).unwrap();
            engine.watch_input(other, 5);
            engine.submit(false).unwrap();
            let mut results = Vec::new();
            for count in [1, 2, 3, 9] {
                waker.send(b"!").unwrap();
                let mut bytes: Vec<Vec<u8>> = (1..=count).map(|n| vec![n as u8; n]).collect();
                let lists: Vec<_> = bytes.iter_mut().map(|b| [segment(b)]).collect();
                let lists = lists.iter().map(|list| &list[..]);
                // SAFETY: the segments are ours.
                unsafe { engine.write_many_now(file, lists, &mut results).unwrap() };
                let want: Vec<i32> = (1..=count as i32).collect();
                assert_eq!(results, want);
                for n in 1..=count {
                    let mut got = [0; 16];
                    assert_eq!(theirs.recv(&mut got).unwrap(), n);
                    assert_eq!(got[0], n as u8);
                }
                engine.submit(true).unwrap();
                let mut completions = Vec::new();
                engine.completions(&mut completions);
                assert!(completions.iter().all(|c| c.token == 5));
                assert!(!completions.is_empty());
                engine.taken(5);
                assert_eq!(woken.recv(&mut [0; 8]).unwrap(), 1);
            }
            // Full, at some point: each says so for itself.
            theirs.set_nonblocking(true).unwrap();
            let mut full = 0;
            for _ in 0..100 {
                let mut byte = [1; 1000];
                let list = [segment(&mut byte)];
                let lists = [&list[..]; MANY];
                // SAFETY: the segment is ours.
                unsafe {
                    engine
                        .write_many_now(file, lists.into_iter(), &mut results)
                        .unwrap();
                };
                assert_eq!(results.len(), MANY);
                full += results.iter().filter(|r| **r == -libc::EAGAIN).count();
                let sent = results.iter().filter(|r| **r == 1000).count();
                if full > 0 {
                    assert!(sent < MANY);
                    break;
                }
            }
            assert!(full > 0);
        }
    }
}
