//! The block device as a driver sees it, beyond reads and writes: discards and
//! zeroes, flushes and the write cache, geometry, files that make the kernel
//! wait. Real Linux drivers do the same in `guests`.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod flood;
mod flush;
mod geometry;
mod guests;
mod space;
mod waiting;

use std::path::Path;

use pericarp_tests::frontend::{Chain, DATA, Driver, HEADER, STATUS, Setup};
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::scratch::Scratch;

const OK: u8 = 0;
const IOERR: u8 = 1;

const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const MIB: u64 = 1 << 20;

fn options(cache: Cache, engine: &str) -> Options {
    Options {
        cache,
        extra: vec![format!("--io-engine={engine}")],
        ..Options::default()
    }
}

fn start(scratch: &Scratch, disk: &Path, options: &Options) -> Backend {
    Backend::start(Kind::Pericarp, scratch, disk, options).unwrap()
}

/// A driver that takes all that is offered.
fn connect(backend: &Backend) -> Driver {
    connect_with(backend, |_| {})
}

fn connect_with(backend: &Backend, change: impl FnOnce(&mut Setup)) -> Driver {
    let mut setup = Setup {
        extra: F_DISCARD | F_WRITE_ZEROES | F_CONFIG_WCE | F_TOPOLOGY,
        ..Setup::default()
    };
    change(&mut setup);
    Driver::connect(backend.socket(), &setup).unwrap()
}

/// Plays a list of (sector, sectors, flags); gives the status.
fn ranges(driver: &mut Driver, kind: u32, list: &[(u64, u32, u32)]) -> u8 {
    let entry = |(sector, count, flags): &(u64, u32, u32)| {
        [
            &sector.to_le_bytes()[..],
            &count.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    };
    let bytes: Vec<u8> = list.iter().flat_map(entry).collect();
    driver.head(0, kind, 0).unwrap();
    driver.poke(DATA(0), &bytes).unwrap();
    let chain = Chain::new()
        .read(HEADER(0), 16)
        .read(DATA(0), bytes.len() as u32)
        .write(STATUS(0), 1);
    let used = driver.play(0, &chain).unwrap();
    assert_eq!(used.len, 1, "the status and nothing else is written");
    status(driver, 0)
}

fn status(driver: &Driver, slot: u64) -> u8 {
    driver.peek(STATUS(slot), 1).unwrap()[0]
}
