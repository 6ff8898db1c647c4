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

mod active;
mod ringer;
mod token;

use std::collections::HashMap;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use pericarp_uring::{Completion, Engine, EngineError, FileSlot};

use crate::device::Device;
use crate::mailbox::{Bell, Command, Mailbox, QueueId, StartQueue, Stopped};
use active::{Active, State};
use ringer::Ringer;
use token::Token;

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
        self.engine.watch(mailbox, Token::MAILBOX);
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
                match Token::parse(completion.token) {
                    Token::Io { slot, head } => {
                        if let Some(Some(active)) = self.queues.get_mut(slot) {
                            active.complete(&mut self.engine, slot, head, completion.result);
                        }
                    }
                    Token::Mailbox if completion.result < 0 => {
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

    fn start_queue(&mut self, mut start: StartQueue<D>) -> Result<(), EngineError> {
        let files = self.device_files(start.id.device, &start.device)?;
        let kick_slot = self.engine.add_file(start.kick.as_raw_fd())?;
        let (call, error) = match self.bells(&mut start) {
            Ok(bells) => bells,
            Err(refusal) => {
                // The table is shared by all devices: nothing may stay in it.
                self.engine.remove_file(kick_slot);
                return Err(refusal);
            }
        };
        let slot = self.queues.iter().position(Option::is_none);
        let slot = slot.unwrap_or_else(|| {
            self.queues.push(None);
            self.queues.len() - 1
        });
        self.generation = self.generation.wrapping_add(1);
        let kick_token = Token::kick(slot, self.generation);
        self.engine.watch(kick_slot, kick_token);
        let mut active = Active::new(start, files, kick_slot, kick_token);
        active.call = call;
        active.error = error;
        self.queues[slot] = Some(active);
        Ok(())
    }

    /// Registers what the driver is called by; all of it or nothing.
    fn bells(
        &mut self,
        start: &mut StartQueue<D>,
    ) -> Result<(Option<Ringer>, Option<Ringer>), EngineError> {
        let call = Ringer::new(&mut self.engine, start.call.take())?;
        match Ringer::new(&mut self.engine, start.error.take()) {
            Ok(error) => Ok((call, error)),
            Err(refusal) => {
                Ringer::retire(call, &mut self.engine)?;
                Err(refusal)
            }
        }
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
}
