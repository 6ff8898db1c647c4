//! Starts the command, and ends whatever is still running after it.
//!
//! The command gets a session of its own and pipes for its standard streams. Called by `main`; the
//! pump owns what [`start`] returns.

// UNSAFETY: a new session between fork and exec, and the signal to every process, have no safe
// form.
#![expect(unsafe_code)]

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use pericarp_protocol::{ExitReport, RunSpec};
use rustix::{
    fs::OFlags,
    process::{Pid, PidfdFlags, Signal, WaitOptions},
};

use crate::{
    error::{InitError, during},
    limits::Group,
};

/// How long killed processes may take to go; one that hangs in the kernel is left behind.
const REAP_LIMIT: Duration = Duration::from_secs(5);

/// A started command.
pub(crate) struct Command {
    pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    ended: Option<ExitReport>,
}

pub(crate) fn start(spec: &RunSpec, group: &Group) -> Result<Command, InitError> {
    let Some((program, arguments)) = spec.argv.split_first() else {
        return Err(InitError::NotFound(String::new()));
    };
    if !Path::new(&spec.cwd).is_dir() {
        return Err(InitError::NoWorkingDirectory(spec.cwd.clone()));
    }
    let mut command = std::process::Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(spec.env.iter().map(|(key, value)| (key, value)))
        .current_dir(&spec.cwd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: runs in the forked child before exec; one system call, nothing shared.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = group
        .within(|| command.spawn())?
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => InitError::NotFound(program.clone()),
            _ => InitError::NotExecutable {
                program: program.clone(),
                source,
            },
        })?;
    Command::take(&mut child)
}

impl Command {
    fn take(child: &mut Child) -> Result<Self, InitError> {
        let pid = Pid::from_child(child);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(during("watching the command"))?;
        let command = Self {
            pid,
            pidfd,
            stdin: child.stdin.take().map(Into::into),
            stdout: child.stdout.take().map(Into::into),
            stderr: child.stderr.take().map(Into::into),
            ended: None,
        };
        for pipe in [&command.stdin, &command.stdout, &command.stderr]
            .into_iter()
            .flatten()
        {
            rustix::fs::fcntl_setfl(pipe, OFlags::NONBLOCK).map_err(during("a pipe"))?;
        }
        Ok(command)
    }

    /// Collects every child that has ended, this command among them; orphans of the command end up
    /// here too.
    pub(crate) fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if pid == self.pid {
                self.ended = Some(report(status.as_raw()));
            }
        }
    }

    /// How the command ended, if it has.
    pub(crate) fn ended(&self) -> Option<ExitReport> {
        self.ended
    }

    /// Passes a signal on: those of a terminal to all of the command's processes, as a terminal
    /// does; others to the command itself.
    pub(crate) fn signal(&self, number: u8) {
        let Some(signal) = Signal::from_named_raw(i32::from(number)) else {
            return;
        };
        // A command that is just ending needs no signal.
        let _ = if signal == Signal::INT || signal == Signal::QUIT {
            rustix::process::kill_process_group(self.pid, signal)
        } else {
            rustix::process::kill_process(self.pid, signal)
        };
    }
}

fn report(raw: i32) -> ExitReport {
    let status = ExitStatus::from_raw(raw);
    // Both are bytes by the definition of a wait status.
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitReport::Code(code as u8),
        (None, signal) => ExitReport::Signal {
            signal: signal.unwrap_or(libc::SIGKILL) as u8,
            out_of_memory: false,
        },
    }
}

/// Kills everything but this process.
pub(crate) fn kill_all() {
    // SAFETY: no memory is involved. -1 from the first process reaches every other process; that
    // there is none is no error here.
    unsafe {
        libc::kill(-1, libc::SIGKILL);
    }
}

/// Kills everything but this process and waits for it to be gone.
pub(crate) fn end_everything() {
    kill_all();
    let end = Instant::now() + REAP_LIMIT;
    while Instant::now() < end {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_status_becomes_a_report() {
        let code = std::process::Command::new("/bin/sh")
            .args(["-c", "exit 7"])
            .status()
            .unwrap();
        assert_eq!(report(code.into_raw()), ExitReport::Code(7));
        let killed = std::process::Command::new("/bin/sh")
            .args(["-c", "kill -TERM $$"])
            .status()
            .unwrap();
        assert_eq!(
            report(killed.into_raw()),
            ExitReport::Signal {
                signal: 15,
                out_of_memory: false
            }
        );
    }
}
