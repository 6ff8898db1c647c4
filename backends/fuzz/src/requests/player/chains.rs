//! How requests lie in memory: a place for each slot of the ring, cut into
//! descriptors as the script says.

use super::{AVAILABLE, Player, SIZE};
use crate::memory::{FAR, SMALL};

/// Indirect tables, requests and replies of the slots.
const TABLES: u64 = 0x800;
const TABLE: u64 = 256;
const REQUESTS: u64 = 0x1800;
const REQUEST: usize = 512;
const REPLIES: u64 = 0x3800;
const REPLY: u64 = 1024;
/// Slots whose replies are in the first two regions, across their seam.
const NEAR: u64 = 10;

/// Where the reply of a slot goes, and the room there.
fn reply_at(slot: u64) -> (u64, u64) {
    match slot.checked_sub(NEAR) {
        None => (REPLIES + REPLY * slot, REPLY),
        Some(far) => {
            let room = (SMALL / (u64::from(SIZE) - NEAR)) & !7;
            (FAR + far * room, room)
        }
    }
}

/// Lengths of the pieces that `len` bytes are cut into.
fn cut(len: u64, how: u8, first: u64, at: u8) -> Vec<u64> {
    let pieces: &[u64] = match how & 3 {
        0 => &[first],
        1 => &[],
        2 => &[1, 6, 9, 2, 21],
        _ => &[u64::from(at)],
    };
    let mut left = len;
    let mut all = Vec::new();
    for piece in pieces {
        let piece = (*piece).min(left);
        if piece > 0 {
            all.push(piece);
        }
        left -= piece;
    }
    if left > 0 {
        all.push(left);
    }
    all
}

impl Player<'_, '_> {
    /// In one descriptor, with all the room there is.
    pub(super) fn send_whole(&mut self, bytes: Vec<u8>) {
        let slot = self.free_slot();
        let (at, room) = reply_at(slot);
        self.place(slot, bytes, &[(at, room)], 0, 0);
    }

    /// As the script says: how the request and the room are cut, how much room,
    /// and seldom something odd.
    pub(super) fn send(&mut self, bytes: Vec<u8>) {
        let slot = self.free_slot();
        let how = self.script.u8();
        let (mut at, most) = reply_at(slot);
        let room = match how >> 4 & 3 {
            0 | 1 => most,
            2 => u64::from(self.script.u8()),
            _ => u64::from(self.script.u16()) % most,
        };
        let piece = if how & 3 == 3 || how & 12 == 12 {
            self.script.u8()
        } else {
            0
        };
        let mut areas = Vec::new();
        for len in cut(room, how >> 2, 16, piece) {
            areas.push((at, len));
            at += len;
        }
        self.place(slot, bytes, &areas, how, piece);
    }

    /// A slot with nothing in flight.
    fn free_slot(&mut self) -> u64 {
        if self.flights.len() == usize::from(SIZE) {
            self.complete_first();
        }
        let free = (0..SIZE).find(|slot| !self.flights.contains_key(slot));
        u64::from(free.expect("one was completed"))
    }

    fn place(&mut self, slot: u64, mut bytes: Vec<u8>, areas: &[(u64, u64)], how: u8, piece: u8) {
        bytes.truncate(REQUEST);
        let at = REQUESTS + REQUEST as u64 * slot;
        self.rig.memory.put(at, &bytes);
        let mut chain = Vec::new();
        let mut from = at;
        for len in cut(bytes.len() as u64, how, 40, piece) {
            chain.push((from, len, 0));
            from += len;
        }
        let mut own = true;
        let odd = if how & 0xc0 == 0xc0 {
            self.script.u8()
        } else {
            0
        };
        if odd & 0x80 != 0 {
            // A body of 64 KiB and more: the same memory over and over.
            chain.extend([(FAR, SMALL, 0); 9]);
        }
        chain.extend(areas.iter().map(|(at, len)| (*at, *len, 2)));
        match odd & 7 {
            1 => chain.push((self.script.address(), u64::from(self.script.u16()), 2)),
            2 => chain.insert(0, (at, 8, 2)),
            3 => chain.push((areas.first().map_or(at, |area| area.0), 64, 2)),
            4 => chain.retain(|(_, _, flags)| *flags == 0),
            5 => chain.retain(|(_, _, flags)| *flags == 2),
            6 => chain.push((at, 0, 2)),
            7 => chain.push((
                u64::from(self.script.u16()),
                16,
                u16::from(self.script.u8() & 6),
            )),
            _ => {}
        }
        own &= odd & 7 == 0;
        chain.truncate((TABLE / 16) as usize);
        let indirect = how & 0x40 != 0 || odd != 0;
        let count = chain.len() as u64;
        for (index, (at, len, flags)) in (0..).zip(chain) {
            let more = u16::from(index + 1 < count);
            let (to, next) = if indirect {
                (TABLES + TABLE * slot + 16 * index, index + 1)
            } else {
                let place = |n: u64| (slot + n) % u64::from(SIZE);
                (16 * place(index), place(index + 1))
            };
            self.descriptor(to, (at, len as u32, flags | more, next as u16));
        }
        if indirect {
            let table = (TABLES + TABLE * slot, 16 * count as u32, 4, 0);
            self.descriptor(16 * slot, table);
        }
        let ring = AVAILABLE + 4 + 2 * u64::from(self.avail % SIZE);
        self.rig.memory.put(ring, &(slot as u16).to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.rig
            .memory
            .put(AVAILABLE + 2, &self.avail.to_le_bytes());
        self.turn(own);
    }

    fn descriptor(&mut self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.rig.memory.put(at, &raw);
    }
}
