//! What is told of a file, from what `statx` says, and what can be changed.
//! Ids and inode numbers are the host's in here only until
//! [`Attributes::shown`] has translated them.

use rustix::fs::{FileType, Statx, StatxFlags};

use crate::table::{Identity, NodeId};

/// STATX_MNT_ID_UNIQUE, Linux 6.8: an id that no later mount gets again.
const MNT_ID_UNIQUE: u32 = 0x4000;

/// All we ask of `statx`. The identity is part of it: no second call for it.
pub(crate) const WANTED: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID)
    .union(StatxFlags::from_bits_retain(MNT_ID_UNIQUE));

/// A file, with ids as the guest has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number; of another file system than the root's, mixed with which.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last read, seconds.
    pub atime: i64,
    /// Nanoseconds of it.
    pub atime_ns: u32,
    /// Last write, seconds.
    pub mtime: i64,
    /// Nanoseconds of it.
    pub mtime_ns: u32,
    /// Last change of any kind, seconds.
    pub ctime: i64,
    /// Nanoseconds of it.
    pub ctime_ns: u32,
    /// Kind and permissions.
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a device node, in the kernel's 32-bit form (`new_encode_dev`).
    pub rdev: u32,
    /// Preferred size of a transfer.
    pub blksize: u32,
}

/// An answer to a lookup. It counts as one, until forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Whose.
    pub node: NodeId,
    /// How often the id's place has been used: id and generation are never
    /// given to two files.
    pub generation: u64,
    /// What it is.
    pub attributes: Attributes,
    /// A directory on another file system or mount than its parent.
    pub submount: bool,
    /// Anything on another mount than its parent.
    pub crosses: bool,
}

/// A moment to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// The host's clock.
    Now,
    /// Seconds and nanoseconds.
    At(i64, u32),
}

/// What to change; `None` leaves it. The time of the last change of any kind is
/// the host's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttributes {
    /// Permissions.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes.
    pub size: Option<u64>,
    /// Last read.
    pub atime: Option<Time>,
    /// Last write.
    pub mtime: Option<Time>,
    /// A change of size takes setuid and setgid away, as from a caller without
    /// CAP_FSETID.
    pub kill_suid_gid: bool,
}

/// Figures of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// Blocks of `fragment_size`.
    pub blocks: u64,
    /// Free ones.
    pub blocks_free: u64,
    /// Free ones that are not kept for root.
    pub blocks_available: u64,
    /// Inodes.
    pub files: u64,
    /// Free ones.
    pub files_free: u64,
    /// Preferred size of a transfer.
    pub block_size: u32,
    /// Longest name.
    pub name_length: u32,
    /// Unit of `blocks`.
    pub fragment_size: u32,
}

impl Attributes {
    pub(crate) fn of(stat: &Statx) -> Self {
        let time = |t: rustix::fs::StatxTimestamp| (t.tv_sec, t.tv_nsec);
        let (atime, atime_ns) = time(stat.stx_atime);
        let (mtime, mtime_ns) = time(stat.stx_mtime);
        let (ctime, ctime_ns) = time(stat.stx_ctime);
        Self {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime,
            atime_ns,
            mtime,
            mtime_ns,
            ctime,
            ctime_ns,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
        }
    }
}

pub(crate) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

pub(crate) fn identity(stat: &Statx) -> Identity {
    let known = stat.stx_mask & (StatxFlags::MNT_ID.bits() | MNT_ID_UNIQUE) != 0;
    Identity {
        mount: if known { stat.stx_mnt_id } else { 0 },
        device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
        ino: stat.stx_ino,
    }
}

/// When the file was made, in nanoseconds; 0 where its file system does not say.
pub(crate) fn born(stat: &Statx) -> u64 {
    match stat.stx_mask & StatxFlags::BTIME.bits() {
        0 => 0,
        _ => nanoseconds(stat.stx_btime),
    }
}

/// When the file changed last in any way, in nanoseconds.
pub(crate) fn changed(stat: &Statx) -> u64 {
    nanoseconds(stat.stx_ctime)
}

fn nanoseconds(time: rustix::fs::StatxTimestamp) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec.into())
}

/// include/linux/kdev_t.h, `new_encode_dev`.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// include/linux/kdev_t.h, `new_decode_dev`.
pub(crate) fn decode_device(device: u32) -> u64 {
    let major = (device & 0xf_ff00) >> 8;
    let minor = (device & 0xff) | ((device >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_the_kernels_form() {
        for (major, minor) in [(1, 3), (8, 17), (259, 300), (4095, 0xf_ffff)] {
            let encoded = encode_device(major, minor);
            assert_eq!(decode_device(encoded), rustix::fs::makedev(major, minor));
        }
        assert_eq!(encode_device(8, 17), 0x811);
    }
}
