//! One connection to a backend, in the order that the protocol wants (QEMU's
//! docs/interop/vhost-user.rst): who we are and what both can do, then memory and
//! rings, then their end. Called by [`super::actor`] alone; every message may
//! wait for the backend, which [`super::Lifeline`] can end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{Bytes, GuestAddress};

use super::kind::Offer;
use crate::memory::{RING_BASE, Ram};
use crate::virtio::function::QUEUES_MAX;
use crate::virtio::{Activation, Ring, VERSION_1};

/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL: u64 = 1 << 30;
/// What no guest is offered: the log of a migration, what only some transports
/// have, what would have the backend see other ring formats than we check
/// (virtio 1.3, 6: 33, 34, 36 to 41).
const WITHHELD: u64 = PROTOCOL | (1 << 26) | (1 << 33) | (1 << 34) | (0b11_1111 << 36) | (1 << 42);

/// Why a backend cannot be used.
#[derive(Debug, Error)]
pub enum SessionError {
    /// A message failed.
    #[error("{step}")]
    Message {
        /// What was asked.
        step: &'static str,
        /// What came of it.
        #[source]
        source: vhost::Error,
    },
    /// It cannot do what is needed.
    #[error("it does not offer {0}")]
    Lacks(&'static str),
    /// It came back as another.
    #[error("it came back without features that the guest uses ({0:#x})")]
    Other(u64),
    /// A descriptor.
    #[error("cannot prepare the connection")]
    Prepare(#[from] io::Error),
    /// Its channel back to us.
    #[error("cannot read its requests")]
    Requests(#[source] vhost::vhost_user::Error),
}

fn step<T>(step: &'static str, result: vhost::Result<T>) -> Result<T, SessionError> {
    result.map_err(|source| SessionError::Message { step, source })
}

/// Where the backend keeps what it has begun, across its own death.
pub struct Inflight {
    layout: VhostUserInflight,
    file: File,
}

/// Hears that the configuration has changed.
#[derive(Debug, Default)]
struct Changes(AtomicBool);

impl VhostUserFrontendReqHandler for Changes {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.store(true, Ordering::Release);
        Ok(0)
    }
}

/// A connection.
pub struct Session {
    front: Frontend,
    stream: UnixStream,
    protocol: VhostUserProtocolFeatures,
    features: u64,
    queues: usize,
    requests: Option<(FrontendReqHandler<Changes>, Arc<Changes>)>,
}

impl Session {
    /// Finds out who is there and agrees on what both can do.
    ///
    /// # Errors
    /// The backend does not answer as it should, or lacks something.
    pub fn open(stream: UnixStream) -> Result<Self, SessionError> {
        let own = stream.try_clone()?;
        let mut front = Frontend::from_stream(stream, QUEUES_MAX as u64);
        step("SET_OWNER", front.set_owner())?;
        let features = step("GET_FEATURES", front.get_features())?;
        if features & VERSION_1 == 0 {
            return Err(SessionError::Lacks("VIRTIO_F_VERSION_1"));
        }
        let mut session = Self {
            front: front.clone(),
            stream: own,
            protocol: VhostUserProtocolFeatures::empty(),
            features,
            queues: 1,
            requests: None,
        };
        if features & PROTOCOL == 0 {
            return Ok(session);
        }
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ;
        let offered = step("GET_PROTOCOL_FEATURES", front.get_protocol_features())?;
        let protocol = offered & wanted;
        step(
            "SET_PROTOCOL_FEATURES",
            front.set_protocol_features(protocol),
        )?;
        session.protocol = protocol;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // An answer to everything: what a backend refuses is known at once.
            front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        // Who serves one queue need not say so; who serves a kind with more mostly does.
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let queues = step("GET_QUEUE_NUM", front.get_queue_num())?;
            session.queues = usize::try_from(queues).unwrap_or(usize::MAX);
        }
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let changes = Arc::new(Changes::default());
            let mut requests =
                FrontendReqHandler::new(Arc::clone(&changes)).map_err(SessionError::Requests)?;
            requests.set_reply_ack_flag(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
            let theirs = requests.get_tx_raw_fd();
            step("SET_BACKEND_REQ_FD", front.set_backend_request_fd(&theirs))?;
            session.requests = Some((requests, changes));
        }
        Ok(session)
    }

    /// What the backend offers. `config_size` bytes of configuration, if it has any.
    ///
    /// # Errors
    /// It does not answer.
    pub fn offer(&mut self, config_size: u32) -> Result<Offer, SessionError> {
        Ok(Offer {
            features: self.features & !WITHHELD,
            queues: self.queues,
            config: self.config(config_size)?,
        })
    }

    /// Its configuration now, if it gives one.
    ///
    /// # Errors
    /// It does not answer.
    pub fn config(&mut self, size: u32) -> Result<Option<Vec<u8>>, SessionError> {
        if size == 0 {
            return Ok(Some(Vec::new()));
        }
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(None);
        }
        let room = vec![0; size as usize];
        let flags = VhostUserConfigFlags::empty();
        let got = self.front.get_config(0, size, flags, &room);
        let (_, config) = step("GET_CONFIG", got)?;
        Ok(Some(config))
    }

    /// Writes to its configuration.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), SessionError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(());
        }
        let flags = VhostUserConfigFlags::WRITABLE;
        step("SET_CONFIG", self.front.set_config(offset, flags, data))
    }

    /// Gives it memory and rings. `again` where an earlier connection had them:
    /// then each ring goes on where its requests are, with `inflight` of that
    /// connection if there is one.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    pub fn start(
        &mut self,
        activation: &Activation,
        ram: &Ram,
        inflight: &mut Option<Inflight>,
        again: bool,
    ) -> Result<(), SessionError> {
        let missing = activation.features & !self.features;
        if missing != 0 {
            return Err(SessionError::Other(missing));
        }
        let most = self.most_served();
        let front = &mut self.front;
        let protocol = self.features & PROTOCOL;
        step(
            "SET_FEATURES",
            front.set_features(activation.features | protocol),
        )?;
        step("SET_MEM_TABLE", front.set_mem_table(&ram.regions()))?;
        let served = |ring: &&Ring| usize::from(ring.index) < most;
        let rings: Vec<&Ring> = activation.rings.iter().filter(served).collect();
        for ring in &rings {
            step(
                "SET_VRING_NUM",
                front.set_vring_num(ring.index.into(), ring.size),
            )?;
        }
        if self
            .protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            share_inflight(front, &rings, inflight)?;
        }
        for ring in &rings {
            let index = usize::from(ring.index);
            let place = VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: RING_BASE + ring.descriptors,
                used_ring_addr: RING_BASE + ring.used,
                avail_ring_addr: RING_BASE + ring.available,
                log_addr: None,
            };
            let base = match again {
                true => used_index(ram, ring),
                false => 0,
            };
            step("SET_VRING_ADDR", front.set_vring_addr(index, &place))?;
            step("SET_VRING_BASE", front.set_vring_base(index, base))?;
            step("SET_VRING_CALL", front.set_vring_call(index, &ring.call))?;
            step("SET_VRING_KICK", front.set_vring_kick(index, &ring.kick))?;
        }
        if protocol != 0 {
            for ring in &rings {
                let index = usize::from(ring.index);
                step("SET_VRING_ENABLE", front.set_vring_enable(index, true))?;
            }
        }
        if again {
            // What was rung or called while nobody listened.
            for ring in &rings {
                let _ = ring.kick.write(1);
                let _ = ring.call.write(1);
            }
        }
        Ok(())
    }

    /// Queues below this are the backend's. Backends of sockets serve two of three,
    /// and some do not say so.
    fn most_served(&self) -> usize {
        self.queues.max(2)
    }

    /// Another interrupt for a ring.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    pub fn set_call(&mut self, ring: &Ring) -> Result<(), SessionError> {
        let set = self.front.set_vring_call(ring.index.into(), &ring.call);
        step("SET_VRING_CALL", set)
    }

    /// Ends all rings: when this returns, the backend has answered all requests
    /// it had begun and touches the guest's memory no more.
    ///
    /// # Errors
    /// It refuses, or vanishes, which ends them, too.
    pub fn stop(&mut self, activation: &Activation) -> Result<(), SessionError> {
        let most = self.most_served();
        let rings = activation.rings.iter().map(|ring| usize::from(ring.index));
        let rings: Vec<usize> = rings.filter(|index| *index < most).collect();
        if self.features & PROTOCOL != 0 {
            for index in &rings {
                step(
                    "SET_VRING_ENABLE",
                    self.front.set_vring_enable(*index, false),
                )?;
            }
        }
        for index in rings {
            step("GET_VRING_BASE", self.front.get_vring_base(index))?;
        }
        Ok(())
    }

    /// Readable when the backend has something to say.
    pub fn requests(&self) -> Option<BorrowedFd<'_>> {
        let (requests, _) = self.requests.as_ref()?;
        Some(requests_fd(requests))
    }

    /// Hears one request of the backend. True where its configuration has changed.
    ///
    /// # Errors
    /// It says nonsense, or is gone.
    pub fn hear(&mut self) -> Result<bool, SessionError> {
        let Some((requests, changes)) = &mut self.requests else {
            return Ok(false);
        };
        requests.handle_request().map_err(SessionError::Requests)?;
        Ok(changes.0.swap(false, Ordering::AcqRel))
    }

    /// The connection, to see its end.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn requests_fd(requests: &FrontendReqHandler<Changes>) -> BorrowedFd<'_> {
    crate::event::borrow_from(requests, requests.as_raw_fd())
}

/// The area of an earlier connection, or a new one of the backend's.
fn share_inflight(
    front: &mut Frontend,
    rings: &[&Ring],
    inflight: &mut Option<Inflight>,
) -> Result<(), SessionError> {
    let count = rings.iter().map(|ring| ring.index + 1).max().unwrap_or(0);
    let size = rings.iter().map(|ring| ring.size).max().unwrap_or(0);
    if count == 0 {
        return Ok(());
    }
    let area = match inflight.take() {
        Some(area) => area,
        None => {
            let wanted = VhostUserInflight::new(0, 0, count, size);
            let got = front.get_inflight_fd(&wanted);
            let (layout, file) = step("GET_INFLIGHT_FD", got)?;
            Inflight { layout, file }
        }
    };
    let set = front.set_inflight_fd(&area.layout, area.file.as_raw_fd());
    // Kept whatever the backend says: the next connection needs it.
    *inflight = Some(area);
    step("SET_INFLIGHT_FD", set)
}

/// How far the backend had come with a ring (2.7.8): what it has not used is
/// offered to its successor again, as far as its record of what is in flight
/// does not say better.
fn used_index(ram: &Ram, ring: &Ring) -> u16 {
    let index = GuestAddress(ring.used + 2);
    ram.mmap().read_obj::<u16>(index).map_or(0, u16::from_le)
}
