//! Programs that do one thing for us and have to succeed at it: `mkfs.ext4`, `mkfs.erofs`,
//! `mount`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use pericarp_hypervisor::{Confinement, Process};
use pericarp_pod::PodError;
use rustix::event::{PollFd, PollFlags, poll};

use crate::{failure::Failure, signals::Signals};

/// Runs a program to its end; a signal to us ends it.
pub(crate) fn run_to_end(
    name: &'static str,
    command: Command,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let mut process = Process::spawn(name, command, Confinement::default()).map_err(|source| {
        PodError::Program {
            program: name.into(),
            source,
            cure: "`cargo xtask setup` installs what is missing",
        }
    })?;
    loop {
        if let Some(status) = process.exited() {
            return if status.success() {
                Ok(())
            } else {
                Err(Failure::Helper {
                    program: name.into(),
                    end: process.describe_end(),
                })
            };
        }
        {
            let exit = process.exit_fd();
            let mut fds = [
                PollFd::new(&exit, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ];
            // An interrupted wait goes round again.
            let _ = poll(&mut fds, None);
        }
        signals.check()?;
    }
}

/// Where a program of the system's administration is: a plain user's search path leaves its
/// directory out.
pub(crate) fn system_program(name: &str) -> PathBuf {
    ["/usr/sbin", "/sbin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| name.into())
}
