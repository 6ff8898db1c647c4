//! The device behind one front end: takes packets off the transmit queue, puts
//! packets into the receive queue, and is the `vhost-user-backend` crate's
//! backend. All work is done on that crate's one event loop thread.
//!
//! `handle_event` must not return an error except to end that thread: the
//! crate ends it without a word. Whatever a guest does wrong is answered or
//! dropped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use log::debug;
use pericarp_ring::Watched;
use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    VhostUserBackend, VhostUserDaemon, VringEpollHandler, VringMutex, VringState, VringT,
};
use virtio_bindings::{virtio_config, virtio_ring};
use virtio_queue::{Error as QueueError, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::chain::{Gathered, gather, room, scatter};
use crate::engine::Engine;
use crate::packet::{HEADER, MAX_PAYLOAD};

/// Guest memory as the crates share it.
pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Memory>;

/// Receive, transmit, and events, which this device never has.
const QUEUES: usize = 3;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: usize = 1024;
/// VIRTIO_VSOCK_F_STREAM: virtio 1.3, 5.10.3.
const STREAM_BIT: u32 = 0;

/// The crate keeps event numbers up to the number of queues to itself.
const HOST: u16 = QUEUES as u16 + 1;
const AGAIN: u16 = HOST + 1;
/// Chains of one queue in one go, so that a guest that never stops leaves time
/// for the host's programs.
const BATCH: usize = 256;

/// What the event loop thread works with.
struct Work {
    engine: Arc<Mutex<Engine>>,
    payload: Vec<u8>,
    /// The transmit queue was stopped by the front end.
    stopped: bool,
}

/// The device as one front end sees it.
pub(crate) struct Vsock {
    guest_cid: u64,
    memory: Memory,
    work: Mutex<Work>,
    /// The front end may take its memory away at any time.
    watched: Mutex<Option<Watched>>,
    /// Readable when there is more to do, or the end has come.
    again: OwnedFd,
    ending: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process in release builds; in others the state is whole
    // enough to be closed.
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Vsock {
    /// A device for the next front end.
    ///
    /// # Errors
    /// The kernel's refusal of an eventfd.
    pub(crate) fn new(engine: Arc<Mutex<Engine>>, memory: Memory) -> io::Result<Arc<Self>> {
        let again = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let guest_cid = lock(&engine).guest_cid();
        Ok(Arc::new(Self {
            guest_cid,
            memory,
            work: Mutex::new(Work {
                engine,
                payload: vec![0; MAX_PAYLOAD],
                stopped: false,
            }),
            watched: Mutex::new(None),
            again,
            ending: AtomicBool::new(false),
        }))
    }

    /// Lets the event loop hear of the host's sockets.
    ///
    /// # Errors
    /// The kernel's refusal to watch a descriptor.
    pub(crate) fn attach(&self, daemon: &VhostUserDaemon<Arc<Self>>) -> io::Result<()> {
        let handlers: Vec<Arc<VringEpollHandler<Arc<Self>>>> = daemon.get_epoll_handlers();
        for handler in handlers {
            // By this it hears of its end, also where the other cannot be watched.
            let again = self.again.as_raw_fd();
            handler.register_listener(again, EventSet::IN, u64::from(AGAIN))?;
            let host = lock(&lock(&self.work).engine).as_fd().as_raw_fd();
            handler.register_listener(host, EventSet::IN, u64::from(HOST))?;
        }
        Ok(())
    }

    /// Ends the event loop thread; its owner waits for that when dropped.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // The only error is a counter at its maximum, which is readable too.
        let _ = rustix::io::write(&self.again, &1u64.to_ne_bytes());
    }

    /// The memory of now, if it is there. It is watched for as long as the guard is held: a front
    /// end's next table, on another thread, must not end the watch over what a turn uses.
    fn watch(&self) -> Option<(MutexGuard<'_, Option<Watched>>, Arc<GuestMemoryMmap>)> {
        let mut watched = lock(&self.watched);
        let memory = self.memory.memory().into_inner();
        if !watched
            .as_ref()
            .is_some_and(|watched| watched.is_of(&memory))
        {
            // What is in both tables is watched without a gap.
            match Watched::new(Arc::clone(&memory)) {
                Ok(new) => *watched = Some(new),
                Err(error) => {
                    debug!("guest memory is not used: {error}");
                    return None;
                }
            }
        }
        let is_there = watched.as_ref().is_some_and(|watched| !watched.is_lost());
        is_there.then_some((watched, memory))
    }

    /// One turn: hears the guest, then tells it what there is to tell.
    fn turn(&self, work: &mut Work, vrings: &[Vring]) {
        let Work {
            engine,
            payload,
            stopped,
        } = work;
        let mut engine = lock(engine);
        let Some((_watched, memory)) = self.watch() else {
            return;
        };
        let (Some(receive), Some(transmit)) = (vrings.get(RECEIVE), vrings.get(TRANSMIT)) else {
            return;
        };
        let mut more = false;
        {
            let mut ring = transmit.get_mut();
            if runs(&ring) {
                if std::mem::take(stopped) && ring.get_queue().next_avail() == 0 {
                    // A driver that starts from the beginning knows nothing of
                    // what its predecessor had open.
                    engine.reset();
                }
                more |= hear(&mut engine, &memory, &mut ring, payload).unwrap_or_else(broken);
            }
        }
        let mut ring = receive.get_mut();
        if runs(&ring) {
            let was_congested = engine.congested();
            more |= tell(&mut engine, &memory, &mut ring, payload).unwrap_or_else(broken);
            more |= was_congested && !engine.congested();
        }
        if more {
            self.wake();
        }
    }
}

/// A ring outside guest memory: nothing moves until the front end sets it anew.
fn broken(error: QueueError) -> bool {
    debug!("a ring is broken: {error}");
    false
}

fn runs(ring: &VringState<Memory>) -> bool {
    ring.is_enabled() && ring.get_queue().ready()
}

fn signal(memory: &GuestMemoryMmap, ring: &mut VringState<Memory>) -> Result<(), QueueError> {
    if ring.get_queue_mut().needs_notification(memory)?
        && let Err(error) = ring.signal_used_queue()
    {
        debug!("the front end cannot be called: {error}");
    }
    Ok(())
}

/// Takes packets off the transmit queue; true when there may be more.
fn hear(
    engine: &mut Engine,
    memory: &GuestMemoryMmap,
    ring: &mut VringState<Memory>,
    payload: &mut [u8],
) -> Result<bool, QueueError> {
    let (mut count, mut empty_rounds) = (0, 0);
    let more = loop {
        let before = count;
        let queue = ring.get_queue_mut();
        queue.disable_notification(memory)?;
        while count < BATCH && !engine.congested() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else {
                break;
            };
            count += 1;
            let head = chain.head_index();
            match gather(memory, chain, payload) {
                Gathered::Packet(header, len) => engine.receive(&header, &payload[..len]),
                Gathered::BadLength(header) => engine.receive_malformed(&header),
                Gathered::Garbage => debug!("a packet without a header"),
            }
            // Refused for a head that is no descriptor: none to give back.
            let _ = queue.add_used(memory, head, 0);
        }
        if count == BATCH {
            break true;
        }
        if engine.congested() {
            // Goes on when the receive queue has taken some.
            break false;
        }
        // Twice nothing although the index moved: it is further ahead than the
        // ring is long, and will stay so.
        empty_rounds += u32::from(count == before);
        if !queue.enable_notification(memory)? || empty_rounds == 2 {
            break false;
        }
    };
    if count > 0 {
        signal(memory, ring)?;
    }
    Ok(more)
}

/// Fills the receive queue; true when there may be more to do.
fn tell(
    engine: &mut Engine,
    memory: &GuestMemoryMmap,
    ring: &mut VringState<Memory>,
    payload: &mut [u8],
) -> Result<bool, QueueError> {
    let (mut count, mut empty_rounds) = (0, 0);
    let more = loop {
        let before = count;
        let queue = ring.get_queue_mut();
        queue.disable_notification(memory)?;
        while count < BATCH && engine.has_packets() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else {
                break;
            };
            count += 1;
            let head = chain.head_index();
            let space = room(chain.clone()).saturating_sub(HEADER).min(MAX_PAYLOAD);
            let written = if space == 0 {
                debug!("a receive buffer too small for a packet");
                0
            } else if let Some(header) = engine.next_packet(&mut payload[..space]) {
                scatter(memory, chain, &header, &payload[..header.len as usize])
            } else {
                queue.go_to_previous_position();
                count -= 1;
                break;
            };
            // As in `hear`.
            let _ = queue.add_used(memory, head, written);
        }
        if count == BATCH {
            break true;
        }
        if !engine.has_packets() {
            break false;
        }
        // Packets and no buffers: ask to be kicked.
        empty_rounds += u32::from(count == before);
        if !queue.enable_notification(memory)? || empty_rounds == 2 {
            break false;
        }
    };
    if count > 0 {
        signal(memory, ring)?;
    }
    Ok(more)
}

impl VhostUserBackend for Vsock {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << STREAM_BIT
            | 1 << virtio_config::VIRTIO_F_VERSION_1
            | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX
            | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // The crate itself reads a ring's index as it is told its addresses. It has put the new
        // memory where ours is.
        let watched = self.watch().map(|_| ());
        watched.ok_or_else(|| io::Error::other("guest memory that cannot be watched"))
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // `struct virtio_vsock_config` is the context id; front ends may ask
        // for a longer space.
        let mut config = vec![0; 256];
        config[..8].copy_from_slice(&self.guest_cid.to_le_bytes());
        let range = offset as usize..(offset as usize).saturating_add(size as usize);
        config.get(range).unwrap_or_default().to_vec()
    }

    fn reset_device(&self) {
        lock(&lock(&self.work).engine).reset();
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        // Taking the lock waits for a turn that still uses the ring.
        let mut work = lock(&self.work);
        work.stopped |= queue as usize == TRANSMIT;
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        if event == AGAIN {
            let _ = rustix::io::read(&self.again, &mut [0; 8]);
        }
        if self.ending.load(Ordering::Acquire) {
            // The crate's own exit event leaks a descriptor for each front end.
            return Err(io::Error::other("the front end is gone"));
        }
        let mut work = lock(&self.work);
        if event == HOST {
            lock(&work.engine).host_events();
        }
        self.turn(&mut work, vrings);
        Ok(())
    }
}
