//! The io_uring engine.
//!
//! One ring per worker with SINGLE_ISSUER and DEFER_TASKRUN where the kernel
//! has them, every descriptor registered, and restrictions that allow nothing
//! but the operations below on registered files: code that takes over the
//! process cannot use the ring to open, connect or execute anything.
#![expect(unsafe_code)]
// UNSAFETY: submission entries carry raw pointers the kernel follows.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::files::{FileSlot, Files};
use crate::{Completion, EngineError, EngineOptions, MAX_TOKEN, Transfer};

/// Register operations a started ring may still use: registering its own
/// descriptor, and updating the file table when front ends come and go.
const REGISTER_OPS: [u8; 3] = [
    6,  // IORING_REGISTER_FILES_UPDATE
    20, // IORING_REGISTER_RING_FDS
    21, // IORING_UNREGISTER_RING_FDS
];
/// The limit of the kernel's threads, where a file may come that needs more.
const REGISTER_IOWQ_MAX_WORKERS: u8 = 19;

/// Operations a ring may submit.
const OPERATIONS: [u8; 8] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Timeout::CODE,
];

/// What a signal adds to an eventfd.
static ONE: u64 = 1;

/// A watch that ended this often without a word from its descriptor is given
/// up: a descriptor that cannot be waited for would keep us awake for ever.
const MAX_ENDS: u8 = 8;

/// Set in the user data of watches, so that their completions cannot be taken
/// for those of file operations.
const WATCH: u64 = MAX_TOKEN + 1;
/// Set in the user data of timers; below it, which timer.
const TIMER: u64 = WATCH << 1;
/// User data of operations whose completion nobody waits for.
const IGNORED: u64 = u64::MAX;

/// An io_uring owned by one worker thread.
pub struct Ring {
    ring: IoUring,
    mode: &'static str,
    pub(crate) files: Files,
    started: bool,
    /// Watched slots by token: a multishot poll that the kernel ended early is
    /// armed again from here.
    watches: HashMap<u64, Watch>,
    /// The kernel can leave out the completion of an operation that succeeds.
    can_skip: bool,
    /// Slots of files whose reads and writes would make the submitter wait.
    waits: HashSet<u32>,
    /// The kernel's threads that such files are to have; none once it was told.
    threads: Option<u32>,
    /// The timer that runs, and when it ends.
    timer: Option<(u64, Instant)>,
    /// The number of the last timer.
    timers: u64,
    /// What the last timer's entry points to; the kernel reads it when the
    /// entry is submitted.
    time: Box<types::Timespec>,
    /// The kernel refused a submission; nothing works any more.
    broken: Option<io::Error>,
    /// File operations the kernel still owns.
    in_kernel: usize,
    /// Completions reaped while the ring was being drained by `drop` or while
    /// room was made for a submission.
    early: Vec<Completion>,
}

impl Ring {
    pub(crate) fn new(options: &EngineOptions) -> Result<Self, EngineError> {
        let files = options.files;
        let (ring, mode) = build(options.depth)?;
        let setup = |step| move |source| EngineError::Setup { step, source };
        let submitter = ring.submitter();
        // Sparse tables came with 5.19; before, every entry is said to be empty.
        submitter
            .register_files_sparse(files)
            .or_else(|_| submitter.register_files(&vec![-1; files as usize]))
            .map_err(setup("register files"))?;
        let commands = options.commands.then_some(opcode::UringCmd16::CODE);
        let late = options.threads.map(|_| REGISTER_IOWQ_MAX_WORKERS);
        let mut restrictions: Vec<Restriction> = OPERATIONS
            .into_iter()
            .chain(commands)
            .map(Restriction::sqe_op)
            .chain(
                REGISTER_OPS
                    .into_iter()
                    .chain(late)
                    .map(Restriction::register_op),
            )
            .collect();
        let fixed = squeue::Flags::FIXED_FILE.bits();
        let skip = squeue::Flags::SKIP_SUCCESS.bits();
        let can_skip = ring.params().is_feature_skip_cqe_on_success();
        let threads = squeue::Flags::ASYNC.bits();
        restrictions.push(Restriction::sqe_flags_allowed(fixed | skip | threads));
        restrictions.push(Restriction::sqe_flags_required(fixed));
        ring.submitter()
            .register_restrictions(&mut restrictions)
            .map_err(setup("restrict operations"))?;
        Ok(Self {
            ring,
            mode,
            files: Files::new(files),
            started: false,
            watches: HashMap::new(),
            can_skip,
            waits: HashSet::new(),
            threads: options.threads,
            timer: None,
            timers: 0,
            time: Box::default(),
            broken: None,
            in_kernel: 0,
            early: Vec::new(),
        })
    }

    pub(crate) fn mode(&self) -> &'static str {
        self.mode
    }

    pub(crate) fn start(&mut self) -> Result<(), EngineError> {
        self.ring
            .submitter()
            .register_enable_rings()
            .map_err(|source| EngineError::Setup {
                step: "enable",
                source,
            })?;
        self.started = true;
        // A registered ring descriptor saves one reference count per enter; a
        // kernel without it works the same.
        let _ = self.ring.submitter().register_ring_fd();
        Ok(())
    }

    pub(crate) fn add_file(&mut self, fd: RawFd) -> Result<FileSlot, EngineError> {
        let slot = self.files.add(fd)?;
        match self.update(slot, fd) {
            Ok(()) => Ok(slot),
            Err(source) => {
                self.files.remove(slot);
                Err(EngineError::Setup {
                    step: "register a file",
                    source,
                })
            }
        }
    }

    pub(crate) fn expect_waiting(&mut self, slot: FileSlot) {
        self.waits.insert(slot.0);
        if let Some(threads) = self.threads.take() {
            // Reads and writes of files, and all else; the second stays. A
            // kernel that does not know this serves such files, with fewer.
            let mut limits = [threads, 0];
            let _ = self.ring.submitter().register_iowq_max_workers(&mut limits);
        }
    }

    /// What keeps an operation on this file from making us wait. The kernel
    /// takes a file that can be polled and says that it is ready, as every
    /// FUSE file does, for one that does not wait, and waits in our thread.
    fn willing(&self, slot: FileSlot) -> squeue::Flags {
        if self.waits.contains(&slot.0) {
            squeue::Flags::ASYNC
        } else {
            squeue::Flags::empty()
        }
    }

    pub(crate) fn remove_file(&mut self, slot: FileSlot) {
        self.waits.remove(&slot.0);
        self.files.remove(slot);
        // Failing leaves a reference to a descriptor of ours behind, until the
        // slot is used again.
        let _ = self.update(slot, -1);
    }

    fn update(&self, slot: FileSlot, fd: RawFd) -> io::Result<()> {
        let submitter = self.ring.submitter();
        submitter.register_files_update(slot.0, &[fd]).map(drop)
    }

    pub(crate) fn watch(&mut self, slot: FileSlot, token: u64) {
        self.watches.insert(token, Watch { slot, ends: 0 });
        self.arm(slot, token);
    }

    fn arm(&mut self, slot: FileSlot, token: u64) {
        let entry = opcode::PollAdd::new(types::Fixed(slot.0), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(token | WATCH);
        // SAFETY: a poll refers to no memory.
        unsafe { self.push(entry) };
    }

    pub(crate) fn unwatch(&mut self, token: u64) {
        if self.watches.remove(&token).is_some() {
            // Not a poll removal: that one fails, and leaves the poll armed,
            // when the descriptor was written to a moment ago.
            let entry = opcode::AsyncCancel::new(token | WATCH)
                .build()
                .user_data(IGNORED);
            // SAFETY: a cancellation refers to no memory. FIXED_FILE is set by
            // `push` because the restrictions ask for it on every entry.
            unsafe { self.push(entry) };
        }
    }

    /// One timer at most is in the kernel. One that ends sooner than asked is
    /// left there: it costs a look around, replacing it costs two entries.
    pub(crate) fn wake_at(&mut self, when: Instant) {
        if let Some((number, running)) = self.timer {
            if running <= when {
                return;
            }
            let entry = opcode::AsyncCancel::new(number | TIMER)
                .build()
                .user_data(IGNORED);
            // SAFETY: as for the cancellation of a watch.
            unsafe { self.push(entry) };
        }
        self.timers = (self.timers + 1) & (WATCH - 1);
        self.timer = Some((self.timers, when));
        let left = when.saturating_duration_since(Instant::now());
        *self.time = left.into();
        let entry = opcode::Timeout::new(&raw const *self.time)
            .build()
            .user_data(self.timers | TIMER);
        // SAFETY: the box stays where it is for as long as the ring exists, and
        // the kernel copies the time when the entry is submitted. A timer set
        // before that takes the later time: it is of no more interest.
        unsafe { self.push(entry) };
    }

    /// False when the kernel is too old for it.
    pub(crate) fn signal(&mut self, slot: FileSlot) -> bool {
        if !self.can_skip {
            return false;
        }
        let entry = opcode::Write::new(types::Fixed(slot.0), (&raw const ONE).cast(), 8)
            .offset(u64::MAX)
            // Never wait: a full counter means that the driver was called.
            .rw_flags(libc::RWF_NOWAIT)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(IGNORED);
        // SAFETY: the bytes written are a static.
        unsafe { self.push(entry) };
        true
    }

    /// # Safety
    /// As [`crate::Engine::read`].
    pub(crate) unsafe fn read(&mut self, t: Transfer<'_>) {
        let entry = opcode::Readv::new(
            types::Fixed(t.file.0),
            t.segments.as_ptr(),
            t.segments.len() as u32,
        )
        .offset(t.offset)
        .rw_flags(t.flags)
        .build()
        .flags(self.willing(t.file));
        self.in_kernel += 1;
        // SAFETY: the caller keeps list and memory in place.
        unsafe { self.push(entry.user_data(t.token)) };
    }

    /// # Safety
    /// As [`crate::Engine::write`].
    pub(crate) unsafe fn write(&mut self, t: Transfer<'_>) {
        let entry = opcode::Writev::new(
            types::Fixed(t.file.0),
            t.segments.as_ptr(),
            t.segments.len() as u32,
        )
        .offset(t.offset)
        .rw_flags(t.flags)
        .build()
        .flags(self.willing(t.file));
        self.in_kernel += 1;
        // SAFETY: the caller keeps list and memory in place.
        unsafe { self.push(entry.user_data(t.token)) };
    }

    pub(crate) fn sync(&mut self, file: FileSlot, token: u64) {
        let entry = opcode::Fsync::new(types::Fixed(file.0))
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        // SAFETY: an fsync refers to no memory.
        unsafe { self.operate(entry, token) };
    }

    /// Queues a file operation whose completion carries `token`.
    ///
    /// # Safety
    /// The memory the entry names stays valid until its completion.
    pub(crate) unsafe fn operate(&mut self, entry: squeue::Entry, token: u64) {
        self.in_kernel += 1;
        // SAFETY: the caller's promise.
        unsafe { self.push(entry.user_data(token)) };
    }

    /// Queues an entry, making room first when the submission queue is full.
    ///
    /// # Safety
    /// The memory the entry names stays valid until its completion.
    unsafe fn push(&mut self, entry: squeue::Entry) {
        let entry = entry.flags(squeue::Flags::FIXED_FILE);
        while self.broken.is_none() {
            // SAFETY: the caller's promise.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // A full completion queue can make the kernel refuse new work; take
            // what is there and try again.
            if let Err(error) = self.ring.submitter().submit()
                && !passes(&error)
            {
                self.broken = Some(error);
            }
            let mut early = std::mem::take(&mut self.early);
            self.reap(&mut early);
            // Arming a watch again may have come through here, too.
            early.append(&mut self.early);
            self.early = early;
        }
    }

    pub(crate) fn submit(&mut self, wait: bool) -> Result<(), EngineError> {
        if let Some(error) = self.broken.take() {
            return Err(EngineError::Failed(error));
        }
        let (idle, arrived) = {
            let queue = self.ring.submission();
            (
                queue.is_empty() && !queue.taskrun() && !queue.cq_overflow(),
                !self.early.is_empty(),
            )
        };
        let arrived = arrived || !self.ring.completion().is_empty();
        if idle && (arrived || !wait) {
            return Ok(());
        }
        let want = usize::from(wait && !arrived);
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Completions must be reaped before more can be submitted.
                Err(e) if passes(&e) => return Ok(()),
                Err(e) => return Err(EngineError::Failed(e)),
            }
        }
    }

    pub(crate) fn flush(&mut self) -> usize {
        if let Err(EngineError::Failed(error)) = self.submit(false) {
            self.broken = Some(error);
        }
        self.ring.completion().len()
    }

    /// True when [`submit`](Self::submit) would not have to wait.
    pub(crate) fn ready(&mut self) -> bool {
        !self.early.is_empty()
            || !self.ring.completion().is_empty()
            || self.ring.submission().taskrun()
    }

    pub(crate) fn completions(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut self.early);
        self.reap(into);
    }

    fn reap(&mut self, into: &mut Vec<Completion>) {
        let mut rearm = Vec::new();
        for entry in self.ring.completion() {
            let (user_data, result) = (entry.user_data(), entry.result());
            if user_data == IGNORED {
                continue;
            }
            if user_data & TIMER != 0 {
                // Ending the sleep was all it had to do.
                if self
                    .timer
                    .is_some_and(|(number, _)| number | TIMER == user_data)
                {
                    self.timer = None;
                }
                continue;
            }
            let token = user_data & MAX_TOKEN;
            if user_data & WATCH == 0 {
                self.in_kernel -= 1;
                into.push(Completion { token, result });
                continue;
            }
            let Some(watch) = self.watches.get_mut(&token) else {
                // The last word of a watch that was removed.
                continue;
            };
            if cqueue::more(entry.flags()) {
                watch.ends = 0;
            } else {
                // The kernel ends a multishot poll when its queue overflows,
                // and when the other end is gone. Only the first is worth
                // watching again: the second would spin.
                let gone = i32::from(libc::POLLHUP | libc::POLLERR);
                watch.ends += 1;
                if result > 0 && result & gone == 0 && watch.ends < MAX_ENDS {
                    rearm.push((watch.slot, token));
                } else {
                    self.watches.remove(&token);
                }
            }
            into.push(Completion { token, result });
        }
        for (slot, token) in rearm {
            self.arm(slot, token);
        }
    }
}

/// A refusal that reaping completions cures.
fn passes(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::EAGAIN | libc::EINTR)
    )
}

/// A watched slot.
#[derive(Debug)]
struct Watch {
    slot: FileSlot,
    /// Times in a row that the kernel ended the poll.
    ends: u8,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("mode", &self.mode)
            .field("in_kernel", &self.in_kernel)
            .finish_non_exhaustive()
    }
}

impl Drop for Ring {
    /// The kernel may still write into memory that the owner of this engine is
    /// about to free: wait until it does not.
    fn drop(&mut self) {
        let mut sink = Vec::new();
        while self.started && self.in_kernel > 0 {
            if self.submit(true).is_err() {
                // Nothing can be waited for any more, so nothing may be freed.
                std::process::abort();
            }
            self.reap(&mut sink);
        }
    }
}

/// Builds the best ring this kernel has: each attempt asks for less.
fn build(depth: u32) -> Result<(IoUring, &'static str), EngineError> {
    type Configure = fn(&mut io_uring::Builder);
    let attempts: [(&'static str, Configure); 3] = [
        ("single issuer, deferred task work", |b| {
            b.setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        }),
        ("cooperative task work", |b| {
            b.setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        }),
        ("plain", |_| {}),
    ];
    let mut refusal = io::Error::from_raw_os_error(libc::ENOSYS);
    for (mode, configure) in attempts {
        let mut builder = IoUring::builder();
        builder
            .setup_r_disabled()
            .setup_clamp()
            .setup_cqsize(depth.saturating_mul(4));
        configure(&mut builder);
        match builder.build(depth) {
            Ok(ring) => return Ok((ring, mode)),
            Err(error) => refusal = error,
        }
    }
    // Forbidden or unknown, as opposed to short of memory or descriptors.
    match refusal.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL) => {
            Err(EngineError::Unavailable(refusal))
        }
        _ => Err(EngineError::Setup {
            step: "create",
            source: refusal,
        }),
    }
}
