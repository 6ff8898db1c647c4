//! The state machine against chains laid out by hand: which step a request
//! leads to, and what the guest finds in its status byte and used element.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use pericarp_ring::{GuestMemory, QueueLayout, Region, RegionSpec, RequestQueue, SplitQueue};
use rustix::fs::{MemfdFlags, memfd_create};

use super::config::CONFIG_BYTES;
use super::*;
use crate::disk::Topology;

pub(super) const HEADER: u64 = 0x4000;
pub(super) const DATA: u64 = 0x1_0000;
pub(super) const STATUS: u64 = 0x5000;
pub(super) const DISK_SECTORS: u64 = 64;
pub(super) const SYNC: Step = Step::Sync {
    file: FILE,
    metadata: false,
};
const SPACE: u64 = feature::DISCARD | feature::WRITE_ZEROES;

/// One guest with one request, and the device that looks at it.
pub(super) struct Case {
    pub(super) device: BlockDevice,
    guest: File,
    pub(super) queue: RequestQueue<Request>,
    pub(super) head: u16,
}

pub(super) fn geometry() -> Geometry {
    Geometry {
        read_only: false,
        cache: CacheMode::Direct,
        logical_block: 512,
        physical_block: 4096,
        memory_align: 512,
        topology: Topology {
            min_io: 4096,
            discard: DiscardBy::Hole,
            granularity: 4096,
            unmap_zeroes: true,
            ..Topology::default()
        },
    }
}

pub(super) fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

impl Case {
    /// A request of this kind with a data segment, if it has a length.
    fn new(disk: Geometry, kind: u32, sector: u64, data: (u64, u32)) -> Self {
        let guest = memfd(0x4_0000);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        guest.write_all_at(&header, HEADER).unwrap();
        guest.write_all_at(&[0xee], STATUS).unwrap();
        let writes = u16::from(kind != T_OUT) * 2;
        let mut chain = vec![(HEADER, 16, 0u16)];
        if data.1 > 0 {
            chain.push((data.0, data.1, writes));
        }
        chain.push((STATUS, 1, 2));
        Self::with_chain(disk, guest, &chain)
    }

    pub(super) fn with_chain(disk: Geometry, guest: File, chain: &[(u64, u32, u16)]) -> Self {
        for (n, (address, len, flags)) in chain.iter().enumerate() {
            let next = u16::from(n + 1 < chain.len());
            let mut raw = address.to_le_bytes().to_vec();
            raw.extend_from_slice(&len.to_le_bytes());
            raw.extend_from_slice(&(flags | next).to_le_bytes());
            raw.extend_from_slice(&(n as u16 + 1).to_le_bytes());
            guest.write_all_at(&raw, 16 * n as u64).unwrap();
        }
        guest.write_all_at(&1u16.to_le_bytes(), 0x1002).unwrap();
        let spec = RegionSpec {
            guest_address: 0,
            size: 0x4_0000,
            user_address: 0,
            file_offset: 0,
        };
        let region = Region::map(guest.try_clone().unwrap(), spec).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![region]).unwrap());
        let layout = QueueLayout {
            size: 16,
            descriptors: 0,
            available: 0x1000,
            used: 0x2000,
        };
        let queue = SplitQueue::new(memory, layout, 0, false).unwrap();
        let device = BlockDevice {
            disk,
            size: AtomicU64::new(DISK_SECTORS * SECTOR),
            files: [memfd(DISK_SECTORS * SECTOR).into()],
            serial: *b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            queues: 1,
            queue_size: 16,
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            zeroing: Zeroing::default(),
            waits: false,
            polled: false,
        };
        device.negotiated(feature::FLUSH | feature::CONFIG_WCE | SPACE);
        Self {
            device,
            guest,
            queue: RequestQueue::new(queue),
            head: 0,
        }
    }

    pub(super) fn start(&mut self) -> Step {
        let (head, loaded) = self.queue.pop().unwrap().unwrap();
        self.head = head;
        let (chain, request) = self.queue.request(head);
        self.device.start(loaded, chain, request)
    }

    /// As a worker does when I/O ends.
    pub(super) fn resume(&mut self, last: Step, result: i32) -> Step {
        if let Ok(bytes) = u64::try_from(result) {
            match last {
                Step::Read { buffer, .. } => self.queue.read_done(self.head, buffer, bytes),
                Step::Write { .. } => self.queue.write_done(self.head, bytes),
                _ => {}
            }
        }
        let (chain, request) = self.queue.request(self.head);
        self.device.resume(chain, request, result)
    }

    pub(super) fn status(&self) -> u8 {
        let mut byte = [0];
        self.guest.read_exact_at(&mut byte, STATUS).unwrap();
        byte[0]
    }
}

fn read_step(offset: u64, buffer: Buffer) -> Step {
    Step::Read {
        file: FILE,
        offset,
        flags: 0,
        buffer,
    }
}

fn write_step(offset: u64, flags: i32) -> Step {
    Step::Write {
        file: FILE,
        offset,
        flags,
        buffer: Buffer::Chain,
    }
}

#[test]
fn a_read_ends_with_ok_and_counts_its_bytes() {
    let mut case = Case::new(geometry(), T_IN, 8, (DATA, 4096));
    let step = case.start();
    assert_eq!(step, read_step(4096, Buffer::Chain));
    assert_eq!(case.resume(step, 4096), Step::Done { written: 4097 });
    assert_eq!(case.status(), S_OK);
}

#[test]
fn a_short_transfer_goes_on_where_it_stopped() {
    let mut case = Case::new(geometry(), T_IN, 8, (DATA, 4096));
    let step = case.start();
    let step = case.resume(step, 1024);
    assert_eq!(step, read_step(5120, Buffer::Chain));
    assert_eq!(case.queue.request(0).0.writable_len(), 3072);
    assert_eq!(case.resume(step, 3072), Step::Done { written: 4097 });
    assert_eq!(case.status(), S_OK);
}

#[test]
fn the_end_of_a_truncated_file_is_an_error() {
    let mut case = Case::new(geometry(), T_IN, 8, (DATA, 4096));
    let step = case.start();
    let step = case.resume(step, 512);
    assert_eq!(case.resume(step, 0), Step::Done { written: 513 });
    assert_eq!(case.status(), S_IOERR);
}

#[test]
fn an_interrupted_transfer_is_repeated_but_not_for_ever() {
    let mut case = Case::new(geometry(), T_OUT, 0, (DATA, 512));
    let mut step = case.start();
    for _ in 0..MAX_RETRIES {
        step = case.resume(step, -libc::EAGAIN);
        assert_eq!(step, write_step(0, 0));
    }
    assert_eq!(case.resume(step, -libc::EINTR), Step::Done { written: 1 });
    assert_eq!(case.status(), S_IOERR);
}

#[test]
fn a_failed_transfer_is_an_error() {
    let mut case = Case::new(geometry(), T_OUT, 0, (DATA, 512));
    let step = case.start();
    assert_eq!(case.resume(step, -libc::ENOSPC), Step::Done { written: 1 });
    assert_eq!(case.status(), S_IOERR);
}

#[test]
fn requests_outside_the_disk_are_errors() {
    for (sector, bytes) in [
        (DISK_SECTORS, 512),
        (DISK_SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (0, 0),
        (0, 511),
        (0, 513),
    ] {
        for kind in [T_IN, T_OUT] {
            let mut case = Case::new(geometry(), kind, sector, (DATA, bytes));
            assert_eq!(case.start(), Step::Done { written: 1 }, "{sector} {bytes}");
            assert_eq!(case.status(), S_IOERR);
        }
    }
}

#[test]
fn a_disk_with_large_blocks_takes_whole_blocks_only() {
    let disk = Geometry {
        logical_block: 4096,
        ..geometry()
    };
    let mut case = Case::new(disk, T_IN, 1, (DATA, 4096));
    assert_eq!(case.start(), Step::Done { written: 1 });
    let mut case = Case::new(disk, T_IN, 8, (DATA, 4096));
    assert_eq!(case.start(), read_step(4096, Buffer::Chain));
}

#[test]
fn misaligned_memory_is_bounced_only_for_direct_io() {
    for (cache, buffer) in [
        (CacheMode::Direct, Buffer::Bounce),
        (CacheMode::Buffered, Buffer::Chain),
    ] {
        let disk = Geometry {
            cache,
            ..geometry()
        };
        let mut case = Case::new(disk, T_IN, 0, (DATA + 3, 512));
        assert_eq!(case.start(), read_step(0, buffer));
    }
}

#[test]
fn a_segment_that_is_part_of_a_block_is_bounced() {
    let guest = memfd(0x4_0000);
    let chain = [
        (HEADER, 16, 0),
        (DATA, 256, 2),
        (DATA + 0x2000, 256, 2),
        (STATUS, 1, 2),
    ];
    let mut case = Case::with_chain(geometry(), guest, &chain);
    assert_eq!(case.start(), read_step(0, Buffer::Bounce));
}

#[test]
fn writes_to_a_read_only_disk_are_errors_and_flushes_are_not() {
    let disk = Geometry {
        read_only: true,
        ..geometry()
    };
    let mut case = Case::new(disk, T_OUT, 0, (DATA, 512));
    assert_eq!(case.start(), Step::Done { written: 1 });
    assert_eq!(case.status(), S_IOERR);
    assert_ne!(case.device.features() & feature::RO, 0);
    let mut case = Case::new(disk, T_FLUSH, 0, (DATA, 0));
    assert_eq!(case.start(), Step::Done { written: 1 });
    assert_eq!(case.status(), S_OK);
}

#[test]
fn a_flush_syncs_before_it_succeeds() {
    let mut case = Case::new(geometry(), T_FLUSH, 0, (DATA, 0));
    let step = case.start();
    assert_eq!(step, SYNC);
    assert_eq!(case.status(), 0xee, "not before the data is safe");
    assert_eq!(case.resume(step, 0), Step::Done { written: 1 });
    assert_eq!(case.status(), S_OK);
}

#[test]
fn the_write_cache_follows_features_and_configuration() {
    let flags = |features: u64, off: bool| {
        let mut case = Case::new(geometry(), T_OUT, 0, (DATA, 512));
        case.device.negotiated(features);
        if off {
            case.device.write_config(WRITEBACK_OFFSET, &[0]).unwrap();
        }
        case.start()
    };
    assert_eq!(flags(feature::FLUSH, false), write_step(0, 0));
    assert_eq!(flags(0, false), write_step(0, RWF_DSYNC));
    let both = feature::FLUSH | feature::CONFIG_WCE;
    assert_eq!(flags(both, false), write_step(0, 0));
    assert_eq!(flags(both, true), write_step(0, RWF_DSYNC));
}

#[test]
fn a_write_stays_durable_whatever_the_driver_sets_meanwhile() {
    let mut case = Case::new(geometry(), T_OUT, 0, (DATA, 1024));
    case.device.write_config(WRITEBACK_OFFSET, &[0]).unwrap();
    let step = case.start();
    assert_eq!(step, write_step(0, RWF_DSYNC));
    case.device.write_config(WRITEBACK_OFFSET, &[1]).unwrap();
    assert_eq!(case.resume(step, -libc::EAGAIN), step);
    assert_eq!(case.resume(step, 512), write_step(512, RWF_DSYNC));
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let case = Case::new(geometry(), T_IN, 0, (DATA, 512));
    assert!(case.device.write_config(WRITEBACK_OFFSET, &[2]).is_err());
    assert!(case.device.write_config(0, &[0]).is_err());
    assert!(case.device.write_config(WRITEBACK_OFFSET, &[1, 0]).is_err());
    case.device.write_config(WRITEBACK_OFFSET, &[0]).unwrap();
    assert_eq!(case.device.config()[WRITEBACK_OFFSET], 0);
    case.device.negotiated(feature::FLUSH);
    assert!(case.device.write_config(WRITEBACK_OFFSET, &[0]).is_err());
}

#[test]
fn the_serial_fills_what_the_guest_offers() {
    let mut case = Case::new(geometry(), T_GET_ID, 0, (DATA, 20));
    assert_eq!(case.start(), Step::Done { written: 21 });
    let mut bytes = [0; 6];
    case.guest.read_exact_at(&mut bytes, DATA).unwrap();
    assert_eq!(&bytes, b"serial");
    let mut case = Case::new(geometry(), T_GET_ID, 0, (DATA, 4));
    assert_eq!(case.start(), Step::Done { written: 5 });
}

#[test]
fn unknown_requests_are_unsupported_and_malformed_ones_errors() {
    let mut case = Case::new(geometry(), 77, 0, (DATA, 512));
    assert_eq!(case.start(), Step::Done { written: 1 });
    assert_eq!(case.status(), S_UNSUPP);
    // A header that is too short.
    let chain = [(HEADER, 15, 0), (STATUS, 1, 2)];
    let mut case = Case::with_chain(geometry(), memfd(0x4_0000), &chain);
    assert_eq!(case.start(), Step::Done { written: 1 });
    assert_eq!(case.status(), S_IOERR);
    // No status byte: nothing can be said, but the chain comes back.
    let chain = [(HEADER, 16, 0), (DATA, 512, 0)];
    let mut case = Case::with_chain(geometry(), memfd(0x4_0000), &chain);
    assert_eq!(case.start(), Step::Done { written: 0 });
}

#[test]
fn a_header_may_be_split_and_joined_with_data() {
    let guest = memfd(0x4_0000);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&T_OUT.to_le_bytes());
    header[8..].copy_from_slice(&3u64.to_le_bytes());
    guest.write_all_at(&header[..5], 0x6000).unwrap();
    guest.write_all_at(&header[5..], 0x7000).unwrap();
    let chain = [(0x6000, 5, 0), (0x7000, 11 + 512, 0), (STATUS, 1, 2)];
    let mut case = Case::with_chain(geometry(), guest, &chain);
    let step = Step::Write {
        file: FILE,
        offset: 3 * SECTOR,
        flags: 0,
        buffer: Buffer::Bounce,
    };
    assert_eq!(case.start(), step);
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let case = Case::new(geometry(), T_IN, 0, (DATA, 512));
    let space = case.device.config();
    assert_eq!(space.len(), CONFIG_BYTES);
    assert_eq!(space[..8], DISK_SECTORS.to_le_bytes());
    assert_eq!(space[12..16], 14u32.to_le_bytes());
    assert_eq!(space[20..24], 512u32.to_le_bytes());
    assert_eq!(
        space[24..26],
        [3, 0],
        "eight logical blocks in a physical one"
    );
    assert_eq!(space[26..28], 8u16.to_le_bytes(), "smallest good transfer");
    assert_eq!(space[34..36], 1u16.to_le_bytes());
    assert_eq!(space[44..48], 8u32.to_le_bytes(), "unit of discards");
    assert_eq!(space[56], 1, "zeroes may unmap");
    for limit in [36, 40, 48, 52] {
        assert_ne!(space[limit..limit + 4], [0; 4]);
    }
}

#[test]
fn the_configuration_space_of_a_block_device_has_its_topology() {
    let disk = Geometry {
        logical_block: 4096,
        physical_block: 16384,
        topology: Topology {
            min_io: 65536,
            opt_io: 1 << 20,
            align_offset: 12288,
            discard: DiscardBy::Nothing,
            granularity: 4096,
            unmap_zeroes: false,
        },
        ..geometry()
    };
    let case = Case::new(disk, T_IN, 0, (DATA, 4096));
    let space = case.device.config();
    assert_eq!(space[20..24], 4096u32.to_le_bytes());
    assert_eq!(space[24..26], [2, 3], "in logical blocks");
    assert_eq!(space[26..28], 16u16.to_le_bytes());
    assert_eq!(space[28..32], 256u32.to_le_bytes());
    assert_eq!(space[36..48], [0; 12], "no discard");
    assert_eq!(space[56], 0);
    assert_eq!(case.device.features() & feature::DISCARD, 0);
    // Of no use, and so not offered: SIZE_MAX (1) and GEOMETRY (4).
    assert_eq!(case.device.features() & (1 << 1 | 1 << 4), 0);
}

#[test]
fn a_resized_disk_has_another_end_and_refuses_no_size_at_all() {
    let past = |sectors: u64| {
        let mut case = Case::new(geometry(), T_IN, DISK_SECTORS, (DATA, 512));
        let file = File::from(case.device.files[0].try_clone().unwrap());
        file.set_len(sectors * SECTOR).unwrap();
        let sized = case.device.resize();
        let capacity = u64::from_le_bytes(case.device.config()[..8].try_into().unwrap());
        (sized, capacity, case.start())
    };
    let (sized, capacity, step) = past(DISK_SECTORS * 2);
    assert_eq!(sized.unwrap(), DISK_SECTORS * 2 * SECTOR);
    assert_eq!(capacity, DISK_SECTORS * 2);
    assert!(matches!(step, Step::Read { .. }));
    let (sized, capacity, step) = past(DISK_SECTORS / 2);
    assert_eq!((sized.is_ok(), capacity), (true, DISK_SECTORS / 2));
    assert!(matches!(step, Step::Done { .. }));
    let (sized, capacity, _) = past(0);
    assert!(matches!(sized, Err(DiskError::Empty)));
    assert_eq!(capacity, DISK_SECTORS);
}
