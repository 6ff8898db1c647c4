//! A network card: frames and commands that are nearly right, and packets that show that all
//! is well.

use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use super::chance::Chance;
use super::session::{Request, Victim};
use super::witness::Innocent;
use crate::card::{Card as Driver, HEADER, LARGE, PLAIN};
use crate::network::{GUEST, HOST, datagram, dotted};

/// How long a packet may be on its way.
const LIMIT: Duration = Duration::from_secs(20);
/// Receive buffers of those who do right.
const BUFFERS: u16 = 16;

/// The second number of the addresses at a card: that of the innocent, the one that front ends
/// attack, and the one that a guest attacks.
pub(super) const OWN: u8 = HOST[1];
/// See [`OWN`].
pub(super) const ATTACKED: u8 = 98;
/// See [`OWN`].
pub(super) const GUESTS: u8 = 97;

/// An address at one of these cards.
pub(super) fn at(card: u8, address: [u8; 4]) -> [u8; 4] {
    [address[0], card, address[2], address[3]]
}

/// The card that is attacked.
#[derive(Debug, Default)]
pub(super) struct Card;

impl Victim for Card {
    fn queues(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        PLAIN | LARGE
    }

    fn request(&mut self, chance: &mut Chance) -> Request {
        match chance.below(8) {
            0 | 1 => {
                // Room for packets.
                let mut writable = Vec::new();
                for _ in 0..1 + chance.below(3) {
                    writable.push(chance.pick(&[1526, 4096, 12, 11, 1, 60, 0x4000]));
                }
                Request {
                    queue: 0,
                    writable,
                    ..Request::default()
                }
            }
            2 => {
                let mut command = vec![chance.below(7) as u8, chance.below(8) as u8];
                let len = chance.pick(&[0, 1, 2, 6, 8, 12, 200]);
                command.extend(chance.bytes(len));
                if chance.one_in(2) {
                    // How many pairs there are to be, or which offloads.
                    command = [&[4, 0][..], &chance.half().to_le_bytes()].concat();
                }
                let writable = match chance.below(8) {
                    0 => vec![],
                    1 => vec![64],
                    _ => vec![1],
                };
                Request {
                    queue: 2,
                    readable: vec![command],
                    writable,
                    what: 0,
                }
            }
            _ => Request {
                queue: 1,
                readable: packet(chance),
                writable: match chance.one_in(32) {
                    true => vec![100],
                    false => vec![],
                },
                what: 0,
            },
        }
    }
}

/// Virtio's header and a frame.
fn packet(chance: &mut Chance) -> Vec<Vec<u8>> {
    let len = chance.pick(&[0, 1, 18, 200, 1300, 9000, 30_000]);
    let payload = chance.bytes(len);
    let mut frame = there(datagram(chance.half(), &payload), ATTACKED);
    match chance.below(8) {
        0 => chance.spoil(&mut frame),
        1 => chance.spoil(&mut frame[..42]),
        2 => frame.truncate(chance.below(60) as usize),
        // Of another kind altogether.
        3 => frame[12..14].copy_from_slice(&chance.half().to_be_bytes()),
        // TCP, for what is to be cut into pieces.
        4 => frame[23] = 6,
        _ => {}
    }
    let mut header = vec![0; HEADER];
    if chance.one_in(2) {
        // A checksum to be filled in, and pieces to be made.
        let kind = chance.pick(&[0, 1, 3, 4, 5, 0x81, 0xff]);
        let fields = [
            chance.pick(&[54, 42, 0, 60_000]),
            chance.pick(&[1, 536, 1400, 0, u16::MAX]),
            chance.pick(&[34, 54, 0, 60_000]),
            chance.pick(&[16, 6, 0, 60_000]),
        ];
        header[0] = chance.below(8) as u8;
        header[1] = kind;
        for (at, field) in fields.into_iter().enumerate() {
            header[2 + 2 * at..4 + 2 * at].copy_from_slice(&u16::to_le_bytes(field));
        }
        header[10..].copy_from_slice(&chance.half().to_le_bytes());
    }
    if chance.one_in(4) {
        chance.spoil(&mut header);
    }
    if chance.one_in(24) {
        header.truncate(chance.below(12) as usize);
    }
    match chance.below(3) {
        0 => vec![[header, frame].concat()],
        1 => vec![header, frame],
        _ => {
            let rest = frame.split_off(frame.len() / 2);
            vec![header, frame, rest]
        }
    }
}

/// The same frame with the addresses of a card.
fn there(mut frame: Vec<u8>, card: u8) -> Vec<u8> {
    for at in [27, 31] {
        frame[at] = card;
    }
    frame[24..26].fill(0);
    let words = frame[14..34].chunks(2);
    let sum: u32 = words
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// A driver that does right, and the host's end of what it says.
pub(super) struct Neighbour {
    driver: Driver,
    socket: UdpSocket,
    content: Vec<u8>,
    card: u8,
    round: u64,
    /// The buffer that is filled next.
    head: u16,
}

impl Neighbour {
    /// Connects to one of the cards.
    pub(super) fn connect(socket: &Path, content: Vec<u8>, card: u8) -> Result<Self, String> {
        let [host, guest] = [HOST, GUEST].map(|address| at(card, address));
        let host = UdpSocket::bind((dotted(host), 0)).map_err(|e| e.to_string())?;
        // From nobody else.
        host.connect((dotted(guest), 7))
            .map_err(|e| e.to_string())?;
        host.set_read_timeout(Some(LIMIT))
            .map_err(|e| e.to_string())?;
        let mut driver = Driver::connect(socket, PLAIN, 1);
        driver.offer_many(BUFFERS, 1526);
        Ok(Self {
            driver,
            socket: host,
            content,
            card,
            round: 0,
            head: 0,
        })
    }

    /// One packet to the host, and one from it.
    fn there_and_back(&mut self) -> Result<(), String> {
        self.round += 1;
        let payload = [&self.round.to_le_bytes()[..], &self.content].concat();
        let port = self.socket.local_addr().map_err(|e| e.to_string())?.port();
        let frame = there(datagram(port, &payload), self.card);
        self.driver.send([0; HEADER], &frame, &[]);
        let mut got = [0; 2000];
        loop {
            let len = self
                .socket
                .recv(&mut got)
                .map_err(|e| format!("to the host: {e}"))?;
            // One of those that were attacked with may look like ours at that card.
            if got[..len] == payload {
                break;
            }
            if self.card == OWN {
                return Err("to the host: what came is something else".into());
            }
        }
        self.socket
            .send(&payload)
            .map_err(|e| format!("to the guest: {e}"))?;
        loop {
            let packet = self.driver.receive(LIMIT);
            let packet = packet.ok_or("to the guest: nothing came")?;
            // They come back in the order in which they were given.
            for _ in 0..packet.chains {
                self.driver.offer(self.head, &[1526]);
                self.head = (self.head + 1) % BUFFERS;
            }
            // The host says other things, too.
            if packet.frame.len() > 42
                && packet.payload().get(..payload.len()) == Some(&payload[..])
            {
                return Ok(());
            }
        }
    }
}

impl Innocent for Neighbour {
    fn turn(&mut self) -> Result<(), String> {
        self.there_and_back()
            .map_err(|error| format!("round {}: {error}", self.round))
    }
}

/// One who comes in between.
pub(super) fn probe(socket: &Path, card: u8) -> Result<(), String> {
    let mut neighbour = Neighbour::connect(socket, vec![0x5b; 700], card)?;
    for _ in 0..4 {
        neighbour.turn()?;
    }
    Ok(())
}
