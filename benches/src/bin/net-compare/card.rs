//! The driver of a card that does nothing but move packets, on the front end of the
//! test rigs. It looks at its rings and is never called, where the backend can be told.

use std::path::Path;
use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_tests::frontend::{Desc, Driver, NEXT, Setup, WRITE};

/// Entries of a ring: what QEMU and Linux have by default.
const ENTRIES: u16 = 256;
/// Where packets lie in guest memory.
const RECEIVED: u64 = 0x20_0000;
const SENT: u64 = 0xc0_0000;
/// Virtio's header, and what comes before the payload of a large packet.
const HEADER: usize = 12;
pub(crate) const BEFORE: u64 = 54;
/// Bits of features: what Linux takes, USO aside, which the peer has not.
const MRG_RXBUF: u64 = 1 << 15;
const WANTED: u64 = MRG_RXBUF | 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
/// Buffers that Linux gives: one of a frame, a page, or 17 pages where a packet must be
/// in one chain.
const FRAME: u32 = 1536;
const PAGE: u32 = 4096;
const PAGES: u16 = 17;

/// What the driver expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Buffers {
    Small,
    Large,
    /// Large, of a driver that has each packet in one chain.
    Chains,
}

/// A card.
pub(crate) struct Card {
    driver: Driver,
    merges: bool,
    /// Bytes before a packet's end that a chain may still belong to.
    buffer: u32,
    free: Vec<u16>,
    /// Chains of the packet that is being read which are still to come.
    more: u16,
    /// Packets that came back from being sent, ever.
    total: u64,
}

impl Card {
    /// Connects and offers all its buffers.
    pub(crate) fn connect(socket: &Path, buffers: Buffers) -> Outcome<Self> {
        let setup = Setup {
            queues: 2,
            queue_size: ENTRIES,
            extra: match buffers {
                Buffers::Chains => WANTED & !MRG_RXBUF,
                _ => WANTED,
            },
            limit: Duration::from_secs(10),
            ..Setup::default()
        };
        let mut driver = Driver::connect(socket, &setup)?;
        let merges = driver.features & MRG_RXBUF != 0;
        let (buffer, chain) = match (merges, buffers) {
            (true, Buffers::Small) => (FRAME, 1),
            (true, _) => (PAGE, 1),
            (false, _) => (PAGE, PAGES),
        };
        let ring = &mut driver.rings[0];
        for head in (0..=ENTRIES - chain).step_by(usize::from(chain)) {
            for n in 0..chain {
                let index = head + n;
                let more = if n + 1 < chain { NEXT } else { 0 };
                let desc = Desc {
                    addr: RECEIVED + u64::from(index) * u64::from(PAGE),
                    len: buffer,
                    flags: WRITE | more,
                    next: index + 1,
                };
                ring.set_desc(index, desc);
            }
            ring.queue(head);
        }
        for ring in &driver.rings {
            ring.set_no_interrupt(true);
        }
        let ring = &driver.rings[0];
        ring.publish_quiet(ring.seen().wrapping_add(0x7fff));
        ring.notify();
        Ok(Self {
            driver,
            merges,
            buffer,
            free: (0..ENTRIES).collect(),
            more: 0,
            total: 0,
        })
    }

    /// What is sent from now on: one packet, header included, in every place.
    pub(crate) fn load(&mut self, packet: &[u8]) -> Outcome<()> {
        self.driver.poke(SENT, packet)?;
        for head in 0..ENTRIES {
            let desc = Desc {
                addr: SENT,
                len: packet.len() as u32,
                flags: 0,
                next: 0,
            };
            self.driver.rings[1].set_desc(head, desc);
        }
        Ok(())
    }

    /// Sends at most so many.
    pub(crate) fn send(&mut self, count: usize) {
        let ring = &mut self.driver.rings[1];
        let before = ring.next_avail();
        for _ in 0..count {
            let Some(head) = self.free.pop() else { break };
            ring.queue(head);
        }
        if ring.next_avail() != before {
            ring.publish_quiet(ring.seen().wrapping_add(0x7fff));
            if ring.wants_kick(before) {
                ring.notify();
            }
        }
    }

    /// How many have been sent since this was asked.
    pub(crate) fn sent(&mut self) -> u64 {
        let ring = &mut self.driver.rings[1];
        let before = self.free.len();
        while let Some(used) = ring.take_one() {
            self.free.push(used.head as u16);
        }
        let count = (self.free.len() - before) as u64;
        self.total += count;
        count
    }

    /// How many have been sent in all.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Takes what has come, and offers its buffers again: packets, and bytes of payload of
    /// large ones.
    pub(crate) fn receive(&mut self) -> (u64, u64) {
        let (mut packets, mut bytes) = (0, 0);
        let mut heads = [0; ENTRIES as usize];
        let mut count = 0;
        while let Some(used) = self.driver.rings[0].take_one() {
            heads[count] = used.head as u16;
            count += 1;
            bytes += u64::from(used.len);
            if self.more > 0 {
                self.more -= 1;
            } else {
                packets += 1;
                bytes = bytes.saturating_sub(HEADER as u64 + BEFORE);
                // Only a full buffer can have more.
                if self.merges && used.len == self.buffer {
                    let at = RECEIVED + u64::from(used.head) * u64::from(PAGE) + 10;
                    let number = self.driver.peek(at, 2).unwrap_or_default();
                    let number = number.try_into().map_or(1, u16::from_le_bytes);
                    self.more = number.saturating_sub(1);
                }
            }
            if count == heads.len() {
                break;
            }
        }
        let ring = &mut self.driver.rings[0];
        let before = ring.next_avail();
        for head in &heads[..count] {
            ring.queue(*head);
        }
        if count > 0 {
            ring.publish_quiet(ring.seen().wrapping_add(0x7fff));
            if ring.wants_kick(before) {
                ring.notify();
            }
        }
        (packets, bytes)
    }
}
