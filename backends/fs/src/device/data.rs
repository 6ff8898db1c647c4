//! What moves data or makes it durable: steps that the worker's ring does.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pericarp_ring::{Buffer, Chain};
use pericarp_share::{Errno, Handle, OpenFile};
use pericarp_vhost::{FileRef, Place, Step};

use super::{FsDevice, Kept, Request};
use crate::wire::{FSYNC_DATA, Fields, Header, Reply, WRITE_CACHE, WRITE_KILL_SUIDGID, opcode};

/// RWF_DONTCACHE, since Linux 6.14.
const RWF_DONTCACHE: i32 = 0x80;
/// How often a request that the kernel asked to repeat is repeated.
const MAX_RETRIES: u8 = 16;

/// fallocate: keep the size, punch a hole, write zeroes.
const ALLOCATIONS: u32 =
    (libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) as u32;

/// What a request is doing.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    #[default]
    None,
    Read,
    Write,
    Sync {
        metadata: bool,
    },
    Allocate {
        mode: i32,
    },
}

/// A step is to be done, or else the request has been looked at in vain.
type Begun = Result<Option<Step>, Errno>;

impl FsDevice {
    pub(super) fn read(&self, node: u64, chain: &mut Chain<'_>, request: &mut Request) -> Begun {
        let (handle, offset, size, ..) = Self::transfer(chain)?;
        let file = self.file(node, handle)?;
        if !file.traits().readable {
            return Err(Errno::BADF);
        }
        chain.limit_writable(size);
        let size = chain.writable_len();
        request.operation = Operation::Read;
        request.place = place(&file, false);
        self.begin(chain, request, file, (offset, size))
    }

    pub(super) fn write(&self, chain: &mut Chain<'_>, request: &mut Request) -> Begun {
        let (handle, offset, size, flags, opened) = Self::transfer(chain)?;
        let file = self.share.file(Handle(handle))?;
        if !file.traits().writable {
            return Err(Errno::BADF);
        }
        if chain.readable_len() < size || chain.writable_len() < 8 {
            return Err(Errno::INVAL);
        }
        chain.limit_readable(size);
        self.share.drop_capabilities_of(&file)?;
        // A write of nothing is none.
        if flags & WRITE_KILL_SUIDGID != 0 && size > 0 {
            self.share.kill_privileges_of(&file)?;
        }
        // To the end as the host knows it, in one step; what was written to a
        // mapping belongs where it is, however the file is open.
        request.append = opened & libc::O_APPEND as u32 != 0 && flags & WRITE_CACHE == 0;
        request.operation = Operation::Write;
        request.place = place(&file, true);
        if request.append && request.recorded.is_some() {
            let done = self.appended(request, &file, chain, size)?;
            request.moved = done;
            return self.begin(chain, request, file, (offset, size - done));
        }
        self.begin(chain, request, file, (offset, size))
    }

    /// `fuse_read_in` and `fuse_write_in`: handle, offset, size, flags, and those
    /// that the file has in the guest now.
    fn transfer(chain: &mut Chain<'_>) -> Result<(u64, u64, u64, u32, u32), Errno> {
        let mut body = [0; 40];
        if !chain.read(&mut body) {
            return Err(Errno::INVAL);
        }
        let mut fields = Fields(&body);
        let (handle, offset) = (fields.u64()?, fields.u64()?);
        let (size, flags) = (u64::from(fields.u32()?), fields.u32()?);
        let (_lock_owner, opened) = (fields.u64()?, fields.u32()?);
        // An offset of -1 would mean the position of the file.
        within(offset, size)?;
        Ok((handle, offset, size, flags, opened))
    }

    fn begin(
        &self,
        chain: &mut Chain<'_>,
        request: &mut Request,
        file: Arc<OpenFile>,
        (offset, size): (u64, u64),
    ) -> Begun {
        request.kept = Some(Kept::File(file));
        request.offset = offset;
        request.left = size;
        request.account.bytes = size;
        Ok(Some(self.next(chain, request)))
    }

    pub(super) fn sync(
        &self,
        header: &Header,
        chain: &mut Chain<'_>,
        request: &mut Request,
    ) -> Begun {
        let mut body = [0; 16];
        if !chain.read(&mut body) {
            return Err(Errno::INVAL);
        }
        let mut fields = Fields(&body);
        let (handle, flags) = (fields.u64()?, fields.u32()?);
        let (kept, waits) = match header.opcode {
            opcode::FSYNC => {
                let file = self.file(header.node, handle)?;
                let waits = file.traits().waits;
                (Kept::File(file), waits)
            }
            _ => {
                let directory = self.directory(header.node, handle)?;
                let waits = directory.waits();
                (Kept::Directory(directory), waits)
            }
        };
        request.place = if waits { Place::Threads } else { Place::Ring };
        request.kept = Some(kept);
        request.operation = Operation::Sync {
            metadata: flags & FSYNC_DATA == 0,
        };
        Ok(Some(self.next(chain, request)))
    }

    pub(super) fn allocate(&self, chain: &mut Chain<'_>, request: &mut Request) -> Begun {
        let mut body = [0; 32];
        if !chain.read(&mut body) {
            return Err(Errno::INVAL);
        }
        let mut fields = Fields(&body);
        let file = self.share.file(Handle(fields.u64()?))?;
        let (offset, len, mode) = (fields.u64()?, fields.u64()?, fields.u32()?);
        // In the order that Linux finds mistakes in.
        if len == 0 {
            return Err(Errno::INVAL);
        }
        within(offset, len)?;
        if !is_known(mode as i32) {
            return Err(Errno::OPNOTSUPP);
        }
        if !file.traits().writable {
            return Err(Errno::BADF);
        }
        if mode & !ALLOCATIONS != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        self.share.drop_capabilities_of(&file)?;
        request.place = place(&file, false);
        request.kept = Some(Kept::File(file));
        request.operation = Operation::Allocate { mode: mode as i32 };
        request.offset = offset;
        request.left = len;
        Ok(Some(self.next(chain, request)))
    }

    /// The step that is left to do.
    fn next(&self, chain: &mut Chain<'_>, request: &mut Request) -> Step {
        let (descriptor, direct) = match &request.kept {
            Some(Kept::File(file)) => (file.as_fd().as_raw_fd(), file.traits().direct),
            Some(Kept::Directory(directory)) => (directory.as_fd().as_raw_fd(), false),
            None => return Self::fail(chain, request, Errno::BADF),
        };
        let place = request.place;
        let file = FileRef::Open { descriptor, place };
        let (offset, len) = (request.offset, request.left);
        let flags = match direct {
            false if self.dont_cache.load(Ordering::Relaxed) => RWF_DONTCACHE,
            _ => 0,
        };
        let buffer = |aligned| {
            if aligned || !direct {
                Buffer::Chain
            } else {
                Buffer::Bounce
            }
        };
        match request.operation {
            Operation::Read if len > 0 => Step::Read {
                file,
                offset,
                flags,
                buffer: buffer(chain.writable_aligned(512, 1)),
            },
            Operation::Write if len > 0 => Step::Write {
                file,
                offset,
                flags: if request.append {
                    flags | libc::RWF_APPEND
                } else {
                    flags
                },
                buffer: buffer(chain.readable_aligned(512, 1)),
            },
            Operation::Read | Operation::Write => Self::moved(chain, request),
            Operation::Sync { metadata } => Step::Sync { file, metadata },
            Operation::Allocate { mode } => Step::Allocate {
                file,
                offset,
                len,
                mode,
            },
            Operation::None => Self::fail(chain, request, Errno::INVAL),
        }
    }

    /// A step ended.
    pub(super) fn go_on(&self, chain: &mut Chain<'_>, request: &mut Request, result: i32) -> Step {
        let Ok(moved) = u64::try_from(result) else {
            return self.go_on_after(chain, request, Errno::from_raw_os_error(-result));
        };
        match request.operation {
            Operation::Read | Operation::Write => {
                let moved = moved.min(request.left);
                request.moved += moved;
                request.offset += moved;
                request.left -= moved;
                // Nothing is the end of the file, for a write the end of its
                // luck: what was moved counts.
                if moved == 0 || request.left == 0 {
                    return Self::moved(chain, request);
                }
                self.next(chain, request)
            }
            _ => Self::reply(chain, request, &Reply::default()),
        }
    }

    fn go_on_after(&self, chain: &mut Chain<'_>, request: &mut Request, errno: Errno) -> Step {
        let again = matches!(errno, Errno::INTR | Errno::AGAIN);
        let uncached = errno == Errno::OPNOTSUPP && self.dont_cache.load(Ordering::Relaxed);
        if uncached {
            self.dont_cache.store(false, Ordering::Relaxed);
            log::warn!("a file system does not know RWF_DONTCACHE: served without");
        }
        if (again || uncached) && request.retries < MAX_RETRIES {
            request.retries += 1;
            return self.next(chain, request);
        }
        // As read and write of the host say it: what was done before counts.
        match request.operation {
            Operation::Read | Operation::Write if request.moved > 0 => Self::moved(chain, request),
            _ => Self::fail(chain, request, errno),
        }
    }

    /// Ends a READ or WRITE with what was moved.
    fn moved(chain: &mut Chain<'_>, request: &mut Request) -> Step {
        let moved = request.moved;
        if request.operation == Operation::Read {
            return Self::head(chain, request, 0, moved);
        }
        let mut reply = Reply::with_capacity(8);
        reply.u32(moved as u32).u32(0);
        Self::reply(chain, request, &reply)
    }
}

/// Where reads or writes of a file are done.
fn place(file: &OpenFile, write: bool) -> Place {
    let traits = file.traits();
    if traits.waits {
        Place::Threads
    } else if write && !traits.direct && !traits.writes_without_waiting {
        Place::Here
    } else {
        Place::Ring
    }
}

/// Whether Linux knows this mode of fallocate, which it looks at before it looks
/// whether the file is open for writing.
fn is_known(mode: i32) -> bool {
    let keeps = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 | libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_UNSHARE_RANGE => true,
        libc::FALLOC_FL_PUNCH_HOLE => keeps,
        libc::FALLOC_FL_COLLAPSE_RANGE | libc::FALLOC_FL_INSERT_RANGE => !keeps,
        _ => false,
    }
}

/// EINVAL for what ends beyond the largest offset a file has.
fn within(offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(Errno::INVAL),
    }
}
