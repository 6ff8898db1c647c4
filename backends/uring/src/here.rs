//! Buffered writes that the calling thread does itself. ext4 takes none without
//! waiting, so the ring would give each to a thread of the kernel's, one after
//! another for each file, where the page cache takes it in two microseconds.
//! `transfer` calls it for files of [`crate::Place::Here`].
//!
//! The cache may be full of what is not written back yet: the kernel then slows
//! writers down, and all that the thread serves would stand still. So a write
//! that took long has those after it done elsewhere for a while.
#![expect(unsafe_code)]
// UNSAFETY: pwritev2 follows the caller's segments.

use std::io;
use std::time::{Duration, Instant};

use libc::c_int;

use crate::ring::Ring;
use crate::{Completion, Transfer};

/// A write that takes longer was slowed down.
const LONG: Duration = Duration::from_millis(2);
/// How long writes are done elsewhere after that.
const ELSEWHERE: Duration = Duration::from_millis(50);
/// More bytes than this are a matter of copying, not of waking a thread: that is
/// better done beside this one.
const MOST: usize = 256 * 1024;

/// When writes are done here again.
#[derive(Debug, Default)]
pub(crate) struct Here(Option<Instant>);

impl Here {
    fn is_allowed(&mut self, now: Instant) -> bool {
        if self.0.is_some_and(|until| now < until) {
            return false;
        }
        self.0 = None;
        true
    }

    fn took(&mut self, begin: Instant, end: Instant) {
        if end.duration_since(begin) > LONG {
            self.0 = Some(end + ELSEWHERE);
        }
    }
}

impl Ring {
    /// Does a write and puts its completion where others wait. False when it is
    /// to be done elsewhere.
    ///
    /// # Safety
    /// As [`crate::Engine::write`], for the length of the call.
    pub(crate) unsafe fn write_here(&mut self, t: &Transfer<'_>) -> bool {
        let begin = Instant::now();
        let bytes: usize = t.segments.iter().map(|segment| segment.iov_len).sum();
        let Some(fd) = t.file.plain() else {
            return false;
        };
        if bytes > MOST || !self.here.is_allowed(begin) {
            return false;
        }
        let (list, count) = (t.segments.as_ptr(), t.segments.len() as c_int);
        // SAFETY: the caller vouches for list and memory.
        let written = unsafe { libc::pwritev2(fd, list, count, t.offset as i64, t.flags) };
        let result = match i32::try_from(written) {
            Ok(written) if written >= 0 => written,
            _ => -io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        };
        self.here.took(begin, Instant::now());
        self.early.push(Completion {
            token: t.token,
            result,
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_write_sends_the_next_ones_elsewhere_for_a_while() {
        let mut here = Here::default();
        let begin = Instant::now();
        assert!(here.is_allowed(begin));
        here.took(begin, begin + LONG);
        assert!(here.is_allowed(begin + LONG));
        let end = begin + 2 * LONG;
        here.took(begin, end);
        assert!(!here.is_allowed(end));
        assert!(!here.is_allowed(end + ELSEWHERE - Duration::from_nanos(1)));
        assert!(here.is_allowed(end + ELSEWHERE));
    }
}
