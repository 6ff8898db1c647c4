//! What a file system of [`super::Fuse`] gets wrong: which operations fail, where
//! in the file and how often, and how much room is left. It is healthy until
//! something is planned and again once [`Faults::heal`] was called.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Operations that can go wrong, by their numbers in linux/fuse.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// LOOKUP.
    Lookup = 1,
    /// SETATTR.
    Attributes = 4,
    /// OPEN.
    Open = 14,
    /// READ.
    Read = 15,
    /// WRITE.
    Write = 16,
    /// STATFS.
    Space = 17,
    /// FSYNC.
    Sync = 20,
    /// FLUSH, at each close.
    Close = 25,
    /// FALLOCATE.
    Allocate = 43,
}

/// How an operation goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// With this error number.
    Errno(i32),
    /// No more than so many bytes of a READ or WRITE are moved.
    Short(usize),
}

#[derive(Debug)]
struct Planned {
    operation: Operation,
    bytes: Range<u64>,
    times: u32,
    wrong: Wrong,
}

#[derive(Debug, Default)]
struct State {
    planned: Vec<Planned>,
    /// Bytes that can still be written; `None` for any number.
    room: Option<u64>,
    happened: u64,
}

/// All that is planned.
#[derive(Debug, Default)]
pub struct Faults(Mutex<State>);

impl Faults {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next `times` operations of a kind that touch any of `bytes` go wrong.
    /// What names no part of the file touches all of it.
    pub fn plan(&self, operation: Operation, bytes: Range<u64>, times: u32, wrong: Wrong) {
        self.state().planned.push(Planned {
            operation,
            bytes,
            times,
            wrong,
        });
    }

    /// Lets so many bytes be written; what does not fit is written in part, or
    /// ENOSPC.
    pub fn leave_room(&self, bytes: u64) {
        self.state().room = Some(bytes);
    }

    /// Nothing goes wrong any more. How many operations did so far.
    pub fn heal(&self) -> u64 {
        let mut state = self.state();
        state.planned.clear();
        state.room = None;
        std::mem::take(&mut state.happened)
    }

    /// What an operation ends with: an error number or zero, and the most bytes
    /// that it may move.
    pub(super) fn strike(&self, opcode: u64, bytes: Range<u64>) -> (i32, usize) {
        const ENOSPC: i32 = 28;
        let mut state = self.state();
        let touches = |planned: &Planned| {
            let same = planned.operation as u64 == opcode && planned.times > 0;
            same && planned.bytes.start < bytes.end && bytes.start < planned.bytes.end
        };
        if let Some(planned) = state.planned.iter_mut().find(|planned| touches(planned)) {
            planned.times -= 1;
            let wrong = planned.wrong;
            state.happened += 1;
            return match wrong {
                Wrong::Errno(errno) => (errno, 0),
                Wrong::Short(most) => (0, most),
            };
        }
        let wanted = bytes.end.saturating_sub(bytes.start);
        if opcode != Operation::Write as u64 || wanted == 0 {
            return (0, usize::MAX);
        }
        let Some(room) = state.room.as_mut() else {
            return (0, usize::MAX);
        };
        let fits = wanted.min(*room);
        *room -= fits;
        state.happened += u64::from(fits < wanted);
        match fits {
            0 => (ENOSPC, 0),
            fits => (0, fits as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_where_and_as_often_as_planned() {
        let faults = Faults::default();
        let read = Operation::Read as u64;
        faults.plan(Operation::Read, 4096..8192, 2, Wrong::Errno(5));
        faults.plan(Operation::Read, 0..u64::MAX, 1, Wrong::Short(7));
        assert_eq!(faults.strike(read, 8191..9000), (5, 0));
        assert_eq!(faults.strike(read, 8192..9000), (0, 7));
        assert_eq!(faults.strike(read, 8192..9000), (0, usize::MAX));
        assert_eq!(faults.strike(read, 0..4097), (5, 0));
        assert_eq!(faults.strike(read, 0..4097), (0, usize::MAX));
        assert_eq!(faults.heal(), 3);
    }

    #[test]
    fn room_is_used_up_to_the_last_byte() {
        let faults = Faults::default();
        let write = Operation::Write as u64;
        faults.leave_room(5000);
        assert_eq!(faults.strike(write, 0..4096), (0, 4096));
        assert_eq!(faults.strike(write, 4096..8192), (0, 904));
        assert_eq!(faults.strike(write, 5000..8192), (28, 0));
        assert_eq!(faults.heal(), 2);
        assert_eq!(faults.strike(write, 5000..8192), (0, usize::MAX));
    }
}
