//! Hand-over: a new process goes on with the front ends of a running one, which
//! do not notice but for a pause.
//!
//! The running process is confined and cannot execute anything, so the new one
//! is started beside it and asks on its control socket. All that takes time
//! comes first, while the old one serves on:
//!
//! ```text
//!   new                                   old
//!    {"op":"hand-over","version":2}  -->
//!                                    <--  {"ok":true,"version":2}
//!    offer: its devices              -->  compares them with its own
//!                                    <--  estate: all sockets, the locks
//!    confines itself, starts threads
//!    drain                           -->  every queue finishes and stands still
//!                                    <--  device: how its session stands, once for each,
//!                                         and bags: what the device itself knows
//!    maps the memory, checks
//!    ready                           -->
//!                                    <--  yours
//!    starts the queues                    ends, removes nothing
//! ```
//!
//! **The point of no return** is the moment in which the old process has sent
//! `yours`. Until then the new one touches no ring, and whatever goes wrong on
//! either side (it dies, it is late, something differs) has the old one start
//! its queues again. From then on the old one touches nothing, and a death of
//! the new one is that of any backend: front ends reconnect to a successor.
//! Nothing is in flight at that point, so that no request can be lost or done
//! twice; records of requests in flight and their locks go along.
//!
//! Both are processes of one user (SO_PEERCRED). The new one believes the old
//! one no more than it would a front end all the same: memory and rings pass
//! the checks that they pass in a session.
//!
//! [`Meeting`] is where the old process's sessions stop for it, [`Giver`] its
//! half of the talk, [`Predecessor`] the new one's. Programs make them; sessions
//! pack and unpack themselves in `session/handover.rs`.

mod bag;
mod give;
mod meeting;
mod state;
mod take;
mod wire;

use std::io;
use std::time::Duration;

use thiserror::Error;

pub use bag::{BAG_BYTES, BAG_DESCRIPTORS, Bag, Unpacked};
pub use give::{Estate, Giver};
pub use meeting::Meeting;
pub(crate) use meeting::{Changing, LOOK, Verdict};
pub(crate) use state::{
    Descriptor, DeviceState, Fds, Parcel, RecordsState, RegionState, SessionState, VringState,
};
pub use state::{DeviceIdentity, Identity};
pub use take::{Inheritance, Predecessor};

/// Why there was no hand-over. The text is what an operator reads.
#[derive(Debug, Error)]
pub enum HandOverError {
    /// Nobody is there to take over from.
    #[error("nobody answers there ({0}): give the control socket of a running program")]
    Connect(io::Error),
    /// It belongs to somebody else.
    #[error("user {0} is at the other end: a program takes over from one of its own user")]
    Stranger(u32),
    /// The running program said so.
    #[error("the running program refuses: {0}")]
    Refused(String),
    /// It serves something else: the operator's mistake.
    #[error("it serves something else ({0}): give the options that it was started with")]
    Differs(String),
    /// The other side ended.
    #[error("the other program ended in the middle of it")]
    Gone,
    /// The other side took too long.
    #[error("the other program did not answer in time")]
    Late,
    /// These devices' requests did not end, or their front ends are in the
    /// middle of a message or leave answers unread.
    #[error("device {0} did not come to rest within {1:?}: its disk or its front end holds it up")]
    Busy(String, Duration),
    /// This program was told to end.
    #[error("the program is ending")]
    Ending,
    /// What arrived makes no sense.
    #[error("the other program says what this one does not understand")]
    Malformed,
    /// The limit of open descriptors.
    #[error("not all descriptors fit this process: raise its limit of open files")]
    Descriptors,
    /// A session cannot be taken over.
    #[error("device {0}: {1}")]
    Session(u16, String),
    /// The kernel's refusal.
    #[error("the system refused it ({0})")]
    System(#[from] io::Error),
}

impl From<rustix::io::Errno> for HandOverError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::System(errno.into())
    }
}

/// The system's monotonic clock, the same for both processes.
pub(crate) fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
