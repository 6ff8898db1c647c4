//! Changing attributes. All by `AT_EMPTY_PATH` on the node's own descriptor, so
//! that no name is looked at again.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, chmodat, chownat,
    ftruncate, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::process::{Gid, Uid};

use super::Share;
use crate::calls;
use crate::credentials::WithoutFsetid;
use crate::handles::{Handle, OpenFile};
use crate::nodes::Found;
use crate::table::NodeId;
use crate::{Attributes, SetAttributes, Time};

impl Share {
    /// Changes attributes of a node, and its size through `handle` where it is
    /// given, as ftruncate needs no permission that the open file has not. The
    /// owner first, since that takes bits from the mode, the times last, since
    /// the size changes them.
    ///
    /// # Errors
    /// The host's; EINVAL for ids or times that are none.
    pub fn set_attributes(
        &self,
        node: NodeId,
        handle: Option<Handle>,
        set: &SetAttributes,
    ) -> Result<Attributes, Errno> {
        self.writable()?;
        let file = handle.map(|handle| self.handles.file(handle)).transpose()?;
        let times = [set.atime, set.mtime].map(timespec);
        let [atime, mtime] = times;
        let (atime, mtime) = (atime?, mtime?);
        let (uids, gids) = (&self.options.uid_map, &self.options.gid_map);
        let uid = set.uid.map(|id| uids.to_host(id).ok_or(Errno::INVAL));
        let gid = set.gid.map(|id| gids.to_host(id).ok_or(Errno::INVAL));
        let (uid, gid) = (uid.transpose()?, gid.transpose()?);

        // The last use of a file without a name may be by its handle alone.
        let found = match (&file, self.nodes.get(node)) {
            (Some(_), Err(_)) => None,
            (_, found) => Some(found?),
        };
        let target = match (&file, &found) {
            (Some(file), _) => file.as_fd(),
            (None, Some(found)) => found.as_fd(),
            (None, None) => return Err(Errno::STALE),
        };
        if uid.is_some() || gid.is_some() || set.size.is_some() {
            match (&file, &found) {
                (_, Some(found)) => self.drop_capabilities(found)?,
                (Some(file), None) => self.drop_capabilities_of(file)?,
                (None, None) => {}
            }
        }
        if uid.is_some() || gid.is_some() {
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            chownat(target, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(size) = set.size {
            let _less = WithoutFsetid::when(set.kill_suid_gid)?;
            self.resize(file.as_deref(), found.as_ref(), size)?;
        }
        if let Some(mode) = set.mode {
            self.change_mode(target, mode)?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps {
                last_access: atime,
                last_modification: mtime,
            };
            utimensat(target, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attributes(node, handle)
    }

    fn resize(
        &self,
        file: Option<&OpenFile>,
        node: Option<&Found>,
        size: u64,
    ) -> Result<(), Errno> {
        if size > i64::MAX as u64 {
            return Err(Errno::FBIG);
        }
        match (file.filter(|file| file.traits.writable), node) {
            (Some(file), _) => ftruncate(file, size),
            (None, Some(node)) if node.kind == FileType::Directory => Err(Errno::ISDIR),
            (None, Some(node)) if node.kind != FileType::RegularFile => Err(Errno::INVAL),
            (None, Some(node)) => ftruncate(self.reopen(node, OFlags::WRONLY)?, size),
            (None, None) => Err(Errno::STALE),
        }
    }

    /// The mode of what a descriptor names, O_PATH or not.
    pub(super) fn change_mode(&self, target: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
        match calls::change_mode(target, mode & 0o7777) {
            // Before Linux 6.6, by the number of the descriptor.
            Err(Errno::NOSYS) => chmodat(
                self.nodes.proc(),
                DecInt::from_fd(target),
                Mode::from_raw_mode(mode & 0o7777),
                AtFlags::empty(),
            ),
            result => result,
        }
    }
}

fn timespec(time: Option<Time>) -> Result<Timespec, Errno> {
    let nanoseconds = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    match time {
        None => Ok(nanoseconds(UTIME_OMIT)),
        Some(Time::Now) => Ok(nanoseconds(UTIME_NOW)),
        // Some larger numbers have a meaning of their own.
        Some(Time::At(tv_sec, ns)) if ns < 1_000_000_000 => Ok(Timespec {
            tv_sec,
            tv_nsec: ns.into(),
        }),
        Some(Time::At(..)) => Err(Errno::INVAL),
    }
}
