//! A small vhost-user block driver of our own on `vhost::Frontend`. It can do
//! everything right, and every single thing wrong: the ring is built by hand
//! in guest memory, so a test can put any bytes anywhere.
//!
//! [`Driver`] holds a connection and its rings, [`Ring`] one split ring,
//! [`Chain`] the pieces of one request, [`Op`] a well-formed request.
//! Used by `tests/hostile.rs`, `tests/crash.rs` and `tests/differential.rs`.

mod memory;
mod request;
mod ring;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use thiserror::Error;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};
use vm_memory::{Bytes, GuestAddress};

pub use memory::{ADJACENT, FAR, Guest, REGION};
pub use request::{Answer, Chain, DATA, HEADER, Op, Place, STATUS, TABLE, UNTOUCHED};
pub use ring::{Desc, INDIRECT, NEXT, Ring, Used, WRITE};

use crate::peer;

/// What can go wrong between us and the backend.
#[derive(Debug, Error)]
pub enum DriverError {
    /// Nobody listens.
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    /// The backend answered a message with an error, or hung up.
    #[error("{step} failed: {source}")]
    Protocol {
        /// Which message.
        step: &'static str,
        /// The crate's word for it.
        source: vhost::Error,
    },
    /// A request was not completed in time.
    #[error("not completed within {0:?}")]
    NotCompleted(Duration),
    /// The used ring advanced, but no call came.
    #[error("completed, but not signalled within {0:?}")]
    NotSignalled(Duration),
    /// The backend completed something else than what was asked.
    #[error("completed head {got} instead of {want}")]
    WrongHead {
        /// What the used ring says.
        got: u32,
        /// What was offered.
        want: u32,
    },
    /// The backend wrote no status byte.
    #[error("completed without a status byte")]
    NoStatus,
    /// Ours: an address outside guest memory where that is not the point.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// How to set a driver up.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Rings to configure and enable.
    pub queues: u16,
    /// Entries of each ring.
    pub queue_size: u16,
    /// Take EVENT_IDX if offered.
    pub event_idx: bool,
    /// Take INDIRECT_DESC if offered.
    pub indirect: bool,
    /// More device features to take if offered.
    pub extra: u64,
    /// Features not to take.
    pub without: u64,
    /// Configure the rings; without this the test does it.
    pub rings: bool,
    /// Enable the rings; without this the test does it.
    pub enable: bool,
    /// Keep the backend's record of requests in flight, if offered.
    pub inflight: bool,
    /// The longest wait for a completion and for a call.
    pub limit: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            queues: 1,
            queue_size: 128,
            event_idx: true,
            indirect: true,
            extra: 0,
            without: 0,
            rings: true,
            enable: true,
            inflight: false,
            // Long: a disk that others keep busy is not what is tested.
            limit: Duration::from_secs(30),
        }
    }
}

/// A connected front end. Dropping it is how a front end vanishes.
pub struct Driver {
    /// The message side.
    pub frontend: Frontend,
    /// The same connection, for raw bytes.
    pub stream: UnixStream,
    /// Guest memory.
    pub guest: Guest,
    /// The rings.
    pub rings: Vec<Ring>,
    /// Virtio features agreed on.
    pub features: u64,
    /// Protocol features agreed on.
    pub protocol: VhostUserProtocolFeatures,
    /// The longest wait for a completion and for a call.
    pub limit: Duration,
    /// Where the backend records what is in flight, kept for its successor.
    pub inflight: Option<(VhostUserInflight, File)>,
    setup: Setup,
}

fn step<T>(step: &'static str, answer: vhost::Result<T>) -> Result<T, DriverError> {
    answer.map_err(|source| DriverError::Protocol { step, source })
}

/// Agrees on features.
fn negotiate(
    stream: UnixStream,
    setup: &Setup,
) -> Result<(UnixStream, Frontend, u64, VhostUserProtocolFeatures), DriverError> {
    let mut frontend = Frontend::from_stream(stream.try_clone()?, 1);
    step("SET_OWNER", frontend.set_owner())?;
    let offered = step("GET_FEATURES", frontend.get_features())?;
    let mut wanted = bit(virtio_config::VIRTIO_F_VERSION_1)
        | bit(virtio_blk::VIRTIO_BLK_F_FLUSH)
        | bit(virtio_blk::VIRTIO_BLK_F_RO)
        | bit(virtio_blk::VIRTIO_BLK_F_MQ)
        | bit(virtio_blk::VIRTIO_BLK_F_SEG_MAX)
        | bit(virtio_blk::VIRTIO_BLK_F_BLK_SIZE)
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if setup.event_idx {
        wanted |= bit(virtio_ring::VIRTIO_RING_F_EVENT_IDX);
    }
    if setup.indirect {
        wanted |= bit(virtio_ring::VIRTIO_RING_F_INDIRECT_DESC);
    }
    let features = offered & (wanted | setup.extra) & !setup.without;
    let known = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | if setup.inflight {
            VhostUserProtocolFeatures::INFLIGHT_SHMFD
        } else {
            VhostUserProtocolFeatures::empty()
        };
    let protocol = step("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())? & known;
    step(
        "SET_PROTOCOL_FEATURES",
        frontend.set_protocol_features(protocol),
    )?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        // Every step is then known to be done, or refused, when it returns.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if protocol.contains(VhostUserProtocolFeatures::MQ) {
        step("GET_QUEUE_NUM", frontend.get_queue_num())?;
    }
    step("SET_FEATURES", frontend.set_features(features))?;
    Ok((stream, frontend, features, protocol))
}

/// A feature bit by its number.
pub fn bit(number: u32) -> u64 {
    1 << number
}

impl Driver {
    /// Connects, agrees on features, sends the memory table and sets up rings.
    ///
    /// # Errors
    /// When the backend is not there or refuses a step.
    pub fn connect(socket: &Path, setup: &Setup) -> Result<Self, DriverError> {
        Self::over(peer::connect(socket)?, setup)
    }

    /// The same over a connection that exists.
    ///
    /// # Errors
    /// When the backend refuses a step.
    pub fn over(stream: UnixStream, setup: &Setup) -> Result<Self, DriverError> {
        let (stream, frontend, features, protocol) = negotiate(stream, setup)?;
        let guest = Guest::new();
        let event_idx = features & bit(virtio_ring::VIRTIO_RING_F_EVENT_IDX) != 0;
        let rings = (0..setup.queues)
            .map(|queue| Ring::new(&guest, queue, setup.queue_size, event_idx))
            .collect();
        let mut driver = Driver {
            frontend,
            stream,
            guest,
            rings,
            features,
            protocol,
            limit: setup.limit,
            setup: setup.clone(),
            inflight: None,
        };
        driver.begin()?;
        Ok(driver)
    }

    /// Ends the connection; all else stays for [`reconnect`](Self::reconnect).
    pub fn leave(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Connects to a successor, with the memory, the rings and all that is in
    /// flight as they are.
    ///
    /// # Errors
    /// When the backend is not there or refuses a step.
    pub fn reconnect(&mut self, socket: &Path) -> Result<(), DriverError> {
        // A backend that lives must see the end of this connection first.
        self.leave();
        let (stream, frontend, features, protocol) =
            negotiate(peer::connect(socket)?, &self.setup)?;
        (self.stream, self.frontend) = (stream, frontend);
        (self.features, self.protocol) = (features, protocol);
        self.begin()
    }

    /// Memory, records and rings.
    fn begin(&mut self) -> Result<(), DriverError> {
        self.send_memory()?;
        if self
            .protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            if self.inflight.is_none() {
                let wanted = VhostUserInflight {
                    num_queues: self.setup.queues,
                    queue_size: self.setup.queue_size,
                    ..VhostUserInflight::default()
                };
                let got = self.frontend.get_inflight_fd(&wanted);
                self.inflight = Some(step("GET_INFLIGHT_FD", got)?);
            }
            if let Some((inflight, memory)) = &self.inflight {
                let set = self.frontend.set_inflight_fd(inflight, memory.as_raw_fd());
                step("SET_INFLIGHT_FD", set)?;
            }
        }
        for queue in 0..usize::from(self.setup.queues) {
            if self.setup.rings {
                self.configure(queue)?;
            }
            if self.setup.enable {
                self.enable(queue, true)?;
            }
        }
        Ok(())
    }

    /// Sends the memory table.
    ///
    /// # Errors
    /// When the backend refuses it.
    pub fn send_memory(&self) -> Result<(), DriverError> {
        step(
            "SET_MEM_TABLE",
            self.frontend.set_mem_table(&self.guest.table()),
        )
        .map(|_| ())
    }

    /// Tells the backend all about one ring, and starts it with its kick fd.
    ///
    /// # Errors
    /// When the backend refuses a step.
    pub fn configure(&self, queue: usize) -> Result<(), DriverError> {
        let ring = &self.rings[queue];
        let config = VringConfigData {
            queue_max_size: ring.size(),
            queue_size: ring.size(),
            flags: 0,
            desc_table_addr: self.guest.pointer(ring.desc_at(0))?,
            used_ring_addr: self.guest.pointer(ring.used_at())?,
            avail_ring_addr: self.guest.pointer(ring.avail_at())?,
            log_addr: None,
        };
        step(
            "SET_VRING_NUM",
            self.frontend.set_vring_num(queue, ring.size()),
        )?;
        step(
            "SET_VRING_BASE",
            self.frontend.set_vring_base(queue, ring.seen()),
        )?;
        step(
            "SET_VRING_ADDR",
            self.frontend.set_vring_addr(queue, &config),
        )?;
        step(
            "SET_VRING_CALL",
            self.frontend.set_vring_call(queue, &ring.call),
        )?;
        step(
            "SET_VRING_KICK",
            self.frontend.set_vring_kick(queue, &ring.kick),
        )
    }

    /// Enables or disables one ring.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn enable(&mut self, queue: usize, on: bool) -> Result<(), DriverError> {
        step(
            "SET_VRING_ENABLE",
            self.frontend.set_vring_enable(queue, on),
        )
    }

    /// Stops one ring; returns where the backend stands in the available ring.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn stop(&self, queue: usize) -> Result<u16, DriverError> {
        step("GET_VRING_BASE", self.frontend.get_vring_base(queue)).map(|base| base as u16)
    }

    /// `len` bytes of the configuration space.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn config(&mut self, len: u32) -> Result<Vec<u8>, DriverError> {
        let room = vec![0; len as usize];
        let flags = VhostUserConfigFlags::empty();
        step("GET_CONFIG", self.frontend.get_config(0, len, flags, &room)).map(|(_, bytes)| bytes)
    }

    /// Sectors on the disk.
    ///
    /// # Errors
    /// When the backend refuses.
    pub fn sectors(&mut self) -> Result<u64, DriverError> {
        let config = self.config(60)?;
        Ok(u64::from_le_bytes(
            config[..8].try_into().unwrap_or_default(),
        ))
    }

    /// Reads guest memory.
    ///
    /// # Errors
    /// When the range is outside.
    pub fn peek(&self, at: u64, len: usize) -> Result<Vec<u8>, DriverError> {
        let mut bytes = vec![0; len];
        self.guest.memory.read_slice(&mut bytes, GuestAddress(at))?;
        Ok(bytes)
    }

    /// Writes guest memory.
    ///
    /// # Errors
    /// When the range is outside.
    pub fn poke(&self, at: u64, bytes: &[u8]) -> Result<(), DriverError> {
        Ok(self.guest.memory.write_slice(bytes, GuestAddress(at))?)
    }
}
