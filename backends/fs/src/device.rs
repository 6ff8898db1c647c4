//! The virtio-fs device (virtio 1.3, 5.11): what becomes of a request.
//!
//! Workers of `pericarp-vhost` call it. What moves data (READ, WRITE, FSYNC,
//! FALLOCATE) becomes steps that the worker's ring does, straight between file
//! and guest memory: `data`. All else is answered at once by calls of
//! `pericarp-share`: `calls`, `listing`, and `session` for INIT and the end.
//!
//! A request that cannot be understood is answered with EINVAL if there is room
//! for an answer, and with nothing if there is none; the device goes on.

mod again;
mod calls;
mod data;
mod hand_over;
mod listing;
mod locks;
mod session;
mod unopened;
mod waits;

use std::mem;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use pericarp_ring::{Chain, ChainError};
use pericarp_share::{Errno, OpenDirectory, OpenFile, Share};
use pericarp_vhost::{Account, Bag, ConfigRefused, Device, Errand, Place, Step, Unpacked};

use crate::wire::{Header, IN_HEADER, OUT_HEADER, Reply, opcode};
use again::Recorded;
use data::Operation;
use locks::Wanted;
use session::Session;
use waits::Waits;

/// Bytes of a tag (virtio 1.3, 5.11.4).
pub const MAX_TAG: usize = 36;

/// The longest body of a request other than WRITE and BATCH_FORGET: an extended
/// attribute of 64 KiB and what comes with it.
const MAX_BODY: u64 = 72 * 1024;

/// What guests may keep of a directory, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Nothing: every look asks again.
    Never,
    /// Names and attributes for a second, data until a file is opened anew.
    #[default]
    Auto,
    /// All, for good: nobody else changes the directory.
    Always,
}

/// How a directory is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settings {
    /// What guests may keep.
    pub cache: Cache,
    /// Guests may keep written data, too, and write it later.
    pub writeback: bool,
    /// The host keeps no pages of what guests read and write (RWF_DONTCACHE),
    /// where its file system knows how.
    pub dont_cache: bool,
    /// Guests are not told of other file systems below the directory: they are
    /// left out, or seem to be part of it. An overlay takes no part of it below
    /// itself that is a mount of its own.
    pub alone: bool,
    /// Mounts that come and go below the directory are passed on. Guests let go of
    /// what lies on one as soon as they are done with it, so that it can go.
    pub later_mounts: bool,
}

/// What a request keeps open until it ends.
#[derive(Debug)]
enum Kept {
    File(Arc<OpenFile>),
    Directory(Arc<OpenDirectory>),
}

/// A call that a helper is to make, and its answer once it has.
#[derive(Debug, Default)]
struct Call {
    header: Header,
    body: Vec<u8>,
    room: usize,
    recorded: Option<Recorded>,
    answer: Arc<Mutex<Option<Result<Reply, Errno>>>>,
    /// Of one that waits for a lock.
    wanted: Option<Wanted>,
}

/// One request in flight.
#[derive(Debug, Default)]
pub struct Request {
    unique: u64,
    /// Where it is on record for a successor.
    recorded: Option<Recorded>,
    operation: Operation,
    kept: Option<Kept>,
    place: Place,
    /// Where in the file it goes on.
    offset: u64,
    /// Bytes still to move, and those that were moved.
    left: u64,
    moved: u64,
    retries: u8,
    /// A write that goes to the end of the file.
    append: bool,
    account: Account,
    /// Of an errand alone.
    call: Option<Box<Call>>,
}

/// A virtio-fs device over one directory.
#[derive(Debug)]
pub struct FsDevice {
    share: Share,
    tag: [u8; MAX_TAG],
    /// Request queues; the high priority queue comes before them.
    queues: u16,
    queue_size: u16,
    settings: Settings,
    session: Session,
    /// Requests that wait for a lock.
    waits: Waits,
    /// RWF_DONTCACHE is asked for, and was not refused yet.
    dont_cache: AtomicBool,
}

impl FsDevice {
    /// A device that guests mount as `tag`, 1 to [`MAX_TAG`] bytes, with so many
    /// request queues of at most `queue_size` descriptors.
    pub fn new(share: Share, tag: &str, queues: u16, queue_size: u16, settings: Settings) -> Self {
        let mut bytes = [0; MAX_TAG];
        let length = tag.len().min(MAX_TAG);
        bytes[..length].copy_from_slice(&tag.as_bytes()[..length]);
        let session = Session::of(&share);
        Self {
            share,
            tag: bytes,
            queues,
            queue_size,
            settings,
            session,
            waits: Waits::new(queue_size),
            dont_cache: AtomicBool::new(settings.dont_cache),
        }
    }

    /// The directory.
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// Looks at a sound chain.
    fn parse(&self, chain: &mut Chain<'_>, request: &mut Request) -> Step {
        let mut header = [0; IN_HEADER];
        if !chain.read(&mut header) {
            return Self::end(request, 0);
        }
        let header = Header::parse(&header);
        request.unique = header.unique;
        request.account.class = class(header.opcode);
        let body = u64::from(header.len).checked_sub(IN_HEADER as u64);
        let body = body.filter(|body| *body <= chain.readable_len());
        if let Some(body) = body {
            chain.limit_readable(body);
        }
        match header.opcode {
            // These have no answer.
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => {
                if body.is_some() {
                    self.forget(&header, chain, request.recorded);
                }
                return Self::end(request, 0);
            }
            _ => {}
        }
        if !chain.take_front(OUT_HEADER as u64) {
            request.account.failed = true;
            return Self::end(request, 0);
        }
        if body.is_none() {
            return Self::fail(chain, request, Errno::INVAL);
        }
        let begun = match header.opcode {
            opcode::INIT | opcode::DESTROY => Ok(None),
            _ if !self.session.is_open() => Err(Errno::NOTCONN),
            // Nothing is open, so nothing is open for it.
            opcode::WRITE | opcode::FALLOCATE if self.opens_nothing() => Err(Errno::ROFS),
            opcode::READ => self.read(header.node, chain, request),
            opcode::WRITE => self.write(chain, request),
            opcode::FSYNC | opcode::FSYNCDIR => self.sync(&header, chain, request),
            opcode::FALLOCATE => self.allocate(chain, request),
            _ => Ok(None),
        };
        let answer = match begun {
            Ok(Some(step)) => return step,
            Ok(None) => self.answer(&header, chain, request),
            Err(errno) => Err(errno),
        };
        if request.call.is_some() {
            return Step::Errand;
        }
        Self::answered(chain, request, answer)
    }

    /// Makes a call, or prepares it as an errand.
    fn answer(
        &self,
        header: &Header,
        chain: &mut Chain<'_>,
        request: &mut Request,
    ) -> Result<Reply, Errno> {
        if chain.readable_len() > MAX_BODY {
            return Err(Errno::TOOBIG);
        }
        let mut body = vec![0; chain.readable_len() as usize];
        if !chain.read(&mut body) {
            return Err(Errno::INVAL);
        }
        let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
        match header.opcode {
            opcode::INIT => self.init(&body),
            opcode::DESTROY => {
                self.close();
                Ok(Reply::default())
            }
            opcode::SETLKW => self.await_lock(header, &body, request),
            code if self.share.waits() || self.takes_long(code) => {
                let call = Call {
                    header: *header,
                    body,
                    room,
                    recorded: request.recorded,
                    ..Call::default()
                };
                request.call = Some(Box::new(call));
                Ok(Reply::default())
            }
            _ => self.call(header, &body, room, request.recorded),
        }
    }

    /// Calls that write a whole file system back, copy megabytes, or have a file
    /// written back somewhere else.
    fn takes_long(&self, code: u32) -> bool {
        match code {
            opcode::SYNCFS | opcode::COPY_FILE_RANGE => true,
            opcode::FLUSH => self.share.options().elsewhere,
            _ => false,
        }
    }

    fn answered(
        chain: &mut Chain<'_>,
        request: &mut Request,
        answer: Result<Reply, Errno>,
    ) -> Step {
        match answer {
            Ok(reply) => Self::reply(chain, request, &reply),
            Err(errno) => Self::fail(chain, request, errno),
        }
    }

    /// Ends a request with a body, if there is room for it.
    fn reply(chain: &mut Chain<'_>, request: &mut Request, reply: &Reply) -> Step {
        if reply.0.len() as u64 > chain.writable_len() {
            return Self::fail(chain, request, Errno::INVAL);
        }
        let written = chain.write(&reply.0);
        Self::head(chain, request, 0, written as u64)
    }

    fn fail(chain: &mut Chain<'_>, request: &mut Request, errno: Errno) -> Step {
        request.account.failed = true;
        Self::head(chain, request, -errno.raw_os_error(), 0)
    }

    /// Writes the header of a reply with so many bytes after it.
    fn head(chain: &mut Chain<'_>, request: &mut Request, error: i32, bytes: u64) -> Step {
        let len = OUT_HEADER as u32 + bytes as u32;
        let mut header = [0; OUT_HEADER];
        header[..4].copy_from_slice(&len.to_le_bytes());
        header[4..8].copy_from_slice(&error.to_le_bytes());
        header[8..].copy_from_slice(&request.unique.to_le_bytes());
        chain.write_front(&header);
        Self::end(request, len)
    }

    fn end(request: &mut Request, written: u32) -> Step {
        // What it had open is closed now and not when its place is used again.
        request.kept = None;
        request.call = None;
        Step::Done { written }
    }
}

/// Index of a request's class in [`Device::CLASSES`].
fn class(code: u32) -> usize {
    match code {
        opcode::READ => 1,
        opcode::WRITE => 2,
        opcode::FSYNC | opcode::FSYNCDIR | opcode::FLUSH | opcode::SYNCFS => 3,
        opcode::LOOKUP => 4,
        opcode::OPEN | opcode::RELEASE | opcode::OPENDIR | opcode::RELEASEDIR => 5,
        opcode::READDIR | opcode::READDIRPLUS => 6,
        opcode::SETATTR
        | opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::CREATE
        | opcode::TMPFILE
        | opcode::FALLOCATE
        | opcode::COPY_FILE_RANGE => 7,
        _ => 0,
    }
}

impl Device for FsDevice {
    type Request = Request;

    const CLASSES: &'static [&'static str] = &[
        "other", "read", "write", "sync", "lookup", "open", "list", "change",
    ];

    fn account(&self, request: &Request) -> Account {
        request.account
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> u16 {
        self.queues + 1
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    /// `struct virtio_fs_config`: the tag, and the number of request queues.
    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        config.extend(u32::from(self.queues).to_le_bytes());
        config
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), ConfigRefused> {
        let end = offset.saturating_add(bytes.len());
        Err(ConfigRefused { offset, end })
    }

    fn held(&self) -> Vec<(&'static str, u64)> {
        let (descriptors, nodes, open) = self.share.counts();
        [
            ("nodes", nodes),
            ("node_descriptors", descriptors),
            ("open_files", open),
        ]
        .map(|(name, count)| (name, count.into()))
        .to_vec()
    }

    fn negotiated(&self, _features: u64) {}

    fn pack(&self) -> std::io::Result<Vec<Bag>> {
        Ok(self.packed())
    }

    fn unpack(&self, bags: Vec<Unpacked>) -> Result<(), String> {
        self.unpacked(bags)
    }

    /// With a state that outlives the process, a guest may come back behind
    /// another connection: what it had open is forgotten when one mounts.
    fn abandoned(&self) {
        if self.share.state().is_none() {
            self.close();
        }
    }

    fn recorded(&self, request: &mut Request, queue: u16, head: u16, again: bool) {
        request.recorded = Some(Recorded::new(queue, head, again));
    }

    fn files(&self) -> &[OwnedFd] {
        &[]
    }

    fn start(
        &self,
        loaded: Result<(), ChainError>,
        mut chain: Chain<'_>,
        request: &mut Request,
    ) -> Step {
        match loaded {
            Ok(()) => self.parse(&mut chain, request),
            Err(_) => {
                request.account.failed = true;
                Self::end(request, 0)
            }
        }
    }

    fn errand(self: Arc<Self>, request: &mut Request) -> Errand {
        let Some(call) = request.call.as_deref_mut() else {
            return Errand::new(|| -libc::EIO);
        };
        if let Some(wanted) = call.wanted.take() {
            return self.lock_errand(call, wanted);
        }
        let (header, room, recorded) = (call.header, call.room, call.recorded);
        let body = mem::take(&mut call.body);
        let answer = Arc::clone(&call.answer);
        Errand::new(move || {
            let found = self.call(&header, &body, room, recorded);
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
            0
        })
    }

    fn hasten(&self) {
        self.waits.end_all(Errno::NOLCK);
    }

    fn resume(&self, mut chain: Chain<'_>, request: &mut Request, result: i32) -> Step {
        if let Some(call) = request.call.take() {
            let mut found = call.answer.lock().unwrap_or_else(PoisonError::into_inner);
            let answer = found.take().unwrap_or(Err(Errno::IO));
            drop(found);
            return Self::answered(&mut chain, request, answer);
        }
        self.go_on(&mut chain, request, result)
    }
}

#[cfg(test)]
mod tests;
