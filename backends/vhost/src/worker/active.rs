//! One queue in service: from available chains to I/O and back.
#![expect(unsafe_code)]
// UNSAFETY: `issue` gives the engine pointers into guest memory and must
// uphold the engine's promise that they stay valid.

use std::mem;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use log::warn;
use pericarp_ring::{Buffer, QueueError, RequestQueue};
use pericarp_uring::{Engine, Extent, FileSlot, Transfer};

use super::flow::{Flow, Trouble};
use super::pace::Pace;
use super::ringer::Ringer;
use super::token::Token;
use crate::device::{Device, FileRef, Step};
use crate::helpers::Errand;
use crate::limiter::Gate;
use crate::mailbox::{QueueId, StartQueue, Stopped};
use crate::records::Fence;
use crate::stats::Timing;

/// How a queue stands.
#[derive(Debug)]
pub(super) enum State {
    Running,
    /// The driver broke the ring; nothing is popped until it is set up anew.
    Broken,
    /// A session waits for the in-flight requests.
    Stopping {
        reply: SyncSender<Stopped>,
        broken: bool,
    },
}

/// A queue in service.
#[derive(Debug)]
pub(super) struct Active<D: Device> {
    pub(super) id: QueueId,
    pub(super) device: Arc<D>,
    pub(super) requests: RequestQueue<D::Request>,
    /// The last step of each in-flight request, by head.
    steps: Box<[Step]>,
    files: Arc<[FileSlot]>,
    /// Requests of this turn that wait for a sync of a file. The worker takes
    /// them: those of all its queues share one.
    pub(super) syncs: Vec<(FileSlot, u16)>,
    /// Those of this turn that somebody else is to do.
    pub(super) errands: Vec<(Errand, u16)>,
    pub(super) kick_slot: FileSlot,
    pub(super) kick_token: u64,
    /// Keeps the descriptor open for as long as the engine watches it.
    _kick: Arc<OwnedFd>,
    /// The lock that outlives us until the last I/O ended, and its place in the
    /// engine.
    _fence: Option<Arc<Fence>>,
    pub(super) fence_slot: Option<FileSlot>,
    pub(super) call: Option<Ringer>,
    pub(super) error: Option<Ringer>,
    pub(super) state: State,
    /// What it carries, if that is packets and no requests.
    pub(super) flow: Option<Flow>,
    /// The driver was asked to kick and the ring was empty after that.
    armed: bool,
    /// When this turn began.
    pub(super) now: u64,
    gate: Option<Gate>,
    pub(super) timing: Option<Timing>,
    /// A limit keeps requests waiting, until then.
    pub(super) held_until: Option<u64>,
}

impl<D: Device> Active<D> {
    /// A queue that has nobody to call yet.
    pub(super) fn new(
        start: StartQueue<D>,
        files: Arc<[FileSlot]>,
        kick_slot: FileSlot,
        kick_token: u64,
        synchronous: bool,
    ) -> Self {
        let (recovered, fence) = match start.record {
            Some(kept) => (Some(kept.recovered), Some(kept.fence)),
            None => (None, None),
        };
        let mut requests = RequestQueue::new(start.queue).with_record(recovered);
        let timing = start.oversight.as_ref().and_then(|oversight| {
            let ring = requests.ring();
            let (size, next) = (ring.size(), ring.next_avail());
            Timing::new(oversight, start.id.queue, size, next, synchronous)
        });
        let lane = start.device.lane(start.id.queue);
        let steps = vec![Step::Done { written: 0 }; usize::from(requests.ring().size())];
        Self {
            id: start.id,
            device: start.device,
            requests,
            steps: steps.into_boxed_slice(),
            files,
            syncs: Vec::new(),
            errands: Vec::new(),
            kick_slot,
            kick_token,
            _kick: start.kick,
            _fence: fence,
            fence_slot: None,
            call: None,
            error: None,
            state: State::Running,
            flow: None,
            armed: false,
            now: 0,
            gate: start
                .oversight
                .zip(lane)
                .map(|(overseen, lane)| Gate::new(overseen, lane)),
            timing,
            held_until: None,
        }
    }

    /// Starts what a predecessor left in flight, in the order it was started in.
    pub(super) fn start_again(&mut self, engine: &mut Engine, slot: usize) {
        while let Some((head, loaded)) = self.requests.pop_again() {
            let (chain, request) = self.requests.request(head);
            self.device.recorded(request, self.id.queue, head, true);
            let step = self.device.start(loaded, chain, request);
            if let Some(timing) = &mut self.timing {
                self.now = timing.again(head);
            }
            self.take_step(engine, slot, head, step);
        }
    }

    /// Starts every available request, at most one ring full per turn so that
    /// the other queues of this worker get theirs.
    pub(super) fn pop_all(
        &mut self,
        engine: &mut Engine,
        slot: usize,
        pace: &mut Pace,
        now: u64,
    ) -> Result<bool, Trouble> {
        if self.flow.is_some() {
            return self.carry(engine, now);
        }
        self.now = now;
        if let Some(timing) = &mut self.timing {
            let ring = self.requests.ring();
            let up_to = ring.next_avail().wrapping_add(ring.available()?);
            timing.look(up_to, now);
        }
        let limit = self.requests.ring().size();
        for _ in 0..limit {
            if self.is_held()? {
                return Ok(false);
            }
            let index = self.requests.ring().next_avail();
            let Some((head, loaded)) = self.requests.pop()? else {
                // Looked at here, where nothing else is to do: lost memory reads
                // as zeros and so ends in an empty or a broken ring.
                if self.requests.ring().memory().is_lost() {
                    return Err(QueueError::MemoryLost.into());
                }
                return Ok(false);
            };
            self.disarm();
            let (chain, request) = self.requests.request(head);
            if self.fence_slot.is_some() {
                self.device.recorded(request, self.id.queue, head, false);
            }
            let step = self.device.start(loaded, chain, request);
            if let Some(gate) = &mut self.gate {
                gate.charge(now, self.device.account(request).bytes);
            }
            if let Some(timing) = &mut self.timing {
                timing.pop(index, head, now);
            }
            self.take_step(engine, slot, head, step);
            if pace.started(engine)
                && let Some(timing) = &mut self.timing
            {
                timing.flush();
            }
        }
        Ok(true)
    }

    /// Makes finished requests visible to the driver and calls it if it asked.
    pub(super) fn publish(&mut self, engine: &mut Engine) {
        if self.requests.publish()
            && let Some(call) = &self.call
        {
            call.ring(engine);
            if let Some(timing) = &self.timing {
                timing.call();
            }
        }
        if let Some(timing) = &mut self.timing {
            timing.publish();
        }
    }

    /// True when the driver offers something, as far as a look can tell.
    pub(super) fn has_work(&mut self) -> bool {
        if self.held_until.is_some() || !matches!(self.state, State::Running) {
            return false;
        }
        let available = self.requests.ring().has_available();
        self.flow
            .as_ref()
            .map_or(available, |flow| flow.has_work(available))
    }

    /// Asks the driver to kick, before the worker sleeps. True when there is
    /// something to pop after all.
    pub(super) fn arm(&mut self) -> Result<bool, QueueError> {
        // While a limit holds requests back, a timer looks again.
        let held = self.held_until.is_some();
        let unwanted = self.flow.as_ref().is_some_and(|flow| !flow.wants_kicks());
        if self.armed || held || unwanted || !matches!(self.state, State::Running) {
            return Ok(false);
        }
        let more = self.requests.ring().enable_kicks()?;
        self.armed = !more;
        if more {
            self.requests.ring().disable_kicks();
        }
        Ok(more)
    }

    /// Has the driver not kick while somebody looks at the ring anyway.
    pub(super) fn disarm(&mut self) {
        if mem::take(&mut self.armed) {
            self.requests.ring().disable_kicks();
        }
    }

    /// Whether a limit keeps the requests waiting that are there. Kicks are
    /// left off for as long: a timer looks again.
    pub(super) fn is_held(&mut self) -> Result<bool, QueueError> {
        self.held_until = None;
        let now = self.now;
        if self.gate.as_mut().is_none_or(|gate| gate.open(now)) {
            return Ok(false);
        }
        // Lost memory reads as an empty ring or for ever as the same request.
        if self.requests.ring().memory().is_lost() {
            return Err(QueueError::MemoryLost);
        }
        if self.requests.ring().available()? == 0 {
            return Ok(false);
        }
        Ok(self.holds())
    }

    /// Whether a limit keeps what is there waiting.
    pub(super) fn holds(&mut self) -> bool {
        self.held_until = None;
        let now = self.now;
        let Some(gate) = &mut self.gate else {
            return false;
        };
        if gate.open(now) {
            return false;
        }
        self.held_until = Some(gate.wait(now));
        self.disarm();
        if let Some(timing) = &mut self.timing {
            timing.hold();
        }
        true
    }

    /// Whether there are limits that each packet is to be asked for.
    pub(super) fn is_limited(&self) -> bool {
        self.gate.as_ref().is_some_and(Gate::limits)
    }

    /// So many bytes moved at once.
    pub(super) fn charge(&mut self, bytes: u64) {
        if let Some(gate) = &mut self.gate {
            gate.charge(self.now, bytes);
        }
    }

    pub(super) fn complete(
        &mut self,
        engine: &mut Engine,
        slot: usize,
        (head, result): (u16, i32),
        now: u64,
    ) {
        self.now = now;
        if let Some(timing) = &mut self.timing {
            timing.back(head, now);
        }
        if let Ok(bytes) = u64::try_from(result) {
            match self.steps[usize::from(head)] {
                Step::Read { buffer, .. } => self.requests.read_done(head, buffer, bytes),
                Step::Write { .. } => self.requests.write_done(head, bytes),
                _ => {}
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
                if let Some(timing) = &mut self.timing {
                    let (_, request) = self.requests.request(head);
                    timing.finish(head, self.device.account(request));
                }
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
            Step::Sync { .. }
            | Step::Allocate { .. }
            | Step::Discard { .. }
            | Step::WriteZeroes { .. }
            | Step::Errand => self.issue(engine, slot, head),
        }
    }

    /// Starts the I/O of the request's current step.
    fn issue(&mut self, engine: &mut Engine, slot: usize, head: u16) {
        let token = Token::io(slot, head);
        if let Some(timing) = &mut self.timing {
            timing.hand(head, self.now);
        }
        let at = |file| match file {
            FileRef::Listed(index) => self.files[usize::from(index)],
            FileRef::Open { descriptor, place } => FileSlot::descriptor(descriptor, place),
        };
        let transfer = |file, offset, flags, segments| Transfer {
            file: at(file),
            segments,
            offset,
            flags,
            token,
        };
        let extent = |file, offset, len| Extent {
            file: at(file),
            offset,
            len,
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
            Step::Sync { file, metadata } => match file {
                FileRef::Listed(_) if !metadata => self.syncs.push((at(file), head)),
                _ => engine.sync(at(file), metadata, token),
            },
            Step::Allocate {
                file,
                offset,
                len,
                mode,
            } => engine.allocate(extent(file, offset, len), mode),
            Step::Discard { file, offset, len } => engine.discard(extent(file, offset, len)),
            Step::WriteZeroes {
                file,
                offset,
                len,
                flags,
            } => engine.write_zeroes(extent(file, offset, len), flags),
            Step::Errand => {
                let (_, request) = self.requests.request(head);
                let errand = Arc::clone(&self.device).errand(request);
                self.errands.push((errand, head));
            }
            Step::Done { .. } => {}
        }
    }

    /// Nobody waits any more for the queue to stop: it is as it was before.
    pub(super) fn go_on(&mut self) {
        if let State::Stopping { broken, .. } = self.state {
            self.state = if broken {
                State::Broken
            } else {
                State::Running
            };
        }
    }

    pub(super) fn break_down(&mut self, engine: &mut Engine, error: &QueueError) {
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
