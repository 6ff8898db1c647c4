//! One front end's session: the vhost-user protocol, back-end side.
//!
//! The session thread owns the memory table and the state of every vring, and
//! moves queues to and from the workers. It answers each message before it
//! reads the next. Whatever the front end does, the session ends with every
//! queue taken back and drained, so that the next front end starts clean.

mod handover;
mod inflight;
mod memory;
#[cfg(test)]
mod tests;
mod vring;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use log::{debug, warn};
use pericarp_ring::{GuestMemory, InflightError, MAX_REGIONS, MemoryError, QueueError, Region};
use pericarp_uring::EngineError;
use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserProtocolFeatures, VhostUserVringState,
};
use vm_memory::ByteValued;

use crate::causes;
use crate::channel::{Channel, ChannelError, Message, Next};
use crate::device::Device;
use crate::features;
use crate::handover::{HandOverError, Meeting};
use crate::oversight::{MaybeOverseen, Notices};
use crate::pool::Handles;
use crate::records::{CrashSafety, Records};
pub(crate) use handover::Moved;
pub(crate) use inflight::Kept;
use pericarp_control::Stop;
use vring::{Vring, bell};

/// What we can do beyond the base protocol. BACKEND_REQ is offered because
/// User-mode Linux asks for it; CONFIGURE_MEM_SLOTS and REPLY_ACK because
/// `virtio-driver` does.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// The request numbers whose answer is part of the request itself.
const ANSWERED: [FrontendReq; 6] = [
    FrontendReq::GET_FEATURES,
    FrontendReq::GET_PROTOCOL_FEATURES,
    FrontendReq::GET_QUEUE_NUM,
    FrontendReq::GET_VRING_BASE,
    FrontendReq::GET_CONFIG,
    FrontendReq::GET_MAX_MEM_SLOTS,
];

/// Why one request was refused. The front end is told if it asked to be, and
/// disconnected if it did not.
#[derive(Debug, Error)]
pub(crate) enum Refusal {
    #[error("request {0} is not supported")]
    Unknown(u32),
    #[error("the payload is too short")]
    Short,
    #[error("{given} descriptors came with it, {wanted} belong to it")]
    Descriptors { given: usize, wanted: usize },
    #[error("queue {index} of {count}")]
    NoSuchQueue { index: u64, count: usize },
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("a queue needs an eventfd as kick descriptor; polling is not supported")]
    NoKick,
    #[error("not an eventfd, pipe or socket")]
    BadBell,
    #[error("no memory region like that is mapped")]
    NoSuchRegion,
    #[error("cannot use the configuration space like that")]
    Config,
    #[error("memory table")]
    Memory(#[from] MemoryError),
    #[error("queue")]
    Queue(#[from] QueueError),
    #[error("engine")]
    Engine(#[from] EngineError),
    #[error("the worker is gone")]
    WorkerGone,
    #[error("it is not memory that can be kept from shrinking")]
    NotMemory,
    #[error("requests in flight")]
    Inflight(#[from] InflightError),
    #[error("another process still owns the records of requests in flight, or its I/O goes on")]
    Fenced,
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    #[error("the system refused it")]
    System(#[from] std::io::Error),
    #[error("the system refused it")]
    Kernel(#[from] rustix::io::Errno),
}

/// The state of one connection.
#[derive(Debug)]
pub(crate) struct Session<'s, D: Device> {
    channel: Channel,
    device: &'s Arc<D>,
    device_id: u16,
    workers: &'s Handles<D>,
    safety: &'s CrashSafety,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    regions: Vec<Region>,
    memory: Arc<GuestMemory>,
    vrings: Vec<Vring>,
    /// The channel for requests of ours, once the front end gave one.
    backend_channel: Option<Notices>,
    /// The records that the front end keeps, once it gave them.
    shared: Option<Records>,
    oversight: MaybeOverseen,
    /// Where a new process is met that takes the session over.
    meeting: Option<&'s Meeting>,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// The front end went or was dropped, or the program ends.
    Ended,
    /// It goes on in another process.
    Moved,
}

impl<'s, D: Device> Session<'s, D> {
    pub(crate) fn new(
        stream: UnixStream,
        stop: Stop,
        device: &'s Arc<D>,
        device_id: u16,
        workers: &'s Handles<D>,
        safety: &'s CrashSafety,
        oversight: MaybeOverseen,
    ) -> Self {
        Self {
            channel: Channel::new(stream, stop),
            device,
            device_id,
            workers,
            safety,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            regions: Vec::new(),
            memory: Arc::default(),
            vrings: (0..device.queue_count())
                .map(|_| Vring::default())
                .collect(),
            backend_channel: None,
            shared: None,
            oversight,
            meeting: None,
        }
    }

    /// Nothing of an earlier front end may linger in the device: a session begins with
    /// this, or [adopts](Self::adopt) another.
    pub(crate) fn begin(&mut self) {
        self.device.negotiated(0);
    }

    /// Lets another process take the session over.
    pub(crate) fn movable(mut self, meeting: Option<&'s Meeting>) -> Self {
        self.meeting = meeting;
        self
    }

    /// Serves the front end until it goes, misbehaves, or the program ends, or
    /// until another process does.
    pub(crate) fn run(mut self) -> Over {
        let end = loop {
            // Between two messages, where nothing is half done.
            match self.channel.next(self.meeting) {
                Ok(Next::Message) => {}
                Ok(Next::Summons) if self.meet() => return Over::Moved,
                Ok(Next::Summons) => continue,
                Err(error) => break error,
            }
            if let Err(error) = self.turn() {
                break error;
            }
        };
        match &end {
            ChannelError::Closed | ChannelError::Stopped => {
                debug!("device {}: session over: {end}", self.device_id);
            }
            other => warn!("device {}: session dropped: {other}", self.device_id),
        }
        self.pause_all();
        self.tell();
        self.device.abandoned();
        Over::Ended
    }

    /// Lets the operator's side tell the front end what it agreed to hear.
    fn hear(&self) {
        let agreed = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG;
        let channel = self
            .protocol
            .contains(agreed)
            .then(|| self.backend_channel.clone());
        if let Some(oversight) = &self.oversight {
            oversight.hear(channel.flatten());
        }
    }

    /// Reads one message and answers it.
    fn turn(&mut self) -> Result<(), ChannelError> {
        let mut message = self.channel.receive()?;
        let code = message.code;
        if message.request() == Some(FrontendReq::GET_INFLIGHT_FD) {
            return self.answer_inflight(&message);
        }
        let answered = message.request().is_some_and(|r| ANSWERED.contains(&r));
        let handled = self.handle(&mut message);
        self.tell();
        match handled {
            Ok(Some(answer)) => self.channel.reply(code, &answer),
            Ok(None) if self.wants_ack(&message) => self.channel.reply(code, &0u64.to_ne_bytes()),
            Ok(None) => Ok(()),
            Err(refusal) => {
                warn!(
                    "device {}: vhost-user request {code} refused: {}",
                    self.device_id,
                    causes(&refusal)
                );
                // An empty answer to GET_CONFIG is the protocol's own way to
                // say no.
                if message.request() == Some(FrontendReq::GET_CONFIG) {
                    self.channel.reply(code, &[])
                } else if self.wants_ack(&message) && !answered {
                    self.channel.reply(code, &1u64.to_ne_bytes())
                } else {
                    Err(ChannelError::Malformed("a request that cannot be refused"))
                }
            }
        }
    }

    fn wants_ack(&self, message: &Message) -> bool {
        message.need_reply && self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK)
    }

    /// Does what the message asks. `Some` is the answer that belongs to it.
    fn handle(&mut self, message: &mut Message) -> Result<Option<Vec<u8>>, Refusal> {
        let request = message.request().ok_or(Refusal::Unknown(message.code))?;
        let number = |value: u64| Ok(Some(value.to_ne_bytes().to_vec()));
        match request {
            FrontendReq::GET_FEATURES => return number(self.offered()),
            FrontendReq::GET_PROTOCOL_FEATURES => {
                return number((PROTOCOL_FEATURES | self.inflight_feature()).bits());
            }
            FrontendReq::GET_QUEUE_NUM => return number(self.vrings.len() as u64),
            FrontendReq::GET_MAX_MEM_SLOTS => return number(MAX_REGIONS as u64),
            FrontendReq::GET_CONFIG => return self.get_config(message).map(Some),
            FrontendReq::GET_VRING_BASE => {
                let state: VhostUserVringState = message.body().ok_or(Refusal::Short)?;
                let (index, base) = self.get_base(state.index)?;
                let answer = VhostUserVringState::new(index, base);
                return Ok(Some(answer.as_slice().to_vec()));
            }
            FrontendReq::SET_OWNER => {}
            FrontendReq::RESET_OWNER | FrontendReq::RESET_DEVICE => self.reset(),
            FrontendReq::SET_FEATURES => self.set_features(number_in(message)?)?,
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let bits = number_in(message)?;
                let known = VhostUserProtocolFeatures::from_bits(bits)
                    .filter(|f| (PROTOCOL_FEATURES | self.inflight_feature()).contains(*f));
                self.protocol = known.ok_or(Refusal::Features(bits))?;
                self.hear();
            }
            FrontendReq::SET_CONFIG => self.set_config(message)?,
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight(message)?,
            FrontendReq::SET_MEM_TABLE => self.set_mem_table(message)?,
            FrontendReq::ADD_MEM_REG => self.add_region(message)?,
            FrontendReq::REM_MEM_REG => self.remove_region(message)?,
            FrontendReq::SET_BACKEND_REQ_FD => {
                let channel = bell(one_fd(message)?)?;
                self.backend_channel = Some(Notices::new(channel.fd, channel.is_socket));
                self.hear();
            }
            FrontendReq::SET_VRING_NUM
            | FrontendReq::SET_VRING_ADDR
            | FrontendReq::SET_VRING_BASE
            | FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_VRING_ENABLE => self.set_vring(request, message)?,
            _ => return Err(Refusal::Unknown(message.code)),
        }
        Ok(None)
    }

    fn offered(&self) -> u64 {
        self.device.features() | features::COMMON
    }

    fn set_features(&mut self, bits: u64) -> Result<(), Refusal> {
        if bits & !self.offered() != 0 {
            return Err(Refusal::Features(bits & !self.offered()));
        }
        // Queues read their features when they start.
        if bits != self.features {
            self.pause_all();
            self.features = bits;
            self.device.negotiated(bits);
            self.resume_all()?;
        }
        Ok(())
    }

    fn get_config(&self, message: &Message) -> Result<Vec<u8>, Refusal> {
        let header: VhostUserConfig = message.body().ok_or(Refusal::Short)?;
        let (offset, size) = (header.offset as usize, header.size as usize);
        // The front end may ask for more than the device has: the rest is zero.
        // The answer must fit a message.
        if size > 256 || offset > 256 {
            return Err(Refusal::Config);
        }
        let mut space = self.device.config();
        space.resize(space.len().max(offset + size), 0);
        let mut answer = header.as_slice().to_vec();
        answer.extend_from_slice(&space[offset..offset + size]);
        Ok(answer)
    }

    fn set_config(&self, message: &Message) -> Result<(), Refusal> {
        let header: VhostUserConfig = message.body().ok_or(Refusal::Short)?;
        let start = size_of::<VhostUserConfig>();
        let end = start + header.size as usize;
        let bytes = message.payload.get(start..end).ok_or(Refusal::Short)?;
        self.device
            .write_config(header.offset as usize, bytes)
            .map_err(|refused| {
                debug!("device {}: {refused}", self.device_id);
                Refusal::Config
            })
    }

    /// Back to the state of a fresh connection, features and memory excepted.
    fn reset(&mut self) {
        self.pause_all();
        self.tell();
        for vring in &mut self.vrings {
            *vring = Vring::default();
        }
        self.device.abandoned();
        self.device.negotiated(self.features);
    }
}

impl<D: Device> Drop for Session<'_, D> {
    fn drop(&mut self) {
        if let Some(oversight) = &self.oversight {
            oversight.hear(None);
        }
    }
}

/// The one number most messages carry.
fn number_in(message: &Message) -> Result<u64, Refusal> {
    message.body().ok_or(Refusal::Short)
}

/// The one descriptor that belongs to a message.
fn one_fd(message: &mut Message) -> Result<OwnedFd, Refusal> {
    let given = message.fds.len();
    match message.fds.pop() {
        Some(fd) if given == 1 => Ok(fd),
        _ => Err(Refusal::Descriptors { given, wanted: 1 }),
    }
}
