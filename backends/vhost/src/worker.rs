//! A worker thread: the queues it serves and the engine it sleeps in.
//!
//! One turn of the loop takes the orders from the mailbox, pops every
//! available chain of every queue, starts the I/O, publishes what is finished
//! with one index store and at most one call per queue, and enters the kernel
//! once. Kicks, orders and I/O completions all end that sleep.
//!
//! A queue leaves a worker only through `Command::Stop`, and only when nothing
//! of it is in flight: that is what keeps guest memory mapped while the kernel
//! may still write to it.
#![expect(unsafe_code)]
// UNSAFETY: `issue` gives the engine pointers into guest memory and must
// uphold the engine's promise that they stay valid.

use std::collections::HashMap;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use log::warn;
use pericarp_ring::{Buffer, QueueError, RequestQueue};
use pericarp_uring::{Completion, Engine, EngineError, FileSlot, Transfer};

use crate::device::{Device, Step};
use crate::mailbox::{Bell, Command, Mailbox, QueueId, StartQueue, Stopped};

/// Tokens: the kind in the top byte that is ours, then what belongs to it.
const KIND_SHIFT: u32 = 56;
const KIND_IO: u64 = 0;
const KIND_KICK: u64 = 1;
const KIND_MAILBOX: u64 = 2;

/// How a queue stands.
#[derive(Debug)]
enum State {
    Running,
    /// The driver broke the ring; nothing is popped until it is set up anew.
    Broken,
    /// A session waits for the in-flight requests.
    Stopping {
        reply: SyncSender<Stopped>,
        broken: bool,
    },
}

/// A registered descriptor of the driver's.
#[derive(Debug)]
struct Ringer {
    bell: Bell,
    slot: FileSlot,
}

impl Ringer {
    fn new(engine: &mut Engine, bell: Option<Bell>) -> Result<Option<Self>, EngineError> {
        bell.map(|bell| {
            let slot = engine.add_file(bell.fd.as_raw_fd())?;
            Ok(Self { bell, slot })
        })
        .transpose()
    }

    fn ring(&self, engine: &mut Engine) {
        engine.signal(self.slot, self.bell.is_eventfd);
    }

    /// What was rung must be on its way before the slot means something else.
    fn retire(this: Option<Self>, engine: &mut Engine) -> Result<(), EngineError> {
        let Some(ringer) = this else {
            return Ok(());
        };
        engine.submit(false)?;
        engine.remove_file(ringer.slot);
        Ok(())
    }
}

/// A queue in service.
#[derive(Debug)]
struct Active<D: Device> {
    id: QueueId,
    device: Arc<D>,
    requests: RequestQueue<D::Request>,
    /// The last step of each in-flight request, by head.
    steps: Box<[Step]>,
    files: Arc<[FileSlot]>,
    kick_slot: FileSlot,
    kick_token: u64,
    /// Keeps the descriptor open for as long as the engine watches it.
    _kick: Arc<OwnedFd>,
    call: Option<Ringer>,
    error: Option<Ringer>,
    state: State,
    /// The driver was asked to kick and the ring was empty after that.
    armed: bool,
}

/// A worker before and while it runs.
#[derive(Debug)]
pub(crate) struct Worker<D: Device> {
    /// Declared first, so that it is dropped, and has drained, before the
    /// memory of the queues goes away.
    engine: Engine,
    mailbox: Arc<Mailbox<D>>,
    queues: Vec<Option<Active<D>>>,
    /// Registered files of each device seen so far.
    files: HashMap<u16, Arc<[FileSlot]>>,
    /// Tells a kick watch from earlier ones of the same queue slot.
    generation: u32,
    completions: Vec<Completion>,
}

impl<D: Device> Worker<D> {
    pub(crate) fn new(engine: Engine, mailbox: Arc<Mailbox<D>>) -> Self {
        Self {
            engine,
            mailbox,
            queues: Vec::new(),
            files: HashMap::new(),
            generation: 0,
            completions: Vec::new(),
        }
    }

    /// Serves until [`Command::End`].
    ///
    /// # Errors
    /// [`EngineError`] when the engine cannot go on.
    pub(crate) fn run(mut self) -> Result<(), EngineError> {
        self.engine.start()?;
        let mailbox = self.engine.add_file(self.mailbox.event())?;
        self.engine.watch(mailbox, KIND_MAILBOX << KIND_SHIFT);
        loop {
            while let Some(command) = self.mailbox.take() {
                if matches!(command, Command::End) {
                    return Ok(());
                }
                self.obey(command)?;
            }
            let mut more = false;
            for slot in 0..self.queues.len() {
                more |= self.serve(slot)?;
            }
            self.engine.submit(!more)?;
            let mut completions = mem::take(&mut self.completions);
            self.engine.completions(&mut completions);
            for completion in completions.drain(..) {
                match completion.token >> KIND_SHIFT {
                    KIND_IO => self.complete(completion),
                    KIND_MAILBOX if completion.result < 0 => {
                        let error = std::io::Error::from_raw_os_error(-completion.result);
                        return Err(EngineError::Failed(error));
                    }
                    _ => {}
                }
            }
            self.completions = completions;
        }
    }

    fn obey(&mut self, command: Command<D>) -> Result<(), EngineError> {
        // A session that no longer waits for its answer has ended; that is its
        // own affair.
        match command {
            Command::Start(start, reply) => {
                let _ = reply.send(self.start_queue(*start));
            }
            Command::Stop(id, reply) => match self.find(id) {
                Some(active) => {
                    let broken = matches!(active.state, State::Broken);
                    active.state = State::Stopping { reply, broken };
                }
                None => drop(reply),
            },
            Command::SetCall(id, call, reply) => {
                let _ = reply.send(self.set_call(id, call));
            }
            Command::End => {}
        }
        Ok(())
    }

    fn set_call(&mut self, id: QueueId, call: Option<Bell>) -> Result<(), EngineError> {
        let engine = &mut self.engine;
        let Some(active) = self.queues.iter_mut().flatten().find(|a| a.id == id) else {
            return Ok(());
        };
        let before = active.call.take();
        let first = before.is_none();
        Ringer::retire(before, engine)?;
        active.call = Ringer::new(engine, call)?;
        // What completed while nobody could be called is said now.
        if first && let Some(call) = &active.call {
            call.ring(engine);
        }
        Ok(())
    }

    fn find(&mut self, id: QueueId) -> Option<&mut Active<D>> {
        self.queues.iter_mut().flatten().find(|a| a.id == id)
    }

    fn start_queue(&mut self, start: StartQueue<D>) -> Result<(), EngineError> {
        let files = self.device_files(start.id.device, &start.device)?;
        let kick_slot = self.engine.add_file(start.kick.as_raw_fd())?;
        let call = Ringer::new(&mut self.engine, start.call)?;
        let error = Ringer::new(&mut self.engine, start.error)?;
        let slot = self.queues.iter().position(Option::is_none);
        let slot = slot.unwrap_or_else(|| {
            self.queues.push(None);
            self.queues.len() - 1
        });
        self.generation = self.generation.wrapping_add(1);
        let kick_token =
            KIND_KICK << KIND_SHIFT | u64::from(self.generation) << 16 | slot as u64 & 0xffff;
        self.engine.watch(kick_slot, kick_token);
        let steps = vec![Step::Done { written: 0 }; usize::from(start.queue.size())];
        self.queues[slot] = Some(Active {
            id: start.id,
            device: start.device,
            requests: RequestQueue::new(start.queue),
            steps: steps.into_boxed_slice(),
            files,
            kick_slot,
            kick_token,
            _kick: start.kick,
            call,
            error,
            state: State::Running,
            armed: false,
        });
        Ok(())
    }

    /// Registers a device's files the first time one of its queues comes here.
    fn device_files(&mut self, id: u16, device: &D) -> Result<Arc<[FileSlot]>, EngineError> {
        if let Some(files) = self.files.get(&id) {
            return Ok(Arc::clone(files));
        }
        let slots: Result<Vec<_>, _> = device
            .files()
            .iter()
            .map(|f| self.engine.add_file(f.as_raw_fd()))
            .collect();
        let slots: Arc<[FileSlot]> = slots?.into();
        self.files.insert(id, Arc::clone(&slots));
        Ok(slots)
    }

    /// Pops, publishes and signals for one queue. True when its ring has more.
    fn serve(&mut self, slot: usize) -> Result<bool, EngineError> {
        let Some(active) = self.queues[slot].as_mut() else {
            return Ok(false);
        };
        let mut more = false;
        if matches!(active.state, State::Running) {
            match active.pop_all(&mut self.engine, slot) {
                Ok(left) => more = left,
                Err(error) => active.break_down(&mut self.engine, &error),
            }
        }
        if active.requests.ring().publish()
            && let Some(call) = &active.call
        {
            call.ring(&mut self.engine);
        }
        if active.requests.in_flight() == 0 && matches!(active.state, State::Stopping { .. }) {
            self.release(slot)?;
        }
        Ok(more)
    }

    /// Lets go of a drained queue and tells the session that asked for it.
    fn release(&mut self, slot: usize) -> Result<(), EngineError> {
        let Some(mut active) = self.queues[slot].take() else {
            return Ok(());
        };
        let next_avail = active.requests.ring().next_avail();
        self.engine.unwatch(active.kick_token);
        Ringer::retire(active.call.take(), &mut self.engine)?;
        Ringer::retire(active.error.take(), &mut self.engine)?;
        self.engine.remove_file(active.kick_slot);
        if let State::Stopping { reply, broken } = mem::replace(&mut active.state, State::Broken) {
            // The queue and its hold on guest memory are gone before the
            // session goes on.
            drop(active);
            let _ = reply.send(Stopped { next_avail, broken });
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion) {
        let slot = (completion.token >> 16) as usize & 0xffff;
        let head = completion.token as u16;
        if let Some(Some(active)) = self.queues.get_mut(slot) {
            active.complete(&mut self.engine, slot, head, completion.result);
        }
    }
}

impl<D: Device> Active<D> {
    /// Starts every available request, at most one ring full per turn so that
    /// the other queues of this worker get theirs.
    fn pop_all(&mut self, engine: &mut Engine, slot: usize) -> Result<bool, QueueError> {
        let limit = self.requests.ring().size();
        for _ in 0..limit {
            let Some((head, loaded)) = self.requests.pop()? else {
                // Looked at here, where nothing else is to do: lost memory reads
                // as zeros and so ends in an empty or a broken ring.
                if self.requests.ring().memory().is_lost() {
                    return Err(QueueError::MemoryLost);
                }
                if self.armed {
                    return Ok(false);
                }
                let more = self.requests.ring().enable_kicks()?;
                self.armed = !more;
                if more {
                    self.requests.ring().disable_kicks();
                }
                return Ok(more);
            };
            if mem::take(&mut self.armed) {
                self.requests.ring().disable_kicks();
            }
            let (chain, request) = self.requests.request(head);
            let step = self.device.start(loaded, chain, request);
            self.take_step(engine, slot, head, step);
        }
        Ok(true)
    }

    fn complete(&mut self, engine: &mut Engine, slot: usize, head: u16, result: i32) {
        if let Ok(bytes) = u64::try_from(result) {
            match self.steps[usize::from(head)] {
                Step::Read { buffer, .. } => self.requests.read_done(head, buffer, bytes),
                Step::Write { .. } => self.requests.write_done(head, bytes),
                Step::Sync { .. } | Step::Done { .. } => {}
            }
        }
        let (chain, request) = self.requests.request(head);
        let step = self.device.resume(chain, request, result);
        self.take_step(engine, slot, head, step);
    }

    /// Does what the device asked for, and what that sets free.
    fn take_step(&mut self, engine: &mut Engine, slot: usize, head: u16, step: Step) {
        self.steps[usize::from(head)] = step;
        match step {
            Step::Done { written } => {
                // A request that waited for this one's bounce buffer has it now.
                if let Some(waiter) = self.requests.finish(head, written) {
                    self.issue(engine, slot, waiter);
                }
            }
            Step::Read { buffer, .. } | Step::Write { buffer, .. } => {
                if buffer == Buffer::Chain || self.requests.take_bounce(head) {
                    self.issue(engine, slot, head);
                }
            }
            Step::Sync { .. } => self.issue(engine, slot, head),
        }
    }

    /// Starts the I/O of the request's current step.
    fn issue(&mut self, engine: &mut Engine, slot: usize, head: u16) {
        let token = KIND_IO << KIND_SHIFT | (slot as u64 & 0xffff) << 16 | u64::from(head);
        let transfer = |file: usize, offset, flags, segments| Transfer {
            file: self.files[file],
            segments,
            offset,
            flags,
            token,
        };
        match self.steps[usize::from(head)] {
            Step::Read {
                file,
                offset,
                flags,
                buffer,
            } => {
                let segments = self.requests.read_target(head, buffer);
                // SAFETY: the segments lie in the request's slot, which is not
                // touched before this token's completion, and point into guest
                // memory or a bounce buffer that the queue keeps until nothing
                // is in flight; the engine drains before the queue is dropped.
                unsafe { engine.read(transfer(file, offset, flags, segments)) };
            }
            Step::Write {
                file,
                offset,
                flags,
                buffer,
            } => {
                let segments = self.requests.write_source(head, buffer);
                // SAFETY: as for the read above.
                unsafe { engine.write(transfer(file, offset, flags, segments)) };
            }
            Step::Sync { file } => engine.sync(self.files[file], token),
            Step::Done { .. } => {}
        }
    }

    fn break_down(&mut self, engine: &mut Engine, error: &QueueError) {
        warn!(
            "device {} queue {}: {error}; the queue is stopped until it is set up again",
            self.id.device, self.id.queue
        );
        self.state = State::Broken;
        if let Some(bell) = &self.error {
            bell.ring(engine);
        }
    }
}
