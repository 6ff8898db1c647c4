//! A worker thread: the queues it serves and the engine it sleeps in.
//!
//! One turn of the loop takes the orders from the mailbox, pops every
//! available chain of every queue, starts the I/O, publishes what is finished
//! with one index store and at most one call per queue, and enters the kernel
//! once, or once for every few requests when there are many: the disk then
//! works on the first while the last are still being read from the ring. With
//! nothing to do the worker polls for a moment where that pays, then has the
//! drivers kick and sleeps. Kicks, orders and I/O completions all end that
//! sleep.
//!
//! A queue leaves a worker only through `Command::Stop`, and only when nothing
//! of it is in flight: that is what keeps guest memory mapped while the kernel
//! may still write to it. Until then `Command::GoOn` takes the order back.

mod active;
mod flow;
mod hand;
mod memory;
mod pace;
mod poller;
mod ringer;
mod syncs;
mod token;

use std::collections::HashMap;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use pericarp_uring::{Completion, Engine, EngineError, FileSlot};

use crate::clock;
use crate::device::Device;
use crate::helpers::Helpers;
use crate::mailbox::{Bell, Command, Mailbox, QueueId, StartQueue, Stopped};
use active::{Active, State};
use flow::{Flow, Trouble};
pub use hand::{Given, Hand, Taken};
use memory::Registry;
use pace::Pace;
use poller::Poller;
use ringer::Ringer;
use syncs::{Syncs, Waiter};
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
    poller: Poller,
    syncs: Syncs,
    helpers: Arc<Helpers>,
    /// Guest memory in the engine's table of registered buffers.
    memory: Registry,
    /// Some queue is counted or limited: turns have a time.
    timed: bool,
    /// The queue that is served first, so that none is always the last to get
    /// what a limit leaves.
    first: usize,
    /// When the kernel was last left, where anybody wants to know it.
    back_at: u64,
}

impl<D: Device> Worker<D> {
    pub(crate) fn new(
        engine: Engine,
        mailbox: Arc<Mailbox<D>>,
        helpers: Arc<Helpers>,
        poll_limit: Duration,
    ) -> Self {
        Self {
            memory: Registry::new(&engine),
            engine,
            mailbox,
            queues: Vec::new(),
            files: HashMap::new(),
            generation: 0,
            completions: Vec::new(),
            poller: Poller::new(poll_limit),
            syncs: Syncs::default(),
            helpers,
            timed: false,
            first: 0,
            back_at: 0,
        }
    }

    /// Serves until [`Command::End`].
    ///
    /// # Errors
    /// [`EngineError`] when the engine cannot go on.
    pub(crate) fn run(mut self) -> Result<(), EngineError> {
        self.begin()?;
        while let Some(more) = self.turn()? {
            self.rest(!more)?;
        }
        Ok(())
    }

    /// What comes before the first turn, on the thread that takes the turns.
    fn begin(&mut self) -> Result<(), EngineError> {
        self.engine.start()?;
        let mailbox = self.engine.add_file(self.mailbox.event())?;
        self.engine.watch(mailbox, Token::MAILBOX);
        Ok(())
    }

    /// Does what there is to do, up to the kernel's part. False when there is nothing
    /// more before something completes; `None` at the end.
    fn turn(&mut self) -> Result<Option<bool>, EngineError> {
        while let Some(command) = self.mailbox.take() {
            if matches!(command, Command::End) {
                return Ok(None);
            }
            self.obey(command)?;
        }
        if self.back_at == 0 {
            self.back_at = self.now();
        }
        let now = self.back_at;
        // What is finished is told before anything else is done.
        for active in self.queues.iter_mut().flatten() {
            active.publish(&mut self.engine);
        }
        let mut more = false;
        let mut pace = Pace::new();
        let count = self.queues.len();
        self.first = (self.first + 1) % count.max(1);
        for slot in (self.first..count).chain(0..self.first) {
            more |= self.serve(slot, &mut pace, now)?;
        }
        if self.timed {
            self.end_turn();
        }
        self.syncs
            .start(|file, token| self.engine.sync(file, false, token));
        if self.memory.is_due() {
            // The disk works on what was popped meanwhile.
            self.engine.submit(false)?;
            self.memory.step(&mut self.engine);
            more = true;
        }
        if !more {
            more = self.linger()?;
        }
        Ok(Some(more || self.arm()))
    }

    /// Enters the kernel, sleeps there if it is to, and takes what completed, of which
    /// it gives the number.
    fn rest(&mut self, wait: bool) -> Result<usize, EngineError> {
        self.engine.submit(wait)?;
        self.back_at = self.now();
        let now = self.back_at;
        let mut completions = mem::take(&mut self.completions);
        self.engine.completions(&mut completions);
        let count = completions.len();
        self.poller.earn(count);
        for completion in completions.drain(..) {
            match Token::parse(completion.token) {
                Token::Io { slot, head } => {
                    if let Some(Some(active)) = self.queues.get_mut(slot) {
                        let done = (head, completion.result);
                        active.complete(&mut self.engine, slot, done, now);
                    }
                }
                Token::Kick { slot } => {
                    if let Some(Some(active)) = self.queues.get(slot)
                        && let Some(timing) = &active.timing
                    {
                        timing.kick();
                    }
                }
                Token::Input { slot } => {
                    if let Some(Some(active)) = self.queues.get_mut(slot)
                        && let Some(flow) = &mut active.flow
                    {
                        flow.arrived();
                    }
                }
                Token::Sync(index) => self.synced(index, completion.result, now),
                Token::Mailbox if completion.result < 0 => {
                    let error = std::io::Error::from_raw_os_error(-completion.result);
                    return Err(EngineError::Failed(error));
                }
                _ => {}
            }
        }
        self.completions = completions;
        Ok(count)
    }

    /// True while requests are in flight.
    fn is_busy(&self) -> bool {
        let mut queues = self.queues.iter().flatten();
        queues.any(|active| active.requests.in_flight() > 0)
    }

    /// Waits a moment for a completion or an available chain, wide awake, where
    /// that pays or nothing else makes the disk's answers known. True when there
    /// is something to do.
    fn linger(&mut self) -> Result<bool, EngineError> {
        let busy = self.is_busy();
        let wants = self.poller.wants_to(busy);
        if !wants && !self.engine.polls() {
            return Ok(false);
        }
        // The kernel has work to start with, so that there is something to wait
        // for.
        self.engine.submit(false)?;
        let patience = self.engine.patience();
        if !wants && patience.is_zero() {
            return Ok(false);
        }
        let (engine, queues) = (&mut self.engine, &mut self.queues);
        queues.iter_mut().flatten().for_each(Active::disarm);
        let ready = || engine.ready() || queues.iter_mut().flatten().any(Active::has_work);
        Ok(if patience.is_zero() {
            self.poller.poll(busy, ready)
        } else {
            poller::look_for(patience, ready)
        })
    }

    /// Has every queue's driver kick for what it offers from now on. True when
    /// one of them offers something already.
    fn arm(&mut self) -> bool {
        let mut more = false;
        for active in self.queues.iter_mut().flatten() {
            match active.arm() {
                Ok(found) => more |= found,
                Err(error) => active.break_down(&mut self.engine, &error),
            }
        }
        more
    }

    /// The time of a turn, where anybody wants to know it.
    fn now(&self) -> u64 {
        if self.timed { clock::now() } else { 0 }
    }

    /// Counts what the turn did, and sees to it that the next sleep ends when a
    /// limit does.
    fn end_turn(&mut self) {
        let active = self.queues.iter_mut().flatten();
        let busy = active.filter(|a| a.timing.as_ref().is_some_and(|t| !t.is_settled()));
        let mut now = None;
        for active in busy {
            let in_flight = active.requests.in_flight();
            if let Some(timing) = &mut active.timing {
                timing.settle(*now.get_or_insert_with(clock::now), in_flight);
            }
        }
        let held = self
            .queues
            .iter()
            .flatten()
            .filter_map(|a| a.held_until)
            .min();
        if let Some(until) = held {
            self.engine.wake_at(clock::instant(until));
        }
    }

    /// Tells everybody who waited for a sync how it went.
    fn synced(&mut self, index: usize, result: i32, now: u64) {
        for Waiter { slot, head } in self.syncs.ended(index) {
            // A queue stays as long as anything of it is in flight.
            if let Some(Some(active)) = self.queues.get_mut(slot) {
                active.complete(&mut self.engine, slot, (head, result), now);
            }
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
                    active.device.hasten();
                    let broken = matches!(active.state, State::Broken);
                    active.state = State::Stopping { reply, broken };
                }
                None => drop(reply),
            },
            Command::GoOn(id) => {
                if let Some(active) = self.find(id) {
                    active.go_on();
                }
            }
            Command::SetCall(id, call, reply) => {
                let _ = reply.send(self.set_call(id, call));
            }
            Command::Forget(device, reply) => {
                for slot in self.files.remove(&device).iter().flat_map(|f| f.iter()) {
                    self.engine.remove_file(*slot);
                }
                let _ = reply.send(());
            }
            Command::Done { slot, head, result } => {
                let now = self.now();
                if let Some(Some(active)) = self.queues.get_mut(slot) {
                    active.complete(&mut self.engine, slot, (head, result), now);
                }
            }
            Command::Look | Command::End => {}
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
            if let Some(timing) = &active.timing {
                timing.call();
            }
        }
        Ok(())
    }

    fn find(&mut self, id: QueueId) -> Option<&mut Active<D>> {
        self.queues.iter_mut().flatten().find(|a| a.id == id)
    }

    fn start_queue(&mut self, mut start: StartQueue<D>) -> Result<(), EngineError> {
        let files = self.device_files(start.id.device, &start.device)?;
        let kick_slot = self.engine.add_file(start.kick.as_raw_fd())?;
        let fence = start.record.as_ref().map(|k| k.fence.descriptor());
        let fence = fence.map(|fd| self.engine.add_file(fd)).transpose();
        let bells = fence.and_then(|fence| match self.bells(&mut start) {
            Ok((call, error)) => Ok((call, error, fence)),
            Err(refusal) => {
                fence
                    .into_iter()
                    .for_each(|slot| self.engine.remove_file(slot));
                Err(refusal)
            }
        });
        let (call, error, fence) = match bells {
            Ok(registered) => registered,
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
        self.timed |= start.oversight.is_some();
        let synchronous = self.engine.is_synchronous();
        let flow = start.device.traffic(start.id.queue).and_then(|traffic| {
            let file = *files.get(usize::from(traffic.file))?;
            let token = Token::input(slot, self.generation);
            Some(Flow::new(traffic, file, token))
        });
        let mut active = Active::new(start, files, kick_slot, kick_token, synchronous);
        if let Some(flow) = &flow {
            flow.watch(&mut self.engine);
        }
        active.flow = flow;
        active.call = call;
        active.error = error;
        active.fence_slot = fence;
        active.start_again(&mut self.engine, slot);
        let device = active.id.device;
        self.memory.enter(device, active.requests.ring().memory());
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
        if device.files_wait() {
            slots.iter().for_each(|s| self.engine.expect_waiting(*s));
        }
        if device.files_poll() {
            slots.iter().for_each(|s| self.engine.expect_polling(*s));
        }
        self.files.insert(id, Arc::clone(&slots));
        Ok(slots)
    }

    /// Pops, publishes and signals for one queue. True when its ring has more.
    fn serve(&mut self, slot: usize, pace: &mut Pace, now: u64) -> Result<bool, EngineError> {
        let Some(active) = self.queues[slot].as_mut() else {
            return Ok(false);
        };
        let mut more = false;
        active.held_until = None;
        if matches!(active.state, State::Running) {
            match active.pop_all(&mut self.engine, slot, pace, now) {
                Ok(left) => more = left,
                Err(Trouble::Queue(error)) => active.break_down(&mut self.engine, &error),
                Err(Trouble::Engine(error)) => return Err(error),
            }
        }
        for (file, head) in active.syncs.drain(..) {
            self.syncs.join(file, Waiter { slot, head });
        }
        for (errand, head) in active.errands.drain(..) {
            let mailbox = Arc::clone(&self.mailbox);
            let report = move |result| mailbox.send(Command::Done { slot, head, result });
            self.helpers.send(errand, Box::new(report));
        }
        active.publish(&mut self.engine);
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
        active.give_back();
        if let Some(flow) = &active.flow {
            flow.unwatch(&mut self.engine);
        }
        let next_avail = active.requests.ring().next_avail();
        if let Some(timing) = &mut active.timing {
            timing.settle(clock::now(), 0);
        }
        self.engine.unwatch(active.kick_token);
        Ringer::retire(active.call.take(), &mut self.engine)?;
        Ringer::retire(active.error.take(), &mut self.engine)?;
        self.engine.remove_file(active.kick_slot);
        if let Some(fence) = active.fence_slot.take() {
            self.engine.remove_file(fence);
        }
        self.memory.leave(active.requests.ring().memory());
        if let State::Stopping { reply, broken } = mem::replace(&mut active.state, State::Broken) {
            // The queue and its hold on guest memory are gone before the
            // session goes on.
            drop(active);
            let stopped = Stopped { next_avail, broken };
            self.memory.once_gone(reply, stopped);
        }
        Ok(())
    }
}
