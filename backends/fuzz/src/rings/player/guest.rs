//! The guest's acts: descriptors, requests, indices.

use super::{AVAILABLE, DATA, HEADERS, Player, TABLES, USED, USED_END};
use crate::memory::{FAR, SEAM};

impl Player<'_, '_> {
    /// The guest writes.
    pub(super) fn poke(&mut self, at: u64, bytes: &[u8]) {
        self.rig.memory.put(at, bytes);
        let end = at.saturating_add(bytes.len() as u64);
        self.tainted |= at < USED_END && end > USED;
        for flight in self.flights.values_mut() {
            flight.alone = false;
        }
    }

    pub(super) fn descriptor(&mut self, at: u64) {
        let address = self.script.address();
        let wide = self.script.u8();
        let len = match wide & 3 {
            0 => 512 * u32::from(wide >> 5),
            1 => u32::from(self.script.u8()),
            2 => 16 * u32::from(self.script.u8() % 16),
            _ => self.script.u32() >> (wide >> 3),
        };
        let flags = u16::from(self.script.u8() & 7);
        let next = u16::from(self.script.u8() % 72);
        self.raw_descriptor(at, (address, len, flags, next));
    }

    fn raw_descriptor(&mut self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.poke(at, &raw);
    }

    pub(super) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.poke(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.poke(AVAILABLE + 2, &self.avail.to_le_bytes());
    }

    /// A request as a driver makes it: kind, sector, blocks, pieces, table.
    pub(super) fn request(&mut self) {
        let kind = u32::from(self.script.u8() % 16);
        let sector = u64::from(self.script.u8());
        let len = u32::from(self.script.u8() % 16) * 512;
        let pieces = u32::from(self.script.u8() % 4) + 1;
        let how = self.script.u8();
        self.lay_out((kind, sector), len, pieces, how);
    }

    /// DISCARD or WRITE_ZEROES: kind, pieces, table, and the list of ranges.
    pub(super) fn space(&mut self) {
        let which = self.script.u8();
        let kind = if which & 1 == 0 { 11 } else { 13 };
        let pieces = u32::from(which >> 1 & 3) + 1;
        let (how, count) = (self.script.u8(), u32::from(self.script.u8() % 24));
        let mut list = Vec::new();
        for _ in 0..count {
            let (sector, sectors, odd) = (self.script.u8(), self.script.u8(), self.script.u8());
            // Mostly inside the disk, seldom near the ends of the fields.
            let sector = match odd >> 4 {
                0xf => u64::MAX - u64::from(sector),
                0xe => u64::MAX / 512 - 2 + u64::from(sector),
                _ => u64::from(sector),
            };
            let sectors = match odd >> 2 & 3 {
                3 => u32::MAX - u32::from(sectors),
                _ => u32::from(sectors),
            };
            let flags = u32::from(odd & 3) << if odd & 2 != 0 { odd >> 4 } else { 0 };
            list.extend(sector.to_le_bytes());
            list.extend(sectors.to_le_bytes());
            list.extend(flags.to_le_bytes());
        }
        // Not a whole number of ranges, at times.
        let cut = usize::from(which >> 5 == 7);
        list.truncate(list.len().saturating_sub(cut));
        let at = self.data_at(how);
        self.poke(at, &list);
        self.lay_out((kind, 0), list.len() as u32, pieces, how);
    }

    /// Whole, or off the alignment that direct I/O needs; in one region or another.
    fn data_at(&self, how: u8) -> u64 {
        match how >> 1 & 3 {
            0 => DATA,
            1 => SEAM + 16 * u64::from(self.slot % 16),
            2 => FAR,
            _ => SEAM - 512,
        }
    }

    fn lay_out(&mut self, (kind, sector): (u32, u64), len: u32, pieces: u32, how: u8) {
        let mut at = self.data_at(how);
        let slot = u64::from(self.slot % 16);
        self.slot = self.slot.wrapping_add(1);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let (header_at, status_at) = (HEADERS + 32 * slot, HEADERS + 0x300 + slot);
        self.poke(header_at, &header);
        self.poke(status_at, &[0xee]);
        let write = if matches!(kind, 1 | 11 | 13) { 0 } else { 2 };
        let mut chain = vec![(header_at, 16, 0)];
        for n in 0..pieces {
            let part = if n + 1 == pieces {
                len - len / pieces * n
            } else {
                len / pieces
            };
            if part > 0 {
                chain.push((at, part, write));
            }
            at += u64::from(part);
        }
        chain.push((status_at, 1, 2));
        let indirect = how & 1 != 0 || chain.len() > usize::from(self.size);
        let first = if indirect {
            0
        } else {
            slot * 6 % u64::from(self.size)
        };
        let base = if indirect { TABLES + 128 * slot } else { 0 };
        let limit = if indirect { 8 } else { u64::from(self.size) };
        let count = chain.len() as u64;
        for (n, (at, len, flags)) in (0..).zip(chain) {
            let more = u16::from(n + 1 < count);
            let next = (first + n + 1) % limit;
            let to = base + 16 * ((first + n) % limit);
            self.raw_descriptor(to, (at, len, flags | more, next as u16));
        }
        let head = if indirect {
            slot % u64::from(self.size)
        } else {
            first
        };
        if indirect {
            self.raw_descriptor(16 * head, (base, 16 * count as u32, 4, 0));
        }
        self.offer(head as u16);
    }
}
