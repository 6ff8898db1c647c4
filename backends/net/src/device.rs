//! The state of one network device: what the driver agreed to, which of the tap's
//! queues are in use, and what was dropped. Sessions and workers of `pericarp-vhost`
//! call it.

use std::ffi::c_uint;
use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use log::warn;
use pericarp_ring::{Chain, ChainError};
use pericarp_vhost::{
    Account, Bag, ConfigRefused, Device, Dropped, Errand, LimitNames, Step, Traffic, Unpacked, Way,
    features as common,
};

use crate::control::Wish;
use crate::features::{
    CSUM, CTRL_GUEST_OFFLOADS, CTRL_VQ, GUEST_CSUM, GUEST_ECN, GUEST_OFFLOADS, GUEST_TSO4,
    GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_USO, MAC, MQ,
    MRG_RXBUF, MTU, STATUS, tap_offloads,
};
use crate::handover;
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Steering {
    /// Pairs that the driver wants to use.
    pub(crate) active: u16,
    /// What the driver takes now, of what it agreed to.
    pub(crate) offloads: u64,
    /// Queues that are served, by their number.
    pub(crate) served: u64,
    /// By pair: the tap's queue is attached.
    pub(crate) attached: Vec<bool>,
}

/// What a card stands on: queues of packets, and how these are to look. A [`Tap`], or
/// what whoever tests the card puts in its place.
pub trait Host: Debug + Send + Sync + Sized + 'static {
    /// These queues, which another process goes on with until it says otherwise: they
    /// are left as they are. It says, too, what [`takes_uso`](Self::takes_uso) is.
    fn inherited(queues: Vec<OwnedFd>, uso: bool) -> Self;

    /// One for each pair of virtqueues: each read gives a packet and each write takes
    /// one, and neither waits.
    fn queues(&self) -> &[OwnedFd];

    /// Whether UDP is passed on in pieces larger than a frame.
    fn takes_uso(&self) -> bool;

    /// How the packets that are read may look, in the words of TUNSETOFFLOAD.
    ///
    /// # Errors
    /// A refusal; all stays as it is.
    fn set_offloads(&self, offloads: c_uint) -> io::Result<()>;

    /// Bytes of the header before each packet.
    ///
    /// # Errors
    /// As there.
    fn set_header(&self, bytes: usize) -> io::Result<()>;

    /// Whether packets come to this queue, too, if there are several.
    ///
    /// # Errors
    /// As there.
    fn attach(&self, queue: usize, on: bool) -> io::Result<()>;
}

/// A network card, on a tap.
#[derive(Debug)]
pub struct NetDevice<H = Tap> {
    /// Comes from another process perhaps, and later.
    host: OnceLock<H>,
    card: Card,
    pairs: u16,
    /// What the driver agreed to.
    negotiated: AtomicU64,
    steering: Mutex<Steering>,
    drops: Drops,
    /// Somebody was told that the tap refused something.
    complained: AtomicBool,
}

/// A command of the driver's.
#[derive(Debug, Default)]
pub struct Order {
    wish: Option<Wish>,
    failed: bool,
}

impl<H: Host> NetDevice<H> {
    /// One with a pair of queues for each of the host's.
    pub fn new(host: H, card: Card) -> Self {
        let pairs = host.queues().len();
        let device = Self::awaiting(pairs as u16, card);
        let _ = device.host.set(host);
        device
    }

    /// One whose host is still another process's, which serves it now.
    pub fn awaiting(pairs: u16, card: Card) -> Self {
        Self {
            host: OnceLock::new(),
            card,
            pairs,
            negotiated: AtomicU64::new(0),
            steering: Mutex::new(Steering {
                active: pairs,
                offloads: 0,
                served: 0,
                attached: vec![true; usize::from(pairs)],
            }),
            drops: Drops::default(),
            complained: AtomicBool::new(false),
        }
    }

    fn takes_uso(&self) -> bool {
        self.host.get().is_some_and(H::takes_uso)
    }

    fn steering(&self) -> MutexGuard<'_, Steering> {
        self.steering.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Changes what is in use, and has the tap follow. True if it does.
    fn steer(&self, change: impl FnOnce(&mut Steering)) -> bool {
        let Some(host) = self.host.get() else {
            return false;
        };
        let mut steering = self.steering();
        let before = steering.offloads;
        change(&mut steering);
        let mut follows = true;
        let mut tell = |what: std::io::Result<()>| {
            if let Err(error) = &what {
                // A driver can ask for it again and again.
                if !self.complained.swap(true, Ordering::Relaxed) {
                    warn!("the tap does not do as the driver wants: {error}");
                }
                follows = false;
            }
            what.is_ok()
        };
        let offloads = tap_offloads(steering.offloads);
        if offloads != tap_offloads(before) && !tell(host.set_offloads(offloads)) {
            // Asked for again, it is tried again.
            steering.offloads = before;
        }
        let Steering {
            active,
            served,
            attached,
            ..
        } = &mut *steering;
        for (pair, attached) in attached.iter_mut().enumerate() {
            let wanted = pair < usize::from(*active) && *served & 1 << (2 * pair) != 0;
            if wanted != *attached && tell(host.attach(pair, wanted)) {
                *attached = wanted;
            }
        }
        follows
    }

    /// What a driver that was just set up has not chosen yet.
    fn begin(&self, steering: &mut Steering) {
        steering.offloads = self.negotiated.load(Ordering::Relaxed);
        // One that can say how many pairs it uses begins with one.
        let says = self.has(MQ | CTRL_VQ);
        steering.active = if says { 1 } else { self.pairs };
    }

    /// Whether the driver may have that.
    fn allows(&self, wish: Wish) -> bool {
        match wish {
            Wish::Pairs(pairs) => self.has(MQ) && (1..=self.pairs).contains(&pairs),
            Wish::Offloads(offloads) => {
                let agreed = GUEST_OFFLOADS & self.negotiated.load(Ordering::Relaxed);
                self.has(CTRL_GUEST_OFFLOADS) && offloads & !agreed == 0
            }
        }
    }

    fn grant(&self, wish: Wish) -> bool {
        self.steer(|steering| match wish {
            Wish::Pairs(pairs) => steering.active = pairs,
            Wish::Offloads(offloads) => steering.offloads = offloads,
        })
    }
}

impl<H: Host> Device for NetDevice<H> {
    type Request = Order;

    const CLASSES: &'static [&'static str] = &["rx", "tx", "control"];

    const LIMITS: &'static [LimitNames] = &crate::options::LIMITS;

    fn lane(&self, queue: u16) -> Option<usize> {
        // A driver waits for its commands, and holds up more than itself.
        let traffic = self.traffic(queue)?;
        Some(usize::from(traffic.way == Way::Out))
    }

    fn account(&self, order: &Order) -> Account {
        Account {
            class: CONTROL,
            bytes: 0,
            failed: order.failed,
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
            (self.takes_uso(), GUEST_USO4 | GUEST_USO6 | HOST_USO),
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
        if let Some(host) = self.host.get()
            && let Err(error) = host.set_header(self.header())
        {
            warn!("the tap's header stays as it is: {error}");
        }
        self.steer(|steering| self.begin(steering));
    }

    fn held(&self) -> Vec<(&'static str, u64)> {
        let names = DROPS.iter().flatten().copied();
        let counts = self.drops.0.iter().flatten();
        names
            .zip(counts.map(|count| count.load(Ordering::Relaxed)))
            .collect()
    }

    fn files(&self) -> &[OwnedFd] {
        self.host.get().map_or(&[], H::queues)
    }

    fn pack(&self) -> io::Result<Vec<Bag>> {
        let again = |queue: &OwnedFd| Ok(Arc::new(queue.try_clone()?) as _);
        let queues = self.files().iter().map(again);
        Ok(vec![Bag {
            text: handover::write(&self.steering(), self.takes_uso()),
            descriptors: queues.collect::<io::Result<_>>()?,
        }])
    }

    fn unpack(&self, mut bags: Vec<Unpacked>) -> Result<(), String> {
        let bag = bags.pop().filter(|_| bags.is_empty());
        let bag = bag.filter(|bag| bag.descriptors.len() == usize::from(self.pairs));
        let read = bag.and_then(|bag| {
            let (steering, uso) = handover::read(&bag.text, self.pairs)?;
            Some((steering, H::inherited(bag.descriptors, uso)))
        });
        let (steering, host) = read.ok_or("what it says of the tap makes no sense")?;
        *self.steering() = steering;
        let first = self.host.set(host);
        first.map_err(|_| "it has a tap already".to_owned())
    }

    fn resumed(&self, features: u64, _config: &[u8]) {
        // The tap has been told all of it, and what the driver chose came with the tap.
        self.negotiated.store(features, Ordering::Relaxed);
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
        // The control queue may have the number of a receive queue.
        let counts = !queue.is_multiple_of(2) || self.traffic(queue).is_some();
        let bit = u64::from(counts) << queue.min(63);
        self.steer(|steering| {
            if on {
                steering.served |= bit;
            } else {
                steering.served &= !bit;
                // The next driver has chosen nothing.
                if steering.served == 0 {
                    self.begin(steering);
                }
            }
        });
    }

    fn start(
        &self,
        loaded: Result<(), ChainError>,
        mut chain: Chain<'_>,
        order: &mut Order,
    ) -> Step {
        order.failed = true;
        if loaded.is_err() || !chain.take_status() {
            return Step::Done { written: 0 };
        }
        order.wish = Wish::read(&mut chain).filter(|wish| self.allows(*wish));
        match order.wish {
            // The kernel takes its time for it, in which others are served.
            Some(_) => Step::Errand,
            None => answer(chain, order),
        }
    }

    fn errand(self: Arc<Self>, order: &mut Order) -> Errand {
        let wish = order.wish;
        Errand::new(move || i32::from(wish.is_some_and(|wish| self.grant(wish))))
    }

    fn resume(&self, chain: Chain<'_>, order: &mut Order, result: i32) -> Step {
        order.failed = result != 1;
        answer(chain, order)
    }
}

fn answer(mut chain: Chain<'_>, order: &Order) -> Step {
    chain.write_status(if order.failed { ERR } else { OK });
    Step::Done { written: 1 }
}
