//! The oracle: a vhost-user block backend written to be obviously right, not
//! fast. It stands on `vhost-user-backend` and `virtio-queue`, shares no line
//! with `pericarp-block`, and does one request at a time with plain file I/O.
//!
//! The suites in `tests/tests` start it by name and compare answers; nothing
//! else should. Use: `pericarp-reference-block SOCKET FILE [ro] [queues=N] [serial=ID]`

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, getrlimit, setrlimit};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringState, VringT};
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic,
    GuestMemoryMmap, Permissions,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Memory>;

const SECTOR: u64 = 512;
const HEADER: u64 = 16;
const QUEUE_SIZE: usize = 256;
const ID_LEN: usize = 20;
/// Bytes of a range of DISCARD and WRITE_ZEROES, and the most of each request.
const RANGE: usize = 16;
const MAX_DISCARDS: usize = 256;
const MAX_DISCARD_SECTORS: u64 = 1 << 21;
const MAX_ZEROES: usize = 16;
const MAX_ZEROES_SECTORS: u64 = 1 << 18;

/// The disk and what the device says about itself; shared by all queues.
struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    queues: usize,
    serial: [u8; ID_LEN],
    /// Features of the front end that is there.
    agreed: AtomicU64,
}

/// One byte range of a request, in guest addresses.
#[derive(Clone, Copy)]
struct Piece {
    addr: GuestAddress,
    len: u64,
}

/// A chain split into what the device may read and what it may write.
struct Request {
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    /// The ring structure itself was wrong; only a status may be written.
    malformed: bool,
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.len).sum()
}

/// Drops `count` bytes at the front of `pieces`.
fn skip(pieces: &[Piece], mut count: u64) -> Vec<Piece> {
    let mut rest = Vec::new();
    for piece in pieces {
        let cut = count.min(piece.len);
        count -= cut;
        if cut < piece.len {
            rest.push(Piece {
                addr: piece.addr.unchecked_add(cut),
                len: piece.len - cut,
            });
        }
    }
    rest
}

impl Request {
    /// Walks the chain. `virtio-queue` ends a chain it cannot follow without
    /// an error, so "says it goes on, but does not" is what marks it as bad.
    fn parse(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Self {
        let mut request = Request {
            readable: vec![],
            writable: vec![],
            malformed: false,
        };
        let mut last: Option<Descriptor> = None;
        for descriptor in chain {
            let piece = Piece {
                addr: descriptor.addr(),
                len: u64::from(descriptor.len()),
            };
            // A length of zero is not allowed to a driver, and harmless.
            let inside = memory.check_range(
                piece.addr,
                descriptor.len() as usize,
                Permissions::ReadWrite,
            );
            request.malformed |= piece.len > 0 && !inside;
            if descriptor.is_write_only() {
                request.writable.push(piece);
            } else {
                request.malformed |= !request.writable.is_empty();
                request.readable.push(piece);
            }
            last = Some(descriptor);
        }
        request.malformed |= last.is_none_or(|descriptor| descriptor.has_next());
        request
    }

    /// Takes the status byte, the last writable one, off the chain.
    fn take_status(&mut self) -> Option<GuestAddress> {
        while self.writable.last().is_some_and(|piece| piece.len == 0) {
            self.writable.pop();
        }
        let piece = self.writable.last_mut()?;
        piece.len -= 1;
        piece.addr.checked_add(piece.len)
    }
}

impl Disk {
    fn open(args: &[String]) -> Result<(String, Self), String> {
        let [socket, path, options @ ..] = args else {
            return Err("usage: SOCKET FILE [ro] [queues=N] [serial=ID]".into());
        };
        let (mut read_only, mut queues, mut serial) = (false, 1, [0; ID_LEN]);
        for option in options {
            match option.split_once('=') {
                None if option == "ro" => read_only = true,
                Some(("queues", n)) => {
                    queues = n.parse().map_err(|e| format!("queues={n}: {e}"))?
                }
                Some(("serial", id)) if id.len() <= ID_LEN => {
                    serial[..id.len()].copy_from_slice(id.as_bytes());
                }
                _ => return Err(format!("{option}: not an option")),
            }
        }
        let file = OpenOptions::new().read(true).write(!read_only).open(path);
        let file = file.map_err(|e| format!("{path}: {e}"))?;
        let len = file.metadata().map_err(|e| format!("{path}: {e}"))?.len();
        let disk = Disk {
            file,
            sectors: len / SECTOR,
            read_only,
            queues,
            serial,
            agreed: AtomicU64::new(0),
        };
        Ok((socket.clone(), disk))
    }

    /// Byte offset of `len` bytes at `sector`, if all of them are on the disk.
    fn place(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        (len.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    /// DISCARD and WRITE_ZEROES: both leave zeroes. The list is checked whole
    /// before anything is written; the status is that of its first fault.
    fn clear(&self, kind: u32, list: &[u8]) -> io::Result<u32> {
        let discard = kind == virtio_blk::VIRTIO_BLK_T_DISCARD;
        let (feature, most, longest) = if discard {
            (
                virtio_blk::VIRTIO_BLK_F_DISCARD,
                MAX_DISCARDS,
                MAX_DISCARD_SECTORS,
            )
        } else {
            (
                virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES,
                MAX_ZEROES,
                MAX_ZEROES_SECTORS,
            )
        };
        if self.read_only {
            return Ok(virtio_blk::VIRTIO_BLK_S_IOERR);
        }
        if self.agreed.load(Ordering::SeqCst) & 1 << feature == 0 {
            return Ok(virtio_blk::VIRTIO_BLK_S_UNSUPP);
        }
        if list.is_empty() || !list.len().is_multiple_of(RANGE) || list.len() / RANGE > most {
            return Ok(virtio_blk::VIRTIO_BLK_S_IOERR);
        }
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        let mut places = Vec::new();
        for range in list.chunks(RANGE) {
            let (sector, sectors) = (number(&range[..8]), number(&range[8..12]));
            let flags = number(&range[12..]);
            if flags > u64::from(!discard) {
                return Ok(virtio_blk::VIRTIO_BLK_S_UNSUPP);
            }
            match self.place(sector, sectors * SECTOR) {
                Some(offset) if (1..=longest).contains(&sectors) => {
                    places.push((offset, sectors * SECTOR));
                }
                _ => return Ok(virtio_blk::VIRTIO_BLK_S_IOERR),
            }
        }
        for (offset, len) in places {
            self.file.write_all_at(&vec![0; len as usize], offset)?;
        }
        Ok(virtio_blk::VIRTIO_BLK_S_OK)
    }

    /// Does what the chain asks for: (bytes of data written to the guest, status).
    fn execute(&self, memory: &GuestMemoryMmap, request: &Request) -> io::Result<(u64, u32)> {
        let failed = Ok((0, virtio_blk::VIRTIO_BLK_S_IOERR));
        let done = |bytes| Ok((bytes, virtio_blk::VIRTIO_BLK_S_OK));
        if request.malformed || total(&request.readable) < HEADER {
            return failed;
        }
        let mut header = Vec::new();
        for piece in &request.readable {
            let mut bytes = vec![0; piece.len.min(HEADER - header.len() as u64) as usize];
            memory
                .read_slice(&mut bytes, piece.addr)
                .map_err(io::Error::other)?;
            header.extend_from_slice(&bytes);
        }
        let mut kind = [0; 4];
        kind.copy_from_slice(&header[..4]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..16]);
        let sector = u64::from_le_bytes(sector);

        match u32::from_le_bytes(kind) {
            virtio_blk::VIRTIO_BLK_T_IN => {
                let len = total(&request.writable);
                let Some(mut offset) = self.place(sector, len) else {
                    return failed;
                };
                for piece in &request.writable {
                    let mut bytes = vec![0; piece.len as usize];
                    self.file.read_exact_at(&mut bytes, offset)?;
                    memory
                        .write_slice(&bytes, piece.addr)
                        .map_err(io::Error::other)?;
                    offset += piece.len;
                }
                done(len)
            }
            virtio_blk::VIRTIO_BLK_T_OUT => {
                let data = skip(&request.readable, HEADER);
                let Some(mut offset) = self.place(sector, total(&data)) else {
                    return failed;
                };
                if self.read_only {
                    return failed;
                }
                for piece in &data {
                    let mut bytes = vec![0; piece.len as usize];
                    memory
                        .read_slice(&mut bytes, piece.addr)
                        .map_err(io::Error::other)?;
                    self.file.write_all_at(&bytes, offset)?;
                    offset += piece.len;
                }
                done(0)
            }
            kind @ (virtio_blk::VIRTIO_BLK_T_DISCARD | virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES) => {
                let mut list = Vec::new();
                for piece in skip(&request.readable, HEADER) {
                    let mut bytes = vec![0; piece.len as usize];
                    memory
                        .read_slice(&mut bytes, piece.addr)
                        .map_err(io::Error::other)?;
                    list.extend(bytes);
                }
                self.clear(kind, &list).map(|status| (0, status))
            }
            virtio_blk::VIRTIO_BLK_T_FLUSH => self.file.sync_data().and_then(|()| done(0)),
            virtio_blk::VIRTIO_BLK_T_GET_ID => {
                let mut written = 0;
                for piece in &request.writable {
                    let rest = &self.serial[written..];
                    let part = &rest[..rest.len().min(piece.len as usize)];
                    memory
                        .write_slice(part, piece.addr)
                        .map_err(io::Error::other)?;
                    written += part.len();
                }
                done(written as u64)
            }
            _ => Ok((0, virtio_blk::VIRTIO_BLK_S_UNSUPP)),
        }
    }

    /// Answers one chain: (head, bytes written into the chain).
    fn answer(
        &self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> (u16, u32) {
        let head = chain.head_index();
        let mut request = Request::parse(memory, chain);
        let Some(status_at) = request.take_status() else {
            return (head, 0);
        };
        let failed = (0, virtio_blk::VIRTIO_BLK_S_IOERR);
        let (bytes, status) = self.execute(memory, &request).unwrap_or(failed);
        // A status byte outside guest memory leaves nowhere to say so.
        match memory.write_obj(status as u8, status_at) {
            Ok(()) => (head, bytes as u32 + 1),
            Err(_) => (head, 0),
        }
    }

    /// Serves everything that is available on one ring.
    fn drain(&self, memory: &GuestMemoryMmap, vring: &mut VringState<Memory>) -> io::Result<()> {
        let other = io::Error::other::<virtio_queue::Error>;
        let mut empty_rounds = 0;
        // Two rounds without a chain although the index moved: the index is
        // further ahead than the ring is long, and the ring stays broken.
        while empty_rounds < 2 {
            empty_rounds += 1;
            vring
                .get_queue_mut()
                .disable_notification(memory)
                .map_err(other)?;
            while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory) {
                empty_rounds = 0;
                let (head, used) = self.answer(memory, chain);
                // Refused for a head that is no descriptor: there is none to give back.
                let _ = vring.get_queue_mut().add_used(memory, head, used);
                if vring
                    .get_queue_mut()
                    .needs_notification(memory)
                    .map_err(other)?
                {
                    vring.signal_used_queue()?;
                }
            }
            if !vring
                .get_queue_mut()
                .enable_notification(memory)
                .map_err(other)?
            {
                break;
            }
        }
        Ok(())
    }
}

/// The disk as one front end sees it.
struct Connection {
    disk: Arc<Disk>,
    memory: Memory,
}

impl VhostUserBackend for Connection {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.disk.queues
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let bit = |n: u32| 1u64 << n;
        let read_only = if self.disk.read_only {
            bit(virtio_blk::VIRTIO_BLK_F_RO)
        } else {
            bit(virtio_blk::VIRTIO_BLK_F_DISCARD) | bit(virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES)
        };
        read_only
            | bit(virtio_config::VIRTIO_F_VERSION_1)
            | bit(virtio_ring::VIRTIO_RING_F_EVENT_IDX)
            | bit(virtio_ring::VIRTIO_RING_F_INDIRECT_DESC)
            | bit(virtio_blk::VIRTIO_BLK_F_SEG_MAX)
            | bit(virtio_blk::VIRTIO_BLK_F_BLK_SIZE)
            | bit(virtio_blk::VIRTIO_BLK_F_FLUSH)
            | bit(virtio_blk::VIRTIO_BLK_F_MQ)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.disk.agreed.store(features, Ordering::SeqCst);
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
        Ok(())
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = vec![0; 256];
        config[0..8].copy_from_slice(&self.disk.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&(QUEUE_SIZE as u32 - 2).to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        for (at, number) in [
            (36, MAX_DISCARD_SECTORS as u32),
            (40, MAX_DISCARDS as u32),
            (44, 1),
            (48, MAX_ZEROES_SECTORS as u32),
            (52, MAX_ZEROES as u32),
        ] {
            config[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        config[56] = 1;
        config[34..36].copy_from_slice(&(self.disk.queues as u16).to_le_bytes());
        let range = offset as usize..(offset as usize).saturating_add(size as usize);
        config.get(range).unwrap_or_default().to_vec()
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.disk.queues).map(|queue| 1 << queue).collect()
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
        if let Some(vring) = vrings.get(usize::from(event)) {
            // An error here would end the crate's thread; a ring outside guest
            // memory must only stop that ring.
            let _ = self.disk.drain(&self.memory.memory(), &mut vring.get_mut());
        }
        Ok(())
    }
}

/// The crate leaks one exit eventfd per front end (it hands it to epoll with
/// `into_raw_fd`); make room for as many as a test connects.
fn allow_many_fds() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

fn serve(socket: &str, disk: Disk) -> Result<(), String> {
    allow_many_fds();
    let disk = Arc::new(disk);
    let mut listener = Listener::new(socket, true).map_err(|e| format!("{socket}: {e}"))?;
    loop {
        // The crate's handler remembers its owner, so every front end gets a new one.
        let memory = Memory::new(GuestMemoryMmap::new());
        let connection = Connection {
            disk: disk.clone(),
            memory: memory.clone(),
        };
        let mut daemon = VhostUserDaemon::new("reference".into(), Arc::new(connection), memory)
            .map_err(|error| error.to_string())?;
        daemon
            .start(&mut listener)
            .map_err(|error| error.to_string())?;
        if let Err(error) = daemon.wait() {
            eprintln!("pericarp-reference-block: {error}");
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let served = Disk::open(&args).and_then(|(socket, disk)| serve(&socket, disk));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("pericarp-reference-block: {message}");
            ExitCode::from(2)
        }
    }
}
