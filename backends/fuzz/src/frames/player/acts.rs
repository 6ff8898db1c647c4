//! What the driver offers and sends, and what the host sends.

use super::Player;
use crate::frames::lane::{Entry, Piece, put};
use crate::frames::rig::ROOM;
use crate::frames::rules::Kind;
use crate::memory::FAR;

/// Indirect tables, behind the rings: so many, of so many bytes.
pub(in crate::frames) const TABLES: u64 = 0x1400;
const TABLE_COUNT: usize = 16;
const TABLE: u64 = 128;
/// Where packets lie that go out, over the seam of two regions.
pub(super) const OUT: u64 = 0x1c00;
const OUT_END: u64 = 0x5800;
/// Commands and their answers.
const COMMANDS: u64 = 0x5800;
const ANSWERS: u64 = 0x5c00;
/// Bytes that an answer had before.
pub(in crate::frames) const UNANSWERED: u8 = 0xaa;

/// Cuts so many bytes into pieces, as it is said.
fn cut(len: u32, how: u8, header: u32) -> Vec<u32> {
    let firsts: &[u32] = match how & 7 {
        0 | 1 => &[],
        2 => &[header],
        3 => &[1, header - 2, 3],
        4 => &[header, 14],
        5 => &[header - 1, 2, 1, 1],
        6 => &[header + 13, 1],
        _ => &[1, 1, 1, 1, 1, 1, 1],
    };
    let (mut pieces, mut left) = (Vec::new(), len);
    for &first in firsts {
        let piece = first.min(left);
        if piece > 0 {
            pieces.push(piece);
        }
        left -= piece;
    }
    if left > 0 {
        pieces.push(left);
    }
    pieces
}

impl Player<'_, '_> {
    /// The queues of a kind.
    fn lanes_of(&self, of: impl Fn(Kind) -> bool) -> Vec<usize> {
        let all = 0..self.lanes.len();
        all.filter(|n| of(self.rules.kind(*n as u16))).collect()
    }

    fn pick(&mut self, of: impl Fn(Kind) -> bool) -> Option<usize> {
        let which = usize::from(self.script.u8());
        let lanes = self.lanes_of(of);
        (!lanes.is_empty()).then(|| lanes[which % lanes.len()])
    }

    /// Bytes of a packet, its header included.
    fn length(&mut self) -> usize {
        let (kind, more) = (self.script.u8(), self.script.u8());
        let more = usize::from(more);
        let (least, most) = (self.rules.least(), self.rules.most());
        match kind & 15 {
            0 => more % 40,
            1 => least - 1 + more % 3,
            2 => 1526,
            3 => 2048 + more % 3,
            4 => most - 1 + more % 3,
            5 => 256 * more + usize::from(self.script.u8()),
            6 => 70_000 + 256 * more,
            7 => self.rules.header() + more % 14,
            _ => least + 4 * more,
        }
    }

    /// A packet of so many bytes, unlike all others if it is long enough.
    fn packet(&mut self, len: usize) -> Vec<u8> {
        self.serial += 1;
        let serial = self.serial.to_le_bytes();
        let mut bytes: Vec<u8> = (0..len)
            .map(|n| (n as u32 * 31 + (n as u32 >> 8) + self.serial) as u8)
            .collect();
        // Flags, kind of pieces, lengths, where the checksum is, and number of buffers.
        let mut header = [0; 12];
        if self.script.u8() & 1 != 0 {
            let from = self.script.take(12);
            header[..from.len()].copy_from_slice(from);
        }
        let both = [&header[..], &serial].concat();
        let count = len.min(both.len());
        bytes[..count].copy_from_slice(&both[..count]);
        bytes
    }

    /// A free indirect table of one's own, where there are not too many pieces.
    fn table(&self, pieces: usize) -> Option<(usize, u64)> {
        if pieces as u64 > TABLE / 16 {
            return None;
        }
        let entries = self.lanes.iter().flat_map(|lane| &lane.entries);
        let taken: Vec<usize> = entries.filter_map(|entry| entry.table).collect();
        let free = (0..TABLE_COUNT).find(|number| !taken.contains(number))?;
        Some((free, TABLES + TABLE * free as u64))
    }

    /// Spoils a piece, seldom; then offers all of them.
    fn lay(&mut self, number: usize, mut pieces: Vec<Piece>, how: u8) -> bool {
        if how & 0xe0 == 0xe0 && !pieces.is_empty() {
            let what = self.script.u8();
            let at = usize::from(what >> 3) % pieces.len();
            match what & 7 {
                0 | 1 => pieces[at].2 ^= true,
                2 => pieces[at].1 = 0,
                3 => pieces[at].0 = self.script.address(),
                4 => pieces[at].1 = self.script.u32(),
                5 => pieces.insert(at, pieces[at]),
                6 => pieces.push((OUT, 16, true)),
                _ => pieces.truncate(at),
            }
        }
        let table = (how & 0x18 == 0x18).then(|| self.table(pieces.len()));
        let offered = self.lanes[number].offer(self.memory, &pieces, table.flatten());
        let Some(head) = offered else {
            return false;
        };
        let lane = &mut self.lanes[number];
        if lane.entries.iter().filter(|e| e.head == head).count() > 1 {
            // Somebody offered the descriptor as it was.
            lane.poisoned = true;
            self.tainted = true;
        }
        self.kick(number);
        true
    }

    /// The guest sends a packet.
    pub(super) fn send(&mut self) {
        let Some(number) = self.pick(|kind| matches!(kind, Kind::Out(_))) else {
            return;
        };
        let how = self.script.u8();
        let len = self.length();
        let mut pieces: Vec<Piece> = Vec::new();
        let header = self.rules.header() as u32;
        if len as u64 <= (OUT_END - OUT) / 2 {
            let bytes = self.packet(len);
            if self.out_at + len as u64 > OUT_END {
                self.out_at = OUT;
            }
            let mut at = self.out_at;
            self.memory.put_over(at, &bytes);
            for piece in cut(len as u32, how, header) {
                pieces.push((at, piece, false));
                at += u64::from(piece);
            }
            self.out_at = at;
        } else {
            // The same memory over and over.
            let bytes = self.packet(64);
            self.memory.put_over(OUT, &bytes);
            let mut left = len as u32;
            while left > 0 {
                let piece = left.min((OUT_END - OUT) as u32);
                pieces.push((OUT, piece, false));
                left -= piece;
            }
        }
        self.lay(number, pieces, how);
    }

    /// The driver offers memory for packets.
    pub(super) fn offer(&mut self) {
        let Some(number) = self.pick(|kind| matches!(kind, Kind::In(_))) else {
            return;
        };
        let (how, size) = (self.script.u8(), self.script.u8());
        let more = u32::from(self.script.u8());
        let len = match size & 7 {
            0 => more % 20,
            1 => self.rules.header() as u32 + more % 3,
            2 => 60 + more,
            3 | 4 => 1526,
            5 => 256,
            6 => 2048 + 16 * more,
            _ => self.rules.most() as u32 - 1 + more % 3,
        };
        for _ in 0..=size >> 5 {
            if !self.offer_one(number, len, how) {
                break;
            }
        }
    }

    /// One of so many bytes; false where there is no place for it.
    pub(super) fn offer_one(&mut self, number: usize, len: u32, how: u8) -> bool {
        let Some(mut at) = self.gap(u64::from(len)) else {
            return false;
        };
        let mut pieces = Vec::new();
        for piece in cut(len, how, self.rules.header() as u32) {
            pieces.push((at, piece, true));
            at += u64::from(piece);
        }
        self.lay(number, pieces, how)
    }

    /// Memory that no chain names.
    fn gap(&self, len: u64) -> Option<u64> {
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for lane in &self.lanes {
            for entry in &lane.entries {
                let named = lane.walk(self.memory, 0, entry.head);
                taken.extend(named.writable);
            }
        }
        taken.sort_unstable();
        let mut at = FAR;
        for (start, size) in taken {
            if start >= FAR && start >= at + len {
                break;
            }
            at = at.max(start.saturating_add(size));
        }
        (at.saturating_add(len) <= FAR + ROOM).then_some(at)
    }

    /// The host sends packets to the guest.
    pub(super) fn frame(&mut self) {
        let which = self.script.u8();
        let pair = usize::from(which) % self.bench.peers.len();
        for _ in 0..=which >> 6 {
            let len = self.length().min(self.rules.most());
            let bytes = self.packet(len);
            if self.bench.peers[pair].send(&bytes).is_ok() {
                self.sent[pair].push_back(bytes);
            }
        }
    }

    /// The driver gives a command, and waits for the answer.
    pub(super) fn command(&mut self) {
        let Some(number) = self.pick(|kind| kind == Kind::Control) else {
            return;
        };
        let (how, what) = (self.script.u8(), self.script.u8());
        let bytes = match what & 7 {
            0 | 1 => vec![4, 0, what >> 6, 0],
            2 | 3 => {
                let bits = self.rules.features & self.script.u64();
                [&[5, 0][..], &bits.to_le_bytes()].concat()
            }
            4 => vec![5, 0, what & 0x80, 1, 0, 0, 0, 0, 0],
            5 => [&[5, 0][..], &self.script.u64().to_le_bytes()].concat(),
            6 => vec![what >> 4, how >> 4, self.script.u8(), 0],
            _ => self.script.take(usize::from(what >> 4)).to_vec(),
        };
        let place = u64::from(self.lanes[number].avail % 16);
        let (mut at, answer) = (COMMANDS + 64 * place, ANSWERS + 16 * place);
        self.memory.put(at, &bytes);
        self.memory.put(answer, &[UNANSWERED; 16]);
        let mut pieces: Vec<Piece> = Vec::new();
        for piece in cut(bytes.len() as u32, how, 3) {
            pieces.push((at, piece, false));
            at += u64::from(piece);
        }
        match what >> 3 & 7 {
            0 => {}
            1 => pieces.extend([(answer, 2, true), (answer + 8, 1, true)]),
            _ => pieces.push((answer, 1, true)),
        }
        self.lay(number, pieces, how);
        self.work();
    }

    /// The guest writes anywhere.
    pub(super) fn poke(&mut self, at: u64, bytes: &[u8]) {
        self.memory.put(at, bytes);
        for lane in &mut self.lanes {
            if (at..at.saturating_add(bytes.len() as u64)).any(|at| lane.is_ring(at)) {
                lane.poisoned = true;
                self.tainted = true;
            }
        }
    }

    /// Any descriptor, in a ring or a table.
    pub(super) fn descriptor(&mut self) {
        let (which, to) = (self.script.u8(), self.script.address());
        let len = match which & 3 {
            0 => u32::from(self.script.u8()),
            1 => 16 * u32::from(self.script.u8() % 16),
            _ => self.script.u32() >> (which >> 3),
        };
        let flags = u16::from(self.script.u8() & 7);
        let next = u16::from(self.script.u8() % 40);
        let index = u64::from(self.script.u8());
        let at = if which & 4 == 0 {
            let lane = usize::from(which >> 3) % self.lanes.len();
            let lane = &self.lanes[lane];
            lane.at() + 16 * (index % u64::from(lane.size))
        } else {
            TABLES + 16 * (index % 128)
        };
        put(self.memory, at, (to, len, flags, next));
    }

    /// Any head.
    pub(super) fn head(&mut self) {
        let (which, head) = (self.script.u8(), self.script.u8());
        let number = usize::from(which) % self.lanes.len();
        let control = self.rules.kind(number as u16) == Kind::Control;
        let lane = &mut self.lanes[number];
        if lane.entries.len() >= usize::from(lane.size) {
            return;
        }
        let head = if head < 250 {
            u16::from(head) % lane.size
        } else {
            u16::from(head) << 8
        };
        let again = lane.entries.iter().any(|entry| entry.head == head);
        if head >= lane.size || control && again {
            lane.poisoned = true;
            self.tainted = true;
        }
        let entry = Entry {
            head,
            ..Entry::default()
        };
        lane.give(self.memory, entry);
        self.kick(number);
    }
}
