//! Polled I/O: transfers of direct files whose device has poll queues go to a
//! second ring of the worker's, and complete when somebody looks at the device
//! instead of by an interrupt. [`crate::Engine`] calls this where
//! [`crate::EngineOptions::polled`] asks for it.
//!
//! A ring for polled I/O can do nothing else: kicks, syncs and timers stay with
//! the first, and both have the same table of files, so that whatever a dead
//! process must keep open until its I/O has ended is kept by both.
//!
//! Looking is a system call, and nothing else makes a transfer complete. It is
//! done without a pause for [`EAGER`] after the last completion came; from then
//! on the worker sleeps between two looks, a quarter of the time it has waited
//! already each time: a device that takes its time is found late by that much at
//! most, and takes no CPU to speak of.
#![expect(unsafe_code)]
// UNSAFETY: submission entries carry raw pointers the kernel follows.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use crate::files::FileSlot;
use crate::ring::passes;
use crate::setup::{build_polled, restrict_polled};
use crate::{Completion, EngineError, EngineOptions};

/// How long it is looked without a pause after the last completion: what a fast
/// device takes for its slower reads.
const EAGER: Duration = Duration::from_micros(100);
/// Sleeps between two looks.
const SHORTEST_NAP: Duration = Duration::from_micros(25);
const LONGEST_NAP: Duration = Duration::from_millis(1);

/// How long the probe waits for its read.
const PROBE_LIMIT: Duration = Duration::from_secs(2);

/// The ring for polled transfers.
pub(crate) struct Polled {
    pub(crate) ring: IoUring,
    /// By slot: whether the file's transfers come here.
    files: Vec<bool>,
    /// Transfers the kernel still owns.
    in_kernel: usize,
    /// Completions taken while room was made for a submission.
    early: Vec<Completion>,
    /// When the last one came back, or the first was started.
    since: Instant,
}

impl Polled {
    /// A ring that is disabled until [`start`](Self::start), with an empty table
    /// of files. What memory may be registered is up to the caller, who also
    /// restricts it.
    pub(crate) fn new(options: &EngineOptions) -> Result<Self, EngineError> {
        let ring = build_polled(options.depth)?;
        ring.submitter()
            .register_files_sparse(options.files)
            .map_err(|source| EngineError::Setup {
                step: "register files for polled I/O",
                source,
            })?;
        Ok(Self {
            ring,
            files: vec![false; options.files as usize],
            in_kernel: 0,
            early: Vec::new(),
            since: Instant::now(),
        })
    }

    pub(crate) fn restrict(&self, buffers: bool) -> io::Result<()> {
        restrict_polled(&self.ring, buffers)
    }

    pub(crate) fn start(&mut self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()?;
        // As with the first ring, a saving and no more.
        let _ = self.ring.submitter().register_ring_fd();
        Ok(())
    }

    pub(crate) fn update(&mut self, slot: FileSlot, fd: RawFd) -> io::Result<()> {
        self.set(slot, false);
        let submitter = self.ring.submitter();
        submitter.register_files_update(slot.0, &[fd]).map(drop)
    }

    /// From now on the file's transfers come here.
    pub(crate) fn take_on(&mut self, slot: FileSlot) {
        self.set(slot, true);
    }

    fn set(&mut self, slot: FileSlot, polled: bool) {
        if let Some(entry) = self.files.get_mut(slot.0 as usize) {
            *entry = polled;
        }
    }

    pub(crate) fn serves(&self, slot: FileSlot) -> bool {
        self.files.get(slot.0 as usize).copied().unwrap_or(false)
    }

    /// Queues a transfer, making room first when the submission queue is full.
    ///
    /// # Errors
    /// The kernel's refusal to go on.
    ///
    /// # Safety
    /// The memory the entry names stays valid until its completion.
    pub(crate) unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        if self.in_kernel == 0 {
            self.since = Instant::now();
        }
        self.in_kernel += 1;
        // SAFETY: the caller's promise.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.look()?;
            // A full completion queue can make the kernel refuse new work; take
            // what is there and try again.
            let mut early = std::mem::take(&mut self.early);
            self.reap(&mut early);
            self.early = early;
        }
        Ok(())
    }

    /// Hands the kernel what is queued, and has it look at the device.
    pub(crate) fn look(&mut self) -> io::Result<()> {
        if self.in_kernel == 0 {
            return Ok(());
        }
        match self.ring.submit() {
            Err(error) if !passes(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// True while only looking makes something complete.
    pub(crate) fn is_busy(&self) -> bool {
        self.in_kernel > 0
    }

    /// Completions to be taken.
    pub(crate) fn arrived(&mut self) -> usize {
        self.early.len() + self.ring.completion().len()
    }

    pub(crate) fn completions(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut self.early);
        self.reap(into);
    }

    fn reap(&mut self, into: &mut Vec<Completion>) {
        let before = into.len();
        for entry in self.ring.completion() {
            into.push(Completion {
                token: entry.user_data(),
                result: entry.result(),
            });
        }
        let count = into.len() - before;
        if count > 0 {
            self.in_kernel -= count;
            self.since = Instant::now();
        }
    }

    /// How much longer it should be looked without a pause.
    pub(crate) fn patience(&self) -> Duration {
        if self.in_kernel == 0 {
            return Duration::ZERO;
        }
        EAGER.saturating_sub(self.since.elapsed())
    }

    /// How long to sleep before the next look.
    pub(crate) fn nap(&self) -> Duration {
        (self.since.elapsed() / 4).clamp(SHORTEST_NAP, LONGEST_NAP)
    }

    /// Waits until the kernel has let go of all memory. False where it cannot be
    /// found out any more.
    pub(crate) fn drain(&mut self) -> bool {
        let mut sink = Vec::new();
        loop {
            self.reap(&mut sink);
            if self.in_kernel == 0 {
                return true;
            }
            if self.look().is_err() {
                return false;
            }
            if self.arrived() == 0 {
                std::thread::sleep(SHORTEST_NAP);
            }
        }
    }
}

/// Whether polled reads of this file work: the file is open with O_DIRECT, and
/// `len` bytes, its block, are read at offset 0. That its device does poll has to
/// be asked elsewhere: older kernels wait for an interrupt where it does not.
///
/// Called at open, before a program confines itself. No read is let wait, or the
/// kernel would start a thread for it, and a program with threads is not confined.
///
/// # Errors
/// The kernel's refusal of the ring or of the read.
pub fn try_polling(fd: RawFd, len: u32) -> io::Result<()> {
    let mut ring: IoUring = IoUring::builder().setup_iopoll().build(2)?;
    let align = len.next_power_of_two().max(4096) as usize;
    let mut memory = vec![0u8; align + len as usize];
    let start = memory.as_ptr().align_offset(align);
    let Some(block) = memory.get_mut(start..start + len as usize) else {
        return Err(io::ErrorKind::OutOfMemory.into());
    };
    // What has to be waited for once: where the block lies, and what of it has
    // not been written yet.
    // SAFETY: the block is as long as is said.
    if unsafe { libc::pread(fd, block.as_mut_ptr().cast(), block.len(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let entry = opcode::Read::new(types::Fd(fd), block.as_mut_ptr(), len)
        .rw_flags(libc::RWF_NOWAIT)
        .build();
    let end = Instant::now() + PROBE_LIMIT;
    loop {
        // SAFETY: the memory lives until the completion is there, or for ever.
        let result = unsafe { one_polled(&mut ring, &entry, end) };
        match result {
            Ok(_) => return Ok(()),
            // The device has no room at the moment.
            Err(Unfinished::Failed(libc::EAGAIN)) if Instant::now() < end => {
                std::thread::sleep(SHORTEST_NAP);
            }
            Err(Unfinished::Failed(errno)) => return Err(io::Error::from_raw_os_error(errno)),
            Err(Unfinished::InKernel(error)) => {
                // The kernel may write to it yet.
                std::mem::forget(memory);
                return Err(error);
            }
        }
    }
}

/// How the probe's read failed.
enum Unfinished {
    Failed(i32),
    InKernel(io::Error),
}

/// # Safety
/// The memory the entry names stays valid unless this says that the kernel is
/// done with it.
unsafe fn one_polled(
    ring: &mut IoUring,
    entry: &squeue::Entry,
    end: Instant,
) -> Result<i32, Unfinished> {
    // SAFETY: the caller's promise.
    let pushed = unsafe { ring.submission().push(entry) };
    pushed.map_err(|_| Unfinished::Failed(libc::EBUSY))?;
    loop {
        let looked = ring.submit();
        if let Some(entry) = ring.completion().next() {
            return match entry.result() {
                error @ ..0 => Err(Unfinished::Failed(-error)),
                bytes => Ok(bytes),
            };
        }
        match looked {
            Err(error) if !passes(&error) => return Err(Unfinished::InKernel(error)),
            _ if Instant::now() > end => {
                return Err(Unfinished::InKernel(io::ErrorKind::TimedOut.into()));
            }
            _ => {}
        }
    }
}
