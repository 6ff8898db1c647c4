//! A queue of packets in service: between its chains and a device that keeps
//! packets of its own, such as a tap, without a step in between.
//!
//! [`Active`] calls it in place of starting requests. A packet moves in one system
//! call that never waits, or many that the driver sends in one, and many make a turn: one store to the used index and one
//! call of the driver tell of all of them. Kicks of a driver that offers memory are
//! wanted only while there is a packet and no memory for it.
#![expect(unsafe_code)]
// UNSAFETY: the engine reads and writes guest memory at once, through segments that
// the queue keeps mapped.

use pericarp_ring::{Arrivals, Delivery, Departures, QueueError};
use pericarp_uring::{Engine, EngineError, FileSlot, MANY};

use super::active::Active;
use crate::device::{Device, Dropped, Traffic, Way};

/// Packets of one turn, so that the driver hears of the first before the last came,
/// and other queues get theirs.
const TURN: usize = 64;

/// The chains of a queue, by which way they go.
#[derive(Debug)]
enum Chains {
    In(Box<Arrivals>),
    Out(Departures),
}

/// What a queue of packets has beside its ring.
#[derive(Debug)]
pub(super) struct Flow {
    traffic: Traffic,
    file: FileSlot,
    /// Of the watch on the file, where packets come in.
    token: Option<u64>,
    chains: Chains,
    /// The file may have something to read.
    readable: bool,
    /// Something is there to read and the driver has no memory for it.
    starved: bool,
    /// What came of the last writes.
    results: Vec<i32>,
}

/// Why a turn could not be ended.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The driver's.
    Queue(QueueError),
    /// Ours.
    Engine(EngineError),
}

impl From<QueueError> for Trouble {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

impl From<EngineError> for Trouble {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

/// What a turn moved.
#[derive(Debug, Default)]
struct Moved {
    packets: u64,
    bytes: u64,
    dropped: u64,
}

impl Flow {
    /// `token` is that of the watch on the file, for packets that come in.
    pub(super) fn new(traffic: Traffic, file: FileSlot, token: u64) -> Self {
        let (chains, token) = match traffic.way {
            Way::In => {
                let arrivals = Arrivals::new(traffic.most, traffic.header, traffic.merge);
                (Chains::In(Box::new(arrivals)), Some(token))
            }
            Way::Out => (Chains::Out(Departures::default()), None),
        };
        Self {
            traffic,
            file,
            token,
            chains,
            readable: true,
            starved: false,
            results: Vec::new(),
        }
    }

    /// Has the engine say when the file has something.
    pub(super) fn watch(&self, engine: &mut Engine) {
        if let Some(token) = self.token {
            engine.watch_input(self.file, token);
        }
    }

    /// Ends that.
    pub(super) fn unwatch(&self, engine: &mut Engine) {
        if let Some(token) = self.token {
            engine.unwatch(token);
        }
    }

    /// The file has something new, or is gone, which reading will tell.
    pub(super) fn arrived(&mut self) {
        self.readable = true;
    }

    /// Whether the driver has to kick for what it offers next.
    pub(super) fn wants_kicks(&self) -> bool {
        self.starved || matches!(self.chains, Chains::Out(_))
    }

    /// Whether packets wait that the chains `available` in the ring could move.
    pub(super) fn has_work(&self, available: bool) -> bool {
        match &self.chains {
            Chains::Out(_) => available,
            Chains::In(arrivals) if arrivals.waits() => available,
            Chains::In(arrivals) => self.readable && (available || arrivals.held() > 0),
        }
    }
}

impl<D: Device> Active<D> {
    /// Moves the packets that are there, at most [`TURN`] of them. True when there
    /// may be more.
    pub(super) fn carry(&mut self, engine: &mut Engine, now: u64) -> Result<bool, Trouble> {
        self.now = now;
        let Some(mut flow) = self.flow.take() else {
            return Ok(false);
        };
        let mut moved = Moved::default();
        let more = match &mut flow.chains {
            Chains::In(_) => {
                let more = self.carry_in(engine, &mut flow, &mut moved);
                more.map_err(Trouble::from)
            }
            Chains::Out(_) => self.carry_out(engine, &mut flow, &mut moved),
        };
        if let Some(timing) = &mut self.timing {
            let Moved {
                packets,
                bytes,
                dropped,
            } = moved;
            timing.carried(flow.traffic.class, packets, bytes, dropped);
        }
        self.flow = Some(flow);
        more
    }

    fn carry_in(
        &mut self,
        engine: &mut Engine,
        flow: &mut Flow,
        moved: &mut Moved,
    ) -> Result<bool, QueueError> {
        let Chains::In(arrivals) = &mut flow.chains else {
            return Ok(false);
        };
        let mut failures = 0;
        for _ in 0..TURN {
            if !flow.readable && !arrivals.waits() {
                return Ok(false);
            }
            if self.holds() {
                return Ok(false);
            }
            let ring = self.requests.ring();
            let next_avail = ring.next_avail();
            let (delivery, bytes) = if arrivals.waits() {
                (arrivals.go_on(ring)?, 0)
            } else {
                let any = arrivals.fill(ring)?;
                if self.requests.ring().next_avail() != next_avail {
                    // What it was asked to kick for lies behind.
                    self.disarm();
                }
                for _ in 0..arrivals.take_unsound() {
                    moved.dropped += 1;
                    self.device.dropped(self.id.queue, Dropped::Chain);
                }
                let ring = self.requests.ring();
                flow.starved = !any;
                if !any {
                    // Lost memory reads as an empty ring.
                    return match ring.memory().is_lost() {
                        true => Err(QueueError::MemoryLost),
                        false => Ok(false),
                    };
                }
                // SAFETY: guest memory that the queue keeps mapped, and memory of
                // the flow's own.
                let read = unsafe { engine.read_now(flow.file, arrivals.target()) };
                if read == -libc::EAGAIN {
                    flow.readable = false;
                    if let Some(token) = flow.token {
                        engine.taken(token);
                    }
                    return Ok(false);
                }
                if read < 0 {
                    // Of one packet: but where the device is gone all attempts fail, and
                    // will until the queue is set up again.
                    failures += 1;
                    let gone = [libc::EBADFD, libc::EBADF, libc::ENODEV, libc::EOPNOTSUPP];
                    flow.readable = failures < TURN && !gone.contains(&-read);
                    moved.dropped += 1;
                    self.device.dropped(self.id.queue, Dropped::Refused(-read));
                    continue;
                }
                let bytes = u64::from(read.unsigned_abs());
                if (bytes as usize) < flow.traffic.least {
                    moved.dropped += 1;
                    self.device.dropped(self.id.queue, Dropped::Length);
                    continue;
                }
                (arrivals.deliver(ring, bytes)?, bytes)
            };
            if self.requests.ring().next_avail() != next_avail {
                self.disarm();
            }
            flow.starved = delivery == Delivery::Waits;
            if bytes > 0 {
                let bytes = bytes - flow.traffic.header as u64;
                if delivery != Delivery::TooLarge {
                    moved.bytes += bytes;
                    moved.packets += 1;
                }
                self.charge(bytes);
            }
            match delivery {
                Delivery::Done => {}
                Delivery::Waits => return Ok(false),
                Delivery::TooLarge => {
                    moved.dropped += 1;
                    self.device.dropped(self.id.queue, Dropped::NoRoom);
                }
            }
        }
        Ok(true)
    }

    fn carry_out(
        &mut self,
        engine: &mut Engine,
        flow: &mut Flow,
        moved: &mut Moved,
    ) -> Result<bool, Trouble> {
        let Chains::Out(departures) = &mut flow.chains else {
            return Ok(false);
        };
        let traffic = &flow.traffic;
        // Each is asked for where there is a limit.
        let most = if self.is_limited() { 1 } else { MANY };
        for _ in 0..TURN / most {
            if self.is_held()? {
                return Ok(false);
            }
            let ring = self.requests.ring();
            let count = departures.take(ring, most)?;
            if count == 0 {
                return match ring.memory().is_lost() {
                    true => Err(QueueError::MemoryLost.into()),
                    false => Ok(false),
                };
            }
            self.disarm();
            let (mut why, mut bytes) = ([None; MANY], [0; MANY]);
            // Those to send, and how many.
            let (mut sound, mut sent) = ([0; MANY], 0);
            for index in 0..count {
                let (chain, loaded) = departures.packet(index);
                bytes[index] = chain.readable_len();
                let fits = (traffic.least as u64..=traffic.most as u64).contains(&bytes[index]);
                if loaded.is_err() || chain.writable_len() > 0 {
                    why[index] = Some(Dropped::Chain);
                } else if !fits {
                    why[index] = Some(Dropped::Length);
                } else {
                    sound[sent] = index;
                    sent += 1;
                }
            }
            let sound = &sound[..sent];
            let sources = sound.iter().map(|index| departures.source(*index));
            // SAFETY: guest memory that the queue keeps mapped.
            unsafe { engine.write_many_now(flow.file, sources, &mut flow.results)? };
            for (index, result) in sound.iter().zip(&flow.results) {
                why[*index] = (*result < 0).then_some(Dropped::Refused(-result));
            }
            departures.finish(self.requests.ring());
            for (why, bytes) in why.iter().zip(bytes).take(count) {
                let bytes = bytes.saturating_sub(traffic.header as u64);
                // What is dropped has cost as much, and counts as much.
                self.charge(bytes.min(traffic.most as u64));
                match why {
                    None => {
                        moved.packets += 1;
                        moved.bytes += bytes;
                    }
                    Some(why) => {
                        moved.dropped += 1;
                        self.device.dropped(self.id.queue, *why);
                    }
                }
            }
            if count < most {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Leaves the chains that nothing came for to whoever has the queue next.
    pub(super) fn give_back(&mut self) {
        if let Some(Flow {
            chains: Chains::In(arrivals),
            ..
        }) = &mut self.flow
            && arrivals.give_back(self.requests.ring())
        {
            self.device.dropped(self.id.queue, Dropped::NoRoom);
        }
    }
}
