//! A worker without a thread: it does what there is to do when it is told to, in the
//! calling thread, and wakes from its sleep by what would have woken it. For whoever
//! plays the driver, the session and time itself, as the fuzzer does; no program has
//! one.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use pericarp_ring::SplitQueue;
use pericarp_uring::EngineError;

use super::Worker;
use crate::device::Device;
use crate::mailbox::{Bell, Command, QueueId, StartQueue};

/// A queue to be served.
#[derive(Debug)]
pub struct Given<D> {
    /// Whose it is.
    pub device: Arc<D>,
    /// Tells the devices of a worker apart.
    pub device_id: u16,
    /// Its number.
    pub number: u16,
    /// Its rings.
    pub queue: SplitQueue,
    /// Eventfds that do not block: the driver's kicks, calls of the driver, and what is
    /// said of a ring that it broke.
    pub bells: [OwnedFd; 3],
}

/// How a queue was given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The index of the next chain.
    pub next_avail: u16,
    /// The driver broke it.
    pub broken: bool,
}

/// The worker.
#[derive(Debug)]
pub struct Hand<D: Device> {
    worker: Worker<D>,
    asleep: bool,
}

impl<D: Device> Hand<D> {
    pub(crate) fn new(mut worker: Worker<D>) -> Result<Self, EngineError> {
        worker.begin()?;
        Ok(Self {
            worker,
            asleep: false,
        })
    }

    /// Gives it a queue.
    ///
    /// # Errors
    /// The engine's.
    pub fn give(&mut self, given: Given<D>) -> Result<(), EngineError> {
        let [kick, call, error] = given.bells.map(Arc::new);
        let bell = |fd| {
            Some(Bell {
                fd,
                is_eventfd: true,
                is_socket: false,
            })
        };
        self.worker.start_queue(StartQueue {
            id: QueueId {
                device: given.device_id,
                queue: given.number,
            },
            device: given.device,
            queue: given.queue,
            kick,
            call: bell(call),
            error: bell(error),
            record: None,
            oversight: None,
        })?;
        // As the order in its mailbox would have.
        self.asleep = false;
        Ok(())
    }

    /// Takes a queue back, once nothing of it is in flight; `None` if it has none like
    /// that, or does not let go of it within so many turns.
    ///
    /// # Errors
    /// As [`work`](Self::work).
    pub fn take(
        &mut self,
        device: u16,
        queue: u16,
        turns: usize,
    ) -> Result<Option<Taken>, EngineError> {
        let (reply, answer) = sync_channel(1);
        let id = QueueId { device, queue };
        self.worker.mailbox.send(Command::Stop(id, reply));
        self.work(turns)?;
        let taken = answer.try_recv().ok();
        Ok(taken.map(|stopped| Taken {
            next_avail: stopped.next_avail,
            broken: stopped.broken,
        }))
    }

    /// Takes turns until it would sleep, if anything wakes it at all; what is in flight
    /// is waited for. False if it does not come to rest in so many turns.
    ///
    /// # Errors
    /// The engine's.
    pub fn work(&mut self, turns: usize) -> Result<bool, EngineError> {
        for _ in 0..turns {
            let woken = self.worker.rest(self.asleep && self.worker.is_busy())?;
            if self.asleep && woken == 0 {
                return Ok(true);
            }
            self.asleep = self.worker.turn()? == Some(false);
        }
        Ok(false)
    }
}
