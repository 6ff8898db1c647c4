//! How a program is told to end: a signal, or a part of it that cannot go on.
//!
//! One eventfd stands for it. It becomes readable once and stays so; session
//! threads poll it beside their socket, and the main thread waits for it and
//! for SIGTERM or SIGINT.
#![expect(unsafe_code)]
// UNSAFETY: signal masks and signalfd have no safe wrapper among our crates.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// Why a sidecar ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// SIGTERM or SIGINT, or the last front end of a connected socket is gone.
    Asked,
    /// A worker failed; the reason was logged.
    Failed,
}

/// A stop request that all threads of a sidecar can see.
#[derive(Debug, Clone)]
pub struct Stop(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: OwnedFd,
    /// None for a part of the program.
    signals: Option<OwnedFd>,
    failed: AtomicBool,
}

impl Stop {
    /// Blocks SIGTERM and SIGINT for this thread and those it starts, and
    /// watches for them instead. Call it before any thread is started.
    ///
    /// # Errors
    /// The kernel's refusal to make an eventfd or a signalfd.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set, the other calls only read
        // and write that set; the descriptor is checked before it is owned.
        let signals = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            if libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Self(Arc::new(Inner {
            event,
            signals: Some(signals),
            failed: AtomicBool::new(false),
        })))
    }

    /// For a part of the program that can be asked to end by itself; whoever
    /// ends the program asks its parts.
    ///
    /// # Errors
    /// The kernel's refusal to make an eventfd.
    pub fn of_a_part() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            signals: None,
            failed: AtomicBool::new(false),
        })))
    }

    /// Asks every thread to end.
    pub fn request(&self) {
        // The only error is a counter at its maximum, which is readable too.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    /// As [`request`](Self::request), because of a failure.
    pub fn fail(&self) {
        self.0.failed.store(true, Ordering::Relaxed);
        self.request();
    }

    /// Sleeps until somebody asks or a signal comes; then everybody is asked.
    pub fn wait(&self) -> Ending {
        loop {
            let mut fds = vec![PollFd::new(&self.0.event, PollFlags::IN)];
            let signals = self.0.signals.as_ref();
            fds.extend(signals.map(|fd| PollFd::new(fd, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Ending::Failed,
            }
        }
        self.request();
        if self.0.failed.load(Ordering::Relaxed) {
            Ending::Failed
        } else {
            Ending::Asked
        }
    }

    /// Readable once a signal came that [`wait`](Self::wait) did not see yet; for
    /// a part of the program, once it was asked.
    pub fn signals(&self) -> BorrowedFd<'_> {
        self.0.signals.as_ref().unwrap_or(&self.0.event).as_fd()
    }

    /// Readable once somebody asked.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}
