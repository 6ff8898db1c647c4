//! GETLK, SETLK and SETLKW, where the operator wants locks to be the host's, too.
//! Otherwise the guest is not told that there are any: its kernel then keeps them
//! for itself.
//!
//! A lock that is free is taken by the call. One that is not, and that the guest
//! wants to wait for, goes to `waits`.

use std::sync::{Arc, PoisonError};

use pericarp_share::{Errno, Handle, LockKind, OpenFile, RangeLock};
use pericarp_vhost::Errand;

use super::{Call, FsDevice, Request};
use crate::wire::{Fields, Header, LOCK, LOCK_WHOLE, RELEASE_UNLOCKS, Reply, feature};

/// A lock that a guest wants.
#[derive(Debug)]
pub(super) struct Wanted {
    file: Arc<OpenFile>,
    owner: u64,
    range: RangeLock,
    /// On the whole file, by the open file.
    whole: bool,
}

impl FsDevice {
    /// Locks are told of.
    pub(super) fn forwards_locks(&self) -> bool {
        self.session.has(feature::POSIX_LOCKS)
    }

    /// `fuse_lk_in`.
    fn wanted_lock(&self, fields: &mut Fields<'_>) -> Result<Wanted, Errno> {
        if !self.forwards_locks() {
            return Err(Errno::NOSYS);
        }
        let (handle, owner) = (Handle(fields.u64()?), fields.u64()?);
        let (start, end) = (fields.u64()?, fields.u64()?);
        let kind = match fields.u32()? as i32 {
            libc::F_RDLCK => LockKind::Read,
            libc::F_WRLCK => LockKind::Write,
            libc::F_UNLCK => LockKind::Unlock,
            _ => return Err(Errno::INVAL),
        };
        let (_process, flags) = (fields.u32()?, fields.u32()?);
        let whole = flags & LOCK_WHOLE != 0;
        if end < start || end > i64::MAX as u64 {
            return Err(Errno::INVAL);
        }
        Ok(Wanted {
            file: self.share.file(handle)?,
            owner,
            range: RangeLock { kind, start, end },
            whole,
        })
    }

    fn try_lock(&self, wanted: &Wanted) -> Result<(), Errno> {
        let Wanted {
            file, owner, range, ..
        } = wanted;
        match wanted.whole {
            true => file.lock_whole(range.kind)?,
            false => self.share.lock_range(file, *owner, range)?,
        }
        if range.kind != LockKind::Write {
            // It may be free for somebody else now.
            self.waits.look();
        }
        Ok(())
    }

    /// GETLK.
    pub(super) fn test_lock(&self, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let wanted = self.wanted_lock(fields)?;
        let found = self
            .share
            .test_range(&wanted.file, wanted.owner, &wanted.range)?;
        let mut reply = Reply::with_capacity(LOCK);
        let kind = match found.map(|lock| lock.kind) {
            Some(LockKind::Read) => libc::F_RDLCK,
            Some(LockKind::Write) => libc::F_WRLCK,
            _ => libc::F_UNLCK,
        };
        let range = found.unwrap_or(wanted.range);
        // Whose it is has no number in the guest.
        reply.u64(range.start).u64(range.end);
        reply.u32(kind as u32).u32(0);
        Ok(reply)
    }

    /// SETLK.
    pub(super) fn set_lock(&self, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let wanted = self.wanted_lock(fields)?;
        self.try_lock(&wanted).map(|()| Reply::default())
    }

    /// SETLKW: an answer, or else a call that waits.
    pub(super) fn await_lock(
        &self,
        header: &Header,
        body: &[u8],
        request: &mut Request,
    ) -> Result<Reply, Errno> {
        let mut fields = Fields(body);
        fields.group(header.extensions)?;
        let wanted = self.wanted_lock(&mut fields)?;
        // Where a call may take long the first attempt is not the worker's.
        if !self.share.waits() {
            match self.try_lock(&wanted) {
                Err(Errno::AGAIN) => {}
                done => return done.map(|()| Reply::default()),
            }
        }
        request.call = Some(Box::new(Call {
            header: *header,
            wanted: Some(wanted),
            ..Call::default()
        }));
        Ok(Reply::default())
    }

    /// What a request of [`await_lock`](Self::await_lock) does.
    pub(super) fn lock_errand(self: Arc<Self>, call: &Call, wanted: Wanted) -> Errand {
        let (unique, answer) = (call.header.unique, Arc::clone(&call.answer));
        Errand::awaited(move |report| {
            let device = Arc::clone(&self);
            let attempt = move || device.try_lock(&wanted);
            let end = move |result: Result<(), Errno>| {
                let found = result.map(|()| Reply::default());
                *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
                report(0);
            };
            self.waits.add(unique, Box::new(attempt), Box::new(end));
        })
    }

    /// FLUSH: a process closes the file.
    pub(super) fn flush(&self, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let (handle, _, owner) = (Handle(fields.u64()?), fields.u64()?, fields.u64()?);
        if !self.forwards_locks() {
            return self.share.flush(handle).map(|()| Reply::default());
        }
        let file = self.share.file(handle)?;
        self.share.unlock_owner(&file, owner);
        self.waits.look();
        match self.share.flush(handle) {
            // It would be the last that is told.
            Err(Errno::NOSYS) | Ok(()) => Ok(Reply::default()),
            Err(errno) => Err(errno),
        }
    }

    /// RELEASE: nobody has the file open any more.
    pub(super) fn release(&self, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let (handle, _, flags) = (Handle(fields.u64()?), fields.u32()?, fields.u32()?);
        if self.forwards_locks() {
            let file = self.share.file(handle)?;
            self.share.unlock_file(&file);
            if flags & RELEASE_UNLOCKS != 0 {
                // Requests under way may keep it open for a while.
                file.lock_whole(LockKind::Unlock)?;
            }
        }
        self.share.close_file(handle)?;
        if self.forwards_locks() {
            self.waits.look();
        }
        Ok(Reply::default())
    }
}
