//! What a device is to its sessions and workers.
//!
//! A device is a state machine over requests: it looks at a chain and says what
//! to do next; the worker does it and comes back with the result. It touches no
//! socket, ring or thread, which is why a device can be tested by itself.

use std::fmt::Debug;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use pericarp_ring::{Buffer, Chain, ChainError};
use pericarp_uring::Place;
use thiserror::Error;

use crate::handover::{Bag, Unpacked};
use crate::helpers::Errand;
use crate::limiter::{LIMIT_NAMES, LimitNames};

/// The front end wrote a configuration field that is read-only or unknown, or a
/// value the device does not take.
#[derive(Debug, Error)]
#[error("bytes {offset}..{end} of the configuration space cannot be set like that")]
pub struct ConfigRefused {
    /// First byte.
    pub offset: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A file that a step acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileRef {
    /// Index into [`Device::files`].
    Listed(u16),
    /// A file that the request keeps open, and goes on keeping open until the
    /// step has ended, with workers that were made for it
    /// ([`crate::PoolOptions::descriptors`]).
    Open {
        /// Its descriptor.
        descriptor: RawFd,
        /// Where operations on it are done.
        place: Place,
    },
}

/// What to do next for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The request is finished; `written` bytes of its chain were filled.
    Done {
        /// For the used element (virtio 1.3, 2.7.8).
        written: u32,
    },
    /// Read from the file into all that is left of the chain's writable part,
    /// or as much of it as the buffer takes.
    Read {
        /// Which file.
        file: FileRef,
        /// Byte offset in the file.
        offset: u64,
        /// RWF_* flags of preadv2.
        flags: i32,
        /// Where the bytes go to.
        buffer: Buffer,
    },
    /// Write all that is left of the chain's readable part to the file, or as
    /// much of it as the buffer takes.
    Write {
        /// Which file.
        file: FileRef,
        /// Byte offset in the file.
        offset: u64,
        /// RWF_* flags of pwritev2.
        flags: i32,
        /// Where the bytes come from.
        buffer: Buffer,
    },
    /// Make everything written to the file so far durable.
    Sync {
        /// Which file.
        file: FileRef,
        /// All that is known about it, too, and not just what it takes to read
        /// it back (fsync, not fdatasync).
        metadata: bool,
    },
    /// Change how the file's space is allocated.
    Allocate {
        /// Which file.
        file: FileRef,
        /// Byte offset in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// FALLOC_FL_* flags of fallocate.
        mode: i32,
    },
    /// Discard a part of a block device, with workers that were
    /// made for it ([`crate::PoolOptions::commands`]).
    Discard {
        /// Which file.
        file: FileRef,
        /// Byte offset in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Write zeroes to the file; fewer than asked for may be written.
    WriteZeroes {
        /// Which file.
        file: FileRef,
        /// Byte offset in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// RWF_* flags of pwritev2.
        flags: i32,
    },
    /// Have a thread that may wait do what [`Device::errand`] says.
    Errand,
}

/// How a request counts, in limits and in statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Account {
    /// Index into [`Device::CLASSES`].
    pub class: usize,
    /// Bytes of data it moves.
    pub bytes: u64,
    /// It ended with an error; of interest once it is done.
    pub failed: bool,
}

/// Which way packets go, seen from the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From a file of the device's to the driver.
    In,
    /// From the driver to the file.
    Out,
}

/// What a queue carries whose chains are packets: each read of the file gives one,
/// and each write takes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Which way.
    pub way: Way,
    /// Index into [`Device::files`]; the file is read for one queue alone.
    pub file: u16,
    /// Bytes of each packet that come before what counts.
    pub header: usize,
    /// Bytes a packet has at least, header included.
    pub least: usize,
    /// Bytes a packet has at most, header included.
    pub most: usize,
    /// A packet may be spread over chains (VIRTIO_NET_F_MRG_RXBUF).
    pub merge: bool,
    /// Index into [`Device::CLASSES`].
    pub class: usize,
}

/// Why a packet was not passed on, or a chain given back empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// The chain is malformed, or not for packets of this way.
    Chain,
    /// Too short or too long.
    Length,
    /// The driver's memory does not hold it.
    NoRoom,
    /// The file refused it with this errno.
    Refused(i32),
}

/// A virtio device served over vhost-user.
pub trait Device: Debug + Send + Sync + 'static {
    /// What the device remembers of one request between its steps.
    type Request: Default + Debug + Send + 'static;

    /// Names of the classes its requests are counted by, at most 8.
    const CLASSES: &'static [&'static str] = &["other"];

    /// What its limits are called, for each direction that is limited apart.
    const LIMITS: &'static [LimitNames] = &[LIMIT_NAMES];

    /// Index into [`Device::LIMITS`]: which limits hold for a queue, if any do.
    fn lane(&self, _queue: u16) -> Option<usize> {
        Some(0)
    }

    /// How a request that was started counts.
    fn account(&self, _request: &Self::Request) -> Account {
        Account::default()
    }

    /// The device type's own feature bits; the common ones are added.
    fn features(&self) -> u64;

    /// Number of virtqueues.
    fn queue_count(&self) -> u16;

    /// The largest size a front end may give a queue, a power of two.
    fn max_queue_size(&self) -> u16;

    /// The configuration space as it reads now.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// [`ConfigRefused`] when a byte of it cannot be written.
    fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), ConfigRefused>;

    /// A session settled on these features. No queue runs yet.
    fn negotiated(&self, features: u64);

    /// What the driver has of us now, by name: shown with the statistics, never
    /// asked for on the data path.
    fn held(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// The front end went, or had the device reset: whatever the driver has open
    /// is nobody's any more. No queue runs.
    fn abandoned(&self) {}

    /// Another process served the device until now, and may have changed what
    /// was looked at when this one started.
    fn refresh(&self) {}

    /// What the device knows of its guest beside the session, for the process that
    /// takes over. No queue runs. The device goes on if that comes to nothing.
    ///
    /// # Errors
    /// Why it cannot be handed over now.
    fn pack(&self) -> io::Result<Vec<Bag>> {
        Ok(Vec::new())
    }

    /// What a predecessor packed. Called at most once, before a session goes on.
    ///
    /// # Errors
    /// What is wrong with it; the predecessor goes on then.
    fn unpack(&self, bags: Vec<Unpacked>) -> Result<(), String> {
        match bags.is_empty() {
            true => Ok(()),
            false => Err("it knows more than this program understands".to_owned()),
        }
    }

    /// A session goes on that settled on these features with another process,
    /// where the configuration space read like this. What the driver has set in
    /// it counts here, too.
    fn resumed(&self, features: u64, _config: &[u8]) {
        self.negotiated(features);
    }

    /// The files requests act on, open as long as the device lives.
    fn files(&self) -> &[OwnedFd];

    /// Reads and writes of the files make whoever starts them wait, because
    /// their file system knows no other way.
    fn files_wait(&self) -> bool {
        false
    }

    /// Reads and writes of the files complete when somebody looks at their device,
    /// with workers that were made for it ([`crate::PoolOptions::polled`]).
    fn files_poll(&self) -> bool {
        false
    }

    /// A request is about to start whose place in its queue is on record for a
    /// successor, and `again` if it was a predecessor's. What the device notes
    /// of it under queue and head is kept until the driver has its answer.
    #[inline]
    fn recorded(&self, _request: &mut Self::Request, _queue: u16, _head: u16, _again: bool) {}

    /// A request arrived. `loaded` tells whether its chain is sound.
    fn start(
        &self,
        loaded: Result<(), ChainError>,
        chain: Chain<'_>,
        request: &mut Self::Request,
    ) -> Step;

    /// What is to be done elsewhere, of a request that asked for
    /// [`Step::Errand`]. What it returns is the step's result; the request keeps
    /// nothing of it that the errand does not share.
    fn errand(self: Arc<Self>, _request: &mut Self::Request) -> Errand {
        Errand::new(|| -libc::ENOSYS)
    }

    /// What the queue carries, if that is packets: no request of it is started then.
    fn traffic(&self, _queue: u16) -> Option<Traffic> {
        None
    }

    /// A packet of such a queue was not passed on. Called on the data path.
    fn dropped(&self, _queue: u16, _why: Dropped) {}

    /// The front end has the queue served from now on, or no more. It is served without
    /// a word of that while it rests for a moment, as for a new memory table.
    fn serves(&self, _queue: u16, _on: bool) {}

    /// A queue is to stop as soon as nothing of it is in flight: what waits for
    /// something that may never happen ([`Errand::awaited`]) is to end now.
    fn hasten(&self) {}

    /// The last step ended with `result`: bytes moved, already consumed from
    /// the chain, or a negative errno.
    fn resume(&self, chain: Chain<'_>, request: &mut Self::Request, result: i32) -> Step;
}
