//! Operations that may wait: each runs on a thread of its own, which leaves its
//! answer with the connection that asked and wakes the serving thread.
//!
//! [`crate::Server`] has one [`Errands`]; connections send them out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

use rustix::event::{EventfdFlags, eventfd};

use crate::operations::{Arguments, Errand, answer_of};

/// Errands under way at once.
const MOST_ERRANDS: usize = 16;

/// The stack of their threads, as of the serving one.
const STACK: usize = 256 * 1024;

/// The errands of one server.
#[derive(Debug)]
pub(crate) struct Errands {
    /// Readable when one has ended.
    bell: Arc<OwnedFd>,
    under_way: Arc<AtomicUsize>,
}

/// An errand under way. The answer of one that is dropped is thrown away.
#[derive(Debug)]
pub(crate) struct Pending(Receiver<String>);

impl Pending {
    /// The answer, without its line end, once it is there.
    pub(crate) fn answer(&self) -> Option<String> {
        self.0.try_recv().ok()
    }
}

impl Errands {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            bell: Arc::new(eventfd(0, flags)?),
            under_way: Arc::default(),
        })
    }

    /// Readable when somebody's answer may be there, until this is called.
    pub(crate) fn silence(&self) {
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
    }

    pub(crate) fn send(
        &self,
        errand: Arc<Errand>,
        arguments: Arguments,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Pending, String> {
        // A peer can go and come again while what it asked for still waits.
        let place = Place(Arc::clone(&self.under_way));
        if place.0.fetch_add(1, Ordering::Relaxed) >= MOST_ERRANDS {
            return Err("too much is being done already: ask again later".to_owned());
        }
        let (answer, pending) = sync_channel(1);
        let bell = Arc::clone(&self.bell);
        std::thread::Builder::new()
            .name("errand".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let outcome = errand(&arguments, descriptors);
                // Nobody may be there any more to hear it.
                let _ = answer.send(answer_of(outcome));
                drop(place);
                let _ = rustix::io::write(&*bell, &1u64.to_ne_bytes());
            })
            .map_err(|e| e.to_string())?;
        Ok(Pending(pending))
    }
}

impl AsFd for Errands {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// Counted as long as it is there.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
