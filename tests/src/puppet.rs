//! A running program whose thread makes the system calls that a test wants: what code
//! of a guest's could do that has taken the program over. The kernel holds these calls
//! against the thread's own filter, namespaces, capabilities and Landlock rules, as it
//! does the program's own; the test itself is held by none of them. For the suite `escape`.
//!
//! The thread is never let go: end the process afterwards.

#![expect(unsafe_code)]
// UNSAFETY: ptrace has no safe form. It writes to another process; of this one it touches
// what the calls are given, which lives on the stack.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::ptr::{null_mut, without_provenance_mut};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::bounded::poll;

/// A call that takes longer waits for something.
const LIMIT: Duration = Duration::from_secs(10);
/// Room for what calls point at.
const ROOM: u64 = 64 * 1024;
/// `PTRACE_EVENT_STOP`, in the upper half of a stop's status.
const EVENT_STOP: i32 = 128;
/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this, which is an error number below zero.
    Returned(i64),
    /// The process was killed by this signal.
    Killed(i32),
    /// It does not return.
    Waits,
}

impl Outcome {
    /// The value of a call that worked.
    pub fn value(self) -> Option<u64> {
        match self {
            Outcome::Returned(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// The error of one that did not.
    pub fn error(self) -> Option<i32> {
        match self {
            Outcome::Returned(value) => i32::try_from(-value).ok().filter(|error| *error > 0),
            _ => None,
        }
    }
}

/// A thread that is held.
#[derive(Debug)]
pub struct Puppet {
    process: i32,
    thread: i32,
    registers: libc::user_regs_struct,
    memory: File,
    /// Where [`ROOM`] begins in it, and how much is used.
    room: u64,
    used: u64,
}

impl Puppet {
    /// Takes hold of a thread of a process, which must be in a system call: waiting, say.
    ///
    /// # Errors
    /// It is not there, not ours to trace, or does something else.
    pub fn take(process: i32, thread: i32) -> io::Result<Self> {
        let path = format!("/proc/{process}/mem");
        let memory = File::options().read(true).write(true).open(path)?;
        ptrace(libc::PTRACE_SEIZE, thread, 0, 0)?;
        // From here on it is let go, or ended, whatever fails.
        let mut puppet = Self {
            process,
            thread,
            // SAFETY: numbers, of which zero is one.
            registers: unsafe { std::mem::zeroed() },
            memory,
            room: 0,
            used: 0,
        };
        let found = poll(LIMIT, || interrupted(thread, &puppet.memory).transpose());
        puppet.registers = found
            .ok_or_else(|| io::Error::other(format!("thread {thread} makes no system calls")))??;
        // Nothing of the interrupted call is to be done again.
        puppet.registers.orig_rax = u64::MAX;
        let shape = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let kind = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let mapped = puppet.call(libc::SYS_mmap, &[0, ROOM, shape, kind, u64::MAX, 0])?;
        puppet.room = mapped
            .value()
            .ok_or_else(|| io::Error::other(format!("no memory: {mapped:?}")))?;
        Ok(puppet)
    }

    /// The process.
    pub fn process(&self) -> i32 {
        self.process
    }

    /// Has the thread make a system call.
    ///
    /// # Errors
    /// Of the machinery: what the call itself says is in the [`Outcome`].
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> io::Result<Outcome> {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        let mut set = self.registers;
        set.rax = number.cast_unsigned();
        [set.rdi, set.rsi, set.rdx, set.r10, set.r8, set.r9] = all;
        set_registers(self.thread, &mut set)?;
        loop {
            ptrace(libc::PTRACE_SINGLESTEP, self.thread, 0, 0)?;
            match stopped(self.thread) {
                Ok(Stop::Ended(signal)) => return Ok(Outcome::Killed(signal)),
                Ok(Stop::Event) => {}
                Ok(Stop::Signal) => {
                    let seen = registers(self.thread)?;
                    // Else it was a signal that came before, and is not delivered.
                    if seen.rip != set.rip {
                        return Ok(Outcome::Returned(seen.rax.cast_signed()));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Ok(Outcome::Waits);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Puts bytes into the memory of the process; where they are.
    ///
    /// # Errors
    /// There is no room left.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let len = bytes.len().next_multiple_of(16) as u64;
        if self.used + len > ROOM {
            return Err(io::Error::other("no room in the process"));
        }
        let place = self.room + self.used;
        self.used += len;
        self.memory.write_all_at(bytes, place)?;
        Ok(place)
    }

    /// The same of a path or another text, with its end.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn text(&mut self, text: impl AsRef<Path>) -> io::Result<u64> {
        let mut bytes = text.as_ref().as_os_str().as_encoded_bytes().to_vec();
        bytes.push(0);
        self.put(&bytes)
    }

    /// A descriptor of the process's that is this very file or directory.
    pub fn descriptor_of(&self, path: &Path) -> Option<u64> {
        let wanted = fs::metadata(path).ok()?;
        self.descriptor(|file| {
            let file = fs::metadata(file).ok();
            file.is_some_and(|file| (file.dev(), file.ino()) == (wanted.dev(), wanted.ino()))
        })
    }

    /// A descriptor of the process's of this kind, as `/proc` names it: `anon_inode:[io_uring]`.
    pub fn descriptor_named(&self, name: &str) -> Option<u64> {
        self.descriptor(|file| fs::read_link(file).is_ok_and(|target| target == Path::new(name)))
    }

    fn descriptor(&self, wanted: impl Fn(&Path) -> bool) -> Option<u64> {
        let all = fs::read_dir(format!("/proc/{}/fd", self.process)).ok()?;
        let mut numbers = all.flatten().filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            wanted(&entry.path()).then_some(number)
        });
        numbers.next()
    }
}

impl Drop for Puppet {
    /// A thread beside the first is waited for by nobody but us, and without that the process
    /// never ends.
    fn drop(&mut self) {
        if self.thread == self.process {
            return;
        }
        let _ = Pid::from_raw(self.process).map(|pid| kill_process(pid, Signal::KILL));
        let mut status = 0;
        // SAFETY: the kernel writes one number.
        while unsafe { libc::waitpid(self.thread, &raw mut status, libc::__WALL) } > 0
            && libc::WIFSTOPPED(status)
        {}
    }
}

/// Stops the thread. What it has in its registers, with the instruction `syscall` next;
/// `None` if it was not in a system call, and goes on.
fn interrupted(thread: i32, memory: &File) -> io::Result<Option<libc::user_regs_struct>> {
    ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
    if let Stop::Ended(signal) = stopped(thread)? {
        return Err(io::Error::other(format!("it has ended (signal {signal})")));
    }
    let mut registers = registers(thread)?;
    registers.rip -= 2;
    let mut instruction = [0; 2];
    memory.read_exact_at(&mut instruction, registers.rip)?;
    if instruction == SYSCALL {
        return Ok(Some(registers));
    }
    ptrace(libc::PTRACE_CONT, thread, 0, 0)?;
    Ok(None)
}

/// The thread of a process whose name begins with this.
pub fn thread_named(process: i32, name: &str) -> Option<i32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).ok()?;
    let mut found = tasks.flatten().filter_map(|task| {
        let path: PathBuf = task.path().join("comm");
        let comm = fs::read_to_string(path).ok()?;
        comm.starts_with(name)
            .then(|| task.file_name().to_str()?.parse().ok())?
    });
    found.next()
}

enum Stop {
    Signal,
    Event,
    Ended(i32),
}

/// Waits for the thread to stop or end. Its end is looked at and left to its parent.
fn stopped(thread: i32) -> io::Result<Stop> {
    let looked = poll(LIMIT, || {
        // SAFETY: all bytes zero is a value of it, into which the kernel writes.
        let mut seen: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
        // SAFETY: as said.
        let done =
            unsafe { libc::waitid(libc::P_PID, thread.cast_unsigned(), &raw mut seen, flags) };
        match done {
            // SAFETY: the kernel has written those of a child, or nothing, which is zero.
            0 => Some(Ok(unsafe {
                (seen.si_code, seen.si_pid(), seen.si_status())
            }))
            .filter(|seen| seen.as_ref().is_ok_and(|seen| seen.1 != 0)),
            _ => Some(Err(io::Error::last_os_error())),
        }
    });
    let (code, _, status) = looked.ok_or(io::ErrorKind::TimedOut)??;
    if matches!(code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED) {
        return Ok(Stop::Ended(status));
    }
    let mut status = 0;
    // SAFETY: the kernel writes one number.
    let reaped = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
    if reaped != thread {
        return Err(io::Error::last_os_error());
    }
    if status >> 16 == EVENT_STOP {
        return Ok(Stop::Event);
    }
    Ok(Stop::Signal)
}

pub(crate) fn ptrace(
    request: libc::c_uint,
    thread: i32,
    address: usize,
    data: usize,
) -> io::Result<()> {
    let address: *mut libc::c_void = without_provenance_mut(address);
    let data: *mut libc::c_void = without_provenance_mut(data);
    // SAFETY: none of the requests made by numbers reads or writes memory of ours.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub(crate) fn registers(thread: i32) -> io::Result<libc::user_regs_struct> {
    // SAFETY: all bytes zero is a value of it.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    let (none, place): (*mut libc::c_void, _) = (null_mut(), &raw mut registers);
    // SAFETY: the kernel writes one such structure.
    match unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, none, place) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(registers),
    }
}

pub(crate) fn set_registers(thread: i32, registers: &mut libc::user_regs_struct) -> io::Result<()> {
    let (none, place): (*mut libc::c_void, _) = (null_mut(), &raw mut *registers);
    // SAFETY: the kernel reads one such structure.
    match unsafe { libc::ptrace(libc::PTRACE_SETREGS, thread, none, place) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Process, command};

    #[test]
    fn a_held_thread_makes_the_calls_it_is_told_to_make() {
        let mut sleeper = command(Path::new("/bin/sleep"));
        let process = Process::start(sleeper.arg("50"), Duration::from_secs(60)).unwrap();
        let asleep = poll(LIMIT, || {
            let call = fs::read_to_string(format!("/proc/{}/syscall", process.pid())).ok()?;
            call.starts_with("230 ").then_some(())
        });
        assert!(asleep.is_some(), "sleep sleeps");
        let mut puppet = Puppet::take(process.pid(), process.pid()).unwrap();
        let pid = puppet.call(libc::SYS_getpid, &[]).unwrap();
        assert_eq!(pid.value(), Some(process.pid().cast_unsigned().into()));
        let path = puppet.text("/dev/null").unwrap();
        let open = [libc::AT_FDCWD as u64, path, 0];
        assert!(
            puppet
                .call(libc::SYS_openat, &open)
                .unwrap()
                .value()
                .is_some()
        );
        assert!(puppet.descriptor_of(Path::new("/dev/null")).is_some());
        let missing = puppet.text("/nowhere").unwrap();
        let open = [libc::AT_FDCWD as u64, missing, 0];
        let refused = puppet.call(libc::SYS_openat, &open).unwrap();
        assert_eq!(refused.error(), Some(libc::ENOENT));
        let abort = [process.pid().cast_unsigned().into(), libc::SIGKILL as u64];
        let killed = puppet.call(libc::SYS_kill, &abort).unwrap();
        assert_eq!(killed, Outcome::Killed(libc::SIGKILL));
    }
}
