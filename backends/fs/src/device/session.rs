//! INIT, and what ends with a mount: what both sides agreed to do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pericarp_share::{Entry, Errno, Share, State, Traits};

use super::unopened::{OPENS_NOTHING, settled};
use super::{Cache, FsDevice};
use crate::wire::{
    Fields, MAJOR, MAX_PAGES, MAX_TRANSFER, MINOR, OLDEST_MINOR, Reply, Validity, feature, open,
};

/// Set beside the features once there are any.
const OPEN: u64 = 1 << 63;

/// Requests that a guest may have on their way of its own accord, such as
/// readahead, and at how many it slows down.
const MAX_BACKGROUND: u16 = u16::MAX;
const CONGESTION: u16 = MAX_BACKGROUND / 4 * 3;

/// How long a guest keeps things that nobody else changes.
const FOR_GOOD: Duration = Duration::from_secs(24 * 60 * 60);

/// The features of the mount, if there is one.
#[derive(Debug, Default)]
pub(super) struct Session(pub(super) AtomicU64);

impl Session {
    /// That of a predecessor, whose guest does not say it again.
    pub(super) fn of(share: &Share) -> Self {
        let agreed = share.state().map_or(0, State::session);
        share.set_writeback(agreed & feature::WRITEBACK_CACHE != 0);
        Self(AtomicU64::new(agreed))
    }

    /// As it is kept for a successor.
    pub(super) fn agreed(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed) & OPEN != 0
    }

    /// Both sides agreed to it.
    pub(super) fn has(&self, feature: u64) -> bool {
        self.0.load(Ordering::Relaxed) & feature != 0
    }
}

impl FsDevice {
    /// A guest mounts. What an earlier mount had open is gone.
    pub(super) fn init(&self, body: &[u8]) -> Result<Reply, Errno> {
        let mut fields = Fields(body);
        let (major, minor) = (fields.u32()?, fields.u32()?);
        let mut reply = Reply::default();
        if major > MAJOR {
            // It asks again, in the version that it is told.
            reply.u32(MAJOR).u32(MINOR).zeroes(56);
            return Ok(reply);
        }
        if major < MAJOR || minor < OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let readahead = fields.u32()?;
        let mut asked = u64::from(fields.u32()?);
        if asked & feature::INIT_EXT != 0 {
            asked |= u64::from(fields.u32()?) << 32;
        }
        let agreed = settled(asked & self.wanted());
        self.close();
        self.share
            .set_writeback(agreed & feature::WRITEBACK_CACHE != 0);
        self.agree(agreed | OPEN);
        reply.u32(MAJOR).u32(MINOR).u32(readahead);
        reply.u32(agreed as u32);
        reply.u16(MAX_BACKGROUND).u16(CONGESTION);
        // Times are those of the host's file system, to the nanosecond.
        reply.u32(MAX_TRANSFER).u32(1);
        reply.u16(MAX_PAGES).u16(0);
        reply.u32((agreed >> 32) as u32).zeroes(28);
        Ok(reply)
    }

    /// The mount is gone.
    pub(super) fn close(&self) {
        self.agree(0);
        self.waits.end_all(Errno::NOLCK);
        self.share.reset();
    }

    /// A mount that agreed on nothing.
    #[cfg(test)]
    pub(super) fn agree_for_test(&self) {
        self.agree(OPEN);
    }

    fn agree(&self, session: u64) {
        self.session.0.store(session, Ordering::Relaxed);
        if let Some(state) = self.share.state() {
            state.set_session(session);
        }
    }

    /// What is wanted of a guest that can do it. Not ATOMIC_O_TRUNC, although it
    /// would spare an open with O_TRUNC a second request: Linux looks whether the
    /// file is being executed only when it has been opened, so that what fails
    /// with ETXTBSY would have emptied a program that runs.
    fn wanted(&self) -> u64 {
        let mut wanted = feature::ASYNC_READ
            | feature::BIG_WRITES
            | feature::ASYNC_DIO
            | feature::PARALLEL_DIROPS
            | feature::MAX_PAGES
            // Without it a guest asks for an attribute before every write.
            | feature::HANDLE_KILLPRIV_V2
            | feature::INIT_EXT
            | feature::CREATE_SUPP_GROUP
            | feature::DIRECT_IO_ALLOW_MMAP;
        // Entries with all their attributes where the guest may keep these, and
        // each time: with READDIRPLUS_AUTO Linux asks so for the first page of a
        // directory alone, unless names are looked up between two pages. Programs
        // that look at files read all names first, and cost a LOOKUP each then.
        wanted |= match self.settings.cache {
            Cache::Never => 0,
            Cache::Auto => feature::DO_READDIRPLUS | feature::AUTO_INVAL_DATA,
            Cache::Always => feature::DO_READDIRPLUS | feature::CACHE_SYMLINKS,
        };
        if !self.settings.alone {
            wanted |= feature::SUBMOUNTS;
        }
        if self.settings.writeback && self.settings.cache != Cache::Never {
            wanted |= feature::WRITEBACK_CACHE;
        }
        if self.share.options().locks {
            wanted |= feature::POSIX_LOCKS | feature::FLOCK_LOCKS;
        }
        if self.could_open_nothing() {
            wanted |= OPENS_NOTHING;
        }
        if self.share.options().posix_acl {
            wanted |= feature::POSIX_ACL | feature::DONT_MASK | feature::SETXATTR_EXT;
        }
        wanted
    }

    /// How long a guest may keep names and attributes.
    pub(super) fn validity(&self) -> Validity {
        Validity(match self.settings.cache {
            Cache::Never => Duration::ZERO,
            Cache::Auto => Duration::from_secs(1),
            Cache::Always => FOR_GOOD,
        })
    }

    /// How long it may keep this name. One that leads to another mount not at all, where mounts
    /// come and go: Linux then lets go of it with its last user (`fuse_dentry_delete`), its FORGET
    /// has us let go, and the host can unmount. What lies below keeps its time, and a guest that
    /// stays there asks no more often; who comes from above asks at each step onto the mount.
    pub(super) fn name_validity(&self, entry: &Entry) -> Validity {
        match self.settings.later_mounts && entry.crosses {
            true => Validity::default(),
            false => self.validity(),
        }
    }

    /// What the guest may do with an open file. Where some files are other machines', so that FLUSH
    /// is answered, those that are not have no use for it: nothing of theirs is to be written back,
    /// and a request for each close is spared. It ends locks, too.
    pub(super) fn file_flags(&self, traits: &Traits) -> u32 {
        let told = traits.waits || self.forwards_locks() || !self.share.options().elsewhere;
        let flush = if told { 0 } else { open::NO_FLUSH };
        flush
            | open::PARALLEL_DIRECT_WRITES
            | match self.settings.cache {
                Cache::Never => open::DIRECT_IO,
                Cache::Auto => 0,
                Cache::Always => open::KEEP_CACHE,
            }
    }

    /// The same for a directory.
    pub(super) fn directory_flags(&self) -> u32 {
        match self.settings.cache {
            Cache::Never | Cache::Auto => 0,
            Cache::Always => open::KEEP_CACHE | open::CACHE_DIR,
        }
    }
}
