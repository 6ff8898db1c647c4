//! What is kept from script to script: guest memory, and cards with a worker each,
//! whose taps are pairs of sockets. A datagram is a packet, both ways.

use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pericarp_net::{Card, Host, NetDevice};
use pericarp_uring::EngineKind;
use pericarp_vhost::{Hand, Pool, PoolOptions};
use rustix::event::{EventfdFlags, eventfd};

use super::player::SIZES;
use crate::memory::Memory;

/// Bytes of the region that receive buffers are in: the largest packet, and more.
pub(super) const ROOM: u64 = 0x1_2000;
/// The most pairs of queues.
pub(super) const PAIRS: u16 = 2;
/// The most queues.
pub(super) const LANES: u16 = 2 * PAIRS + 1;

/// What the tap was told, and whether it listens.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) offloads: c_uint,
    pub(super) header: usize,
    pub(super) attached: Vec<bool>,
    pub(super) refuses_offloads: bool,
    pub(super) refuses_attaching: bool,
}

/// The tap.
#[derive(Debug)]
pub(super) struct Wire {
    queues: Vec<OwnedFd>,
    said: Arc<Mutex<Said>>,
}

fn lock(said: &Mutex<Said>) -> MutexGuard<'_, Said> {
    said.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host for Wire {
    fn inherited(_: Vec<OwnedFd>, _: bool) -> Self {
        unreachable!("nobody hands one over")
    }

    fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    fn takes_uso(&self) -> bool {
        true
    }

    fn set_offloads(&self, offloads: c_uint) -> io::Result<()> {
        let mut said = lock(&self.said);
        if said.refuses_offloads {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        said.offloads = offloads;
        Ok(())
    }

    fn set_header(&self, bytes: usize) -> io::Result<()> {
        lock(&self.said).header = bytes;
        Ok(())
    }

    fn attach(&self, queue: usize, on: bool) -> io::Result<()> {
        let mut said = lock(&self.said);
        if said.refuses_attaching {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        said.attached[queue] = on;
        Ok(())
    }
}

/// One card, its worker, and the other ends of its tap.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) hand: Hand<NetDevice<Wire>>,
    pub(super) device: Arc<NetDevice<Wire>>,
    pub(super) peers: Vec<UnixDatagram>,
    /// The tap's own ends, to empty them.
    ours: Vec<UnixDatagram>,
    said: Arc<Mutex<Said>>,
}

impl Bench {
    fn new(pairs: u16, engine: EngineKind) -> Self {
        let sockets = (0..pairs).map(|_| {
            let (ours, theirs) = UnixDatagram::pair().expect("sockets");
            ours.set_nonblocking(true).expect("a socket");
            theirs.set_nonblocking(true).expect("a socket");
            (ours, theirs)
        });
        let (ours, peers): (Vec<_>, Vec<_>) = sockets.unzip();
        let queues = ours.iter().map(|socket| {
            let again = socket.try_clone().expect("a descriptor");
            OwnedFd::from(again)
        });
        let said = Arc::new(Mutex::new(Said {
            offloads: 0,
            header: 0,
            attached: vec![true; usize::from(pairs)],
            refuses_offloads: false,
            refuses_attaching: false,
        }));
        let wire = Wire {
            queues: queues.collect(),
            said: Arc::clone(&said),
        };
        let card = Card {
            queue_size: *SIZES.end(),
            ..Card::default()
        };
        let pool = Pool::new(&PoolOptions {
            workers: 1,
            engine,
            depth: 64,
            // What the queues need and no more: what is left behind is missed.
            files: 3 * u32::from(LANES) + u32::from(pairs),
            poll_limit: Duration::ZERO,
            commands: false,
            register_memory: false,
            polled: false,
            descriptors: false,
            threads: None,
            cpus: Vec::new(),
        });
        let hand = pool.expect("a pool").by_hand();
        Self {
            hand: hand.expect("a worker"),
            device: Arc::new(NetDevice::new(wire, card)),
            peers,
            ours,
            said,
        }
    }

    pub(super) fn said(&self) -> MutexGuard<'_, Said> {
        lock(&self.said)
    }

    /// Empties the tap, both ways.
    pub(super) fn drain(&self) {
        for socket in self.peers.iter().chain(&self.ours) {
            while socket.recv(&mut [0; 64]).is_ok() {}
        }
    }
}

/// What is kept from script to script.
#[derive(Debug)]
pub(super) struct Rig {
    pub(super) memory: Memory,
    benches: Vec<Bench>,
    /// Kick, call and error of each queue.
    pub(super) bells: Vec<[OwnedFd; 3]>,
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

impl Rig {
    pub(super) fn new() -> Self {
        let kinds = [EngineKind::Auto, EngineKind::Sync];
        let benches = kinds
            .into_iter()
            .flat_map(|kind| (1..=PAIRS).map(move |pairs| Bench::new(pairs, kind)));
        Self {
            memory: Memory::with(ROOM),
            benches: benches.collect(),
            bells: (0..LANES).map(|_| [bell(), bell(), bell()]).collect(),
        }
    }

    /// Guest memory, one of the cards, and the queues' bells.
    pub(super) fn parts(&mut self, which: u8) -> (&mut Memory, &mut Bench, &[[OwnedFd; 3]]) {
        let which = usize::from(which) % self.benches.len();
        (&mut self.memory, &mut self.benches[which], &self.bells)
    }
}

/// Takes the count of an eventfd; true if there was one.
pub(super) fn rung(bell: &OwnedFd) -> bool {
    rustix::io::read(bell, &mut [0; 8]).is_ok()
}

/// The same bells once more, for whoever is given them.
pub(super) fn shared(bells: &[OwnedFd; 3]) -> [OwnedFd; 3] {
    let again = |fd: &OwnedFd| fd.as_fd().try_clone_to_owned().expect("a descriptor");
    [again(&bells[0]), again(&bells[1]), again(&bells[2])]
}
