//! The state of one network device: what the driver agreed to, which of the tap's
//! queues are in use, and what was dropped. Sessions and workers of `pericarp-vhost`
//! call it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use log::warn;
use pericarp_ring::{Chain, ChainError};
use pericarp_vhost::{
    Account, ConfigRefused, Device, Dropped, LimitNames, Step, Traffic, Way, features as common,
};

use crate::control::Wish;
use crate::features::{
    CSUM, CTRL_GUEST_OFFLOADS, CTRL_VQ, GUEST_CSUM, GUEST_ECN, GUEST_OFFLOADS, GUEST_TSO4,
    GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_USO, MAC, MQ,
    MRG_RXBUF, MTU, STATUS, tap_offloads,
};
use crate::tap::Tap;

/// Bytes of an Ethernet header, and of one with a VLAN tag.
const ETHERNET: usize = 14;
const ETHERNET_VLAN: usize = 18;
/// The largest IP packet.
const LARGEST: usize = 65535;
/// Bytes of the header of a packet (virtio 1.3, 5.1.6), and without `num_buffers`.
const HEADER: usize = 12;
const SHORT_HEADER: usize = 10;

/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
const OK: u8 = 0;
const ERR: u8 = 1;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

/// Indices into [`Device::CLASSES`].
const RECEIVED: usize = 0;
const SENT: usize = 1;
const CONTROL: usize = 2;

/// What the operator says of a card.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Card {
    /// Its address; without one the front end or the driver has one.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the driver is to use.
    pub mtu: Option<u16>,
    /// Largest virtqueue.
    pub queue_size: u16,
}

/// Packets that were not passed on, by way and reason.
#[derive(Debug, Default)]
struct Drops([[AtomicU64; 4]; 2]);

/// What [`Drops`] are called, in the same order.
const DROPS: [[&str; 4]; 2] = [
    [
        "rx-dropped-chain",
        "rx-dropped-length",
        "rx-dropped-no-room",
        "rx-dropped-refused",
    ],
    [
        "tx-dropped-chain",
        "tx-dropped-length",
        "tx-dropped-no-room",
        "tx-dropped-refused",
    ],
];

/// Which queues of the tap get the host's packets.
#[derive(Debug)]
struct Steering {
    /// Pairs that the driver wants to use.
    active: u16,
    /// By pair: a worker serves its receive queue.
    served: Vec<bool>,
    /// By pair: the tap's queue is attached.
    attached: Vec<bool>,
}

/// A network card on a tap.
#[derive(Debug)]
pub struct NetDevice {
    tap: Tap,
    card: Card,
    pairs: u16,
    /// What the driver agreed to.
    negotiated: AtomicU64,
    steering: Mutex<Steering>,
    drops: Drops,
}

impl NetDevice {
    /// One with a pair of queues for each of the tap's.
    pub fn new(tap: Tap, card: Card) -> Self {
        let pairs = tap.queues().len();
        Self {
            tap,
            card,
            pairs: pairs as u16,
            negotiated: AtomicU64::new(0),
            steering: Mutex::new(Steering {
                active: pairs as u16,
                served: vec![false; pairs],
                attached: vec![true; pairs],
            }),
            drops: Drops::default(),
        }
    }

    fn has(&self, features: u64) -> bool {
        self.negotiated.load(Ordering::Relaxed) & features == features
    }

    /// The control queue, where the driver has one (virtio 1.3, 5.1.2).
    fn control_queue(&self) -> Option<u16> {
        let pairs = if self.has(MQ) { self.pairs } else { 1 };
        self.has(CTRL_VQ).then_some(2 * pairs)
    }

    fn header(&self) -> usize {
        let features = self.negotiated.load(Ordering::Relaxed);
        // Before there is a driver, as most have it.
        match features == 0 || features & (common::VERSION_1 | MRG_RXBUF) != 0 {
            true => HEADER,
            false => SHORT_HEADER,
        }
    }

    fn offload(&self, features: u64) -> bool {
        match self.tap.set_offloads(tap_offloads(features)) {
            Ok(()) => true,
            Err(error) => {
                warn!("the tap's offloads stay as they are: {error}");
                false
            }
        }
    }

    /// Changes which queues are in use, and has the tap follow.
    fn steer(&self, change: impl FnOnce(&mut Steering)) {
        let mut steering = self.steering.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut steering);
        let Steering {
            active,
            served,
            attached,
        } = &mut *steering;
        for (pair, (served, attached)) in served.iter().zip(attached).enumerate() {
            let wanted = *served && pair < usize::from(*active);
            if wanted != *attached {
                match self.tap.attach(pair, wanted) {
                    Ok(()) => *attached = wanted,
                    Err(error) => warn!("queue {pair} of the tap: {error}"),
                }
            }
        }
    }

    fn grant(&self, wish: Option<Wish>) -> bool {
        match wish {
            Some(Wish::Pairs(pairs)) if self.has(MQ) && (1..=self.pairs).contains(&pairs) => {
                self.steer(|steering| steering.active = pairs);
                true
            }
            Some(Wish::Offloads(offloads)) if self.has(CTRL_GUEST_OFFLOADS) => {
                let agreed = GUEST_OFFLOADS & self.negotiated.load(Ordering::Relaxed);
                offloads & !agreed == 0 && self.offload(offloads)
            }
            _ => false,
        }
    }
}

impl Device for NetDevice {
    /// A command failed.
    type Request = bool;

    const CLASSES: &'static [&'static str] = &["rx", "tx", "control"];

    const LIMITS: &'static [LimitNames] = &crate::options::LIMITS;

    fn lane(&self, queue: u16) -> usize {
        usize::from(queue % 2)
    }

    fn account(&self, failed: &bool) -> Account {
        Account {
            class: CONTROL,
            bytes: 0,
            failed: *failed,
        }
    }

    fn features(&self) -> u64 {
        let mut features = CSUM
            | GUEST_CSUM
            | CTRL_GUEST_OFFLOADS
            | GUEST_TSO4
            | GUEST_TSO6
            | GUEST_ECN
            | HOST_TSO4
            | HOST_TSO6
            | HOST_ECN
            | MRG_RXBUF
            | STATUS
            | CTRL_VQ;
        for (offered, bits) in [
            (self.tap.takes_uso(), GUEST_USO4 | GUEST_USO6 | HOST_USO),
            (self.card.mac.is_some(), MAC),
            (self.card.mtu.is_some(), MTU),
            (self.pairs > 1, MQ),
        ] {
            if offered {
                features |= bits;
            }
        }
        features
    }

    fn queue_count(&self) -> u16 {
        2 * self.pairs + 1
    }

    fn max_queue_size(&self) -> u16 {
        self.card.queue_size
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_net_config up to `mtu`.
        let mut config = self.card.mac.unwrap_or_default().to_vec();
        for field in [LINK_UP, self.pairs, self.card.mtu.unwrap_or(0)] {
            config.extend_from_slice(&field.to_le_bytes());
        }
        config
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), ConfigRefused> {
        let end = offset + bytes.len();
        Err(ConfigRefused { offset, end })
    }

    fn negotiated(&self, features: u64) {
        self.negotiated.store(features, Ordering::Relaxed);
        if let Err(error) = self.tap.set_header(self.header()) {
            warn!("the tap's header stays as it is: {error}");
        }
        self.offload(features);
        // Where the driver can say how many pairs it uses, it begins with one.
        let says = self.has(MQ | CTRL_VQ);
        self.steer(|steering| steering.active = if says { 1 } else { self.pairs });
    }

    fn held(&self) -> Vec<(&'static str, u64)> {
        let names = DROPS.iter().flatten().copied();
        let counts = self.drops.0.iter().flatten();
        names
            .zip(counts.map(|count| count.load(Ordering::Relaxed)))
            .collect()
    }

    fn files(&self) -> &[OwnedFd] {
        self.tap.queues()
    }

    fn traffic(&self, queue: u16) -> Option<Traffic> {
        let pair = queue / 2;
        if pair >= self.pairs || self.control_queue() == Some(queue) {
            return None;
        }
        let header = self.header();
        let (way, class) = match queue % 2 {
            0 => (Way::In, RECEIVED),
            _ => (Way::Out, SENT),
        };
        Some(Traffic {
            way,
            file: pair,
            header,
            least: header + ETHERNET,
            most: header + ETHERNET_VLAN + LARGEST,
            merge: self.has(MRG_RXBUF),
            class,
        })
    }

    fn dropped(&self, queue: u16, why: Dropped) {
        let reason = match why {
            Dropped::Chain => 0,
            Dropped::Length => 1,
            Dropped::NoRoom => 2,
            Dropped::Refused(_) => 3,
        };
        self.drops.0[usize::from(queue % 2)][reason].fetch_add(1, Ordering::Relaxed);
    }

    fn serves(&self, queue: u16, on: bool) {
        if queue.is_multiple_of(2) && queue / 2 < self.pairs {
            self.steer(|steering| steering.served[usize::from(queue / 2)] = on);
        }
    }

    fn start(
        &self,
        loaded: Result<(), ChainError>,
        mut chain: Chain<'_>,
        failed: &mut bool,
    ) -> Step {
        *failed = true;
        if loaded.is_err() || !chain.take_status() {
            return Step::Done { written: 0 };
        }
        *failed = !self.grant(Wish::read(&mut chain));
        chain.write_status(if *failed { ERR } else { OK });
        Step::Done { written: 1 }
    }

    fn resume(&self, _chain: Chain<'_>, _failed: &mut bool, _result: i32) -> Step {
        Step::Done { written: 0 }
    }
}
