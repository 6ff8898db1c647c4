//! Locks that the host has, too: what a guest locks, other guests and the host
//! find locked. Nothing here waits; who wants a lock that another has is told
//! EAGAIN and asks again.
//!
//! A lock on a whole file (flock) is one of the guest's open file, which is one
//! of ours: it ends with it. A lock on a range (fcntl) belongs to a process and a
//! file, over all of the process's open ones, and ends when the first of them is
//! closed. Each such owner therefore has the file open once for its locks alone
//! (an open file description lock, F_OFD_SETLK): locks of one owner meet those of
//! others, and never each other. What the guest itself takes as such a lock has
//! an open file for its owner and is not flushed: it ends when the file does
//! through which it was taken.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::Share;
use crate::calls;
use crate::handles::OpenFile;
use crate::pieces::Passed;
use crate::table::{NodeId, Permit};

/// The most owners of locks on ranges; more are told ENOLCK.
const MOST_OWNERS: usize = 4096;

/// What is wanted of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// Together with other readers.
    Read,
    /// Alone.
    Write,
    /// Not any more.
    Unlock,
}

/// A lock on a range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLock {
    /// What kind.
    pub kind: LockKind,
    /// First byte.
    pub start: u64,
    /// Last byte; the largest offset there is stands for all that comes.
    pub end: u64,
}

/// One owner's file for its locks.
#[derive(Debug)]
struct Owned {
    // Closed before the permit is given back.
    file: OwnedFd,
    _permit: Permit,
    /// The owner has closed the file: what is locked from here on is unlocked.
    closed: AtomicBool,
}

impl AsFd for Owned {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Debug)]
struct Owner {
    owned: Arc<Owned>,
    /// What it locked through last.
    through: Weak<OpenFile>,
}

/// Whoever has locks on ranges.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    by_file: Mutex<BTreeMap<(NodeId, u64), Owner>>,
    count: AtomicUsize,
}

impl Owners {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(NodeId, u64), Owner>> {
        self.by_file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, file: &OpenFile, owner: u64) -> Option<Arc<Owned>> {
        let all = self.lock();
        all.get(&(file.node, owner))
            .map(|owner| owner.owned.clone())
    }

    fn end(&self, gone: impl IntoIterator<Item = Owner>) {
        for owner in gone {
            owner.owned.closed.store(true, Ordering::SeqCst);
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Each with the open file that it locked through last, and its own.
    pub(super) fn all(&self) -> Vec<(NodeId, u64, *const OpenFile, Passed)> {
        let all = self.lock();
        let each = all.iter().map(|((node, owner), known)| {
            let file: Passed = known.owned.clone();
            (*node, *owner, Weak::as_ptr(&known.through), file)
        });
        each.collect()
    }

    /// An owner that another process knew, with its locks.
    pub(super) fn put_back(
        &self,
        (node, owner): (NodeId, u64),
        through: Option<&Arc<OpenFile>>,
        file: OwnedFd,
        permit: Permit,
    ) {
        let owned = Arc::new(Owned {
            file,
            _permit: permit,
            closed: AtomicBool::new(false),
        });
        let through = through.map_or_else(Weak::new, Arc::downgrade);
        let before = self.lock().insert((node, owner), Owner { owned, through });
        if before.is_none() {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut *self.lock());
        self.end(gone.into_values());
    }
}

impl Share {
    /// Takes, changes or gives up an owner's lock on a range.
    ///
    /// # Errors
    /// EAGAIN where another has it, EINVAL for a range that is none, EBADF for a
    /// lock that the file cannot be opened for, ENOLCK at a limit.
    pub fn lock_range(
        &self,
        file: &Arc<OpenFile>,
        owner: u64,
        lock: &RangeLock,
    ) -> Result<(), Errno> {
        let mut raw = raw(lock)?;
        let owned = match self.owners.find(file, owner) {
            None if lock.kind == LockKind::Unlock => return Ok(()),
            None => self.new_owner(file, owner)?,
            Some(owned) => {
                if let Some(owner) = self.owners.lock().get_mut(&(file.node, owner)) {
                    owner.through = Arc::downgrade(file);
                }
                owned
            }
        };
        calls::record_lock(owned.file.as_fd(), libc::F_OFD_SETLK, &mut raw)?;
        // As fcntl says it of a file that was closed meanwhile; what was locked
        // goes with the last that has it.
        match owned.closed.load(Ordering::SeqCst) {
            true => Err(Errno::BADF),
            false => Ok(()),
        }
    }

    /// Whose lock is in the way of this one, if any is.
    ///
    /// # Errors
    /// As [`lock_range`](Self::lock_range), but for EAGAIN.
    pub fn test_range(
        &self,
        file: &OpenFile,
        owner: u64,
        lock: &RangeLock,
    ) -> Result<Option<RangeLock>, Errno> {
        let mut raw = raw(lock)?;
        if lock.kind == LockKind::Unlock {
            return Err(Errno::INVAL);
        }
        // The open file itself never has such a lock.
        let owned = self.owners.find(file, owner);
        let file = owned.as_ref().map_or(file.as_fd(), |o| o.file.as_fd());
        calls::record_lock(file, libc::F_OFD_GETLK, &mut raw)?;
        let kind = match i32::from(raw.l_type) {
            libc::F_UNLCK => return Ok(None),
            libc::F_WRLCK => LockKind::Write,
            _ => LockKind::Read,
        };
        let start = raw.l_start.max(0);
        let end = match raw.l_len {
            0 => i64::MAX,
            len => start.saturating_add(len - 1),
        };
        Ok(Some(RangeLock {
            kind,
            start: start as u64,
            end: end as u64,
        }))
    }

    /// An owner closes one of its open files of this node: its locks are gone.
    pub fn unlock_owner(&self, file: &OpenFile, owner: u64) {
        if self.owners.count.load(Ordering::Relaxed) > 0 {
            let gone = self.owners.lock().remove(&(file.node, owner));
            self.owners.end(gone);
        }
    }

    /// Nobody has this file open any more: what was locked on ranges through it
    /// is not.
    pub fn unlock_file(&self, file: &Arc<OpenFile>) {
        if self.owners.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut gone = Vec::new();
        let mut all = self.owners.lock();
        let whole = (file.node, 0)..=(file.node, u64::MAX);
        let ended: Vec<_> = all
            .range(whole)
            .filter(|(_, owner)| Weak::as_ptr(&owner.through) == Arc::as_ptr(file))
            .map(|(key, _)| *key)
            .collect();
        for key in ended {
            gone.extend(all.remove(&key));
        }
        drop(all);
        self.owners.end(gone);
    }

    fn new_owner(&self, file: &Arc<OpenFile>, owner: u64) -> Result<Arc<Owned>, Errno> {
        if self.owners.count.load(Ordering::Relaxed) >= MOST_OWNERS {
            return Err(Errno::NOLCK);
        }
        let permit = self.handles.permit().map_err(|_| Errno::NOLCK)?;
        let open = |mode| self.reopen_fd(file.as_fd(), mode);
        let opened = match self.options.read_only {
            true => open(OFlags::RDONLY),
            // For both kinds of locks; a file that cannot be written to, or is
            // being executed, can be locked for reading.
            false => open(OFlags::RDWR).or_else(|_| open(OFlags::RDONLY)),
        };
        let new = Arc::new(Owned {
            file: opened?,
            _permit: permit,
            closed: AtomicBool::new(false),
        });
        let mut all = self.owners.lock();
        let entry = all.entry((file.node, owner)).or_insert_with(|| {
            self.owners.count.fetch_add(1, Ordering::Relaxed);
            Owner {
                owned: new,
                through: Weak::new(),
            }
        });
        entry.through = Arc::downgrade(file);
        Ok(entry.owned.clone())
    }
}

impl OpenFile {
    /// Locks or unlocks the whole file, as one open file among all of it.
    ///
    /// # Errors
    /// EAGAIN where another has it.
    pub fn lock_whole(&self, kind: LockKind) -> Result<(), Errno> {
        let operation = match kind {
            LockKind::Read => FlockOperation::NonBlockingLockShared,
            LockKind::Write => FlockOperation::NonBlockingLockExclusive,
            LockKind::Unlock => FlockOperation::Unlock,
        };
        flock(self, operation)
    }
}

fn raw(lock: &RangeLock) -> Result<libc::flock, Errno> {
    let kind = match lock.kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
        LockKind::Unlock => libc::F_UNLCK,
    };
    let start = i64::try_from(lock.start).map_err(|_| Errno::INVAL)?;
    let end = i64::try_from(lock.end).map_err(|_| Errno::INVAL)?;
    if end < start {
        return Err(Errno::INVAL);
    }
    let len = match end {
        i64::MAX => 0,
        end => end - start + 1,
    };
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        // What the kernel wants of an open file description's lock.
        l_pid: 0,
    })
}
