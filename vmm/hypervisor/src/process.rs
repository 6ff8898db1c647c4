//! Child processes that cannot be left behind.
//!
//! Used for the virtual machine and by `pericarp run` for the sidecars beside it. A [`Process`]
//! is killed and reaped when it is dropped; when the *caller* dies, even by SIGKILL, the kernel
//! kills the child. The kernel ties that to the thread that started the child, so start children
//! from a thread that lives as long as they should: the main thread.
//!
//! Children get a process group of their own, so that a Ctrl-C at the terminal reaches only the
//! program itself, which decides what it means.

// UNSAFETY: what a child must do between fork and exec has no safe form in the standard library.
#![expect(unsafe_code)]

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mount::{MountFlags, MountPropagationFlags},
    process::{Pid, PidfdFlags, Resource, Rlimit, Signal},
    thread::{CapabilitySet, UnshareFlags},
};

use crate::ring::Ring;

/// Error output kept of a child.
const KEEP_STDERR: usize = 8 * 1024;

/// What a child gives up before its program starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Confinement {
    /// Start without any capability, and without a way to gain one.
    pub drop_capabilities: bool,
    /// A network and System V IPC of its own, with nothing in it. Takes effect where the caller
    /// may make namespaces; an unprivileged caller's child goes without.
    pub private_network: bool,
    /// The caller has arranged that the child is the first process of a new PID namespace. It
    /// gets mounts of its own and a fresh `/proc`, and all that it starts dies with it.
    pub first_process: bool,
}

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    stderr: Arc<Mutex<Ring>>,
    drained: Receiver<()>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` without input. Its error output is kept within bounds; its standard output
    /// goes where the command says. `name` is used in messages.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn spawn(name: &str, command: Command, confinement: Confinement) -> io::Result<Self> {
        Self::spawn_with(name, command, confinement, Vec::new())
    }

    /// As [`Process::spawn`], for a child that gets `inherited` under the same numbers.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn spawn_with(
        name: &str,
        mut command: Command,
        confinement: Confinement,
        inherited: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        Self::prepare(&mut command, confinement);
        let mut child = spawn_with_inherited(&mut command, inherited)?;
        let stderr = Arc::new(Mutex::new(Ring::new(KEEP_STDERR)));
        let (done, drained) = mpsc::channel();
        let started = (|| {
            let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            if let Some(mut pipe) = child.stderr.take() {
                let shared = Arc::clone(&stderr);
                thread::Builder::new()
                    .name("stderr".into())
                    .stack_size(64 * 1024)
                    .spawn(move || {
                        let mut buffer = [0; 2048];
                        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                            let mut ring = shared.lock().unwrap_or_else(PoisonError::into_inner);
                            ring.push(&buffer[..count]);
                        }
                        drop(done);
                    })?;
            }
            Ok(pidfd)
        })();
        match started {
            Ok(pidfd) => Ok(Self {
                name: name.to_owned(),
                child,
                pidfd,
                stderr,
                drained,
                status: None,
            }),
            Err(error) => {
                // Neither can fail for a child that was not waited for.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Makes `command` die with this process and start with a clean signal mask, and confines it.
    /// For commands that keep the caller's own input and output; [`Process::spawn`] calls it too.
    pub fn prepare(command: &mut Command, confinement: Confinement) {
        let parent = rustix::process::getpid();
        // SAFETY: the closure runs in the forked child before exec. It only makes system calls
        // through rustix and libc on values it owns: no allocation, no lock, no other state.
        unsafe {
            command.pre_exec(move || {
                let mut none: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut none);
                if libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                before_exec(parent, confinement)
            });
        }
    }

    /// The name given at the start.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Takes the child's standard output, if it was made a pipe.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Becomes readable when the process has ended.
    #[must_use]
    pub fn exit_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The exit status, if the process has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.status.is_none()
            && let Ok(status) = self.child.try_wait()
        {
            self.status = status;
        }
        self.status
    }

    /// Waits for the end, at most this long.
    pub fn wait_for(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if let Some(status) = self.exited() {
                return Some(status);
            }
            if left.is_zero() {
                return None;
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            // An interrupted poll goes round again.
            let _ = poll(&mut fds, Some(&timeout));
        }
    }

    /// Sends a signal. A process that is already gone is no error.
    pub fn signal(&self, signal: Signal) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal);
    }

    /// Asks the process to end with SIGTERM, and kills it after `grace`.
    pub fn end(&mut self, grace: Duration) -> Option<ExitStatus> {
        if self.exited().is_none() {
            self.signal(Signal::TERM);
            if self.wait_for(grace).is_none() {
                self.kill();
            }
        }
        self.status
    }

    /// Kills and reaps the process.
    pub fn kill(&mut self) {
        if self.exited().is_none() {
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }

    /// The last lines of the error output, safe to print. Complete once the process has ended.
    #[must_use]
    pub fn last_words(&self, count: usize) -> Vec<String> {
        if self.status.is_some() {
            // The pipe ends with the process, unless a child of it holds it open: don't wait long.
            let _ = self.drained.recv_timeout(Duration::from_millis(300));
        }
        self.stderr
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last_lines(count)
    }

    /// How it ended, in words: `exit code 1: its last line` or `signal 9`.
    pub fn describe_end(&mut self) -> String {
        use std::os::unix::process::ExitStatusExt;
        let how = match self.exited() {
            None => "still running".to_owned(),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, Some(signal)) => format!("killed by signal {signal}"),
                (None, None) => "ended".to_owned(),
            },
        };
        match self.last_words(1).pop() {
            Some(line) => format!("{how}: {line}"),
            None => how,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Only the child itself lets the descriptors through exec: in this process another thread could
/// be starting a program of its own.
fn spawn_with_inherited(command: &mut Command, inherited: Vec<OwnedFd>) -> io::Result<Child> {
    // SAFETY: the closure makes system calls on descriptors it owns, and nothing else.
    unsafe {
        command.pre_exec(move || {
            for fd in &inherited {
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    command.spawn()
}

/// Runs in the child between fork and exec.
fn before_exec(parent: Pid, confinement: Confinement) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // A first process cannot see its parent, whose death before the line above it would miss.
    if !confinement.first_process && rustix::process::getppid() != Some(parent) {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    if confinement.first_process {
        // SAFETY: does not concern file descriptors or memory.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", private)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount(c"proc", c"/proc", c"proc", flags, None)?;
    }
    // A dump of a machine's whole memory helps nobody and fills the disk.
    rustix::process::setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    if confinement.private_network {
        // SAFETY: neither flag concerns file descriptors or memory.
        let done =
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWIPC) };
        match done {
            Ok(()) | Err(rustix::io::Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if confinement.drop_capabilities {
        // An empty bounding set leaves nothing to gain at exec, not even for uid 0. Where the
        // caller may not shrink the set it has no capability to pass on either.
        for bit in 0..64 {
            let Some(capability) = CapabilitySet::from_bits(1 << bit) else {
                break;
            };
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // Beyond the kernel's last capability, or not allowed.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => break,
                Err(error) => return Err(error.into()),
            }
        }
        rustix::thread::set_no_new_privs(true)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn the_last_words_of_a_failing_child_are_told() {
        let mut process = Process::spawn(
            "x",
            shell("echo one >&2; printf 'two\\033[31m red' >&2; exit 3"),
            Confinement::default(),
        )
        .unwrap();
        assert!(process.wait_for(Duration::from_secs(10)).is_some());
        assert_eq!(process.describe_end(), "exit code 3: two red");
    }

    #[test]
    fn a_stubborn_child_is_killed_and_reaped() {
        let mut process = Process::spawn(
            "x",
            shell("trap '' TERM; echo ready >&2; while :; do sleep 0.05; done"),
            Confinement::default(),
        )
        .unwrap();
        let begin = Instant::now();
        while process.last_words(1).is_empty() && begin.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(5));
        }
        process.end(Duration::from_millis(100));
        assert!(process.describe_end().starts_with("killed by signal 9"));
        assert!(!std::path::Path::new(&format!("/proc/{}", process.pid())).exists());
    }

    #[test]
    fn a_dropped_child_is_gone() {
        let process = Process::spawn("x", shell("exec sleep 100"), Confinement::default()).unwrap();
        let path = format!("/proc/{}", process.pid());
        assert!(std::path::Path::new(&path).exists());
        drop(process);
        assert!(!std::path::Path::new(&path).exists());
    }

    #[test]
    fn a_confined_child_has_no_capability_and_no_network() {
        let confinement = Confinement {
            drop_capabilities: true,
            private_network: true,
            ..Confinement::default()
        };
        let mut command = shell(
            "grep -E '^Cap(Prm|Eff)|NoNewPrivs' /proc/self/status; ls /sys/class/net | wc -l >/dev/null; cat /proc/net/dev | wc -l",
        );
        command.stdout(Stdio::piped());
        let mut process = Process::spawn("x", command, confinement).unwrap();
        let mut text = String::new();
        process
            .take_stdout()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert!(process.wait_for(Duration::from_secs(10)).unwrap().success());
        assert!(text.contains("CapPrm:\t0000000000000000"), "{text}");
        assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
        assert!(text.contains("NoNewPrivs:\t1"), "{text}");
        if rustix::process::geteuid().is_root() {
            // Two heading lines and the loopback device.
            assert!(text.trim_end().ends_with('3'), "{text}");
        }
    }
}
