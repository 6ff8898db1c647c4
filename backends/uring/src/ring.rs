//! The io_uring engine.
//!
//! One ring per worker, every descriptor registered. How it is made and what it
//! may do is in `setup`; here is what it does: watches, timers, signals, and
//! the ways into the kernel and back. [`crate::Engine`] is the only caller.
#![expect(unsafe_code)]
// UNSAFETY: submission entries carry raw pointers the kernel follows.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::buffers::Buffers;
use crate::cpus::narrowed;
use crate::files::{FileSlot, Files, Place, on};
use crate::here::Here;
use crate::polled::Polled;
use crate::setup::{build, restrict};
use crate::wake::Watch;
use crate::{Completion, EngineError, EngineOptions, MAX_TOKEN};

/// A watch that ended this often without a word from its descriptor is given
/// up: a descriptor that cannot be waited for would keep us awake for ever.
const MAX_ENDS: u8 = 8;

/// Set in the user data of watches, so that their completions cannot be taken
/// for those of file operations.
pub(crate) const WATCH: u64 = MAX_TOKEN + 1;
/// Set in the user data of timers; below it, which timer.
pub(crate) const TIMER: u64 = WATCH << 1;
/// User data of operations whose completion nobody waits for.
pub(crate) const IGNORED: u64 = u64::MAX;

/// An io_uring owned by one worker thread.
pub struct Ring {
    pub(crate) ring: IoUring,
    mode: &'static str,
    pub(crate) files: Files,
    pub(crate) buffers: Buffers,
    /// Where transfers of polled files go, and where memory is registered then.
    pub(crate) polled: Option<Box<Polled>>,
    started: bool,
    /// Watched slots by token: a multishot poll that the kernel ended early is
    /// armed again from here.
    pub(crate) watches: HashMap<u64, Watch>,
    /// The kernel can leave out the completion of an operation that succeeds.
    pub(crate) can_skip: bool,
    /// Slots of files whose reads and writes would make the submitter wait.
    waits: HashSet<u32>,
    /// The kernel's threads that such files are to have; none once it was told.
    threads: Option<u32>,
    /// Where the kernel's threads are to run; none once it was told, or where that is anywhere.
    cpus: Option<libc::cpu_set_t>,
    /// The timer that runs, and when it ends.
    pub(crate) timer: Option<(u64, Instant)>,
    /// The number of the last timer.
    pub(crate) timers: u64,
    /// What the last timer's entry points to; the kernel reads it when the
    /// entry is submitted.
    pub(crate) time: Box<types::Timespec>,
    /// The kernel refused a submission; nothing works any more.
    pub(crate) broken: Option<io::Error>,
    /// File operations the kernel still owns.
    in_kernel: usize,
    /// Completions reaped while the ring was being drained by `drop` or while
    /// room was made for a submission, and of what was done here.
    pub(crate) early: Vec<Completion>,
    pub(crate) here: Here,
    /// Several writes that do not wait can be done at once.
    pub(crate) takes_many: bool,
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
        let polled = options
            .polled
            .then(|| Polled::new(options).map(Box::new))
            .transpose()?;
        let can_skip = ring.params().is_feature_skip_cqe_on_success();
        // Refused before Linux 5.19: then memory stays as it is.
        let buffers = match options.buffers {
            0 => 0,
            count => polled
                .as_ref()
                .map_or(submitter, |polled| polled.ring.submitter())
                .register_buffers_sparse(count)
                .map_or(0, |()| count),
        };
        let here = buffers > 0 && polled.is_none();
        restrict(&ring, options, here).map_err(setup("restrict operations"))?;
        if let Some(polled) = &polled {
            let restricted = polled.restrict(buffers > 0);
            restricted.map_err(setup("restrict polled operations"))?;
        }
        Ok(Self {
            ring,
            mode,
            files: Files::new(files),
            buffers: Buffers::new(buffers),
            polled,
            started: false,
            watches: HashMap::new(),
            can_skip,
            waits: HashSet::new(),
            threads: options.threads,
            cpus: narrowed(),
            timer: None,
            timers: 0,
            time: Box::default(),
            broken: None,
            in_kernel: 0,
            early: Vec::new(),
            here: Here::default(),
            takes_many: true,
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
        if let Some(polled) = &mut self.polled {
            polled.start().map_err(|source| EngineError::Setup {
                step: "enable polled I/O",
                source,
            })?;
        }
        self.started = true;
        // A registered ring descriptor saves one reference count per enter; a
        // kernel without it works the same.
        let mut submitter = self.ring.submitter();
        let _ = submitter.register_ring_fd();
        if let Some(cpus) = self.cpus.take() {
            // Of this thread's rings, all of them. The kernel knows it from Linux 5.14 on, and this
            // thread since the line before, from 5.18 on.
            let _ = submitter.register_iowq_aff(&cpus);
        }
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
        self.allow_threads();
    }

    /// Raises the number of the kernel's threads, once.
    fn allow_threads(&mut self) {
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
    pub(crate) fn willing(&mut self, slot: FileSlot) -> squeue::Flags {
        let threads = slot.place() == Place::Threads;
        if threads {
            self.allow_threads();
        }
        if threads || self.waits.contains(&slot.0) {
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

    /// Both rings hold the file, or neither does.
    fn update(&mut self, slot: FileSlot, fd: RawFd) -> io::Result<()> {
        let submitter = self.ring.submitter();
        submitter.register_files_update(slot.0, &[fd])?;
        if let Some(polled) = &mut self.polled
            && let Err(error) = polled.update(slot, fd)
        {
            let _ = submitter.register_files_update(slot.0, &[-1]);
            return Err(error);
        }
        Ok(())
    }

    pub(crate) fn sync(&mut self, file: FileSlot, metadata: bool, token: u64) {
        let flags = if metadata {
            types::FsyncFlags::empty()
        } else {
            types::FsyncFlags::DATASYNC
        };
        let entry = on!(file, |target| opcode::Fsync::new(target)
            .flags(flags)
            .build());
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
        unsafe { self.push_as_it_is(entry.user_data(token)) };
    }

    /// Queues an entry of ours, with the flag that the restrictions ask for on
    /// each, whether it names a file or not.
    ///
    /// # Safety
    /// The memory the entry names stays valid until its completion.
    pub(crate) unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller's promise.
        unsafe { self.push_as_it_is(entry.flags(squeue::Flags::FIXED_FILE)) };
    }

    /// Queues an entry, making room first when the submission queue is full.
    ///
    /// # Safety
    /// The memory the entry names stays valid until its completion.
    unsafe fn push_as_it_is(&mut self, entry: squeue::Entry) {
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
        self.look();
        let nap = wait && self.is_polling();
        if nap && let Some(polled) = &self.polled {
            let next = Instant::now() + polled.nap();
            self.wake_at(next);
        }
        let done = self.enter(wait);
        if nap {
            self.look();
        }
        done
    }

    /// True while something is with the device that nothing but looking
    /// completes, and has not completed yet.
    fn is_polling(&mut self) -> bool {
        let polled = self.polled.as_mut();
        polled.is_some_and(|polled| polled.is_busy() && polled.arrived() == 0)
    }

    /// Hands polled transfers to the kernel, and looks for those that are done.
    fn look(&mut self) {
        if let Some(polled) = &mut self.polled
            && let Err(error) = polled.look()
        {
            self.broken = Some(error);
        }
    }

    pub(crate) fn patience(&self) -> Duration {
        let polled = self.polled.as_ref();
        polled.map_or(Duration::ZERO, |polled| polled.patience())
    }

    /// Hands the first ring's entries to the kernel, and waits for it.
    fn enter(&mut self, wait: bool) -> Result<(), EngineError> {
        if let Some(error) = self.broken.take() {
            return Err(EngineError::Failed(error));
        }
        let idle = {
            let queue = self.ring.submission();
            queue.is_empty() && !queue.taskrun() && !queue.cq_overflow()
        };
        let arrived = !self.early.is_empty() || self.polled_arrived() > 0;
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
        let arrived = self.ring.completion().len();
        arrived + self.polled_arrived()
    }

    fn polled_arrived(&mut self) -> usize {
        let polled = self.polled.as_mut();
        polled.map_or(0, |polled| polled.arrived())
    }

    /// True when [`submit`](Self::submit) would not have to wait.
    pub(crate) fn ready(&mut self) -> bool {
        !self.early.is_empty()
            || !self.ring.completion().is_empty()
            || self.ring.submission().taskrun()
            || self.found_polled()
    }

    fn found_polled(&mut self) -> bool {
        self.look();
        self.polled_arrived() > 0 || self.broken.is_some()
    }

    pub(crate) fn completions(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut self.early);
        self.reap(into);
        if let Some(polled) = &mut self.polled {
            polled.completions(into);
        }
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
pub(crate) fn passes(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::EAGAIN | libc::EINTR)
    )
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
        if let Some(polled) = &mut self.polled
            && !polled.drain()
        {
            std::process::abort();
        }
        while self.started && self.in_kernel > 0 {
            if self.submit(true).is_err() {
                // Nothing can be waited for any more, so nothing may be freed.
                std::process::abort();
            }
            self.reap(&mut sink);
        }
    }
}
