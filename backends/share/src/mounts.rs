//! What is known of each mount (and each btrfs subvolume) that a guest has
//! reached: whether its files have handles, and whether I/O on them can be told
//! not to wait. Found out once, by trying; `nodes` and `share::files` ask.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstatfs, openat, statx};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};
use rustix::path::DecInt;

use crate::attributes::{WANTED, identity};
use crate::calls::{FileHandle, handle_of, open_handle};
use crate::table::Identity;

/// How often a handle is tried that Linux has no memory for. It says so, too, of
/// an inode's number that another file is being made with at that moment: a
/// moment later the handle is stale.
const CREATING_TRIES: u32 = 64;

/// `statfs` magic numbers (include/uapi/linux/magic.h) of file systems whose
/// answers come from another process or machine, so that any call may wait.
const WAITING: [i64; 8] = [
    0x6573_5546, // FUSE
    0x6969,      // NFS
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x517b,      // SMB
    0x0102_1997, // 9P
    0x00c3_6400, // Ceph
    0x5346_414f, // AFS
];

/// Overlayfs: the first change of a file copies it, and so do some that change nothing. Device and
/// inode number stay.
pub(crate) const OVERLAY: i64 = 0x794c_7630;

/// Those known to take buffered writes without waiting, where it cannot be
/// tried: XFS, btrfs.
const NOWAIT_WRITES: [i64; 2] = [0x5846_5342, 0x9123_683e];

/// Where no file system has data (filemap_read ends there before it looks), and
/// a page before the end of offsets.
const BEYOND: u64 = (1 << 63) - 4096;

/// A mount.
#[derive(Debug)]
pub(crate) struct Mount {
    /// 0 for the root's, else what its inode numbers are mixed with.
    number: u64,
    /// Really open on the mount, as `open_by_handle_at` wants it: a directory,
    /// or the file that is mounted.
    anchor: Option<OwnedFd>,
    anchor_is_directory: bool,
    handles: AtomicBool,
    magic: i64,
    reads: OnceLock<bool>,
    writes: OnceLock<bool>,
}

impl Mount {
    fn new(
        number: u64,
        file: BorrowedFd<'_>,
        kind: FileType,
        proc: &OwnedFd,
        handles: bool,
    ) -> Self {
        let flags = match kind {
            FileType::Directory => Some(OFlags::DIRECTORY),
            FileType::RegularFile => Some(OFlags::NONBLOCK),
            _ => None,
        };
        let anchor = flags.and_then(|flags| {
            let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC;
            openat(proc, DecInt::from_fd(file), flags, Mode::empty()).ok()
        });
        let mount = Self {
            number,
            anchor_is_directory: anchor.is_some() && kind == FileType::Directory,
            anchor,
            handles: AtomicBool::new(true),
            magic: fstatfs(file).map_or(0, |figures| figures.f_type & 0xffff_ffff),
            reads: OnceLock::new(),
            writes: OnceLock::new(),
        };
        let works = handles && mount.handle(file).is_ok();
        mount.handles.store(works, Ordering::Relaxed);
        mount
    }

    /// What its inode numbers are mixed with.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Nodes on it can do without a descriptor.
    pub(crate) fn has_handles(&self) -> bool {
        self.handles.load(Ordering::Relaxed)
    }

    /// A handle that has been seen to lead back to the same file: encoding one
    /// takes no right, opening it does, and that may be lost since.
    pub(crate) fn handle(&self, file: BorrowedFd<'_>) -> Result<FileHandle, Errno> {
        if !self.has_handles() {
            return Err(Errno::NOTSUP);
        }
        let works = || {
            let handle = handle_of(file)?;
            let again = self.open(&handle)?;
            let what = |fd| statx(fd, c"", AtFlags::EMPTY_PATH, WANTED);
            let (now, then) = (what(again.as_fd())?, what(file)?);
            // Without a name it lives by our descriptor alone: its user, a
            // process in a removed directory for one, would find it stale.
            if identity(&now) != identity(&then) || then.stx_nlink == 0 {
                return Err(Errno::STALE);
            }
            Ok(handle)
        };
        works().inspect_err(|errno| {
            if matches!(*errno, Errno::PERM | Errno::NOTSUP | Errno::NOSYS) {
                self.handles.store(false, Ordering::Relaxed);
            }
        })
    }

    /// An O_PATH descriptor of what has this handle.
    pub(crate) fn open(&self, handle: &FileHandle) -> Result<OwnedFd, Errno> {
        let anchor = self.anchor.as_ref().ok_or(Errno::NOTSUP)?;
        let mut tries = 1..CREATING_TRIES;
        loop {
            match open_handle(anchor.as_fd(), handle) {
                Err(Errno::NOMEM) if tries.next().is_some() => std::thread::yield_now(),
                result => return result,
            }
        }
    }

    /// Inode numbers that differ from those of the root's file system.
    pub(crate) fn shown(&self, ino: u64) -> u64 {
        if self.number == 0 {
            return ino;
        }
        // One to one within the file system, and nothing that one counts up to.
        (ino ^ self.number << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Any call on it may wait for somebody else.
    pub(crate) fn waits(&self) -> bool {
        WAITING.contains(&self.magic)
    }

    /// Its files say another time of their making once they have been changed.
    pub(crate) fn copies_up(&self) -> bool {
        self.magic == OVERLAY
    }

    /// Whether reads of this file can be told not to wait (RWF_NOWAIT), as all
    /// of its mount. Nothing is read, and no time of access is set: at that
    /// offset no file has anything.
    pub(crate) fn reads_without_waiting(&self, file: BorrowedFd<'_>) -> bool {
        let mut byte = [0];
        *self.reads.get_or_init(|| {
            let result = preadv2(
                file,
                &mut [IoSliceMut::new(&mut byte)],
                BEYOND,
                ReadWriteFlags::NOWAIT,
            );
            !matches!(result, Err(Errno::OPNOTSUPP | Errno::NOSYS))
        })
    }

    /// The same, as far as it is known, for a file that cannot be read.
    pub(crate) fn are_reads_known_not_to_wait(&self) -> bool {
        self.reads.get().is_some_and(|reads| *reads)
    }

    /// The same for buffered writes: ext4 has the flag and refuses those. It is
    /// tried on a file without a name, since a write would show on any other.
    pub(crate) fn writes_without_waiting(&self) -> bool {
        *self.writes.get_or_init(|| {
            let known = NOWAIT_WRITES.contains(&self.magic);
            let Some(directory) = self.anchor.as_ref().filter(|_| self.anchor_is_directory) else {
                return known;
            };
            let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(0o600);
            let Ok(file) = openat(directory, c".", flags, mode) else {
                return known;
            };
            let result = pwritev2(&file, &[IoSlice::new(b"x")], 0, ReadWriteFlags::NOWAIT);
            !matches!(result, Err(Errno::OPNOTSUPP | Errno::NOSYS))
        })
    }
}

/// Mount and device.
type MountId = (u64, u64);

/// The number of a mount that is new.
fn next(known: &HashMap<MountId, (u64, Weak<Mount>)>) -> u64 {
    let numbers = known.values().map(|(number, _)| number + 1);
    numbers.max().unwrap_or(0)
}

/// All mounts reached.
#[derive(Debug)]
pub(crate) struct Mounts {
    handles: bool,
    /// Numbers stay, so that inode numbers do; the mounts go with their nodes,
    /// since what is open on one keeps the host from unmounting it.
    by_id: RwLock<HashMap<MountId, (u64, Weak<Mount>)>>,
}

impl Mounts {
    pub(crate) fn new(handles: bool) -> Self {
        Self {
            handles,
            by_id: RwLock::default(),
        }
    }

    /// Gives a mount the number that it had in a predecessor.
    pub(crate) fn number(&self, identity: &Identity, number: u64) {
        let mut known = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        let key = (identity.mount, identity.device);
        known.entry(key).or_insert((number, Weak::new()));
    }

    /// The mount of a file.
    pub(crate) fn of(
        &self,
        identity: &Identity,
        file: BorrowedFd<'_>,
        kind: FileType,
        proc: &OwnedFd,
    ) -> Arc<Mount> {
        let key = (identity.mount, identity.device);
        let known = self.by_id.read().unwrap_or_else(PoisonError::into_inner);
        let (number, mount) = match known.get(&key) {
            Some((number, mount)) => (*number, mount.upgrade()),
            None => (next(&known), None),
        };
        drop(known);
        if let Some(mount) = mount {
            return mount;
        }
        // Calls that may wait, so without the lock; of two that find out at the
        // same time one is enough, and the number is given under the lock.
        let mut new = Mount::new(number, file, kind, proc, self.handles);
        let mut known = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        let next = next(&known);
        let place = known.entry(key).or_insert((next, Weak::new()));
        if let Some(mount) = place.1.upgrade() {
            return mount;
        }
        new.number = place.0;
        let mount = Arc::new(new);
        place.1 = Arc::downgrade(&mount);
        mount
    }
}

#[cfg(test)]
impl Mount {
    /// Somewhere nobody has been, for tests of the table.
    pub(crate) fn with_handles() -> Self {
        Self {
            number: 0,
            anchor: None,
            anchor_is_directory: false,
            handles: AtomicBool::new(true),
            magic: 0,
            reads: OnceLock::new(),
            writes: OnceLock::new(),
        }
    }
}
