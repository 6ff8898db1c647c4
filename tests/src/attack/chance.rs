//! What comes next, from one number: the same number has the same things come, in the same order.

use crate::model::Sequence;

/// Values at which sizes, indices and addresses go wrong.
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    7,
    8,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
];

/// A sequence of choices.
#[derive(Debug)]
pub(super) struct Chance(Sequence);

impl Chance {
    /// That of one attacker, of those that a seed has.
    pub(super) fn new(seed: u64, attacker: &str) -> Self {
        // FNV: another sequence for each name.
        let name = attacker
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
                (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            });
        let mut sequence = Sequence::new(seed ^ name);
        // The first few depend on few bits.
        for _ in 0..8 {
            sequence.number();
        }
        Self(sequence)
    }

    /// A number below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0.below(end)
    }

    /// True once in `count` times.
    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.0.below(count) == 0
    }

    /// One of these.
    pub(super) fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// Any number; those at edges, and small ones, more often.
    pub(super) fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.pick(&EDGES).wrapping_sub(self.below(2)),
            1 => self.below(64),
            2 => self.below(1 << 20),
            3 => u64::MAX - self.below(4096),
            4 => (1 << self.below(64)) | self.below(3),
            _ => self.0.number(),
        }
    }

    /// The same of four bytes.
    pub(super) fn word(&mut self) -> u32 {
        self.number() as u32
    }

    /// The same of two.
    pub(super) fn half(&mut self) -> u16 {
        self.number() as u16
    }

    /// So many bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        self.0.bytes(len)
    }

    /// Makes one field of these bytes another value.
    pub(super) fn spoil(&mut self, bytes: &mut [u8]) {
        if bytes.is_empty() {
            return;
        }
        let value = self.number().to_le_bytes();
        let at = self.below(bytes.len() as u64) as usize;
        // Fields lie at multiples of their size.
        let (at, len) = match self.below(4) {
            0 => (at, 1),
            1 => (at & !1, 2),
            2 => (at & !3, 4),
            _ => (at & !7, 8),
        };
        let end = (at + len).min(bytes.len());
        bytes[at..end].copy_from_slice(&value[..end - at]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_and_a_name_have_one_sequence() {
        let first = |seed, name| {
            let mut chance = Chance::new(seed, name);
            [(); 20].map(|()| chance.number())
        };
        assert_eq!(first(1, "block"), first(1, "block"));
        assert_ne!(first(1, "block"), first(2, "block"));
        assert_ne!(first(1, "block"), first(1, "net"));
    }

    #[test]
    fn what_is_spoilt_stays_within_its_bytes() {
        let mut chance = Chance::new(3, "x");
        for len in 0..20 {
            let mut bytes = vec![0; len];
            for _ in 0..100 {
                chance.spoil(&mut bytes);
            }
        }
    }
}
