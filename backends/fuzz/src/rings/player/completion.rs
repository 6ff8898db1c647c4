//! The store's side: operations complete in any order, with any result.

use pericarp_vhost::{Device, Step};

use super::Player;
use crate::rings::store::{self, DISK};

impl Player<'_, '_> {
    /// The store completes one operation.
    pub(super) fn complete_some(&mut self) {
        if self.issued.is_empty() {
            return;
        }
        let which = usize::from(self.script.u8()) % self.issued.len();
        let outcome = self.script.u8();
        let head = self.issued.remove(which);
        self.complete(head, outcome);
        self.publish();
    }

    fn complete(&mut self, head: u16, outcome: u8) {
        let step = self.flights[&head].step;
        let errno = match outcome {
            0xff => Some(libc::EIO),
            0xfe => Some(libc::ENOSPC),
            0xfd => Some(libc::EINTR),
            0xfc => Some(libc::EAGAIN),
            0xfb => Some(libc::EOPNOTSUPP),
            _ => None,
        };
        let limit = if outcome < 0x80 {
            usize::MAX
        } else {
            usize::from(outcome - 0x80) * 100
        };
        let result = errno.map_or_else(|| self.transfer(head, step, limit), |errno| -errno);
        if let Ok(bytes) = u64::try_from(result) {
            match step {
                Step::Read { buffer, .. } => self.queue.read_done(head, buffer, bytes),
                Step::Write { .. } => self.queue.write_done(head, bytes),
                _ => {}
            }
        }
        if result == -libc::EOPNOTSUPP {
            self.rig.taught = true;
        }
        let flight = self.flights.get_mut(&head).expect("in flight");
        flight.completed(step, result);
        let (chain, request) = self.queue.request(head);
        let next = self.device.resume(chain, request, result);
        // A retry is no failure, until it is the last.
        if !matches!(next, Step::Done { .. }) {
            flight.failed = None;
        }
        self.take(head, next);
    }

    fn transfer(&mut self, head: u16, step: Step, limit: usize) -> i32 {
        let place = |offset: u64, len: usize| {
            let end = offset.checked_add(len as u64);
            assert!(
                end.is_some_and(|end| end <= DISK as u64),
                "I/O at {offset}+{len}"
            );
            offset as usize
        };
        let total = |segments: &[libc::iovec]| segments.iter().map(|s| s.iov_len).sum::<usize>();
        match step {
            Step::Read { offset, buffer, .. } => {
                let segments = self.queue.read_target(head, buffer);
                let at = place(offset, total(segments));
                store::read(&self.rig.disk, at, segments, limit) as i32
            }
            Step::Write { offset, buffer, .. } => {
                assert!(!self.rules.read_only, "a write to a read-only disk");
                let segments = self.queue.write_source(head, buffer);
                let at = place(offset, total(segments));
                self.rig.dirty = true;
                for flight in self.flights.values_mut() {
                    flight.alone = false;
                }
                store::write(&mut self.rig.disk, at, segments, limit) as i32
            }
            Step::Allocate { offset, len, .. } | Step::Discard { offset, len, .. } => {
                self.zero(place(offset, len as usize), len as usize);
                0
            }
            Step::WriteZeroes { offset, len, .. } => {
                let at = place(offset, len as usize);
                let len = (len as usize).min(limit);
                self.zero(at, len);
                len as i32
            }
            Step::Sync { .. } | Step::Errand | Step::Done { .. } => 0,
        }
    }

    /// Discards and zeroes read as zeroes from then on.
    fn zero(&mut self, at: usize, len: usize) {
        assert!(!self.rules.read_only, "a change to a read-only disk");
        self.rig.dirty = true;
        for flight in self.flights.values_mut() {
            flight.alone = false;
        }
        self.rig.disk[at..at + len].fill(0);
    }

    pub(super) fn drain(&mut self) {
        while let Some(head) = self.issued.pop() {
            self.complete(head, 0);
        }
    }
}
