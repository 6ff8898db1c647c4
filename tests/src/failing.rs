//! A program one of whose system calls fails, as it would where descriptors or memory
//! run out at that very moment. For the suite `faults`, which lets each call of a start
//! fail in turn.
//!
//! The program is traced: before the chosen call the kernel is told of a harmless one
//! instead, and after it the program finds the error. Counted are calls of `CALLS`,
//! from the first that is the program's own and not its loader's, until all threads wait
//! for something to do.

#![expect(unsafe_code)]
// UNSAFETY: ptrace, wait and what a child does between fork and exec have no safe form.
// None of the calls reads or writes more than the numbers that it is given.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use libc::{EAGAIN, EMFILE, ENOMEM, ENOSPC};
use rustix::process::{Pid, Signal, kill_process};

use crate::puppet::{ptrace, registers, set_registers};

/// Calls that fail, and with which error.
const CALLS: &[(i64, &str, i32)] = &[
    (libc::SYS_openat, "openat", EMFILE),
    (libc::SYS_open, "open", EMFILE),
    (libc::SYS_openat2, "openat2", EMFILE),
    (libc::SYS_open_tree, "open_tree", EMFILE),
    (libc::SYS_fsopen, "fsopen", EMFILE),
    (libc::SYS_fsmount, "fsmount", EMFILE),
    (libc::SYS_socket, "socket", EMFILE),
    (libc::SYS_eventfd2, "eventfd2", EMFILE),
    (libc::SYS_signalfd4, "signalfd4", EMFILE),
    (libc::SYS_timerfd_create, "timerfd_create", EMFILE),
    (libc::SYS_epoll_create1, "epoll_create1", EMFILE),
    (libc::SYS_memfd_create, "memfd_create", EMFILE),
    (libc::SYS_dup, "dup", EMFILE),
    (libc::SYS_dup3, "dup3", EMFILE),
    (libc::SYS_fcntl, "fcntl", EMFILE),
    (libc::SYS_io_uring_setup, "io_uring_setup", EMFILE),
    (
        libc::SYS_landlock_create_ruleset,
        "landlock_create_ruleset",
        EMFILE,
    ),
    (libc::SYS_io_uring_register, "io_uring_register", ENOMEM),
    (libc::SYS_landlock_add_rule, "landlock_add_rule", ENOMEM),
    (
        libc::SYS_landlock_restrict_self,
        "landlock_restrict_self",
        ENOMEM,
    ),
    (libc::SYS_mmap, "mmap", ENOMEM),
    (libc::SYS_epoll_ctl, "epoll_ctl", ENOMEM),
    (libc::SYS_bind, "bind", ENOMEM),
    (libc::SYS_listen, "listen", ENOMEM),
    (libc::SYS_ioctl, "ioctl", ENOMEM),
    (libc::SYS_statx, "statx", ENOMEM),
    (libc::SYS_newfstatat, "newfstatat", ENOMEM),
    (libc::SYS_fstat, "fstat", ENOMEM),
    (libc::SYS_getdents64, "getdents64", ENOMEM),
    (libc::SYS_readlink, "readlink", ENOMEM),
    (libc::SYS_unshare, "unshare", ENOMEM),
    (libc::SYS_mount, "mount", ENOMEM),
    (libc::SYS_mount_setattr, "mount_setattr", ENOMEM),
    (libc::SYS_move_mount, "move_mount", ENOMEM),
    (libc::SYS_fsconfig, "fsconfig", ENOMEM),
    (libc::SYS_pivot_root, "pivot_root", ENOMEM),
    (libc::SYS_umount2, "umount2", ENOMEM),
    (libc::SYS_seccomp, "seccomp", ENOMEM),
    (libc::SYS_capset, "capset", ENOMEM),
    (libc::SYS_clone3, "clone3", EAGAIN),
    (libc::SYS_clone, "clone", EAGAIN),
    (libc::SYS_fallocate, "fallocate", ENOSPC),
    (libc::SYS_ftruncate, "ftruncate", ENOSPC),
];

/// Calls in which a thread that has nothing to do is found.
const WAITING: [i64; 7] = [
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_accept4,
    libc::SYS_futex,
    libc::SYS_io_uring_enter,
];

/// A stop at a system call, where `PTRACE_O_TRACESYSGOOD` is set.
const AT_CALL: i32 = libc::SIGTRAP | 0x80;

/// What became of the program.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    /// The call that failed and its error; `None` if there were fewer.
    pub failed: Option<(&'static str, i32)>,
    /// It came to wait for something to do.
    pub served: bool,
    /// It had to be killed.
    pub hung: bool,
    /// Its exit code, or the signal that ended it.
    pub end: Option<Result<i32, i32>>,
    /// What it wrote to stderr.
    pub said: String,
}

/// One thread of it.
#[derive(Debug, Default)]
struct Task {
    /// It was stopped once.
    seen: bool,
    /// It is inside a system call.
    inside: bool,
    /// In one that waits, without end.
    waits: bool,
    /// What it is to find after it.
    instead: Option<(libc::user_regs_struct, i32)>,
}

/// Starts a program and has the `nth` call, counted from 0, fail. Once all of its threads
/// wait `act` is called with its id, and then it is asked to end. Whatever takes longer
/// than `limit` is killed.
///
/// # Errors
/// Of the machinery.
pub fn fail(
    command: &mut Command,
    nth: usize,
    limit: Duration,
    act: impl FnOnce(i32),
) -> io::Result<Tried> {
    let (say, hear) = channel();
    thread::scope(|scope| {
        let tracer = thread::Builder::new().name("tracer".into());
        let tracer = tracer.spawn_scoped(scope, || trace(command, nth, limit, say))?;
        if let Ok(pid) = hear.recv() {
            act(pid);
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::TERM));
        }
        tracer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs it to its end. All of this is one thread's: no other may trace its children.
fn trace(
    command: &mut Command,
    nth: usize,
    limit: Duration,
    serving: Sender<i32>,
) -> io::Result<Tried> {
    let asked = || ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
    // SAFETY: one system call, between fork and exec.
    unsafe { command.pre_exec(asked) };
    let command = command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let pid = child.id().cast_signed();
    let (calm, barked) = channel::<()>();
    let dog = thread::spawn(move || watch(pid, limit, &barked));
    let mut tracer = Tracer {
        pid,
        left: nth,
        begun: 0,
        tasks: HashMap::new(),
        tried: Tried::default(),
        serving: Some(serving),
    };
    let done = tracer.run();
    if done.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    drop(calm);
    let barked = dog.join().unwrap_or(true);
    done?;
    let mut tried = tracer.tried;
    tried.hung = barked;
    if let Some(mut stderr) = child.stderr.take() {
        let mut bytes = Vec::new();
        stderr.read_to_end(&mut bytes)?;
        tried.said = String::from_utf8_lossy(&bytes).into_owned();
    }
    Ok(tried)
}

/// Kills the program if nobody has called it off in time; whether it did.
fn watch(pid: i32, limit: Duration, barked: &Receiver<()>) -> bool {
    let late = barked.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
    if late {
        let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
    }
    late
}

struct Tracer {
    pid: i32,
    /// Calls that still work.
    left: usize,
    /// How many signal stacks were looked at or made: the second is the program's own,
    /// the last thing before its `main`.
    begun: u32,
    tasks: HashMap<i32, Task>,
    tried: Tried,
    serving: Option<Sender<i32>>,
}

impl Tracer {
    fn run(&mut self) -> io::Result<()> {
        // Where it executes the program.
        let (task, status) = wait()?;
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other(format!("{task} was not stopped")));
        }
        let options =
            libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE;
        ptrace(libc::PTRACE_SETOPTIONS, task, 0, options as usize)?;
        self.tasks.entry(task).or_default().seen = true;
        resume(task, 0)?;
        loop {
            let (task, status) = wait()?;
            if !libc::WIFSTOPPED(status) {
                self.tasks.remove(&task);
                if task == self.pid {
                    self.tried.end = Some(match libc::WIFEXITED(status) {
                        true => Ok(libc::WEXITSTATUS(status)),
                        false => Err(libc::WTERMSIG(status)),
                    });
                    return Ok(());
                }
                continue;
            }
            let signal = self.stopped(task, status)?;
            resume(task, signal)?;
        }
    }

    /// A thread has stopped; the signal that it goes on with.
    fn stopped(&mut self, task: i32, status: i32) -> io::Result<i32> {
        let signal = libc::WSTOPSIG(status);
        let first = !std::mem::replace(&mut self.tasks.entry(task).or_default().seen, true);
        if status >> 16 != 0 {
            // A new thread, which may have been seen before.
            let mut new: libc::c_ulong = 0;
            let place = &raw mut new;
            ptrace(libc::PTRACE_GETEVENTMSG, task, 0, place.expose_provenance())?;
            self.tasks.entry(new as i32).or_default();
            return Ok(0);
        }
        if signal == AT_CALL {
            return gone(self.at_call(task)).map(|_| 0);
        }
        // A new thread begins with one that nobody sent.
        let own = first && signal == libc::SIGSTOP;
        Ok(if own { 0 } else { signal })
    }

    fn at_call(&mut self, task: i32) -> io::Result<()> {
        let mut seen = registers(task)?;
        let Some(state) = self.tasks.get_mut(&task) else {
            return Ok(());
        };
        state.inside = !state.inside;
        if !state.inside {
            state.waits = false;
            if let Some((mut before, errno)) = state.instead.take() {
                before.rax = i64::from(-errno).cast_unsigned();
                set_registers(task, &mut before)?;
            }
            return Ok(());
        }
        let number = seen.orig_rax.cast_signed();
        state.waits = waits(number, &seen);
        if number == libc::SYS_sigaltstack && task == self.pid && self.begun < 2 {
            self.begun += 1;
            return Ok(());
        }
        if self.begun < 2 || self.serving.is_none() {
            return Ok(());
        }
        if let Some((name, errno)) = fault(number, &seen)
            && self.tried.failed.is_none()
        {
            if self.left == 0 {
                state.instead = Some((seen, errno));
                self.tried.failed = Some((name, errno));
                // Closing nothing is what every filter lets through.
                seen.orig_rax = libc::SYS_close.cast_unsigned();
                seen.rdi = u64::MAX;
                return set_registers(task, &mut seen);
            }
            self.left -= 1;
        }
        let main = self.tasks.get(&self.pid);
        let is_serving =
            main.is_some_and(|main| main.waits) && self.tasks.values().all(|t| t.waits);
        if is_serving && let Some(serving) = self.serving.take() {
            self.tried.served = true;
            let _ = serving.send(self.pid);
        }
        Ok(())
    }
}

/// A thread that was killed meanwhile is seen to end later.
fn gone(done: io::Result<()>) -> io::Result<Option<()>> {
    match done {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        other => other.map(Some),
    }
}

/// Whether a call waits without end for something to do.
fn waits(number: i64, with: &libc::user_regs_struct) -> bool {
    match number {
        libc::SYS_ppoll => with.rdx == 0,
        libc::SYS_poll => with.rdx.cast_signed() < 0,
        libc::SYS_io_uring_enter => with.rdx > 0,
        number => WAITING.contains(&number),
    }
}

/// The name and error of a call that can fail for want of something. Memory that the
/// allocator and the standard library ask for is left out: where there is none these
/// abort.
fn fault(number: i64, with: &libc::user_regs_struct) -> Option<(&'static str, i32)> {
    let (_, name, errno) = CALLS.iter().find(|(call, ..)| *call == number)?;
    let lacks = match number {
        libc::SYS_fcntl => [libc::F_DUPFD, libc::F_DUPFD_CLOEXEC].contains(&(with.rsi as i32)),
        // Files and rings, and stacks, which are opened up later.
        libc::SYS_mmap => {
            with.r10 as i32 & libc::MAP_ANONYMOUS == 0
                || with.r10 as i32 & libc::MAP_STACK != 0 && with.rdx as i32 == libc::PROT_NONE
        }
        // The question of its version makes none.
        libc::SYS_landlock_create_ruleset => with.rdi != 0,
        _ => true,
    };
    lacks.then_some((*name, *errno))
}

fn resume(task: i32, signal: i32) -> io::Result<()> {
    let signal = signal.cast_unsigned() as usize;
    gone(ptrace(libc::PTRACE_SYSCALL, task, 0, signal)).map(drop)
}

/// The next thread of this thread's own children that stops or ends, and how.
fn wait() -> io::Result<(i32, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one number.
        let task = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        if task > 0 {
            return Ok((task, status));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_told_that_its_call_failed() {
        // Ours have a main of Rust's, and so has this test: it is its own subject.
        let program = std::env::current_exe().expect("a test is a program");
        let mut list = Command::new(program);
        let limit = Duration::from_secs(20);
        let tried = fail(list.arg("--list"), usize::MAX, limit, |_| {}).expect("it runs");
        assert_eq!((tried.failed, tried.end), (None, Some(Ok(0))));
        assert!(!tried.served && !tried.hung, "{tried:?}");
    }
}
