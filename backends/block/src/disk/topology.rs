//! What a file or block device prefers and can do, asked once at open:
//! [`super::Disk::open`] calls this before the program confines itself.
//!
//! A probe never changes a byte of the disk. What cannot be asked for without
//! changing something (zeroing a range of a file) is found out by the first
//! request that needs it; see `device/space.rs`.
#![expect(unsafe_code)]
// UNSAFETY: three ioctls that read one integer each.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use pericarp_uring::can_discard;
use rustix::fs::FallocateFlags;
use rustix::ioctl::{Getter, ioctl, opcode};

/// Numbers of the block layer's ioctls, linux/fs.h.
const BLKIOMIN: u32 = opcode::none(0x12, 120);
const BLKIOOPT: u32 = opcode::none(0x12, 121);
const BLKALIGNOFF: u32 = opcode::none(0x12, 122);

/// How a disk gives space back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum DiscardBy {
    /// Not at all: DISCARD is not offered.
    #[default]
    Nothing,
    /// Holes in a file.
    Hole,
    /// The block device's own discard.
    Command,
}

/// Preferences and abilities, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Topology {
    /// Smallest unit that is not read, changed and written back.
    pub(crate) min_io: u32,
    /// Unit of streaming transfers, 0 where there is none.
    pub(crate) opt_io: u32,
    /// Distance of the first aligned byte from the disk's begin.
    pub(crate) align_offset: u32,
    pub(crate) discard: DiscardBy,
    /// Unit of discards.
    pub(crate) granularity: u32,
    /// Zeroed blocks can be given back.
    pub(crate) unmap_zeroes: bool,
}

/// Of an image file; `block` is its file system's.
pub(super) fn of_file(file: &File, size: u64, block: u32, read_only: bool) -> Topology {
    let holes = !read_only && takes_holes(file, size);
    Topology {
        min_io: block,
        discard: if holes {
            DiscardBy::Hole
        } else {
            DiscardBy::Nothing
        },
        granularity: block,
        unmap_zeroes: holes,
        ..Topology::default()
    }
}

/// What only sysfs and a ring tell of a block device. Nothing where it is
/// read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    /// Unit of discards; 0 where it cannot discard.
    pub discard_granularity: u32,
    /// Zeroed blocks can be given back.
    pub unmap_zeroes: bool,
}

impl Abilities {
    /// Before the program confines itself.
    pub(super) fn of_device(file: &File, logical: u32) -> io::Result<Self> {
        let limit = |name: &str| queue_limit(file, name).unwrap_or(0);
        let discards = limit("discard_max_bytes") > 0 && {
            // The probe needs a descriptor that cannot write. This path leads to
            // the very same device, whatever happened to its name meanwhile.
            let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            can_discard(again.as_raw_fd(), logical)
        };
        let granularity = u32::try_from(limit("discard_granularity")).unwrap_or(0);
        Ok(Self {
            discard_granularity: if discards {
                granularity.max(logical)
            } else {
                0
            },
            unmap_zeroes: limit("write_zeroes_max_bytes") > 0,
        })
    }
}

/// `ioctl` requests that measuring a block device takes, for a confined program
/// that is given one.
pub const MEASURING: [u32; 5] = [
    opcode::none(0x12, 104), // BLKSSZGET
    opcode::none(0x12, 123), // BLKPBSZGET
    BLKIOMIN,
    BLKIOOPT,
    BLKALIGNOFF,
];

/// Of a block device with these logical and physical blocks.
pub(super) fn of_device(
    file: &File,
    logical: u32,
    physical: u32,
    abilities: Abilities,
) -> Topology {
    // SAFETY: BLKIOMIN writes one unsigned int.
    let min_io = unsafe { ioctl(file, Getter::<BLKIOMIN, u32>::new()) };
    // SAFETY: BLKIOOPT writes one unsigned int.
    let opt_io = unsafe { ioctl(file, Getter::<BLKIOOPT, u32>::new()) };
    // SAFETY: BLKALIGNOFF writes one int, -1 where nothing is aligned.
    let align_offset = unsafe { ioctl(file, Getter::<BLKALIGNOFF, i32>::new()) };
    Topology {
        min_io: min_io.unwrap_or(physical),
        opt_io: opt_io.unwrap_or(0),
        align_offset: align_offset
            .ok()
            .and_then(|n| n.try_into().ok())
            .unwrap_or(0),
        discard: if abilities.discard_granularity > 0 {
            DiscardBy::Command
        } else {
            DiscardBy::Nothing
        },
        granularity: abilities.discard_granularity.max(logical),
        unmap_zeroes: abilities.unmap_zeroes,
    }
}

/// Tries a hole where nothing is: far behind the end, where it frees nothing
/// and, with KEEP_SIZE, changes no size.
fn takes_holes(file: &File, size: u64) -> bool {
    let offset = size.next_multiple_of(1 << 20).saturating_add(1 << 20);
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, mode, offset, 4096).is_ok()
}

/// A limit of the device's request queue; there is no ioctl for these.
fn queue_limit(file: &File, name: &str) -> Option<u64> {
    of_queue(file.metadata().ok()?.rdev(), name)
}

/// An attribute of the request queue of the block device with this number.
pub(super) fn of_queue(device: u64, name: &str) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let base = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A partition has the queue of its disk.
    ["queue", "../queue"].iter().find_map(|queue| {
        let text = std::fs::read_to_string(base.join(queue).join(name)).ok()?;
        text.trim().parse().ok()
    })
}

/// Whether reads of the file can be told not to wait. Where they cannot, a
/// ring does every one of them on a thread of the kernel's.
pub(super) fn reads_without_waiting(file: &File, block: u32) -> bool {
    let block = block as usize;
    let mut storage = vec![0u8; 2 * block.max(4096)];
    let start = storage.as_ptr().align_offset(block.max(4096));
    let Some(buffer) = storage.get_mut(start..start + block) else {
        return true;
    };
    let mut slices = [io::IoSliceMut::new(buffer)];
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    !matches!(
        rustix::io::preadv2(file, &mut slices, 0, flags),
        Err(rustix::io::Errno::OPNOTSUPP)
    )
}
