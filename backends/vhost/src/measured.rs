//! Private pieces as the bench `inside` needs them; no promise to anybody else.

use std::io;
use std::sync::Arc;

use crate::limiter::{Gate, Limits};
use crate::mailbox::{Command, Mailbox};
use crate::oversight::Oversight;

/// A queue under limits.
#[derive(Debug)]
pub struct Limited(Gate);

impl Limited {
    /// A queue of a device with these limits, which begin at time 0.
    pub fn new(limits: &Limits) -> Self {
        let oversight = Oversight::default();
        oversight.lanes[0].set(limits, 0);
        Self(Gate::new(Arc::new(oversight), 0))
    }

    /// What one request does on its way in, at `now` (nanoseconds), with so many
    /// bytes. False when it would have to wait.
    pub fn pass(&mut self, now: u64, bytes: u64) -> bool {
        let open = self.0.open(now);
        if open {
            self.0.charge(now, bytes);
        }
        open
    }
}

/// A worker's mailbox.
#[derive(Debug)]
pub struct Orders(Mailbox<()>);

impl Orders {
    /// An empty one.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> io::Result<Self> {
        Mailbox::new().map(Self)
    }

    /// Leaves an order, and wakes the worker.
    pub fn send(&self) {
        self.0.send(Command::Look);
    }

    /// Takes one, if there is any.
    pub fn take(&self) -> bool {
        self.0.take().is_some()
    }
}
