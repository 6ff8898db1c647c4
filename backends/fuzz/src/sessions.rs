//! A hostile front end against a whole server: real sessions, a real worker,
//! over a socket.
//!
//! After every script the next front end must be served, correctly and soon,
//! and the process must hold as many descriptors as before: what a front end
//! did may end its own session and leave nothing behind.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pericarp_block::{BlockDevice, CacheMode, Disk, DiskOptions};
use pericarp_uring::EngineKind;
use pericarp_vhost::{Endpoint, Pool, PoolOptions, Running, Server, Stop, features};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::memory::memfd;
use crate::script::Script;

/// Bytes of guest memory, in one region at guest address 0.
const MEMORY: u64 = 0x1_0000;
const USER: u64 = 0x7000_0000_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 16;
/// Nothing may take longer.
const LIMIT: Duration = Duration::from_secs(20);

/// Descriptors that whoever runs us may open meanwhile: under libFuzzer one more
/// than at the start was seen. A leak that repeats passes this soon.
const SLACK: usize = 4;

/// Request numbers of the vhost-user protocol.
mod code {
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const ADD_MEM_REG: u32 = 37;
    pub(super) const REM_MEM_REG: u32 = 38;
}

/// The server all scripts talk to.
struct Rig {
    address: SocketAddr,
    descriptors: usize,
    /// Kept, or the leak check counts the worker's handle.
    _running: Running<BlockDevice>,
}

fn rig() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(|| {
        ignore_broken_pipes();
        let disk = memfd(64 * 1024);
        for sector in 0..128u64 {
            disk.write_all_at(&[sector as u8; 512], sector * 512)
                .expect("a disk");
        }
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&disk));
        let options = DiskOptions {
            file: PathBuf::from(path),
            read_only: false,
            cache: CacheMode::Buffered,
        };
        let disk = Disk::open(&options).expect("a disk");
        let device = Arc::new(BlockDevice::new(disk, "fuzz", 2, 64));
        let pool = Pool::new(&PoolOptions {
            workers: 1,
            engine: EngineKind::Auto,
            depth: 64,
            // As the program counts: four for each queue, one for each disk.
            files: 4 * 2 + 1,
            poll_limit: Duration::from_micros(5),
            commands: false,
            threads: None,
            cpus: Vec::new(),
        })
        .expect("a pool");
        let name = format!("pericarp-fuzz-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("a socket");
        let endpoint = Endpoint::from_descriptor(listener.into()).expect("a listening socket");
        let stop = Stop::new().expect("a stop");
        let server = Server::new(endpoint, device, 0, &pool);
        let running = pool.start(&stop).expect("workers");
        server.start(&stop).expect("a session thread");
        healthy(&address);
        // Long enough for the session of that front end to end.
        std::thread::sleep(Duration::from_millis(300));
        let descriptors = descriptors();
        Rig {
            address,
            descriptors,
            _running: running,
        }
    })
}

/// Rust's own start-up does this for every program; libFuzzer's main does not,
/// and a call by a pipe without reader would end the process.
#[expect(unsafe_code, reason = "signal dispositions have no safe wrapper here")]
fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Waits until the last session let go of everything.
fn settled(want: usize) {
    let end = Instant::now() + LIMIT;
    while descriptors() > want {
        assert!(
            Instant::now() < end,
            "{} descriptors, {want} before",
            descriptors()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Plays one script.
///
/// # Panics
/// When the next front end is not served, or something was left behind.
pub fn play(bytes: &[u8]) {
    let rig = rig();
    let mut script = Script::new(bytes);
    let mut client = Client::new(&rig.address);
    for _ in 0..60 {
        if script.is_over() {
            break;
        }
        client.act(&mut script, &rig.address);
    }
    drop(client);
    healthy(&rig.address);
    settled(rig.descriptors + SLACK);
}

/// Hand-made scripts.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let set_up = 0u8;
    let request = |kind: u8| [5, kind, 1, 1];
    let mut seeds = Vec::new();
    for (kind, name) in [
        (0, "read"),
        (1, "write"),
        (4, "flush"),
        (8, "serial"),
        (11, "discard"),
        (13, "zeroes"),
    ] {
        let mut script = vec![set_up];
        script.extend(request(kind));
        seeds.push((name.to_owned(), script));
    }
    let busy = |tail: &[u8]| {
        let mut script = vec![set_up];
        for _ in 0..4 {
            script.extend(request(1));
        }
        script.extend_from_slice(tail);
        script.extend(request(0));
        script
    };
    seeds.push(("reconnect".into(), busy(&[8, set_up])));
    seeds.push(("truncate".into(), busy(&[7, 0])));
    seeds.push(("same-memory".into(), busy(&[3, 0, 0])));
    seeds.push(("region-removed-and-added".into(), busy(&[3, 2, 0, 3, 1, 0])));
    seeds.push((
        "disabled-and-enabled".into(),
        busy(&[2, 18, 0, 0, 2, 18, 0, 1]),
    ));
    seeds.push(("stopped".into(), busy(&[2, 11, 0, 0])));
    seeds.push(("renewed-kick".into(), busy(&[9, 12, 0, 0])));
    seeds.push((
        "strange-calls".into(),
        busy(&[9, 13, 0, 5, 9, 13, 0, 1, 9, 13, 0, 7]),
    ));
    seeds
}

/// One front end.
struct Client {
    stream: UnixStream,
    memory: File,
    kick: OwnedFd,
    call: OwnedFd,
    avail: u16,
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

fn pair(index: u32, number: u32) -> Vec<u8> {
    [index.to_ne_bytes(), number.to_ne_bytes()].concat()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

impl Client {
    fn new(address: &SocketAddr) -> Self {
        let stream = UnixStream::connect_addr(address).expect("the server listens");
        stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
        // A script that never reads its answers must not wait for itself.
        stream
            .set_write_timeout(Some(Duration::from_millis(20)))
            .expect("a timeout");
        Self {
            stream,
            memory: memfd(MEMORY),
            kick: bell(),
            call: bell(),
            avail: 0,
        }
    }

    fn send(&self, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut bytes: Vec<u8> = [code, 1 | flags, payload.len() as u32]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        bytes.extend_from_slice(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        sendmsg(
            &self.stream,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .is_ok()
    }

    fn table(&self) -> Vec<u8> {
        let mut payload = pair(1, 0);
        payload.extend(words(&[0, MEMORY, USER, 0]));
        payload
    }

    /// What a correct front end says, without waiting for answers.
    fn set_up(&self, queue: u32) {
        let features = features::COMMON | 1 << 9 | 1 << 11;
        let protocol = 1u64 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15;
        self.send(code::SET_PROTOCOL_FEATURES, 0, &words(&[protocol]), &[]);
        self.send(code::SET_FEATURES, 0, &words(&[features]), &[]);
        self.send(
            code::SET_MEM_TABLE,
            0,
            &self.table(),
            &[self.memory.as_fd()],
        );
        self.send(code::SET_VRING_NUM, 0, &pair(queue, u32::from(SIZE)), &[]);
        self.send(
            code::SET_VRING_BASE,
            0,
            &pair(queue, u32::from(self.avail)),
            &[],
        );
        let mut addresses = pair(queue, 0);
        addresses.extend(words(&[USER, USER + USED, USER + AVAILABLE, 0]));
        self.send(code::SET_VRING_ADDR, 0, &addresses, &[]);
        let index = words(&[u64::from(queue)]);
        self.send(code::SET_VRING_CALL, 0, &index, &[self.call.as_fd()]);
        self.send(code::SET_VRING_KICK, 0, &index, &[self.kick.as_fd()]);
        self.send(code::SET_VRING_ENABLE, 0, &pair(queue, 1), &[]);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        // Beyond the end the file would grow again after it was cut short.
        if self
            .memory
            .metadata()
            .is_ok_and(|m| at + bytes.len() as u64 <= m.len())
        {
            let _ = self.memory.write_all_at(bytes, at);
        }
    }

    fn kick(&self) {
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// A request as a driver makes it, in descriptors of its own.
    fn request(&mut self, kind: u8, sector: u8, blocks: u8) -> u64 {
        let slot = u64::from(self.avail % 5);
        let at = 0x4000 + slot * 0x2000;
        let mut header = [0; 16];
        header[0] = kind;
        header[8] = sector;
        self.put(at, &header);
        self.put(at + 32, &[0xee]);
        let write = if kind == 1 { 0u16 } else { 2 };
        let first = slot * 3;
        let len = u32::from(blocks % 8) * 512;
        for (n, (at, len, flags)) in [(at, 16, 1), (at + 64, len, write | 1), (at + 32, 1, 2)]
            .into_iter()
            .enumerate()
        {
            let mut raw = at.to_le_bytes().to_vec();
            raw.extend(len.to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend((first as u16 + n as u16 + 1).to_le_bytes());
            self.put(16 * (first + n as u64), &raw);
        }
        self.put(
            AVAILABLE + 4 + 2 * u64::from(self.avail % SIZE),
            &(first as u16).to_le_bytes(),
        );
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.avail.to_le_bytes());
        self.kick();
        at
    }

    fn act(&mut self, script: &mut Script<'_>, address: &SocketAddr) {
        match script.u8() % 11 {
            0 => self.set_up(0),
            1 => {
                let (number, flags, count) = (script.u8() % 48, script.u8() & 8, script.u8());
                let payload = script.take(usize::from(count));
                self.send(u32::from(number), u32::from(flags), payload, &[]);
            }
            2 => {
                let (number, index, value) = (script.u8() % 40, script.u8() % 4, script.u8());
                // A later answer is left in the socket; there is room for many.
                self.send(
                    u32::from(number),
                    0,
                    &pair(u32::from(index), u32::from(value)),
                    &[],
                );
            }
            3 => {
                let (what, offset) = (script.u8() % 3, u64::from(script.u8() & 3) * 0x1000);
                let mut single = words(&[0, offset, MEMORY - offset, USER + offset, offset]);
                match what {
                    0 => {
                        self.send(
                            code::SET_MEM_TABLE,
                            8,
                            &self.table(),
                            &[self.memory.as_fd()],
                        );
                    }
                    1 => {
                        self.send(code::ADD_MEM_REG, 8, &single, &[self.memory.as_fd()]);
                    }
                    _ => {
                        single.truncate(40);
                        self.send(code::REM_MEM_REG, 8, &single, &[]);
                    }
                }
            }
            4 => {
                let (at, count) = (u64::from(script.u16()), script.u8() % 64);
                self.put(at, script.take(usize::from(count)));
            }
            5 => {
                let (kind, sector, blocks) = (script.u8() % 16, script.u8(), script.u8());
                self.request(kind, sector, blocks);
            }
            6 => self.kick(),
            7 => {
                let _ = self.memory.set_len(u64::from(script.u8()) * 0x100);
            }
            8 => *self = Self::new(address),
            9 => {
                let (number, index, kind) = (script.u8(), script.u8() & 3, script.u8());
                self.descriptor(u32::from(number % 40), u64::from(index), kind);
            }
            _ => {
                let (index, base) = (script.u8() % 3, script.u16());
                self.send(code::GET_VRING_BASE, 0, &pair(u32::from(index), 0), &[]);
                self.send(
                    code::SET_VRING_BASE,
                    0,
                    &pair(u32::from(index), u32::from(base)),
                    &[],
                );
                self.set_up(u32::from(index & 1));
            }
        }
    }

    /// A message with a descriptor that may not belong to it.
    fn descriptor(&mut self, number: u32, index: u64, kind: u8) {
        let path = |fd: BorrowedFd<'_>| {
            let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
            rustix::fs::open(
                format!("/proc/self/fd/{raw}"),
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        let fd: OwnedFd = match kind % 8 {
            0 => bell(),
            1 => match std::io::pipe() {
                Ok((_, writer)) => writer.into(),
                Err(_) => return,
            },
            2 => match UnixStream::pair() {
                Ok((one, _)) => one.into(),
                Err(_) => return,
            },
            3 => memfd(0x1000).into(),
            4 => match File::open("/dev/null") {
                Ok(file) => file.into(),
                Err(_) => return,
            },
            5 => match path(self.kick.as_fd()) {
                Ok(fd) => fd,
                Err(_) => return,
            },
            6 => match File::open("/") {
                Ok(file) => file.into(),
                Err(_) => return,
            },
            _ => match std::io::pipe() {
                Ok((reader, _)) => reader.into(),
                Err(_) => return,
            },
        };
        self.send(number, 8, &words(&[index]), &[fd.as_fd()]);
        if number == code::SET_VRING_KICK && kind.is_multiple_of(8) {
            self.kick = fd;
        }
    }
}

/// A front end that does everything right is served.
fn healthy(address: &SocketAddr) {
    let mut client = Client::new(address);
    client.set_up(0);
    let at = client.request(0, 5, 1);
    let end = Instant::now() + LIMIT;
    let mut used = [0; 2];
    while u16::from_le_bytes(used) == 0 {
        assert!(Instant::now() < end, "the next front end is not served");
        client
            .memory
            .read_exact_at(&mut used, USED + 2)
            .expect("guest memory");
        std::thread::yield_now();
    }
    let mut status = [0; 1];
    client
        .memory
        .read_exact_at(&mut status, at + 32)
        .expect("guest memory");
    assert_eq!(status, [0], "a good read fails for the next front end");
}
