//! The worker's side: steps are done on real files, in any order, and end with
//! any result.
#![expect(unsafe_code)]
// UNSAFETY: it does what a ring does: I/O by the number of a descriptor, to and
// from the segments of a chain.

use std::os::fd::BorrowedFd;

use libc::iovec;
use pericarp_vhost::{Device, FileRef, Step};

use super::Player;

/// No file grows beyond this: the directory may be in memory.
const LARGEST: u64 = 1 << 20;

/// Device and inode number of the file that a step is about, which must be open
/// for I/O, and a file.
pub(super) fn file_of(step: Step) -> Option<(u64, u64)> {
    let (Step::Read { file, .. }
    | Step::Write { file, .. }
    | Step::Sync { file, .. }
    | Step::Allocate { file, .. }) = step
    else {
        return None;
    };
    let FileRef::Open { descriptor, .. } = file else {
        panic!("a registered file: {step:?}");
    };
    // SAFETY: used for two calls that bear any number.
    let file = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let stat = rustix::fs::fstat(file).expect("an open descriptor");
    let flags = rustix::fs::fcntl_getfl(file).expect("an open descriptor");
    assert!(
        !flags.contains(rustix::fs::OFlags::PATH),
        "only a path: {step:?}"
    );
    let kind = stat.st_mode & libc::S_IFMT;
    let right = match step {
        Step::Sync { .. } => matches!(kind, libc::S_IFREG | libc::S_IFDIR),
        _ => kind == libc::S_IFREG,
    };
    assert!(right, "type {kind:o} is open: {step:?}");
    Some((stat.st_dev, stat.st_ino))
}

impl Player<'_, '_> {
    /// One step ends.
    pub(super) fn complete_some(&mut self) {
        if self.issued.is_empty() {
            return;
        }
        let which = usize::from(self.script.u8()) % self.issued.len();
        let outcome = self.script.u8();
        let head = self.issued.remove(which);
        self.complete(head, outcome);
    }

    /// The oldest request ends, whatever steps it takes.
    pub(super) fn complete_first(&mut self) {
        let Some(&head) = self.issued.first() else {
            return;
        };
        while self.flights.contains_key(&head) {
            self.issued.retain(|other| *other != head);
            self.complete(head, 0);
        }
    }

    pub(super) fn drain(&mut self) {
        while !self.issued.is_empty() {
            self.complete_first();
        }
    }

    fn complete(&mut self, head: u16, outcome: u8) {
        let flight = &self.flights[&head];
        let step = flight.step;
        // Whatever was released meanwhile, it is still the same.
        assert_eq!(file_of(step), flight.file, "another file: {flight:?}");
        let errno = match outcome {
            0xff => Some(libc::EIO),
            0xfe => Some(libc::ENOSPC),
            0xfd => Some(libc::EINTR),
            0xfc => Some(libc::EAGAIN),
            0xfb => Some(libc::EOPNOTSUPP),
            _ => None,
        };
        let limit = match outcome {
            0..0x80 => usize::MAX,
            part => usize::from(part - 0x80) * 16,
        };
        let result = match (step, errno) {
            (Step::Errand, _) => {
                let (_, request) = self.queue.request(head);
                self.device.clone().errand(request).run()
            }
            (_, Some(errno)) => -errno,
            _ => self.transfer(head, step, limit),
        };
        if let Ok(bytes) = u64::try_from(result) {
            match step {
                Step::Read { buffer, .. } => self.queue.read_done(head, buffer, bytes),
                Step::Write { .. } => self.queue.write_done(head, bytes),
                _ => {}
            }
        }
        let (chain, request) = self.queue.request(head);
        let next = self.device.resume(chain, request, result);
        self.take(head, next);
    }

    fn transfer(&mut self, head: u16, step: Step, limit: usize) -> i32 {
        let changes = matches!(step, Step::Write { .. } | Step::Allocate { .. });
        assert!(!(changes && self.read_only), "read-only: {step:?}");
        let at = |offset: u64, len: usize| {
            let end = offset.checked_add(len as u64);
            assert!(end.is_some_and(|end| end <= i64::MAX as u64), "{step:?}");
            offset as i64
        };
        let total = |segments: &[iovec]| segments.iter().map(|s| s.iov_len).sum::<usize>();
        match step {
            Step::Read {
                file: FileRef::Open { descriptor, .. },
                offset,
                buffer,
                ..
            } => {
                let segments = self.queue.read_target(head, buffer);
                let at = at(offset, total(segments));
                let some = first(segments, limit);
                // SAFETY: the queue vouches for its segments until the request
                // is finished, which it is not; that is what is being tested.
                result(unsafe { libc::preadv(descriptor, some.as_ptr(), some.len() as i32, at) })
            }
            Step::Write {
                file: FileRef::Open { descriptor, .. },
                offset,
                buffer,
                ..
            } => {
                let segments = self.queue.write_source(head, buffer);
                let at = at(offset, total(segments));
                if offset > LARGEST {
                    return -libc::EFBIG;
                }
                let some = first(segments, limit);
                // SAFETY: as above.
                result(unsafe { libc::pwritev(descriptor, some.as_ptr(), some.len() as i32, at) })
            }
            Step::Allocate {
                file: FileRef::Open { descriptor, .. },
                offset,
                len,
                mode,
            } => {
                let end = offset.checked_add(len);
                assert!(end.is_some_and(|end| end <= i64::MAX as u64), "{step:?}");
                if end.is_none_or(|end| end > LARGEST) {
                    return -libc::ENOSPC;
                }
                // SAFETY: no memory is involved.
                let done = unsafe { libc::fallocate(descriptor, mode, offset as i64, len as i64) };
                result(done as isize)
            }
            Step::Sync { .. } => 0,
            other => panic!("no request of a file server leads to {other:?}"),
        }
    }
}

/// The first `limit` bytes of segments.
fn first(segments: &[iovec], limit: usize) -> Vec<iovec> {
    let mut left = limit;
    let mut some = Vec::new();
    for segment in segments {
        let iov_len = segment.iov_len.min(left);
        some.push(iovec {
            iov_len,
            ..*segment
        });
        left -= iov_len;
    }
    some
}

fn result(done: isize) -> i32 {
    match done {
        -1 => -rustix::io::Errno::from_io_error(&std::io::Error::last_os_error())
            .map_or(libc::EIO, |errno| errno.raw_os_error()),
        done => done as i32,
    }
}
