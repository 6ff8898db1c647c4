//! The process namespace that a pod's containers share, if they share one.
//!
//! A namespace lasts as long as its first process. That is a copy of this program that has no rights
//! and does nothing: whose parents have ended become its children, and the kernel forgets them at
//! their end. It takes two steps, since a process cannot enter a new namespace, but its children do.
//! `container` asks for the namespace, `main` calls the steps.

// UNSAFETY: `unshare` is unsafe in rustix because it can split the table of descriptors between
// threads, and to ignore a signal has no safe form.
#![expect(unsafe_code)]

use std::{
    io::{self, PipeReader, Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use rustix::{
    process::Pid,
    thread::{CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities, unshare_unsafe},
};

use crate::{
    error::{RequestError, trying},
    reaper::Reaper,
};

/// This program, whatever the root is.
const PROGRAM: &str = "/proc/self/exe";
/// The first step: leaves the second behind, whose number it says.
const MAKE: &str = "make-process-namespace";
/// The second: the first process.
const BE_FIRST: &str = "be-first-process";

/// The namespace, once somebody has asked for it.
#[derive(Debug, Default)]
pub(crate) struct Shared(Mutex<Option<Pid>>);

impl Shared {
    /// Where it is to be joined.
    pub(crate) fn path(&self, reaper: &Reaper) -> Result<PathBuf, RequestError> {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = match *first {
            Some(pid) => pid,
            None => make(reaper).map_err(trying("a process namespace"))?,
        };
        *first = Some(pid);
        Ok(format!("/proc/{}/ns/pid", pid.as_raw_nonzero()).into())
    }
}

fn make(reaper: &Reaper) -> io::Result<Pid> {
    let (said, says) = io::pipe()?;
    let mut command = Command::new(PROGRAM);
    command
        .arg(MAKE)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(says)
        .stderr(Stdio::null());
    reaper.spawn(&mut command, Box::new(|_| {}))?;
    // With its copy of the pipe.
    drop(command);
    read_pid(said)
}

fn read_pid(from: PipeReader) -> io::Result<Pid> {
    let mut text = String::new();
    from.take(16).read_to_string(&mut text)?;
    let number = text.trim().parse().ok().filter(|number| *number > 0);
    let pid = number.and_then(Pid::from_raw);
    pid.ok_or_else(|| io::Error::other("it cannot be made"))
}

/// Plays the part that this process was started for. Returns if it was started for none.
pub(crate) fn play() {
    let played = match std::env::args().nth(1).as_deref() {
        Some(MAKE) => leave_first_behind(),
        Some(BE_FIRST) => be_first(),
        _ => return,
    };
    std::process::exit(i32::from(played.is_err()));
}

fn leave_first_behind() -> io::Result<()> {
    // SAFETY: does not concern descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID)? };
    let mut command = Command::new(PROGRAM);
    let first = command
        .arg(BE_FIRST)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    // As the namespace that we are in numbers it.
    writeln!(io::stdout(), "{}", first.id())
}

fn be_first() -> io::Result<()> {
    // SAFETY: no handler is called; the kernel reaps then.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // Containers may look at it as at one of theirs.
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)?;
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_no_process() {
        let pid = |text: &str| {
            let (said, mut says) = io::pipe().unwrap();
            says.write_all(text.as_bytes()).unwrap();
            drop(says);
            read_pid(said).map(|pid| pid.as_raw_nonzero().get())
        };
        assert_eq!(pid("42\n").unwrap(), 42);
        for bad in ["", "x", "0\n", "-1\n"] {
            assert!(pid(bad).is_err(), "{bad}");
        }
    }
}
