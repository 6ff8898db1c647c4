//! A guest's side of a vsock device: a driver for the receive and transmit queues that says
//! exactly what a test tells it to. Used by the suite `vsock` and by [`crate::attack`], which both
//! take what should not be for a failure of the test.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::time::Duration;

use crate::bounded::{Deadline, poll};
use crate::frontend::{Desc, Driver, NEXT, Setup, Used, WRITE};

/// The guest's context.
pub const CID: u64 = 42;
/// The host's.
pub const HOST: u64 = 2;
/// Bytes of a packet's header.
pub const HEADER: usize = 44;
const STEP: Duration = Duration::from_secs(20);
/// Entries of a ring.
const QUEUE: u16 = 128;
/// Size of a receive buffer: what Linux 6 uses.
pub const BUFFER: u32 = 4096;
const RECEIVE_AT: u64 = 0x10_0000;
const TRANSMIT_AT: u64 = 0x80_0000;

/// The operations of virtio 1.3, 5.10.6.
pub mod op {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// One packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Who sends.
    pub src_cid: u64,
    /// To whom.
    pub dst_cid: u64,
    /// From which port.
    pub src_port: u32,
    /// To which port.
    pub dst_port: u32,
    /// 1 for a stream.
    pub kind: u16,
    /// One of [`op`], or not.
    pub op: u16,
    /// Of a SHUTDOWN.
    pub flags: u32,
    /// Room that the sender has.
    pub buf_alloc: u32,
    /// Bytes that the sender has read.
    pub fwd_cnt: u32,
    /// The length to claim, if it is not the payload's.
    pub len: Option<u32>,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A packet of the guest's, with room for much.
    pub fn to_host(op: u16, from: u32, to: u32) -> Self {
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

    /// The header as it lies in memory.
    pub fn bytes(&self) -> Vec<u8> {
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

/// The guest's driver. Dropping it is how a guest vanishes.
pub struct Guest {
    /// The connection and its rings.
    pub driver: Driver,
    buffer: u32,
    received: VecDeque<Packet>,
    /// Receive buffer the guest claims to have for a connection.
    pub room: u32,
    /// Bytes it claims to have read.
    pub read: u32,
    /// Do not give receive buffers back.
    pub hold_buffers: bool,
    held: Vec<u16>,
    /// By port: what the device said last about its credit, and what was sent.
    credit: HashMap<u32, (u32, u32)>,
    sent: HashMap<u32, u32>,
    transmit_head: u16,
}

impl Guest {
    /// Connects, and offers buffers of this size.
    ///
    /// # Panics
    /// When the device is not there or refuses a step.
    pub fn connect(socket: &Path, buffer: u32) -> Self {
        let setup = Setup {
            queues: 2,
            queue_size: QUEUE,
            ..Setup::default()
        };
        let driver = Driver::connect(socket, &setup).expect("the device takes part");
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
    pub fn offer_buffers(&mut self) {
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
    pub fn take_all_buffers(&mut self) {
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
            let bytes = self
                .driver
                .peek(at, used.len as usize)
                .expect("the device takes part");
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
    pub fn next(&mut self, limit: Duration) -> Option<Packet> {
        poll(limit, || {
            self.collect();
            self.received.pop_front()
        })
    }

    /// The next packet, which must be of this kind. Credit updates come when
    /// they come, so that they are passed over unless asked for.
    pub fn expect(&mut self, operation: u16) -> Packet {
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
    pub fn expect_shutdown(&mut self, flags: u32) {
        loop {
            let packet = self.expect(op::SHUTDOWN);
            assert_eq!(packet.flags & !flags, 0, "{packet:?}");
            if packet.flags == flags {
                return;
            }
        }
    }

    /// Nothing but credit updates comes.
    pub fn quiet(&mut self) {
        while let Some(packet) = self.next(Duration::from_millis(50)) {
            assert_eq!(packet.op, op::CREDIT_UPDATE, "{packet:?}");
        }
    }

    /// Sends a packet and waits until the device has taken it.
    pub fn send(&mut self, packet: &Packet) {
        assert!(self.try_send(packet, STEP), "not taken: {packet:?}");
    }

    /// False when the device does not take it in time.
    pub fn try_send(&mut self, packet: &Packet, limit: Duration) -> bool {
        let head = self.transmit_head;
        self.transmit_head = (head + 2) % QUEUE;
        let at = TRANSMIT_AT;
        self.driver
            .poke(at, &packet.bytes())
            .expect("the device takes part");
        self.driver
            .poke(at + 64, &packet.payload)
            .expect("the device takes part");
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
    pub fn answer(&mut self, to: &Packet, operation: u16) {
        let packet = self.reply(to, operation);
        self.send(&packet);
    }

    /// Sends data.
    pub fn answer_with(&mut self, to: &Packet, payload: &[u8]) {
        let payload = payload.to_vec();
        *self.sent.entry(to.dst_port).or_default() += payload.len() as u32;
        let packet = Packet {
            payload,
            ..self.reply(to, op::RW)
        };
        self.send(&packet);
    }

    /// Says that a direction, or both, has ended.
    pub fn shutdown(&mut self, to: &Packet, flags: u32) {
        let packet = Packet {
            flags,
            ..self.reply(to, op::SHUTDOWN)
        };
        self.send(&packet);
    }

    /// Sends what the device has room for; gives how much. Waits a little when
    /// that is nothing.
    pub fn send_with_credit(&mut self, to: &Packet, data: &[u8]) -> usize {
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
    /// it took, in bytes.
    pub fn fill(&mut self, to: &Packet) -> usize {
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
    pub fn dial(&mut self, from: u32, to: u32) -> Packet {
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
    pub fn restart(&mut self, afresh: bool) {
        self.collect();
        for queue in 0..2 {
            self.driver.stop(queue).expect("the device takes part");
            if afresh {
                self.driver.rings[queue].reset(QUEUE);
            }
            self.driver.rings[queue].renew_kick();
            self.driver.rings[queue].renew_call();
            self.driver.configure(queue).expect("the device takes part");
        }
        if afresh {
            self.transmit_head = 0;
            self.held = (0..QUEUE).collect();
            self.offer_buffers();
        }
    }
}
