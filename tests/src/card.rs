//! A driver of a network card that can do everything right and everything wrong. Used by the
//! suite `net` and by [`crate::attack`], which both take what should not be for a failure of the test.

use std::path::Path;
use std::time::Duration;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_MRG_RXBUF,
};

use crate::bounded::poll;
use crate::frontend::{Desc, Driver, NEXT, Ring, Setup, WRITE};

/// After this long something hangs.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of virtio's header.
pub const HEADER: usize = 12;

/// Both kinds of USO for the driver, and USO for the device.
pub const USO: u64 = 1 << 54 | 1 << 55 | 1 << 56;
/// What a driver of today takes, but for large packets.
pub const PLAIN: u64 =
    1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_CTRL_VQ;
/// And these.
pub const LARGE: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | USO;

/// Where packets lie in guest memory: those that come, those that go, commands.
const RECEIVED: u64 = 0x20_0000;
const SENT: u64 = 0x80_0000;
const COMMANDS: u64 = 0xc0_0000;
/// Room of each.
const STRIDE: u64 = 0x4000;

/// A packet as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Virtio's header.
    pub header: [u8; HEADER],
    /// Ethernet's frame.
    pub frame: Vec<u8>,
    /// Chains that it took.
    pub chains: usize,
}

impl Packet {
    /// `num_buffers` as the device wrote it.
    pub fn buffers(&self) -> usize {
        usize::from(u16::from_le_bytes([self.header[10], self.header[11]]))
    }

    /// What a UDP datagram without options carries.
    pub fn payload(&self) -> &[u8] {
        &self.frame[14 + 20 + 8..]
    }
}

/// The driver.
pub struct Card {
    /// The connection and its rings.
    pub driver: Driver,
    /// Bytes of each receive buffer, by head.
    sizes: Vec<u32>,
}

impl Card {
    /// Connects with these features and so many pairs of queues, and a control queue.
    ///
    /// # Panics
    /// When the device is not there, refuses a step or does not offer the features.
    pub fn connect(socket: impl AsRef<Path>, features: u64, pairs: u16) -> Self {
        let setup = Setup {
            queues: 2 * pairs + 1,
            queue_size: 256,
            extra: features,
            limit: LIMIT,
            ..Setup::default()
        };
        let driver = Driver::connect(socket.as_ref(), &setup).expect("the device takes part");
        assert_eq!(driver.features & features, features, "all is offered");
        Self {
            driver,
            sizes: vec![0; 256],
        }
    }

    /// Offers one chain of these sizes, its descriptors from `head` on.
    pub fn offer(&mut self, head: u16, sizes: &[u32]) {
        let ring = &mut self.driver.rings[0];
        let mut at = RECEIVED + STRIDE * u64::from(head);
        for (n, &len) in sizes.iter().enumerate() {
            let index = head + n as u16;
            let more = if n + 1 < sizes.len() { NEXT } else { 0 };
            ring.set_desc(
                index,
                Desc {
                    addr: at,
                    len,
                    flags: WRITE | more,
                    next: index + 1,
                },
            );
            at += u64::from(len);
        }
        self.sizes[usize::from(head)] = sizes.iter().sum();
        give(ring, head);
    }

    /// Offers so many buffers of one size, from head 0 on.
    pub fn offer_many(&mut self, count: u16, size: u32) {
        for head in 0..count {
            self.offer(head, &[size]);
        }
    }

    /// Takes the next packet; `None` when none comes in time.
    pub fn receive(&mut self, limit: Duration) -> Option<Packet> {
        let mut chains = poll(limit, || self.next_chain())?;
        let header: [u8; HEADER] = chains[..HEADER].try_into().expect("a header");
        let buffers = usize::from(u16::from_le_bytes([header[10], header[11]]));
        for _ in 1..buffers {
            // All of it is there at once, or this fails.
            let more = self.next_chain().expect("a packet is published whole");
            chains.extend(more);
        }
        Some(Packet {
            header,
            frame: chains.split_off(HEADER),
            chains: buffers,
        })
    }

    /// The bytes of one chain that came back.
    fn next_chain(&mut self) -> Option<Vec<u8>> {
        let used = self.driver.rings[0].take_one()?;
        let head = used.head as u16;
        assert!(used.len <= self.sizes[usize::from(head)], "{used:?}");
        let at = RECEIVED + STRIDE * u64::from(head);
        Some(
            self.driver
                .peek(at, used.len as usize)
                .expect("the device takes part"),
        )
    }

    /// Sends what follows virtio's header, cut into descriptors of these lengths, the
    /// rest in the last; waits until it was taken.
    pub fn send(&mut self, header: [u8; HEADER], frame: &[u8], cuts: &[usize]) {
        let bytes = [&header[..], frame].concat();
        self.send_raw(&bytes, cuts, 0);
    }

    /// Sends all of these packets at once, header included, one descriptor each; they come
    /// back in their order.
    pub fn burst(&mut self, packets: &[Vec<u8>]) {
        for (index, packet) in packets.iter().enumerate() {
            let at = SENT + STRIDE * index as u64;
            self.driver.poke(at, packet).expect("the device takes part");
            let desc = Desc {
                addr: at,
                len: packet.len() as u32,
                ..Desc::default()
            };
            self.driver.rings[1].set_desc(index as u16, desc);
        }
        let ring = &mut self.driver.rings[1];
        for index in 0..packets.len() {
            ring.queue(index as u16);
        }
        ring.publish();
        ring.notify();
        let used = ring
            .watch(packets.len(), LIMIT)
            .expect("the device takes part");
        let heads: Vec<usize> = used.iter().map(|used| used.head as usize).collect();
        assert_eq!(heads, (0..packets.len()).collect::<Vec<_>>());
    }

    /// Offers a frame to be sent, and does not wait for it.
    pub fn post(&mut self, frame: &[u8]) {
        let packet = [&[0; HEADER][..], frame].concat();
        self.driver
            .poke(SENT, &packet)
            .expect("the device takes part");
        let ring = &mut self.driver.rings[1];
        let desc = Desc {
            addr: SENT,
            len: packet.len() as u32,
            ..Desc::default()
        };
        ring.set_desc(0, desc);
        give(ring, 0);
    }

    /// Sends any bytes as a packet; `flags` go to all its descriptors.
    pub fn send_raw(&mut self, bytes: &[u8], cuts: &[usize], flags: u16) {
        let at = SENT;
        self.driver.poke(at, bytes).expect("the device takes part");
        let ring = &mut self.driver.rings[1];
        let mut lengths = cuts.to_vec();
        let cut: usize = cuts.iter().sum();
        if bytes.len() > cut || lengths.is_empty() {
            lengths.push(bytes.len() - cut);
        }
        let mut start = at;
        for (n, &len) in lengths.iter().enumerate() {
            let more = if n + 1 < lengths.len() { NEXT } else { 0 };
            ring.set_desc(
                n as u16,
                Desc {
                    addr: start,
                    len: len as u32,
                    flags: flags | more,
                    next: n as u16 + 1,
                },
            );
            start += len as u64;
        }
        give(ring, 0);
        let used = ring.watch(1, LIMIT).expect("the device takes part");
        assert_eq!((used[0].head, used[0].len), (0, 0));
    }

    /// Gives a command; the device's answer, or `None` if it left the byte alone.
    pub fn command(&mut self, queue: usize, command: &[u8], answer: bool) -> Option<u8> {
        let (at, ack) = (COMMANDS, COMMANDS + 0x1000);
        self.driver
            .poke(at, command)
            .expect("the device takes part");
        self.driver
            .poke(ack, &[0xaa])
            .expect("the device takes part");
        let ring = &mut self.driver.rings[queue];
        let len = command.len() as u32;
        let more = if answer { NEXT } else { 0 };
        let read = Desc {
            addr: at,
            len,
            flags: more,
            next: 1,
        };
        let write = Desc {
            addr: ack,
            len: 1,
            flags: WRITE,
            next: 0,
        };
        ring.set_desc(0, read);
        ring.set_desc(1, write);
        give(ring, 0);
        ring.watch(1, LIMIT).expect("the device takes part");
        let got = self.driver.peek(ack, 1).expect("the device takes part")[0];
        (got != 0xaa).then_some(got)
    }
}

/// Makes a chain available, and kicks if the device asked for it, as every driver does.
fn give(ring: &mut Ring, head: u16) {
    let before = ring.next_avail();
    ring.queue(head);
    ring.publish();
    if ring.wants_kick(before) {
        ring.notify();
    }
}
