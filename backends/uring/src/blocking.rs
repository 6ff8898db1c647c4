//! The engine for kernels and sandboxes that forbid io_uring: file operations
//! are done on the spot, and sleeping is poll(2) on what is watched.
#![expect(unsafe_code)]
// UNSAFETY: preadv2 and pwritev2 follow the segment list's raw pointers.

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::time::Instant;

use libc::{c_int, iovec, pollfd};

use crate::files::{FileSlot, Files};
use crate::{Completion, EngineError, Transfer};

/// What ends a sleep.
#[derive(Debug, Clone, Copy)]
struct Watch {
    token: u64,
    slot: FileSlot,
    /// The caller reads it; whether it still has to, and nothing new is to be told.
    input: Option<bool>,
}

/// Synchronous file I/O and poll(2).
#[derive(Debug)]
pub struct Blocking {
    pub(crate) files: Files,
    watches: Vec<Watch>,
    /// When the next sleep ends at the latest.
    wake: Option<Instant>,
    pub(crate) done: Vec<Completion>,
}

impl Blocking {
    pub(crate) fn new(files: u32) -> Self {
        Self {
            files: Files::new(files),
            watches: Vec::new(),
            wake: None,
            done: Vec::new(),
        }
    }

    pub(crate) fn watch(&mut self, slot: FileSlot, token: u64) {
        self.watches.push(Watch {
            token,
            slot,
            input: None,
        });
    }

    pub(crate) fn watch_input(&mut self, slot: FileSlot, token: u64) {
        self.watches.push(Watch {
            token,
            slot,
            input: Some(false),
        });
    }

    pub(crate) fn taken(&mut self, token: u64) {
        let mut watches = self.watches.iter_mut();
        if let Some(watch) = watches.find(|watch| watch.token == token) {
            watch.input = Some(false);
        }
    }

    pub(crate) fn wake_at(&mut self, when: Instant) {
        self.wake = Some(self.wake.map_or(when, |earlier| earlier.min(when)));
    }

    pub(crate) fn unwatch(&mut self, token: u64) {
        self.watches.retain(|watch| watch.token != token);
    }

    /// # Safety
    /// As [`crate::Engine::read`], for the length of the call.
    pub(crate) unsafe fn read(&mut self, t: Transfer<'_>) {
        self.transfer(t, |fd, t| {
            // SAFETY: the caller vouches for list and memory.
            unsafe {
                libc::preadv2(
                    fd,
                    t.segments.as_ptr(),
                    t.segments.len() as c_int,
                    t.offset as i64,
                    t.flags,
                )
            }
        });
    }

    /// # Safety
    /// As [`crate::Engine::write`], for the length of the call.
    pub(crate) unsafe fn write(&mut self, t: Transfer<'_>) {
        self.transfer(t, |fd, t| {
            // SAFETY: the caller vouches for list and memory.
            unsafe {
                libc::pwritev2(
                    fd,
                    t.segments.as_ptr(),
                    t.segments.len() as c_int,
                    t.offset as i64,
                    t.flags,
                )
            }
        });
    }

    fn transfer(&mut self, t: Transfer<'_>, call: impl Fn(RawFd, &Transfer<'_>) -> isize) {
        let result = self.files.get(t.file).map_or(-libc::EBADF, |fd| {
            loop {
                let got = call(fd, &t);
                let error = io::Error::last_os_error();
                if got >= 0 {
                    break i32::try_from(got).unwrap_or(i32::MAX);
                }
                if error.kind() != io::ErrorKind::Interrupted {
                    break -error.raw_os_error().unwrap_or(libc::EIO);
                }
            }
        });
        self.done.push(Completion {
            token: t.token,
            result,
        });
    }

    pub(crate) fn sync(&mut self, file: FileSlot, metadata: bool, token: u64) {
        let call = if metadata {
            libc::fsync
        } else {
            libc::fdatasync
        };
        let result = self.files.get(file).map_or(-libc::EBADF, |fd| {
            // SAFETY: either takes a descriptor and touches no memory.
            match unsafe { call(fd) } {
                0 => 0,
                _ => -io::Error::last_os_error()
                    .raw_os_error()
                    .unwrap_or(libc::EIO),
            }
        });
        self.done.push(Completion { token, result });
    }

    pub(crate) fn done(&self) -> usize {
        self.done.len()
    }

    pub(crate) fn submit(&mut self, wait: bool) -> Result<(), EngineError> {
        let block = wait && self.done.is_empty();
        let mut polled: Vec<pollfd> = self
            .watches
            .iter()
            .map(|watch| pollfd {
                // A negative number is passed over.
                fd: match watch.input {
                    Some(true) => -1,
                    _ => self.files.get(watch.slot).unwrap_or(-1),
                },
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        // Only a sleep uses it up.
        let wake = if wait { self.wake.take() } else { None };
        let left = wake.map(|w| w.saturating_duration_since(Instant::now()));
        // poll(2) knows milliseconds only, which are too coarse for a timer.
        let time = left.map(|left| libc::timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let limit: *const libc::timespec = match &time {
            _ if !block => &now,
            Some(time) => time,
            None => std::ptr::null(),
        };
        // SAFETY: array and time live across the call, the array's length is
        // passed, and no signal mask is.
        let ready = unsafe {
            libc::ppoll(
                polled.as_mut_ptr(),
                polled.len() as libc::nfds_t,
                limit,
                std::ptr::null(),
            )
        };
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                return Ok(());
            }
            return Err(EngineError::Failed(error));
        }
        let mut gone = Vec::new();
        for (index, entry) in polled.iter().enumerate().filter(|(_, e)| e.revents != 0) {
            let Watch { token, slot, input } = self.watches[index];
            if input.is_some() {
                self.watches[index].input = Some(true);
                self.done.push(Completion {
                    token,
                    result: i32::from(entry.revents),
                });
                continue;
            }
            let over = libc::POLLHUP | libc::POLLERR | libc::POLLNVAL;
            // At its end, or no descriptor that falls silent: it would keep us
            // awake for ever.
            if entry.revents & over != 0 || !self.drain(slot) {
                gone.push(token);
            }
            self.done.push(Completion {
                token,
                result: i32::from(entry.revents),
            });
        }
        for token in gone {
            self.unwatch(token);
        }
        Ok(())
    }

    /// poll(2) reports a level: take the count so that it falls silent. The
    /// descriptor was just seen readable. False when it has nothing to take.
    fn drain(&self, slot: FileSlot) -> bool {
        let Some(fd) = self.files.get(slot) else {
            return false;
        };
        let mut buffer = [0u8; 4096];
        let mut segment = iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: segment and buffer outlive the call. RWF_NOWAIT: somebody
        // else may have read it meanwhile.
        let got = unsafe { libc::preadv2(fd, &raw mut segment, 1, -1, libc::RWF_NOWAIT) };
        got > 0 || (got < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock)
    }

    pub(crate) fn completions(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut mem::take(&mut self.done));
    }
}
