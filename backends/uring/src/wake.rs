//! What ends a ring's sleep without being asked for as I/O: watched
//! descriptors and the timer; and what ends the driver's, the signal.
//! [`crate::Engine`] calls them.
#![expect(unsafe_code)]
// UNSAFETY: submission entries carry raw pointers the kernel follows.

use std::time::Instant;

use io_uring::{opcode, squeue, types};

use crate::files::FileSlot;
use crate::ring::{IGNORED, Ring, TIMER, WATCH};

/// What a signal adds to an eventfd.
static ONE: u64 = 1;

/// A watched slot.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) slot: FileSlot,
    /// Times in a row that the kernel ended the poll.
    pub(crate) ends: u8,
}

impl Ring {
    pub(crate) fn watch(&mut self, slot: FileSlot, token: u64) {
        self.watches.insert(token, Watch { slot, ends: 0 });
        self.arm(slot, token);
    }

    pub(crate) fn arm(&mut self, slot: FileSlot, token: u64) {
        let entry = opcode::PollAdd::new(types::Fixed(slot.0), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(token | WATCH);
        // SAFETY: a poll refers to no memory.
        unsafe { self.push(entry) };
    }

    pub(crate) fn unwatch(&mut self, token: u64) {
        if self.watches.remove(&token).is_some() {
            // Not a poll removal: that one fails, and leaves the poll armed,
            // when the descriptor was written to a moment ago.
            let entry = opcode::AsyncCancel::new(token | WATCH)
                .build()
                .user_data(IGNORED);
            // SAFETY: a cancellation refers to no memory. FIXED_FILE is set by
            // `push` because the restrictions ask for it on every entry.
            unsafe { self.push(entry) };
        }
    }

    /// One timer at most is in the kernel. One that ends sooner than asked is
    /// left there: it costs a look around, replacing it costs two entries.
    pub(crate) fn wake_at(&mut self, when: Instant) {
        if let Some((number, running)) = self.timer {
            if running <= when {
                return;
            }
            let entry = opcode::AsyncCancel::new(number | TIMER)
                .build()
                .user_data(IGNORED);
            // SAFETY: as for the cancellation of a watch.
            unsafe { self.push(entry) };
        }
        self.timers = (self.timers + 1) & (WATCH - 1);
        self.timer = Some((self.timers, when));
        let left = when.saturating_duration_since(Instant::now());
        *self.time = left.into();
        let entry = opcode::Timeout::new(&raw const *self.time)
            .build()
            .user_data(self.timers | TIMER);
        // SAFETY: the box stays where it is for as long as the ring exists, and
        // the kernel copies the time when the entry is submitted. A timer set
        // before that takes the later time: it is of no more interest.
        unsafe { self.push(entry) };
    }

    /// False when the kernel is too old for it.
    pub(crate) fn signal(&mut self, slot: FileSlot) -> bool {
        if !self.can_skip {
            return false;
        }
        let entry = opcode::Write::new(types::Fixed(slot.0), (&raw const ONE).cast(), 8)
            .offset(u64::MAX)
            // Never wait: a full counter means that the driver was called.
            .rw_flags(libc::RWF_NOWAIT)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(IGNORED);
        // SAFETY: the bytes written are a static.
        unsafe { self.push(entry) };
        true
    }
}
