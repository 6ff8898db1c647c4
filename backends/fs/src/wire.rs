//! FUSE as it is on the wire (linux/fuse.h, protocol 7): numbers, requests,
//! replies. [`crate::FsDevice`] reads and writes it; nothing here touches a file
//! or a ring.
//!
//! All of it is little-endian: what a guest of another order sends is refused at
//! INIT, whose version then reads wrong.

mod reply;
mod request;

pub(crate) use reply::{Reply, Validity, dirent_size, push_entry_bare};
pub(crate) use request::{Fields, Header, names};

/// Bytes of the header of a request, and of a reply.
pub(crate) const IN_HEADER: usize = 40;
pub(crate) const OUT_HEADER: usize = 16;
/// Bytes of an entry, of attributes with their validity, of a directory entry
/// without its name.
pub(crate) const ENTRY: usize = 128;
pub(crate) const ATTRIBUTES: usize = 104;
pub(crate) const DIRENT: usize = 24;

/// The version served, and the oldest that a guest may speak: with a flush that
/// may be missing and sizes of requests that it asks for (Linux 4.20).
pub(crate) const MAJOR: u32 = 7;
pub(crate) const MINOR: u32 = 38;
pub(crate) const OLDEST_MINOR: u32 = 27;

/// The largest number of bytes in one READ or WRITE, and pages of 4 KiB in it.
pub(crate) const MAX_TRANSFER: u32 = 1 << 20;
pub(crate) const MAX_PAGES: u16 = 256;

/// What a request wants.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const ACCESS: u32 = 34;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
}

/// What a session may do; the first 32 bits are in INIT's `flags`, the others
/// in `flags2`.
pub(crate) mod feature {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const POSIX_LOCKS: u64 = 1 << 1;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const FLOCK_LOCKS: u64 = 1 << 10;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(crate) const NO_OPEN: u64 = 1 << 17;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const NO_OPENDIR: u64 = 1 << 24;
    pub(crate) const SUBMOUNTS: u64 = 1 << 27;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const CREATE_SUPP_GROUP: u64 = 1 << 34;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// What an open file may do in the guest.
pub(crate) mod open {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const CACHE_DIR: u32 = 1 << 3;
    /// Closing it is not told (FLUSH). Linux before 5.16 tells it all the same.
    pub(crate) const NO_FLUSH: u32 = 1 << 5;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    /// Of a request.
    pub(crate) const KILL_SUIDGID: u32 = 1 << 0;
}

/// Which attributes SETATTR sets.
pub(crate) mod set {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const HANDLE: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Locks: on the whole file, as flock has it.
pub(crate) const LOCK_WHOLE: u32 = 1;
/// RELEASE: such a lock is given up.
pub(crate) const RELEASE_UNLOCKS: u32 = 1 << 1;
/// Bytes of a lock.
pub(crate) const LOCK: usize = 24;
/// GETATTR: by the open file.
pub(crate) const GETATTR_HANDLE: u32 = 1;
/// WRITE: pages that the guest had cached, which belong where they are.
pub(crate) const WRITE_CACHE: u32 = 1 << 0;
/// WRITE: take setuid and setgid away.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FSYNC: data alone.
pub(crate) const FSYNC_DATA: u32 = 1;
/// SETXATTR: an access control list takes setgid away.
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1;
/// SETXATTR: bytes of flags and padding, where both sides agreed on them.
pub(crate) const SETXATTR_EXTENDED: usize = 8;
/// Attributes: another mount is here.
pub(crate) const ATTRIBUTE_SUBMOUNT: u32 = 1;
/// The kind of extension that names groups of the caller.
pub(crate) const EXTENSION_GROUPS: u32 = 32;
