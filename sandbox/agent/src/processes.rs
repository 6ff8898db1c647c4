//! The process namespace that a pod's containers share, if they share one.
//!
//! A namespace lasts as long as its first process. That is a copy of this program that does nothing:
//! whose parents have ended become its children, and the kernel forgets them at their end. All
//! containers of the pod see it, so it is as little as a process can be: nobody, without rights or a
//! way to any, its root an empty file system, and the program that it runs on a mount that cannot be
//! written to. Who may trace every process of its namespace finds nothing of this machine there.
//!
//! It takes two steps, since a process cannot enter a new namespace, but its children do. `container`
//! asks for the namespace, `main` calls the steps.

// UNSAFETY: `unshare` is unsafe in rustix because it can split the table of descriptors between
// threads; to ignore a signal, and to close descriptors that nobody has in hand, has no safe form.
#![expect(unsafe_code)]

use std::{
    fs::File,
    io::{self, BufRead, BufReader, PipeReader, Read, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{CWD, Gid, Uid},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
        mount_change, mount_remount, move_mount, unmount,
    },
    process::{DumpableBehavior, Pid, chdir, fchdir, pivot_root, set_dumpable_behavior},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
        clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
        set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid, unshare_unsafe,
    },
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
/// What that one says when it has nothing left to give up.
const READY: &str = "ready";
/// Longest line that the steps say.
const MAX_LINE: u64 = 256;
/// Who owns nothing.
const NOBODY: u32 = 65534;

/// The namespace, once somebody has asked for it.
#[derive(Debug, Default)]
pub(crate) struct Shared(Mutex<Option<Arc<First>>>);

/// A namespace and its first process.
#[derive(Debug)]
pub(crate) struct First {
    /// Names the namespace whatever becomes of the process and its number.
    namespace: File,
    ended: AtomicBool,
}

impl Shared {
    /// The namespace that is to be joined; another where it has ended.
    pub(crate) fn first(&self, reaper: &Reaper) -> Result<Arc<First>, RequestError> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = kept.as_ref().filter(|first| !first.has_ended()) {
            return Ok(Arc::clone(first));
        }
        let first = make(reaper).map_err(trying("a process namespace"))?;
        *kept = Some(Arc::clone(&first));
        Ok(first)
    }
}

impl First {
    /// Where crun joins it, for as long as this lives: a descriptor of this program's, since a
    /// process's number may be another's by then.
    pub(crate) fn path(&self) -> PathBuf {
        let own = rustix::process::getpid().as_raw_nonzero();
        format!("/proc/{own}/fd/{}", self.namespace.as_raw_fd()).into()
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

fn make(reaper: &Reaper) -> io::Result<Arc<First>> {
    let starting = reaper.starting();
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
    let pid = read_pid(said)?;
    let first = Arc::new(First {
        namespace: File::open(format!("/proc/{}/ns/pid", pid.as_raw_nonzero()))?,
        ended: AtomicBool::new(false),
    });
    let watched = Arc::clone(&first);
    starting.watch(
        pid,
        Box::new(move |_| watched.ended.store(true, Ordering::SeqCst)),
    );
    // One that ended before it was watched may have left its number to another: what was opened
    // need not be its namespace then.
    match first.has_ended() {
        true => Err(io::Error::other("its first process has ended")),
        false => Ok(first),
    }
}

fn read_line(from: PipeReader) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(from.take(MAX_LINE)).read_line(&mut line)?;
    line.truncate(line.trim_end().len());
    Ok(line)
}

/// The number that was said, else what was said in its place.
fn read_pid(from: PipeReader) -> io::Result<Pid> {
    let line = read_line(from)?;
    let number = line.parse().ok().filter(|number| *number > 0);
    let pid = number.and_then(Pid::from_raw);
    pid.ok_or_else(|| unexpected(&line))
}

fn unexpected(line: &str) -> io::Error {
    io::Error::other(match line {
        "" => "it cannot be made".to_owned(),
        said => said.to_owned(),
    })
}

/// Plays the part that this process was started for. Returns if it was started for none.
pub(crate) fn play() {
    let played = match std::env::args().nth(1).as_deref() {
        Some(MAKE) => leave_first_behind(),
        Some(BE_FIRST) => be_first(),
        _ => return,
    };
    if let Err(error) = &played {
        // Who started it reads that in place of what it waits for.
        let _ = writeln!(io::stdout(), "{error}");
    }
    std::process::exit(i32::from(played.is_err()));
}

fn leave_first_behind() -> io::Result<()> {
    // SAFETY: does not concern descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID | UnshareFlags::NEWNS)? };
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    // /proc/1/exe leads to the program through the mount that it was executed from, and the agent
    // runs the same file.
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, c"")?;
    let (said, says) = io::pipe()?;
    // By its name on that mount: PROGRAM would be the one that this process was executed from.
    let mut command = Command::new(std::env::current_exe()?);
    let first = command
        .arg(BE_FIRST)
        .stdin(Stdio::null())
        .stdout(says)
        .spawn()?;
    drop(command);
    match &*read_line(said)? {
        // As the namespace that we are in numbers it.
        READY => writeln!(io::stdout(), "{}", first.id()),
        line => Err(unexpected(line)),
    }
}

fn be_first() -> io::Result<()> {
    // SAFETY: no handler is called; the kernel reaps then.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // SAFETY: nothing in this program has opened a descriptor yet but its standard streams. One
    // that the agent passed on by mistake would be there for all to see.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    leave_root()?;
    give_up_rights()?;
    writeln!(io::stdout(), "{READY}")?;
    loop {
        std::thread::park();
    }
}

/// Swaps the root for a read-only one that never held a file.
fn leave_root() -> io::Result<()> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "mode", "0555")?;
    fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, "", CWD, "/", flags)?;
    fchdir(&root)?;
    // The old root is stacked upon the new one, and comes off. `boot` has made it one that can be
    // pivoted away from.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}

/// Becomes nobody, for good.
fn give_up_rights() -> io::Result<()> {
    set_no_new_privs(true)?;
    for bit in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Past the last that this kernel knows.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    clear_ambient_capability_set()?;
    // All but what would keep capabilities, which is locked as it is.
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(bits)?;
    set_thread_groups(&[])?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)?;
    // Last, since a change of user sets it anew. Its directory in /proc is closed to all but those
    // who may trace any process.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
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
        // A reason in its place is passed on.
        assert_eq!(pid("No space\nleft").unwrap_err().to_string(), "No space");
    }
}
