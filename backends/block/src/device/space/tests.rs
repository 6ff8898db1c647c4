//! Lists of ranges: which are refused, with what status and before anything is
//! done; and which steps a good one leads to.

use std::os::unix::fs::FileExt;

use super::super::tests::{Case, DATA, DISK_SECTORS, HEADER, STATUS, SYNC, geometry, memfd};
use super::super::{FILE, S_IOERR, S_OK, S_UNSUPP, T_DISCARD, T_WRITE_ZEROES, WRITEBACK_OFFSET};
use super::*;
use crate::disk::Geometry;

/// A request of `kind` whose data is `bytes`.
fn case(disk: Geometry, kind: u32, bytes: &[u8]) -> Case {
    let guest = memfd(0x4_0000);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    guest.write_all_at(&header, HEADER).unwrap();
    guest.write_all_at(&[0xee], STATUS).unwrap();
    guest.write_all_at(bytes, DATA).unwrap();
    let mut chain = vec![(HEADER, 16, 0)];
    if !bytes.is_empty() {
        chain.push((DATA, bytes.len() as u32, 0));
    }
    chain.push((STATUS, 1, 2));
    Case::with_chain(disk, guest, &chain)
}

/// The list as it lies in memory: sector, count, flags.
fn list(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let entry = |(sector, count, flags): &(u64, u32, u32)| {
        [
            &sector.to_le_bytes()[..],
            &count.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    };
    ranges.iter().flat_map(entry).collect()
}

fn allocate(sector: u64, count: u64, mode: i32) -> Step {
    Step::Allocate {
        file: FILE,
        offset: sector * SECTOR,
        len: count * SECTOR,
        mode,
    }
}

fn refused(mut case: Case, status: u8, what: &str) {
    assert_eq!(case.start(), Step::Done { written: 1 }, "{what}");
    assert_eq!(case.status(), status, "{what}");
}

#[test]
fn ranges_outside_the_disk_are_errors() {
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for (sector, count) in [
            (DISK_SECTORS, 1),
            (DISK_SECTORS - 1, 2),
            (u64::MAX, 1),
            (u64::MAX / 512, 1),
            (u64::MAX / 512 + 1, 1),
            (0, 0),
            // In 32 bits this many bytes are none.
            (0, 1 << 23),
            (0, u32::MAX),
        ] {
            let what = format!("{kind}: {count} at {sector}");
            // Behind a good one: that must not be touched either.
            let bytes = list(&[(0, 8, 0), (sector, count, 0)]);
            refused(case(geometry(), kind, &bytes), S_IOERR, &what);
        }
    }
}

#[test]
fn longer_ranges_than_offered_are_errors() {
    let large = |kind, bytes: &[u8]| {
        let case = case(geometry(), kind, bytes);
        case.device.size.store(1 << 40, Ordering::Relaxed);
        case
    };
    let zeroes = list(&[(0, MAX_ZEROES_SECTORS + 1, 0)]);
    refused(large(T_WRITE_ZEROES, &zeroes), S_IOERR, "zeroes");
    let discard = list(&[(0, MAX_DISCARD_SECTORS + 1, 0)]);
    refused(large(T_DISCARD, &discard), S_IOERR, "discard");
    let whole = list(&[(0, MAX_DISCARD_SECTORS, 0)]);
    let step = large(T_DISCARD, &whole).start();
    assert_eq!(step, allocate(0, MAX_DISCARD_SECTORS.into(), HOLE));
}

#[test]
fn flags_that_nobody_knows_are_unsupported() {
    for flags in [2, 3, 1 << 31, u32::MAX] {
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            let bytes = list(&[(0, 8, 0), (8, 8, flags)]);
            refused(case(geometry(), kind, &bytes), S_UNSUPP, &flags.to_string());
        }
    }
}

#[test]
fn unmap_on_a_discard_is_unsupported() {
    let bytes = list(&[(0, 8, F_UNMAP)]);
    refused(case(geometry(), T_DISCARD, &bytes), S_UNSUPP, "unmap");
}

#[test]
fn lists_that_are_no_list_are_errors() {
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for len in [0, 1, 15, 17, 24] {
            let bytes = [0; 24];
            refused(case(geometry(), kind, &bytes[..len]), S_IOERR, "length");
        }
    }
    let many = vec![(0, 8, 0); MAX_DISCARD_RANGES + 1];
    refused(case(geometry(), T_DISCARD, &list(&many)), S_IOERR, "many");
    let many = vec![(0, 8, 0); MAX_ZEROES_RANGES + 1];
    refused(
        case(geometry(), T_WRITE_ZEROES, &list(&many)),
        S_IOERR,
        "many",
    );
}

#[test]
fn a_read_only_disk_offers_neither_and_refuses_both() {
    let disk = Geometry {
        read_only: true,
        ..geometry()
    };
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let case = case(disk, kind, &list(&[(0, 8, 0)]));
        let both = feature::DISCARD | feature::WRITE_ZEROES;
        assert_eq!(pericarp_vhost::Device::features(&case.device) & both, 0);
        refused(case, S_IOERR, "read-only");
    }
}

#[test]
fn what_the_driver_did_not_take_is_unsupported() {
    for (kind, other) in [
        (T_DISCARD, feature::WRITE_ZEROES),
        (T_WRITE_ZEROES, feature::DISCARD),
    ] {
        let case = case(geometry(), kind, &list(&[(0, 8, 0)]));
        pericarp_vhost::Device::negotiated(&case.device, feature::FLUSH | other);
        refused(case, S_UNSUPP, "not negotiated");
    }
}

#[test]
fn parts_of_large_blocks_are_errors() {
    let disk = Geometry {
        logical_block: 4096,
        ..geometry()
    };
    for (sector, count) in [(1, 8), (0, 7), (4, 4)] {
        let bytes = list(&[(sector, count, 0)]);
        refused(case(disk, T_DISCARD, &bytes), S_IOERR, "part of a block");
    }
    assert_eq!(
        case(disk, T_DISCARD, &list(&[(8, 8, 0)])).start(),
        allocate(8, 8, HOLE)
    );
}

#[test]
fn ranges_are_done_in_order_and_then_the_status_is_written() {
    let ranges: Vec<_> = (0..3).map(|n| (n * 16, 8, 0)).collect();
    let mut case = case(geometry(), T_DISCARD, &list(&ranges));
    let mut step = case.start();
    for n in 0..3 {
        assert_eq!(step, allocate(n * 16, 8, HOLE));
        assert_eq!(case.status(), 0xee);
        step = case.resume(step, 0);
    }
    assert_eq!(step, Step::Done { written: 1 });
    assert_eq!(case.status(), S_OK);
}

#[test]
fn an_error_ends_the_request_at_once() {
    let mut case = case(geometry(), T_DISCARD, &list(&[(0, 8, 0), (8, 8, 0)]));
    let step = case.start();
    assert_eq!(case.resume(step, -libc::EIO), Step::Done { written: 1 });
    assert_eq!(case.status(), S_IOERR);
}

#[test]
fn an_interrupted_range_is_repeated() {
    let mut case = case(geometry(), T_DISCARD, &list(&[(8, 8, 0)]));
    let step = case.start();
    assert_eq!(case.resume(step, -libc::EINTR), step);
}

#[test]
fn zeroes_are_a_hole_only_where_the_driver_lets_go_of_the_blocks() {
    for (flags, mode) in [(0, ZERO), (F_UNMAP, HOLE)] {
        let mut case = case(geometry(), T_WRITE_ZEROES, &list(&[(8, 8, flags)]));
        let step = case.start();
        assert_eq!(step, allocate(8, 8, mode));
        assert_eq!(case.resume(step, 0), Step::Done { written: 1 });
        assert_eq!(case.status(), S_OK);
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_knows_no_better_way() {
    let bytes = list(&[(8, 8, F_UNMAP), (32, 8, 0)]);
    let mut case = case(geometry(), T_WRITE_ZEROES, &bytes);
    let mut step = case.start();
    for mode in [HOLE, ZERO] {
        assert_eq!(step, allocate(8, 8, mode));
        step = case.resume(step, -libc::EOPNOTSUPP);
    }
    let write = |sector: u64, len| Step::WriteZeroes {
        file: FILE,
        offset: sector * SECTOR,
        len,
        flags: 0,
    };
    assert_eq!(step, write(8, 4096));
    // Short, as it may be.
    step = case.resume(step, 512);
    assert_eq!(step, write(9, 3584));
    step = case.resume(step, 3584);
    assert_eq!(step, write(32, 4096), "what failed once is not tried again");
    assert_eq!(case.resume(step, 0), Step::Done { written: 1 });
    assert_eq!(case.status(), S_IOERR, "no progress");
}

#[test]
fn a_discard_that_the_disk_lacks_after_all_is_unsupported() {
    let mut case = case(geometry(), T_DISCARD, &list(&[(8, 8, 0)]));
    let step = case.start();
    let end = case.resume(step, -libc::EOPNOTSUPP);
    assert_eq!(end, Step::Done { written: 1 });
    assert_eq!(case.status(), S_UNSUPP);
}

#[test]
fn a_block_device_discards_by_its_own_command() {
    let mut disk = geometry();
    disk.topology.discard = DiscardBy::Command;
    let step = case(disk, T_DISCARD, &list(&[(8, 16, 0)])).start();
    let (offset, len) = (8 * SECTOR, 16 * SECTOR);
    let file = pericarp_vhost::FileRef::Listed(0);
    assert_eq!(step, Step::Discard { file, offset, len });
}

#[test]
fn write_through_makes_ranges_durable_before_it_says_so() {
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let mut case = case(geometry(), kind, &list(&[(8, 8, 0)]));
        // Neither FLUSH nor CONFIG_WCE.
        let both = feature::DISCARD | feature::WRITE_ZEROES;
        pericarp_vhost::Device::negotiated(&case.device, both);
        let step = case.start();
        let step = case.resume(step, 0);
        assert_eq!(step, SYNC);
        assert_eq!(case.status(), 0xee);
        // An interrupted sync has made nothing durable.
        assert_eq!(case.resume(step, -libc::EINTR), step);
        assert_eq!(case.status(), 0xee);
        assert_eq!(case.resume(step, 0), Step::Done { written: 1 });
        assert_eq!(case.status(), S_OK);
    }
}

/// The driver may turn the write cache on while a request waits to be durable:
/// it was made when the cache was off.
#[test]
fn an_interrupted_sync_is_repeated_whatever_the_driver_sets_meanwhile() {
    let mut case = case(geometry(), T_WRITE_ZEROES, &list(&[(8, 8, 0)]));
    pericarp_vhost::Device::write_config(&case.device, WRITEBACK_OFFSET, &[0]).unwrap();
    let range = case.start();
    let sync = case.resume(range, 0);
    assert_eq!(sync, SYNC);
    pericarp_vhost::Device::write_config(&case.device, WRITEBACK_OFFSET, &[1]).unwrap();
    assert_eq!(case.resume(sync, -libc::EAGAIN), sync);
    assert_eq!(case.resume(sync, 0), Step::Done { written: 1 });
    assert_eq!(case.status(), S_OK);
}

#[test]
fn the_list_is_not_kept_once_the_request_is_over() {
    let mut case = case(geometry(), T_DISCARD, &list(&[(8, 8, 0); 256]));
    let mut step = case.start();
    while !matches!(step, Step::Done { .. }) {
        step = case.resume(step, 0);
    }
    let head = case.head;
    assert_eq!(case.queue.request(head).1.ranges.left.capacity(), 0);
}
