//! Every piece by name, and how to make it.

mod device;
mod ring;

use std::hint::black_box;

use pericarp_vhost::histogram::Histogram;

/// Requests of one turn of every piece.
pub(crate) const BATCH: u16 = 64;

/// A piece of the data plane that can be run again and again.
pub trait Piece {
    /// The driver's half of a turn, or what was left of the last one. Not
    /// measured.
    fn prepare(&mut self) {}

    /// The device's half: what is measured.
    fn run(&mut self);
}

/// A piece that can be made.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Its name in tables, and in the trailer that accepts a regression.
    pub name: &'static str,
    /// Requests, or calls, of one turn.
    pub count: u64,
    make: fn() -> Box<dyn Piece>,
}

impl Entry {
    /// One that has run a few times.
    pub fn make(&self) -> Box<dyn Piece> {
        let mut piece = (self.make)();
        for _ in 0..4 {
            piece.prepare();
            piece.run();
        }
        piece
    }
}

const fn entry(name: &'static str, make: fn() -> Box<dyn Piece>) -> Entry {
    let count = BATCH as u64;
    Entry { name, count, make }
}

/// All pieces.
pub const ALL: &[Entry] = &[
    entry("pop", ring::pop),
    entry("publish", ring::publish),
    entry("kicks", ring::kicks),
    entry("chain-direct", ring::direct),
    entry("chain-indirect", ring::indirect),
    entry("chain-scattered", ring::scattered),
    entry("parse-read", device::parse),
    entry("engine-read", device::read),
    entry("engine-write", device::write),
    entry("histogram", || Box::new(Counted::default())),
];

/// A latency into the histogram.
#[derive(Default)]
struct Counted {
    histogram: Histogram,
    value: u64,
}

impl Piece for Counted {
    fn run(&mut self) {
        for _ in 0..BATCH {
            // Spread over many buckets, as latencies are.
            self.value = self
                .value
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            self.histogram.record(black_box(self.value >> 44));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_piece_runs_and_has_a_name_of_its_own() {
        let names: HashSet<_> = ALL.iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), ALL.len());
        for entry in ALL {
            // Longer than the ring: indices wrap.
            let mut piece = entry.make();
            for _ in 0..2048 {
                piece.prepare();
                piece.run();
            }
        }
    }
}
