//! The baseline of `net-compare`: a vhost-user network card on a tap as it is written
//! when nothing but `vhost-user-backend` and `virtio-queue` is at hand. One thread, one
//! pair of queues, one read or write for each packet through a buffer of its own, chains
//! that hold a whole packet. It shares no line with `pericarp-net`.
//!
//! Use: `pericarp-reference-net SOCKET TAP`
#![expect(unsafe_code)]
// UNSAFETY: ioctls of the tap with pointers to values of ours.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::zeroed;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::sync::Arc;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringState, VringT};
use virtio_bindings::{virtio_config, virtio_net, virtio_ring};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Memory>;

const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;
/// Queues by their numbers, and what says that the tap has a packet. The number between
/// is the crate's.
const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const TAP: u16 = 3;
/// Virtio's header, its number of buffers last, and the most that may follow it.
const HEADER: usize = 12;
const MOST: usize = HEADER + 18 + 65535;

/// A tap, without waiting.
fn open(name: &str) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    let tap = options
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: a structure of numbers.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as _;
    // SAFETY: takes a pointer to such a structure.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let mut size = HEADER as libc::c_int;
    // SAFETY: takes a pointer to a number.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw mut size) })?;
    Ok(tap)
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The card as one front end sees it.
struct Connection {
    tap: Arc<File>,
    memory: Memory,
}

/// The rings and the memory that they are in.
type Ring<'a> = (&'a GuestMemoryMmap, &'a mut VringState<Memory>);

/// Serves what is available until there is no more, or `serve` has no use for it. It says
/// how much it wrote, or that the chain is to be left.
fn drain(
    (memory, vring): Ring<'_>,
    mut serve: impl FnMut(virtio_queue::DescriptorChain<&GuestMemoryMmap>) -> Option<u32>,
) -> io::Result<()> {
    let other = io::Error::other::<virtio_queue::Error>;
    let mut more = true;
    while more {
        let queue = vring.get_queue_mut();
        queue.disable_notification(memory).map_err(other)?;
        let mut done = 0;
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory) {
            let queue = vring.get_queue_mut();
            let head = chain.head_index();
            let Some(written) = serve(chain) else {
                queue.go_to_previous_position();
                more = false;
                break;
            };
            queue.add_used(memory, head, written).map_err(other)?;
            done += 1;
        }
        let queue = vring.get_queue_mut();
        if done > 0 && queue.needs_notification(memory).map_err(other)? {
            vring.signal_used_queue()?;
        }
        let queue = vring.get_queue_mut();
        more = more && queue.enable_notification(memory).map_err(other)?;
    }
    Ok(())
}

impl Connection {
    /// The host's packets to the guest.
    fn receive(&self, ring: Ring<'_>) -> io::Result<()> {
        let memory = ring.0;
        let mut packet = vec![0; MOST];
        drain(ring, |chain| {
            // Nothing there: the chain is for the next one.
            let len = (&*self.tap).read(&mut packet).ok()?;
            packet[HEADER - 2..HEADER].copy_from_slice(&1u16.to_le_bytes());
            let writer = chain.writer(memory);
            let written = writer.map(|mut writer| writer.write_all(&packet[..len]));
            // What has no room is lost.
            Some(if let Ok(Ok(())) = written {
                len as u32
            } else {
                0
            })
        })
    }

    /// The guest's packets to the host.
    fn send(&self, ring: Ring<'_>) -> io::Result<()> {
        let memory = ring.0;
        let mut packet = Vec::new();
        drain(ring, |chain| {
            packet.clear();
            if let Ok(reader) = chain.reader(memory) {
                // What cannot be read or is refused is lost.
                let _ = reader.take(MOST as u64).read_to_end(&mut packet);
                let _ = (&*self.tap).write(&packet);
            }
            Some(0)
        })
    }
}

impl VhostUserBackend for Connection {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        [
            virtio_net::VIRTIO_NET_F_CSUM,
            virtio_net::VIRTIO_NET_F_GUEST_CSUM,
            virtio_net::VIRTIO_NET_F_GUEST_TSO4,
            virtio_net::VIRTIO_NET_F_GUEST_TSO6,
            virtio_net::VIRTIO_NET_F_HOST_TSO4,
            virtio_net::VIRTIO_NET_F_HOST_TSO6,
            virtio_config::VIRTIO_F_VERSION_1,
            virtio_ring::VIRTIO_RING_F_EVENT_IDX,
            virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
        ]
        .iter()
        .fold(
            VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            |all, bit| all | 1u64 << *bit,
        )
    }

    fn acked_features(&self, features: u64) {
        let has = |bit: u32| features & 1u64 << bit != 0;
        let mut offloads = 0;
        for (bit, offload) in [
            (virtio_net::VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (virtio_net::VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (virtio_net::VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        ] {
            if has(bit) {
                offloads |= offload;
            }
        }
        // SAFETY: takes a number.
        let set = unsafe { libc::ioctl(self.tap.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) };
        if let Err(error) = check(set) {
            eprintln!("pericarp-reference-net: the tap's offloads: {error}");
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn get_config(&self, _offset: u32, size: u32) -> Vec<u8> {
        vec![0; size.min(256) as usize]
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![0b11]
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.memory();
        let ring = |index: u16| vrings[usize::from(index)].get_mut();
        // An error here would end the crate's thread; a ring that is not there yet, or
        // outside memory, must only stop that ring.
        let _ = match event {
            SEND => self.send((&memory, &mut ring(SEND))),
            RECEIVE | TAP => self.receive((&memory, &mut ring(RECEIVE))),
            _ => Ok(()),
        };
        Ok(())
    }
}

fn serve(socket: &str, name: &str) -> Result<(), String> {
    let tap = Arc::new(open(name).map_err(|e| format!("{name}: {e}"))?);
    let mut listener = Listener::new(socket, true).map_err(|e| format!("{socket}: {e}"))?;
    // The crate's handler remembers its owner: one front end, and another process for
    // the next.
    let memory = Memory::new(GuestMemoryMmap::new());
    let connection = Connection {
        tap: tap.clone(),
        memory: memory.clone(),
    };
    let mut daemon = VhostUserDaemon::new("reference".into(), Arc::new(connection), memory)
        .map_err(|error| error.to_string())?;
    // Told once for all that comes until a read finds nothing: a ring without buffers
    // would else be a loop.
    let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
    for handler in daemon.get_epoll_handlers() {
        let added = handler.register_listener(tap.as_raw_fd(), once, TAP.into());
        added.map_err(|error| error.to_string())?;
    }
    daemon.start(&mut listener).map_err(|e| e.to_string())?;
    daemon.wait().map_err(|e| e.to_string())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let served = match args.as_slice() {
        [socket, tap] => serve(socket, tap),
        _ => Err("usage: SOCKET TAP".to_owned()),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("pericarp-reference-net: {message}");
            ExitCode::from(2)
        }
    }
}
