//! All of a ring at once, with the largest requests there can be, in memory that the disk cannot take as
//! it is: what the backend holds for them is bounded, whatever they ask for.

use pericarp_tests::frontend::{Chain, HEADER, STATUS};
use pericarp_tests::peer::{Cache, Kind};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::usage::Watch;

use super::{MIB, OK, connect_with, options, start, status};

/// Requests of three descriptors that fit into a ring of 256.
const DEPTH: u64 = 85;
/// Bytes of each.
const LARGE: u32 = 8 << 20;
/// Where they all read to and write from: past the rig's own places, and aligned to nothing.
const AT: u64 = 0x50_0201;

#[test]
fn a_ring_full_of_the_largest_requests_holds_no_more_than_is_said() {
    let test = "a_ring_full_of_the_largest_requests_holds_no_more_than_is_said";
    if !Kind::Pericarp.usable(test) {
        return;
    }
    let scratch = Scratch::new();
    for (cache, engine) in [
        (Cache::Direct, "uring"),
        (Cache::Direct, "sync"),
        (Cache::Buffered, "uring"),
    ] {
        let disk = scratch.sparse("disk", 16 * MIB);
        let backend = start(&scratch, &disk, &options(cache, engine));
        let mut driver = connect_with(&backend, |setup| setup.queue_size = 256);
        let watch = Watch::begin(backend.pid());
        for kind in [0, 1, 0] {
            for slot in 0..DEPTH {
                driver.head(slot, kind, 0).unwrap();
                let chain = Chain::new().read(HEADER(slot), 16);
                let chain = match kind {
                    0 => chain.write(AT, LARGE),
                    _ => chain.read(AT, LARGE),
                };
                driver.place(0, slot as u16 * 3, &chain.write(STATUS(slot), 1));
                driver.rings[0].queue(slot as u16 * 3);
            }
            driver.rings[0].publish();
            driver.rings[0].notify();
            driver.rings[0].wait(DEPTH as usize, driver.limit).unwrap();
            assert!((0..DEPTH).all(|slot| status(&driver, slot) == OK));
        }
        // 16 buffers of 128 KiB for what is not aligned, and 256 lists of segments.
        let flood = format!("block ({cache:?}, {engine}), {DEPTH} requests of 8 MiB at once");
        watch.end(&flood, 16 * 128 + 2048);
        assert!(backend.stop().unwrap().success());
    }
}
