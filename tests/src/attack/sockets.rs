//! Sockets: packets that are nearly right, and streams that show that all is well.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::chance::Chance;
use super::session::{Request, Victim};
use super::witness::Innocent;
use crate::bounded::poll;
use crate::vsock::{BUFFER, CID, Guest, HOST, Packet, op};

/// The host port where everything comes back, and one that those who do right use.
pub(super) const ECHO: u32 = 1;
/// See [`ECHO`].
pub(super) const OWN: u32 = 9;
const LIMIT: Duration = Duration::from_secs(20);
/// After this long nobody of the host's is about to call any more, even on a busy machine.
const CALM: Duration = Duration::from_millis(300);

/// The device that is attacked.
#[derive(Debug, Default)]
pub(super) struct Streams;

impl Victim for Streams {
    fn queues(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        0
    }

    fn request(&mut self, chance: &mut Chance) -> Request {
        match chance.below(6) {
            0 => {
                let writable = chance.pick(&[4096, 4096, 4096, 44, 43, 1, 0x4000]);
                Request {
                    queue: 0,
                    writable: vec![writable],
                    ..Request::default()
                }
            }
            1 if chance.one_in(4) => Request {
                queue: 2,
                writable: vec![chance.pick(&[8, 4, 100])],
                ..Request::default()
            },
            _ => packet(chance),
        }
    }
}

fn packet(chance: &mut Chance) -> Request {
    let operation = match chance.below(16) {
        0..=4 => op::REQUEST,
        5..=8 => op::RW,
        9 => op::RESPONSE,
        10 => op::RST,
        11 => op::SHUTDOWN,
        12 => op::CREDIT_UPDATE,
        13 => op::CREDIT_REQUEST,
        _ => chance.half(),
    };
    let payload = match operation {
        op::RW => {
            let len = chance.pick(&[0, 1, 100, 4096, 0x6000]);
            chance.bytes(len)
        }
        _ => vec![],
    };
    let port = match chance.below(10) {
        0 => chance.word(),
        1 => 2,
        _ => ECHO,
    };
    let mut packet = Packet {
        payload,
        ..Packet::to_host(operation, 1000 + chance.below(24) as u32, port)
    };
    match chance.below(16) {
        0 => packet.src_cid = chance.number(),
        1 => packet.dst_cid = chance.number(),
        2 => packet.kind = chance.half(),
        3 => packet.len = Some(chance.word()),
        4 | 5 => packet.buf_alloc = chance.word(),
        6 | 7 => packet.fwd_cnt = chance.word(),
        8 => packet.flags = chance.word(),
        9 => (packet.src_cid, packet.dst_cid) = (HOST, CID),
        _ => {}
    }
    if operation == op::SHUTDOWN {
        packet.flags = chance.below(4) as u32;
    }
    let mut header = packet.bytes();
    if chance.one_in(12) {
        chance.spoil(&mut header);
    }
    if chance.one_in(32) {
        header.truncate(chance.below(44) as usize);
    }
    let mut readable = match chance.one_in(3) {
        true => vec![[header, packet.payload].concat()],
        false => vec![header, packet.payload],
    };
    readable.retain(|piece| !piece.is_empty());
    Request {
        queue: 1,
        readable,
        writable: vec![],
        what: u32::from(operation),
    }
}

/// The host's half of the device that is attacked: a program that sends back what it hears, and
/// such as connect from outside and do not wait. Until it is told to stop; who holds `quiet`
/// is left alone.
pub(super) fn host(uds: &Path, stop: &AtomicBool, quiet: &Mutex<()>, chance: &mut Chance) {
    let mut port = uds.as_os_str().to_owned();
    port.push(format!("_{ECHO}"));
    let Ok(listener) = UnixListener::bind(&port) else {
        return;
    };
    let _ = listener.set_nonblocking(true);
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut room = vec![0; 64 << 10];
    while !stop.load(Ordering::Relaxed) {
        let Ok(turn) = quiet.try_lock() else {
            streams.clear();
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        while let Ok((stream, _)) = listener.accept() {
            let _ = stream.set_nonblocking(true);
            if streams.len() < 64 {
                streams.push(stream);
            }
        }
        streams.retain_mut(|stream| match stream.read(&mut room) {
            Ok(0) => false,
            Ok(count) => stream.write(&room[..count]).is_ok(),
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        });
        if chance.one_in(8)
            && let Some(mut stream) = dial(uds)
        {
            let line = match chance.below(4) {
                0 => format!("CONNECT {}\n", chance.number()),
                1 => "CONN".to_owned(),
                _ => format!("CONNECT {}\n", 1000 + chance.below(24)),
            };
            let _ = stream.write_all(line.as_bytes());
            if chance.one_in(2) && streams.len() < 64 {
                streams.push(stream);
            }
        }
        if chance.one_in(64) {
            streams.clear();
        }
        drop(turn);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Connects, if the device has room for one more who waits; does not wait itself.
fn dial(uds: &Path) -> Option<UnixStream> {
    let address = SocketAddrUnix::new(uds).ok()?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    rustix::net::connect(&socket, &address).ok()?;
    Some(socket.into())
}

/// A guest that does right, and a program on the host that it talks to.
pub(super) struct Neighbour {
    guest: Guest,
    listener: UnixListener,
    content: Vec<u8>,
    port: u32,
}

impl Neighbour {
    /// Connects.
    pub(super) fn connect(socket: &Path, uds: &Path, content: Vec<u8>) -> Result<Self, String> {
        let mut path = uds.as_os_str().to_owned();
        path.push(format!("_{OWN}"));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(|e| format!("port {OWN}: {e}"))?;
        listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        Ok(Self {
            guest: Guest::connect(socket, BUFFER),
            listener,
            content,
            port: 5000,
        })
    }

    /// A connection from the guest, some bytes there and back, and its end.
    fn stream(&mut self) -> Result<(), String> {
        self.port = 5000 + (self.port + 1) % 4000;
        let answer = self.guest.dial(self.port, OWN);
        if answer.op != op::RESPONSE {
            return Err(format!("answered with {answer:?}"));
        }
        let accepted = poll(LIMIT, || self.listener.accept().ok());
        let (mut host, _) = accepted.ok_or("nobody came to the host")?;
        host.set_nonblocking(false).map_err(|e| e.to_string())?;
        host.set_read_timeout(Some(LIMIT))
            .map_err(|e| e.to_string())?;
        self.guest.answer_with(&answer, &self.content);
        let mut got = vec![0; self.content.len()];
        host.read_exact(&mut got)
            .map_err(|e| format!("at the host: {e}"))?;
        if got != self.content {
            return Err("at the host: what came is something else".into());
        }
        host.write_all(&got)
            .map_err(|e| format!("from the host: {e}"))?;
        let mut back = Vec::new();
        while back.len() < got.len() {
            back.extend(self.guest.expect(op::RW).payload);
        }
        if back != self.content {
            return Err("at the guest: what came is something else".into());
        }
        drop(host);
        self.guest.expect_shutdown(3);
        self.guest.answer(&answer, op::RST);
        Ok(())
    }
}

impl Innocent for Neighbour {
    fn turn(&mut self) -> Result<(), String> {
        self.stream()
            .map_err(|error| format!("port {}: {error}", self.port))
    }
}

/// One who comes in between.
pub(super) fn probe(socket: &Path, uds: &Path) -> Result<(), String> {
    let mut neighbour = Neighbour::connect(socket, uds, vec![0x5c; 1000])?;
    // Those who wanted to speak to the hostile guest, and were too late, are sent away.
    while let Some(packet) = neighbour.guest.next(CALM) {
        if packet.op == op::REQUEST {
            neighbour.guest.answer(&packet, op::RST);
        }
    }
    for _ in 0..4 {
        neighbour.turn()?;
    }
    Ok(())
}
