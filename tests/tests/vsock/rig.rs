//! A running `pericarp-vsock` and the guest's side of it: a driver for the
//! receive and transmit queues that says exactly what a test tells it to.

use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use pericarp_tests::bounded::{Deadline, poll};
use pericarp_tests::frontend::{Desc, Driver, NEXT, Setup, Used, WRITE};
use pericarp_tests::parts::Part;
use pericarp_tests::peer::{Footprint, connect};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use rustix::process::Signal;

pub(crate) const CID: u64 = 42;
pub(crate) const HOST: u64 = 2;
const HEADER: usize = 44;
const STEP: Duration = Duration::from_secs(20);
const QUEUE: u16 = 128;
/// Size of a receive buffer: what Linux 6 uses.
pub(crate) const BUFFER: u32 = 4096;
const RECEIVE_AT: u64 = 0x10_0000;
const TRANSMIT_AT: u64 = 0x80_0000;

/// The operations of virtio 1.3, 5.10.6.
pub(crate) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// One packet.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
    /// The length to claim, if it is not the payload's.
    pub(crate) len: Option<u32>,
    pub(crate) payload: Vec<u8>,
}

impl Packet {
    pub(crate) fn to_host(op: u16, from: u32, to: u32) -> Self {
        Packet {
            src_cid: CID,
            dst_cid: HOST,
            src_port: from,
            dst_port: to,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
            len: None,
            payload: vec![],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let len = self.len.unwrap_or(self.payload.len() as u32);
        let mut bytes = Vec::new();
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let number = |at: usize, len: usize| {
            let mut value = [0; 8];
            value[..len].copy_from_slice(&bytes[at..at + len]);
            u64::from_le_bytes(value)
        };
        let len = number(24, 4) as usize;
        assert_eq!(bytes.len(), HEADER + len, "the used length is the packet's");
        Packet {
            src_cid: number(0, 8),
            dst_cid: number(8, 8),
            src_port: number(16, 4) as u32,
            dst_port: number(20, 4) as u32,
            kind: number(28, 2) as u16,
            op: number(30, 2) as u16,
            flags: number(32, 4) as u32,
            buf_alloc: number(36, 4) as u32,
            fwd_cnt: number(40, 4) as u32,
            len: None,
            payload: bytes[HEADER..].to_vec(),
        }
    }
}

/// One line without its end.
pub(crate) fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        if byte[0] == b'\n' {
            return String::from_utf8(line).unwrap();
        }
        line.push(byte[0]);
    }
}

/// The next one to connect, with bounded reads.
pub(crate) fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let stream = poll(STEP, || listener.accept().ok())
        .expect("nobody connects")
        .0;
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(STEP)).unwrap();
    stream
}

/// A running device. Its directory has `front`, `host`, and `host_N`.
pub(crate) struct Vsock {
    process: Process,
    scratch: Scratch,
}

impl Vsock {
    pub(crate) fn start(extra: &[&str]) -> Self {
        Self::start_in(Scratch::new(), extra)
    }

    pub(crate) fn start_in(scratch: Scratch, extra: &[&str]) -> Self {
        let path = Part::Ours("pericarp-vsock").find().unwrap();
        let mut command = command(&path);
        command.arg("--socket-path").arg(scratch.path("front"));
        command.arg("--uds-path").arg(scratch.path("host"));
        command.arg(format!("--guest-cid={CID}")).args(extra);
        let mut process = Process::start(&mut command, Duration::from_secs(120)).unwrap();
        // Bound last, and to be connected to, dead socket or not.
        let up = poll(STEP, || {
            (process.ended().is_some() || UnixStream::connect(scratch.path("front")).is_ok())
                .then(|| process.ended().is_none())
        });
        assert_eq!(up, Some(true), "{}", process.output().last(20));
        Vsock { process, scratch }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.scratch.path("front")
    }

    pub(crate) fn uds(&self) -> PathBuf {
        self.scratch.path("host")
    }

    pub(crate) fn port(&self, port: u32) -> PathBuf {
        self.scratch.path(&format!("host_{port}"))
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.pid()
    }

    pub(crate) fn is_alive(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.pid()))
            .symlink_metadata()
            .is_ok()
    }

    /// A host program.
    pub(crate) fn dial(&self) -> UnixStream {
        connect(&self.uds()).unwrap()
    }

    pub(crate) fn guest(&self) -> Guest {
        self.guest_with(BUFFER)
    }

    pub(crate) fn guest_with(&self, buffer: u32) -> Guest {
        Guest::connect(&self.socket(), buffer)
    }

    pub(crate) fn footprint(&self) -> Footprint {
        Footprint::of(self.pid()).unwrap()
    }

    pub(crate) fn stop(mut self) -> ExitStatus {
        self.process.signal(Signal::TERM);
        self.process.wait(STEP).expect("it ends on SIGTERM")
    }

    /// Kills it and gives what it left behind.
    pub(crate) fn crash(self) -> Scratch {
        let Vsock {
            mut process,
            scratch,
        } = self;
        process.kill();
        scratch
    }
}

/// The guest's driver. Dropping it is how a guest vanishes.
pub(crate) struct Guest {
    pub(crate) driver: Driver,
    buffer: u32,
    received: VecDeque<Packet>,
    /// Receive buffer the guest claims to have for a connection.
    pub(crate) room: u32,
    /// Bytes it claims to have read.
    pub(crate) read: u32,
    /// Do not give receive buffers back.
    pub(crate) hold_buffers: bool,
    held: Vec<u16>,
    /// By port: what the device said last about its credit, and what was sent.
    credit: HashMap<u32, (u32, u32)>,
    sent: HashMap<u32, u32>,
    transmit_head: u16,
}

impl Guest {
    pub(crate) fn connect(socket: &Path, buffer: u32) -> Self {
        let setup = Setup {
            queues: 2,
            queue_size: QUEUE,
            ..Setup::default()
        };
        let driver = Driver::connect(socket, &setup).unwrap();
        let mut guest = Guest {
            driver,
            buffer,
            received: Default::default(),
            room: 1 << 20,
            read: 0,
            hold_buffers: false,
            held: (0..QUEUE).collect(),
            credit: HashMap::new(),
            sent: HashMap::new(),
            transmit_head: 0,
        };
        guest.offer_buffers();
        guest
    }

    /// Gives the held receive buffers to the device.
    pub(crate) fn offer_buffers(&mut self) {
        let ring = &mut self.driver.rings[0];
        for head in self.held.drain(..) {
            let addr = RECEIVE_AT + u64::from(head) * u64::from(BUFFER);
            let (len, flags) = (self.buffer, WRITE);
            ring.set_desc(
                head,
                Desc {
                    addr,
                    len,
                    flags,
                    next: 0,
                },
            );
            ring.queue(head);
        }
        ring.publish();
        ring.notify();
    }

    /// Waits until the device has used every receive buffer it was given.
    pub(crate) fn take_all_buffers(&mut self) {
        self.hold_buffers = true;
        for index in 0..u32::from(QUEUE) {
            self.send(&Packet::to_host(op::RW, 90_000 + index, 1));
        }
        for _ in 0..QUEUE {
            self.expect(op::RST);
        }
        assert_eq!(self.held.len(), usize::from(QUEUE));
    }

    fn collect(&mut self) {
        for used in self.driver.rings[0].take() {
            let head = used.head as u16;
            let at = RECEIVE_AT + u64::from(head) * u64::from(BUFFER);
            let bytes = self.driver.peek(at, used.len as usize).unwrap();
            if !bytes.is_empty() {
                let packet = Packet::parse(&bytes);
                let said = (packet.buf_alloc, packet.fwd_cnt);
                self.credit.insert(packet.dst_port, said);
                self.received.push_back(packet);
            }
            self.held.push(head);
        }
        if !self.hold_buffers && !self.held.is_empty() {
            self.offer_buffers();
        }
    }

    /// The next packet from the device.
    pub(crate) fn next(&mut self, limit: Duration) -> Option<Packet> {
        poll(limit, || {
            self.collect();
            self.received.pop_front()
        })
    }

    /// The next packet, which must be of this kind. Credit updates come when
    /// they come, so that they are passed over unless asked for.
    pub(crate) fn expect(&mut self, operation: u16) -> Packet {
        let deadline = Deadline::after(STEP);
        loop {
            let packet = self.next(deadline.left());
            let packet =
                packet.unwrap_or_else(|| panic!("no packet; operation {operation} expected"));
            if packet.op == op::CREDIT_UPDATE && operation != op::CREDIT_UPDATE {
                continue;
            }
            assert_eq!(packet.op, operation, "{packet:?}");
            return packet;
        }
    }

    /// SHUTDOWN packets until all of `flags` are set.
    pub(crate) fn expect_shutdown(&mut self, flags: u32) {
        loop {
            let packet = self.expect(op::SHUTDOWN);
            assert_eq!(packet.flags & !flags, 0, "{packet:?}");
            if packet.flags == flags {
                return;
            }
        }
    }

    /// Nothing but credit updates comes.
    pub(crate) fn quiet(&mut self) {
        while let Some(packet) = self.next(Duration::from_millis(50)) {
            assert_eq!(packet.op, op::CREDIT_UPDATE, "{packet:?}");
        }
    }

    /// Sends a packet and waits until the device has taken it.
    pub(crate) fn send(&mut self, packet: &Packet) {
        assert!(self.try_send(packet, STEP), "not taken: {packet:?}");
    }

    /// False when the device does not take it in time.
    pub(crate) fn try_send(&mut self, packet: &Packet, limit: Duration) -> bool {
        let head = self.transmit_head;
        self.transmit_head = (head + 2) % QUEUE;
        let at = TRANSMIT_AT;
        self.driver.poke(at, &packet.bytes()).unwrap();
        self.driver.poke(at + 64, &packet.payload).unwrap();
        let ring = &mut self.driver.rings[1];
        let more = !packet.payload.is_empty();
        let flags = if more { NEXT } else { 0 };
        let len = HEADER as u32;
        ring.set_desc(
            head,
            Desc {
                addr: at,
                len,
                flags,
                next: head + 1,
            },
        );
        let len = packet.payload.len() as u32;
        ring.set_desc(
            head + 1,
            Desc {
                addr: at + 64,
                len,
                flags: 0,
                next: 0,
            },
        );
        ring.queue(head);
        ring.publish();
        ring.notify();
        // An earlier one may have timed out and come back now.
        let taken = |used: Vec<Used>| used.iter().any(|used| used.head == u32::from(head));
        poll(limit, || taken(ring.take()).then_some(())).is_some()
    }

    fn reply(&self, to: &Packet, operation: u16) -> Packet {
        Packet {
            buf_alloc: self.room,
            fwd_cnt: self.read,
            ..Packet::to_host(operation, to.dst_port, to.src_port)
        }
    }

    /// Sends an operation on the connection that `to` came from.
    pub(crate) fn answer(&mut self, to: &Packet, operation: u16) {
        let packet = self.reply(to, operation);
        self.send(&packet);
    }

    /// Sends data.
    pub(crate) fn answer_with(&mut self, to: &Packet, payload: &[u8]) {
        let payload = payload.to_vec();
        *self.sent.entry(to.dst_port).or_default() += payload.len() as u32;
        let packet = Packet {
            payload,
            ..self.reply(to, op::RW)
        };
        self.send(&packet);
    }

    pub(crate) fn shutdown(&mut self, to: &Packet, flags: u32) {
        let packet = Packet {
            flags,
            ..self.reply(to, op::SHUTDOWN)
        };
        self.send(&packet);
    }

    /// Sends what the device has room for; gives how much. Waits a little when
    /// that is nothing.
    pub(crate) fn send_with_credit(&mut self, to: &Packet, data: &[u8]) -> usize {
        if let Some(packet) = self.next(Duration::ZERO) {
            assert_eq!(packet.op, op::CREDIT_UPDATE, "{packet:?}");
            assert_eq!(packet.dst_port, to.dst_port);
        }
        let (room, forwarded) = self.credit[&to.dst_port];
        let sent = self.sent.get(&to.dst_port).copied().unwrap_or(0);
        let free = room - (sent - forwarded);
        let len = data.len().min(free as usize).min(32_768);
        if len == 0 {
            std::thread::sleep(Duration::from_millis(1));
        } else {
            self.answer_with(to, &data[..len]);
        }
        len
    }

    /// Sends to a host program that does not read, until the device has no room for more; how much
    /// it took.
    pub(crate) fn fill(&mut self, to: &Packet) -> usize {
        let data = [7; 32_768];
        let (mut all, mut idle) = (0, 0);
        while idle < 5 {
            while let Some(packet) = self.next(Duration::ZERO) {
                assert_eq!(packet.op, op::CREDIT_UPDATE, "{packet:?}");
            }
            let (room, forwarded) = self.credit[&to.dst_port];
            let sent = self.sent.get(&to.dst_port).copied().unwrap_or(0);
            let free = room - (sent - forwarded);
            let len = data.len().min(free as usize);
            if len == 0 {
                idle += 1;
                std::thread::sleep(Duration::from_millis(1));
            } else {
                idle = 0;
                self.answer_with(to, &data[..len]);
                all += len;
            }
        }
        all
    }

    /// Dials a host port; gives the answer.
    pub(crate) fn dial(&mut self, from: u32, to: u32) -> Packet {
        self.read = 0;
        self.sent.insert(from, 0);
        let request = Packet {
            buf_alloc: self.room,
            ..Packet::to_host(op::REQUEST, from, to)
        };
        self.send(&request);
        let answer = loop {
            let packet = self.next(STEP).expect("an answer");
            if packet.op != op::CREDIT_UPDATE {
                break packet;
            }
        };
        assert!(matches!(answer.op, op::RESPONSE | op::RST), "{answer:?}");
        assert_eq!((answer.src_port, answer.dst_port), (to, from));
        answer
    }

    /// Stops both rings and starts them, where they stood or from the beginning.
    pub(crate) fn restart(&mut self, afresh: bool) {
        self.collect();
        for queue in 0..2 {
            self.driver.stop(queue).unwrap();
            if afresh {
                self.driver.rings[queue].reset(QUEUE);
            }
            self.driver.rings[queue].renew_kick();
            self.driver.rings[queue].renew_call();
            self.driver.configure(queue).unwrap();
        }
        if afresh {
            self.transmit_head = 0;
            self.held = (0..QUEUE).collect();
            self.offer_buffers();
        }
    }
}
