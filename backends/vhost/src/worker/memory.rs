//! Guest memory as registered buffers of a worker's ring, where the operator
//! asked for it: the kernel pins the pages once and need not look them up for
//! every request. The loop of the worker calls it.
//!
//! A region is registered while any queue of this worker lives in it. It goes
//! in piece by piece, one for each turn of the loop, because pinning takes time
//! and the worker has other guests' queues to serve; until a piece is in, and
//! where the kernel refuses, requests do without. It goes out the same way, and
//! the session that waits for its queues to stop is answered when all of it is
//! out. A [`Region`] is held for as long as any piece of it is registered: the
//! mapping cannot go before, and no other can come in its place.
#![expect(unsafe_code)]
// UNSAFETY: `step` promises the engine that a piece stays mapped.

use std::collections::HashSet;
use std::sync::mpsc::SyncSender;

use log::{debug, warn};
use pericarp_ring::{GuestMemory, Region};
use pericarp_uring::{BufferSlot, Engine, EngineError, MAX_BUFFER};
use rustix::fs::fcntl_get_seals;

use crate::causes;
use crate::mailbox::Stopped;

/// Bytes of one piece. Pinning 64 MiB takes about a millisecond, and several
/// where the pages must be made first: so long do the other queues of a worker
/// wait, again and again, while a guest begins. A request that crosses the
/// edge of a piece does without.
const PIECE: usize = 64 << 20;
const _: () = assert!(PIECE <= MAX_BUFFER);

/// A region that queues of this worker live in, or have just left.
#[derive(Debug)]
struct Held {
    device: u16,
    region: Region,
    /// Queues.
    users: usize,
    /// Those that are registered, from the region's start on.
    pieces: Vec<BufferSlot>,
    /// The kernel refused a part of it, or it cannot be registered at all.
    refused: bool,
}

/// The registered memory of one worker.
#[derive(Debug)]
pub(super) struct Registry {
    enabled: bool,
    held: Vec<Held>,
    /// Something may have to be registered or taken out.
    due: bool,
    /// Devices whose refusal was logged.
    told: HashSet<u16>,
    /// Sessions to be answered once all that nobody uses is out.
    waiting: Vec<(SyncSender<Stopped>, Stopped)>,
}

impl Registry {
    pub(super) fn new(engine: &Engine) -> Self {
        Self {
            enabled: engine.registers_memory(),
            held: Vec::new(),
            due: false,
            told: HashSet::new(),
            waiting: Vec::new(),
        }
    }

    /// A queue begins to live in this memory.
    pub(super) fn enter(&mut self, device: u16, memory: &GuestMemory) {
        if !self.enabled {
            return;
        }
        self.due = true;
        for region in memory.regions() {
            let place = region.host_range();
            // A mapping is in one place, and nothing else is there.
            match self
                .held
                .iter_mut()
                .find(|h| h.region.host_range() == place)
            {
                Some(held) => held.users += 1,
                None => self.held.push(Held {
                    device,
                    region: region.clone(),
                    users: 1,
                    pieces: Vec::new(),
                    refused: false,
                }),
            }
        }
    }

    /// A queue that lived in this memory is gone, and nothing of it in flight.
    pub(super) fn leave(&mut self, memory: &GuestMemory) {
        for region in memory.regions() {
            let place = region.host_range();
            if let Some(held) = self
                .held
                .iter_mut()
                .find(|h| h.region.host_range() == place)
            {
                held.users -= 1;
                self.due = true;
            }
        }
    }

    /// Tells a session that its queue has stopped, once no memory is registered
    /// that no queue lives in.
    pub(super) fn once_gone(&mut self, reply: SyncSender<Stopped>, stopped: Stopped) {
        self.waiting.push((reply, stopped));
        self.answer();
    }

    fn answer(&mut self) {
        if self.held.iter().all(|held| held.users > 0) {
            for (reply, stopped) in self.waiting.drain(..) {
                // A session that no longer waits has ended; its own affair.
                let _ = reply.send(stopped);
            }
        }
    }

    /// True while [`step`](Self::step) has something to do.
    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    /// Registers one piece, or takes one out.
    pub(super) fn step(&mut self, engine: &mut Engine) {
        // Out first: a session waits, and a limit may have room again.
        if let Some(index) = self.held.iter().position(Held::is_over) {
            match self.held[index].pieces.pop() {
                Some(slot) => engine.remove_buffer(slot),
                None => {
                    self.held.swap_remove(index);
                    self.answer();
                }
            }
        } else if let Some(index) = self.held.iter().position(Held::wants_more) {
            if let Err(error) = self.held[index].register(engine) {
                self.give_up(self.held[index].device, &error);
            }
        } else {
            self.due = false;
        }
    }

    /// All or nothing: half a guest's memory would still be pinned, and count
    /// against a limit that others need.
    fn give_up(&mut self, device: u16, error: &Refused) {
        for held in self.held.iter_mut().filter(|h| h.device == device) {
            held.refused = true;
        }
        if self.told.insert(device) {
            let why = causes(error);
            warn!("device {device}: its memory is not registered, it is served without: {why}");
        }
    }
}

/// Why a region cannot be registered.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("it is a file on a file system, not memory")]
    NotMemory,
    #[error("the limit of locked memory (RLIMIT_MEMLOCK) or the machine's memory does not suffice")]
    TooMuch(#[source] EngineError),
    #[error(transparent)]
    Engine(EngineError),
}

impl Held {
    /// Something of it is registered that must not be, or nothing is and
    /// nobody needs it.
    fn is_over(&self) -> bool {
        self.users == 0 || (self.refused && !self.pieces.is_empty())
    }

    fn wants_more(&self) -> bool {
        let (_, len) = self.region.host_range();
        self.users > 0 && !self.refused && self.pieces.len() * PIECE < len
    }

    /// Registers the next piece.
    fn register(&mut self, engine: &mut Engine) -> Result<(), Refused> {
        // Only memory has seals. Pages of any other file system may be the
        // front end's own to deliver, and are not to be pinned for long.
        let file = self.region.file().ok_or(Refused::NotMemory)?;
        fcntl_get_seals(file).map_err(|_| Refused::NotMemory)?;
        let (start, len) = self.region.host_range();
        let done = self.pieces.len() * PIECE;
        // SAFETY: `done` is less than the region's length, and the mapping is
        // as long as the region. The region is held, and with it the mapping,
        // until the last piece was taken out or the engine is gone; what
        // replaces lost memory in it is never given out as another region.
        let slot = unsafe { engine.add_buffer(start.add(done), PIECE.min(len - done)) };
        self.pieces.push(slot.map_err(|error| match &error {
            EngineError::Setup { source, .. } if source.raw_os_error() == Some(libc::ENOMEM) => {
                Refused::TooMuch(error)
            }
            _ => Refused::Engine(error),
        })?);
        if !self.wants_more() {
            let (device, guest) = (self.device, self.region.spec().guest_address);
            debug!("device {device}: {len} bytes at guest address {guest:#x} are registered");
        }
        Ok(())
    }
}
