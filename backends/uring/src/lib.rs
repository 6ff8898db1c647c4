//! The one place a worker waits: an io_uring per worker thread, or poll(2) and
//! plain system calls where io_uring is forbidden.
//!
//! Everything a worker can be woken by goes through an [`Engine`]: kicks and
//! the control mailbox as polls, file I/O as operations. Each comes back as a
//! [`Completion`] that carries the caller's token. [`Engine::submit`] is the
//! only call that enters the kernel on the fast path, but for packets, which are
//! moved at once ([`Engine::read_now`], [`Engine::write_many_now`]).
//!
//! Engines are made before a program confines itself ([`Engine::new`]) and
//! started on the thread that will own them ([`Engine::start`]).

mod blocking;
mod buffers;
mod cpus;
mod files;
mod here;
mod now;
mod polled;
mod ring;
mod setup;
mod space;
mod transfer;
mod wake;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use libc::iovec;
use thiserror::Error;

pub use buffers::{BufferSlot, MAX_BUFFER, MAX_BUFFERS};
pub use files::{FileSlot, Place};
pub use now::MANY;
pub use polled::try_polling;
pub use space::{ZEROES, can_discard};

use blocking::Blocking;
use ring::Ring;

/// The highest token a caller may use; those above are the engine's own.
pub const MAX_TOKEN: u64 = (1 << 61) - 1;

/// Which engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// io_uring where the kernel lets us, else the synchronous one.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// preadv and pwritev on the worker thread.
    Sync,
}

/// Why an engine could not be made or used.
#[derive(Debug, Error)]
pub enum EngineError {
    /// io_uring was asked for and the kernel refuses it.
    #[error("io_uring is not available here")]
    Unavailable(#[source] io::Error),
    /// The ring exists but could not be set up.
    #[error("cannot set up io_uring ({step})")]
    Setup {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Waiting or submitting failed.
    #[error("the I/O engine failed")]
    Failed(#[source] io::Error),
    /// All file slots are taken.
    #[error("more than {0} files and eventfds on one worker")]
    TooManyFiles(u32),
    /// All places for registered memory are taken, or there are none.
    #[error("more than {0} pieces of memory registered with one worker")]
    TooManyBuffers(u32),
}

/// What came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The token given with the operation.
    pub token: u64,
    /// Bytes moved, poll events, or a negative errno.
    pub result: i32,
}

/// A file operation on segments of memory.
#[derive(Debug, Clone, Copy)]
pub struct Transfer<'a> {
    /// The registered file.
    pub file: FileSlot,
    /// Where the bytes go to or come from.
    pub segments: &'a [iovec],
    /// Byte offset in the file.
    pub offset: u64,
    /// RWF_* flags.
    pub flags: i32,
    /// Comes back in the completion.
    pub token: u64,
}

/// A part of a file, for an operation that moves no bytes of the caller's.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// The registered file.
    pub file: FileSlot,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Comes back in the completion.
    pub token: u64,
}

/// What an engine is to be able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Which engine.
    pub kind: EngineKind,
    /// Operations it has room for at a time, about.
    pub depth: u32,
    /// Descriptors that can be registered.
    pub files: u32,
    /// [`Engine::discard`] is used: a ring without it is allowed less.
    pub commands: bool,
    /// Pieces of memory that can be registered, at most [`MAX_BUFFERS`]. Where
    /// the kernel cannot do that the engine is made all the same; see
    /// [`Engine::registers_memory`].
    pub buffers: u32,
    /// Threads the kernel may use once a file comes that makes whoever starts
    /// an operation wait ([`Engine::expect_waiting`]): its own limit (four per
    /// CPU) is less than the depth wanted.
    pub threads: Option<u32>,
    /// Files may come that are polled ([`Engine::expect_polling`]).
    pub polled: bool,
    /// Plain descriptors are used ([`FileSlot::descriptor`]). A ring without is
    /// restricted to registered ones.
    pub descriptors: bool,
}

/// A worker's way into the kernel.
#[derive(Debug)]
pub enum Engine {
    /// io_uring.
    #[doc(hidden)]
    Uring(Box<Ring>),
    /// System calls.
    #[doc(hidden)]
    Sync(Blocking),
}

impl Engine {
    /// Makes an engine with room for about `depth` operations at a time and
    /// `files` registered descriptors. It does nothing until
    /// [`start`](Self::start).
    ///
    /// # Errors
    /// [`EngineError`] when `kind` is [`EngineKind::Uring`] and io_uring cannot
    /// be had, or when memory runs out.
    pub fn new(kind: EngineKind, depth: u32, files: u32) -> Result<Self, EngineError> {
        Self::with(&EngineOptions {
            kind,
            depth,
            files,
            commands: false,
            buffers: 0,
            threads: None,
            polled: false,
            descriptors: false,
        })
    }

    /// As [`new`](Self::new), with all there is to choose.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with(options: &EngineOptions) -> Result<Self, EngineError> {
        let files = options.files;
        match options.kind {
            EngineKind::Sync => Ok(Self::Sync(Blocking::new(files))),
            EngineKind::Uring => Ok(Self::Uring(Box::new(Ring::new(options)?))),
            EngineKind::Auto => match Ring::new(options) {
                Ok(ring) => Ok(Self::Uring(Box::new(ring))),
                Err(EngineError::Unavailable(_)) => Ok(Self::Sync(Blocking::new(files))),
                Err(error) => Err(error),
            },
        }
    }

    /// Hands the engine to the calling thread, which alone may use it from now
    /// on.
    ///
    /// # Errors
    /// [`EngineError::Setup`] when the kernel refuses to enable the ring.
    pub fn start(&mut self) -> Result<(), EngineError> {
        match self {
            Self::Uring(ring) => ring.start(),
            Self::Sync(_) => Ok(()),
        }
    }

    /// Registers a descriptor. The caller keeps it open until
    /// [`remove_file`](Self::remove_file).
    ///
    /// # Errors
    /// [`EngineError::TooManyFiles`], or the kernel's refusal.
    pub fn add_file(&mut self, fd: RawFd) -> Result<FileSlot, EngineError> {
        match self {
            Self::Uring(ring) => ring.add_file(fd),
            Self::Sync(blocking) => blocking.files.add(fd),
        }
    }

    /// Reads and writes of this file make whoever starts them wait: a ring does
    /// them on threads of the kernel's from now on.
    pub fn expect_waiting(&mut self, slot: FileSlot) {
        if let Self::Uring(ring) = self {
            ring.expect_waiting(slot);
        }
    }

    /// Reads and writes of this file, open with O_DIRECT on a device with poll
    /// queues, complete by looking at it instead of by interrupts, on an engine
    /// with [`EngineOptions::polled`]. Those with flags do not: they may wait for
    /// more than one answer of the device.
    pub fn expect_polling(&mut self, slot: FileSlot) {
        if let Self::Uring(ring) = self
            && let Some(polled) = &mut ring.polled
        {
            polled.take_on(slot);
        }
    }

    /// True while transfers are under way, or are to be, that nothing but looking
    /// completes.
    pub fn polls(&self) -> bool {
        match self {
            Self::Uring(ring) => ring.polled.as_ref().is_some_and(|p| p.is_busy()),
            Self::Sync(_) => false,
        }
    }

    /// How long the caller should go on asking [`ready`](Self::ready) before it
    /// sleeps, for the sake of polled transfers; zero without any. While there
    /// are some, [`submit`](Self::submit) sleeps but for a short time, too.
    pub fn patience(&self) -> Duration {
        match self {
            Self::Uring(ring) => ring.patience(),
            Self::Sync(_) => Duration::ZERO,
        }
    }

    /// True where memory can be registered.
    pub fn registers_memory(&self) -> bool {
        match self {
            Self::Uring(ring) => ring.buffers.exist(),
            Self::Sync(_) => false,
        }
    }

    /// Registers memory, of [`MAX_BUFFER`] bytes at most: transfers that lie in
    /// it with their only segment spare the kernel work. Its pages are pinned
    /// until [`remove_buffer`](Self::remove_buffer), and made now where they
    /// are not there yet, which takes its time.
    ///
    /// # Errors
    /// The kernel's refusal, or [`EngineError::TooManyBuffers`].
    ///
    /// # Safety
    /// The memory is mapped, overlaps no other that is registered, and stays
    /// until it is taken out, with nothing else mapped in its place.
    #[expect(unsafe_code, reason = "the kernel writes through raw pointers")]
    pub unsafe fn add_buffer(
        &mut self,
        start: *mut u8,
        len: usize,
    ) -> Result<BufferSlot, EngineError> {
        match self {
            // SAFETY: the caller's promise, passed on.
            Self::Uring(ring) => unsafe { ring.add_buffer(start, len) },
            Self::Sync(_) => Err(EngineError::TooManyBuffers(0)),
        }
    }

    /// Takes memory out again. Transfers that use it must have completed.
    pub fn remove_buffer(&mut self, slot: BufferSlot) {
        if let Self::Uring(ring) = self {
            ring.remove_buffer(slot);
        }
    }

    /// Forgets a descriptor. Operations that use it still complete.
    pub fn remove_file(&mut self, slot: FileSlot) {
        match self {
            Self::Uring(ring) => ring.remove_file(slot),
            Self::Sync(blocking) => blocking.files.remove(slot),
        }
    }

    /// Watches a pipe or eventfd: every write to it that happens while nobody
    /// looks completes `token`, until [`unwatch`](Self::unwatch). Writes may be
    /// reported together. The count of an eventfd is of no interest to the
    /// caller and may or may not be consumed.
    pub fn watch(&mut self, slot: FileSlot, token: u64) {
        match self {
            Self::Uring(ring) => ring.watch(slot, token),
            Self::Sync(blocking) => blocking.watch(slot, token),
        }
    }

    /// Watches a descriptor that has something to read, of which the caller takes all
    /// there is with [`read_now`](Self::read_now) whenever `token` completes, and then
    /// says so with [`taken`](Self::taken).
    pub fn watch_input(&mut self, slot: FileSlot, token: u64) {
        match self {
            // The ring reports what is new, and takes nothing.
            Self::Uring(ring) => ring.watch(slot, token),
            Self::Sync(blocking) => blocking.watch_input(slot, token),
        }
    }

    /// All was read that the watch of this token was for, up to EAGAIN.
    pub fn taken(&mut self, token: u64) {
        if let Self::Sync(blocking) = self {
            blocking.taken(token);
        }
    }

    /// Ends a watch. A completion already on its way may still arrive.
    pub fn unwatch(&mut self, token: u64) {
        match self {
            Self::Uring(ring) => ring.unwatch(token),
            Self::Sync(blocking) => blocking.unwatch(token),
        }
    }

    /// Ends the next sleep in [`submit`](Self::submit) at `when`, or sooner.
    /// It has to be said again before every sleep, and costs nothing when it
    /// was said before.
    pub fn wake_at(&mut self, when: Instant) {
        match self {
            Self::Uring(ring) => ring.wake_at(when),
            Self::Sync(blocking) => blocking.wake_at(when),
        }
    }

    /// Adds one to an eventfd, or a word to a pipe or socket, without waiting
    /// for its reader: full means that there is something to read already.
    /// For an eventfd it may happen as late as the next
    /// [`submit`](Self::submit), which then saves a system call.
    pub fn signal(&mut self, slot: FileSlot, is_eventfd: bool) {
        match self {
            Self::Uring(ring) => {
                if !is_eventfd || !ring.signal(slot) {
                    ring.files.signal(slot);
                }
            }
            Self::Sync(blocking) => blocking.files.signal(slot),
        }
    }

    /// True for the synchronous engine.
    pub fn is_synchronous(&self) -> bool {
        matches!(self, Self::Sync(_))
    }

    /// Starts a read from a file into memory.
    ///
    /// # Safety
    /// The segment list and the memory it names stay valid and in place until
    /// the completion with this token was delivered or the engine is dropped.
    #[expect(unsafe_code, reason = "the kernel writes through raw pointers")]
    pub unsafe fn read(&mut self, transfer: Transfer<'_>) {
        match self {
            // SAFETY: the caller's promise, passed on.
            Self::Uring(ring) => unsafe { ring.read(transfer) },
            // SAFETY: as above; this one is done before it returns.
            Self::Sync(blocking) => unsafe { blocking.read(transfer) },
        }
    }

    /// Starts a write from memory to a file.
    ///
    /// # Safety
    /// As for [`read`](Self::read).
    #[expect(unsafe_code, reason = "the kernel reads through raw pointers")]
    pub unsafe fn write(&mut self, transfer: Transfer<'_>) {
        match self {
            // SAFETY: the caller's promise, passed on.
            Self::Uring(ring) => unsafe { ring.write(transfer) },
            // SAFETY: as above.
            Self::Sync(blocking) => unsafe { blocking.write(transfer) },
        }
    }

    /// Starts an fdatasync, or an fsync with `metadata`.
    pub fn sync(&mut self, file: FileSlot, metadata: bool, token: u64) {
        match self {
            Self::Uring(ring) => ring.sync(file, metadata, token),
            Self::Sync(blocking) => blocking.sync(file, metadata, token),
        }
    }

    /// Starts a fallocate of this mode.
    pub fn allocate(&mut self, extent: Extent, mode: i32) {
        match self {
            Self::Uring(ring) => ring.allocate(extent, mode),
            Self::Sync(blocking) => blocking.allocate(extent, mode),
        }
    }

    /// Starts a discard on a block device, on an engine with
    /// [`EngineOptions::commands`].
    pub fn discard(&mut self, extent: Extent) {
        match self {
            Self::Uring(ring) => ring.discard(extent),
            Self::Sync(blocking) => blocking.discard(extent),
        }
    }

    /// Starts a write of zeroes, of [`ZEROES`] bytes at most; `flags` are those
    /// of pwritev2.
    pub fn write_zeroes(&mut self, extent: Extent, flags: i32) {
        match self {
            Self::Uring(ring) => ring.write_zeroes(extent, flags),
            Self::Sync(blocking) => blocking.write_zeroes(extent, flags),
        }
    }

    /// Hands everything started so far to the kernel and, with `wait`, sleeps
    /// until at least one completion is there, or for a short time while polled
    /// transfers are under way.
    ///
    /// # Errors
    /// [`EngineError::Failed`] when the kernel refuses; the engine is then of
    /// no further use.
    pub fn submit(&mut self, wait: bool) -> Result<(), EngineError> {
        match self {
            Self::Uring(ring) => ring.submit(wait),
            Self::Sync(blocking) => blocking.submit(wait),
        }
    }

    /// Hands what was started so far to the kernel without waiting for anything,
    /// where that takes a call of its own, and says how many completions are
    /// there. A refusal shows at the next [`submit`](Self::submit).
    pub fn flush(&mut self) -> usize {
        match self {
            Self::Uring(ring) => ring.flush(),
            Self::Sync(blocking) => blocking.done(),
        }
    }

    /// True when a completion is there, or the kernel has one ready for the next
    /// [`submit`](Self::submit). It enters the kernel for polled transfers only,
    /// which is why the synchronous engine does not see its watches here.
    pub fn ready(&mut self) -> bool {
        match self {
            Self::Uring(ring) => ring.ready(),
            Self::Sync(blocking) => blocking.done() > 0,
        }
    }

    /// Moves all completions that have arrived into `into`.
    pub fn completions(&mut self, into: &mut Vec<Completion>) {
        match self {
            Self::Uring(ring) => ring.completions(into),
            Self::Sync(blocking) => blocking.completions(into),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uring(ring) if ring.polled.is_some() => {
                write!(f, "io_uring ({}), and one for polled I/O", ring.mode())
            }
            Self::Uring(ring) => write!(f, "io_uring ({})", ring.mode()),
            Self::Sync(_) => write!(f, "synchronous system calls"),
        }
    }
}
