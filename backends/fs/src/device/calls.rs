//! Everything that is answered at once: names, attributes, opening, closing.
//!
//! A reply that does not fit is refused before anything is done, so that a guest
//! cannot lose track of what it has.

use pericarp_ring::Chain;
use pericarp_share::{Caller, Entry, Errno, Handle, NodeId, OpenFile, SetAttributes, Time, Xattr};

use super::again::{Asked, Recorded, renaming};
use super::{Cache, FsDevice};
use crate::wire::{
    ATTRIBUTES, ENTRY, Fields, GETATTR_HANDLE, Header, LOCK, Reply, SETXATTR_ACL_KILL_SGID,
    feature, names, opcode, open, set,
};

/// Bytes of `fuse_open_out`, and of `fuse_write_out` and others of one or two
/// numbers.
const OPENED: usize = 16;
const NUMBERS: usize = 8;
/// Bytes of `fuse_statfs_out`.
const FIGURES: usize = 80;
/// The most bytes that one COPY_FILE_RANGE copies: the worker waits for it.
const MOST_COPIED: u64 = 8 << 20;

impl FsDevice {
    pub(super) fn call(
        &self,
        header: &Header,
        body: &[u8],
        room: usize,
        recorded: Option<Recorded>,
    ) -> Result<Reply, Errno> {
        let mut fields = Fields(body);
        let mut caller = header.caller;
        // Agreed or not, they are no part of a name or a value.
        let group = fields.group(header.extensions)?;
        caller.group = group.filter(|_| self.session.has(feature::CREATE_SUPP_GROUP));
        if room < reply_size(header.opcode) {
            return Err(Errno::INVAL);
        }
        let asked = Asked {
            header,
            caller: &caller,
            fields,
        };
        self.call_recorded(recorded, asked, room)
    }

    /// Does what a request asks for.
    pub(super) fn act(&self, asked: Asked<'_>, room: usize) -> Result<Reply, Errno> {
        let Asked {
            header,
            caller,
            mut fields,
        } = asked;
        let node = NodeId(header.node);
        let fields = &mut fields;
        match header.opcode {
            opcode::LOOKUP => self.lookup(node, fields),
            opcode::GETATTR => self.attributes(node, fields),
            opcode::SETATTR => self.set_attributes(node, fields),
            opcode::READLINK => {
                let mut target = self.share.read_link(node)?;
                // The guest asks for as much as a path can be long.
                target.truncate(room);
                Ok(Reply(target))
            }
            opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => {
                let entry = self.make(header.opcode, caller, node, fields)?;
                Ok(self.entry(&entry))
            }
            opcode::CREATE | opcode::TMPFILE => self.create(header.opcode, caller, node, fields),
            opcode::UNLINK => done(self.share.unlink(node, fields.name()?)),
            opcode::RMDIR => done(self.share.remove_dir(node, fields.name()?)),
            opcode::RENAME | opcode::RENAME2 => self.rename(header.opcode, node, fields),
            opcode::OPEN | opcode::OPENDIR if self.opens_nothing() => Err(Errno::NOSYS),
            opcode::OPEN => {
                let (flags, also) = (fields.u32()? as i32, fields.u32()?);
                let kill = also & open::KILL_SUIDGID != 0;
                let opened = self.share.open_file(node, flags, kill)?;
                Ok(self.opened(Reply::with_capacity(OPENED), opened.handle, &opened.file))
            }
            opcode::OPENDIR => {
                let handle = self.share.open_dir(node)?;
                Ok(self.opened_dir(handle))
            }
            opcode::RELEASE => self.release(fields),
            opcode::RELEASEDIR => done(self.share.close_dir(Handle(fields.u64()?))),
            opcode::READDIR => self.list(node.0, fields, room, false),
            opcode::READDIRPLUS => self.list(node.0, fields, room, true),
            opcode::STATFS => {
                let figures = self.share.statistics(node)?;
                let mut reply = Reply::with_capacity(FIGURES);
                reply.file_system(&figures);
                Ok(reply)
            }
            opcode::ACCESS => done(self.share.access(caller, node, fields.u32()? as i32)),
            // There is nothing to write back.
            opcode::FLUSH if self.opens_nothing() => Err(Errno::NOSYS),
            opcode::FLUSH => self.flush(fields),
            opcode::GETLK => self.test_lock(fields),
            opcode::SETLK => self.set_lock(fields),
            opcode::SYNCFS => done(self.share.sync_all(node)),
            opcode::LSEEK => {
                let (handle, offset) = (fields.u64()?, fields.u64()?);
                let file = self.file(node.0, handle)?;
                let found = self.share.seek_in(&file, offset, fields.u32()? as i32)?;
                let mut reply = Reply::with_capacity(NUMBERS);
                reply.u64(found);
                Ok(reply)
            }
            opcode::COPY_FILE_RANGE => self.copy(fields),
            opcode::GETXATTR | opcode::LISTXATTR | opcode::SETXATTR | opcode::REMOVEXATTR => {
                self.xattr(header.opcode, node, fields)
            }
            // Ioctl, poll and what comes in later versions: the guest does
            // without.
            _ => Err(Errno::NOSYS),
        }
    }

    /// FORGET, BATCH_FORGET, and INTERRUPT: whatever does not wait for a lock goes
    /// on to its end.
    pub(super) fn forget(
        &self,
        header: &Header,
        chain: &mut Chain<'_>,
        recorded: Option<Recorded>,
    ) {
        let mut eight = [0; 8];
        if !chain.read(&mut eight) {
            return;
        }
        if header.opcode == opcode::INTERRUPT {
            if self.forwards_locks() {
                self.waits.interrupt(u64::from_le_bytes(eight));
            }
            return;
        }
        let mut left = match header.opcode {
            opcode::FORGET => 1,
            _ => u64::from_le_bytes(eight) & 0xffff_ffff,
        };
        self.forget_recorded(recorded, header, || {
            left = left.checked_sub(1)?;
            if header.opcode == opcode::FORGET {
                return Some((NodeId(header.node), u64::from_le_bytes(eight)));
            }
            let mut one = [0; 16];
            if !chain.read(&mut one) {
                return None;
            }
            let mut fields = Fields(&one);
            Some((NodeId(fields.u64().ok()?), fields.u64().ok()?))
        });
    }

    fn lookup(&self, parent: NodeId, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        match self.share.lookup(parent, fields.name()?) {
            // Nobody else makes it: the guest need not ask again.
            Err(Errno::NOENT) if self.settings.cache == Cache::Always => {
                let mut reply = Reply::with_capacity(ENTRY);
                reply.no_entry(self.validity());
                Ok(reply)
            }
            found => Ok(self.entry(&found?)),
        }
    }

    pub(super) fn entry(&self, entry: &Entry) -> Reply {
        let mut reply = Reply::with_capacity(ENTRY + OPENED);
        let valid = (self.name_validity(entry), self.validity());
        reply.entry(entry, valid, self.session.has(feature::SUBMOUNTS));
        reply
    }

    pub(super) fn opened(&self, mut reply: Reply, handle: Handle, file: &OpenFile) -> Reply {
        let flags = self.file_flags(file.traits());
        reply.u64(handle.0).u32(flags).u32(0);
        reply
    }

    pub(super) fn opened_dir(&self, handle: Handle) -> Reply {
        let mut reply = Reply::with_capacity(OPENED);
        reply.u64(handle.0).u32(self.directory_flags()).u32(0);
        reply
    }

    fn attributes(&self, node: NodeId, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let (flags, _) = (fields.u32()?, fields.u32()?);
        let handle = Handle(fields.u64()?);
        let open = flags & GETATTR_HANDLE != 0 && !self.opens_nothing();
        let handle = open.then_some(handle);
        let found = self.share.attributes(node, handle)?;
        let mut reply = Reply::with_capacity(ATTRIBUTES);
        reply.valid_attributes(&found, self.validity());
        Ok(reply)
    }

    /// `fuse_setattr_in`.
    fn set_attributes(&self, node: NodeId, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let (valid, _) = (fields.u32()?, fields.u32()?);
        let (handle, size, _owner) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (atime, mtime, _ctime) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (atime_ns, mtime_ns, _) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (mode, _) = (fields.u32()?, fields.u32()?);
        let (uid, gid) = (fields.u32()?, fields.u32()?);
        let has = |bit| valid & bit != 0;
        let time = |at, now, seconds: u64, nanoseconds| match (has(at), has(now)) {
            (true, true) => Some(Time::Now),
            (true, false) => Some(Time::At(seconds as i64, nanoseconds)),
            _ => None,
        };
        let wanted = SetAttributes {
            mode: has(set::MODE).then_some(mode),
            uid: has(set::UID).then_some(uid),
            gid: has(set::GID).then_some(gid),
            size: has(set::SIZE).then_some(size),
            atime: time(set::ATIME, set::ATIME_NOW, atime, atime_ns),
            mtime: time(set::MTIME, set::MTIME_NOW, mtime, mtime_ns),
            kill_suid_gid: has(set::KILL_SUIDGID),
        };
        let handle = has(set::HANDLE).then_some(Handle(handle));
        let now = self.share.set_attributes(node, handle, &wanted)?;
        let mut reply = Reply::with_capacity(ATTRIBUTES);
        reply.valid_attributes(&now, self.validity());
        Ok(reply)
    }

    fn make(
        &self,
        code: u32,
        caller: &Caller,
        node: NodeId,
        fields: &mut Fields<'_>,
    ) -> Result<Entry, Errno> {
        match code {
            opcode::MKNOD => {
                let (mode, rdev) = (fields.u32()?, fields.u32()?);
                let (umask, _) = (fields.u32()?, fields.u32()?);
                let name = fields.name()?;
                self.share.make_node(caller, node, name, mode, umask, rdev)
            }
            opcode::MKDIR => {
                let (mode, umask) = (fields.u32()?, fields.u32()?);
                self.share
                    .make_dir(caller, node, fields.name()?, mode, umask)
            }
            opcode::SYMLINK => {
                let (name, target) = names(fields)?;
                self.share.make_symlink(caller, node, name, target)
            }
            _ => {
                let old = NodeId(fields.u64()?);
                self.share.link(old, node, fields.name()?)
            }
        }
    }

    fn create(
        &self,
        code: u32,
        caller: &Caller,
        parent: NodeId,
        fields: &mut Fields<'_>,
    ) -> Result<Reply, Errno> {
        let (flags, mode) = (fields.u32()? as i32, fields.u32()?);
        let (umask, also) = (fields.u32()?, fields.u32()?);
        let (entry, opened) = if code == opcode::TMPFILE {
            self.share
                .make_temporary(caller, parent, flags, mode, umask)?
        } else {
            let (name, kill) = (fields.name()?, also & open::KILL_SUIDGID != 0);
            if self.opens_nothing() {
                return self.create_nothing(parent, name, flags);
            }
            self.share
                .create(caller, parent, name, flags, mode, umask, kill)?
        };
        Ok(self.opened(self.entry(&entry), opened.handle, &opened.file))
    }

    fn rename(&self, code: u32, parent: NodeId, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let (new_parent, flags, name, new_name) = renaming(code, fields)?;
        done(self.share.rename(parent, name, new_parent, new_name, flags))
    }

    fn copy(&self, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        let (from, from_offset) = (Handle(fields.u64()?), fields.u64()?);
        let (_node, to, to_offset) = (fields.u64()?, Handle(fields.u64()?), fields.u64()?);
        let (len, flags) = (fields.u64()?, fields.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let len = len.min(MOST_COPIED);
        let copied = self
            .share
            .copy_range(from, from_offset, to, to_offset, len)?;
        let mut reply = Reply::with_capacity(NUMBERS);
        reply.u32(copied as u32).u32(0);
        Ok(reply)
    }

    fn xattr(&self, code: u32, node: NodeId, fields: &mut Fields<'_>) -> Result<Reply, Errno> {
        if code == opcode::REMOVEXATTR {
            return done(self.share.remove_xattr(node, fields.name()?));
        }
        let (size, flags) = (fields.u32()?, fields.u32()?);
        let got = match code {
            opcode::GETXATTR => self.share.get_xattr(node, fields.name()?, size)?,
            opcode::LISTXATTR => self.share.list_xattr(node, size)?,
            _ => {
                let mut also = 0;
                if self.session.has(feature::SETXATTR_EXT) {
                    (also, _) = (fields.u32()?, fields.u32()?);
                }
                let kill = also & SETXATTR_ACL_KILL_SGID != 0;
                let name = fields.name()?;
                let value = fields.bytes(size as usize)?;
                return done(self.share.set_xattr(node, name, value, flags, kill));
            }
        };
        Ok(match got {
            Xattr::Size(size) => {
                let mut reply = Reply::with_capacity(NUMBERS);
                reply.u32(size as u32).u32(0);
                reply
            }
            Xattr::Value(value) => Reply(value),
        })
    }
}

/// A reply without a body.
fn done(result: Result<(), Errno>) -> Result<Reply, Errno> {
    result.map(|()| Reply::default())
}

/// Bytes of the reply's body, where they are known beforehand.
fn reply_size(code: u32) -> usize {
    match code {
        opcode::LOOKUP | opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => ENTRY,
        opcode::CREATE | opcode::TMPFILE => ENTRY + OPENED,
        opcode::OPEN | opcode::OPENDIR => OPENED,
        opcode::GETATTR | opcode::SETATTR => ATTRIBUTES,
        opcode::STATFS => FIGURES,
        opcode::GETLK => LOCK,
        opcode::LSEEK | opcode::COPY_FILE_RANGE => NUMBERS,
        _ => 0,
    }
}
