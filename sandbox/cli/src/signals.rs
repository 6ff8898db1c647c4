//! Signals as a descriptor to wait for.
//!
//! Blocked once in `run` before anything is created, so that none can end the process between two
//! steps and leave something behind. Children start with a clean mask (see
//! `pericarp_hypervisor::process`).

// UNSAFETY: signal masks and signalfd have no safe form.
#![expect(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::failure::{Failure, during};

/// Passed on to the command; the last one as a new size of its terminal.
const FORWARDED: [libc::c_int; 7] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];

/// Requests to end that are needed to end a run whose command does not.
const PATIENCE: u32 = 3;

/// The signals this process is sent.
pub(crate) struct Signals {
    fd: OwnedFd,
    requests: u32,
}

impl Signals {
    /// Blocks the signals for all threads, present and future; call while there is only one.
    pub(crate) fn block() -> Result<Self, Failure> {
        // SAFETY: `set` is initialised by sigemptyset before it is used, and lives through the
        // calls; the descriptor that signalfd returns is owned by nothing else.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in FORWARDED {
                libc::sigaddset(&raw mut set, signal);
            }
            let status =
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            if status != 0 {
                return Err(during("signals")(io::Error::from_raw_os_error(status)));
            }
            let raw = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if raw < 0 {
                return Err(during("signals")(io::Error::last_os_error()));
            }
            OwnedFd::from_raw_fd(raw)
        };
        Ok(Self { fd, requests: 0 })
    }

    /// The next signal that has arrived, if any.
    pub(crate) fn next(&mut self) -> Option<u8> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.fd, &mut info) {
            // The number is the first field, and below 65.
            Ok(count) if count == info.len() => Some(info[0]),
            _ => None,
        }
    }

    /// Counts requests to end. True when the command has had its chances.
    pub(crate) fn insists(&mut self, signal: u8) -> bool {
        if [libc::SIGINT, libc::SIGTERM].contains(&libc::c_int::from(signal)) {
            self.requests += 1;
        }
        self.requests >= PATIENCE
    }

    /// For the time before the command runs: a signal that has arrived ends the run.
    pub(crate) fn check(&mut self) -> Result<(), Failure> {
        loop {
            match self
                .next()
                .map(|signal| (signal, libc::c_int::from(signal)))
            {
                None => return Ok(()),
                Some((_, libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGWINCH)) => {}
                Some((signal, _)) => return Err(Failure::Signal(signal)),
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
