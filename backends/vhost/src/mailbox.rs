//! Orders from session threads to a worker.
//!
//! A lock-free queue and an eventfd: the session pushes and writes the eventfd,
//! the worker's engine watches it and empties the queue whenever it wakes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use crossbeam::queue::SegQueue;
use pericarp_ring::SplitQueue;
use pericarp_uring::EngineError;
use rustix::event::{EventfdFlags, eventfd};

use crate::oversight::MaybeOverseen;
use crate::session::Kept;

/// Names one virtqueue of one device in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueId {
    pub(crate) device: u16,
    pub(crate) queue: u16,
}

/// A queue handed to a worker.
#[derive(Debug)]
pub(crate) struct StartQueue<D> {
    pub(crate) id: QueueId,
    pub(crate) device: Arc<D>,
    pub(crate) queue: SplitQueue,
    pub(crate) kick: Arc<OwnedFd>,
    pub(crate) call: Option<Bell>,
    pub(crate) error: Option<Bell>,
    /// For a successor of this process.
    pub(crate) record: Option<Kept>,
    pub(crate) oversight: MaybeOverseen,
}

/// A descriptor that tells the driver something. Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct Bell {
    pub(crate) fd: Arc<OwnedFd>,
    /// An eventfd, as opposed to a pipe or socket.
    pub(crate) is_eventfd: bool,
    pub(crate) is_socket: bool,
}

/// How a queue was when its worker gave it back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopped {
    /// The index of the next request.
    pub(crate) next_avail: u16,
    /// The driver broke the ring: it must be set up anew before it runs.
    pub(crate) broken: bool,
}

/// An order to a worker.
#[derive(Debug)]
pub(crate) enum Command<D> {
    /// Serve a queue.
    Start(Box<StartQueue<D>>, SyncSender<Result<(), EngineError>>),
    /// Take no more requests from the queue, finish those in flight, and answer.
    Stop(QueueId, SyncSender<Stopped>),
    /// Forget a [`Stop`](Self::Stop) that was not answered yet, and drop its sender.
    GoOn(QueueId),
    /// Signal completions of the queue here from now on. It is answered, so
    /// that a front end cannot fill the mailbox with descriptors.
    SetCall(QueueId, Option<Bell>, SyncSender<Result<(), EngineError>>),
    /// Let go of the files of this device, whose queues are all stopped.
    Forget(u16, SyncSender<()>),
    /// The errand of a request is done, with this result. Queue and request are
    /// those of the worker: neither goes while it is under way.
    Done { slot: usize, head: u16, result: i32 },
    /// Look at all queues again: limits have changed.
    Look,
    /// Return once nothing is left to do.
    End,
}

/// The sending and receiving end in one: both sides hold it by `Arc`.
#[derive(Debug)]
pub(crate) struct Mailbox<D> {
    queue: SegQueue<Command<D>>,
    event: OwnedFd,
}

impl<D> Mailbox<D> {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            queue: SegQueue::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Leaves an order and wakes the worker.
    pub(crate) fn send(&self, command: Command<D>) {
        self.queue.push(command);
        // A counter at its maximum has woken the worker already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    pub(crate) fn take(&self) -> Option<Command<D>> {
        self.queue.pop()
    }

    pub(crate) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}
