//! Confinement of the programs that face a guest: once a sidecar holds every
//! descriptor it needs, [`enter`] takes the rest of the machine away from it.
//!
//! Called by `main` of each sidecar, once: after files are open, sockets are
//! bound and io_urings exist, before the first byte of a peer is read and
//! before a thread is spawned (threads inherit what their parent has). It must
//! not print, and must not be told by a peer what to leave out.
//!
//! ```no_run
//! use pericarp_confine::{Namespaces, Profile, SocketFile, enter};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let path = std::path::Path::new("/run/pod-1/block/socket");
//! let listener = std::os::unix::net::UnixListener::bind(path)?;
//! let mut sockets = [SocketFile::open(path)?];
//! // Open the images and create the rings here.
//! let (syscalls, ioctls, registrations) = (&[], &[], &[]);
//! let namespaces = Namespaces::ALL;
//! let profile = Profile { syscalls, ioctls, registrations, namespaces };
//! let confinement = enter(&profile, &mut sockets)?;
//! eprintln!("{confinement}");
//! // Spawn the workers, accept, serve; then, at a clean exit:
//! sockets[0].remove()?;
//! # drop(listener);
//! # Ok(())
//! # }
//! ```
//!
//! # Threat model
//!
//! The guest, or whoever holds the other end of the vhost-user socket, has
//! found a bug and runs code of its choice in the sidecar. It may then use what
//! the sidecar holds: the disk images it serves, the guest memory it was given,
//! its sockets and its rings. It must not get anything else:
//!
//! | measure | takes away |
//! |---|---|
//! | no_new_privs | gain by set-uid files and file capabilities |
//! | no capabilities | root's powers: all five sets are emptied |
//! | no dumps | core files and `ptrace` by a process of the same user |
//! | namespaces | the host's network, System V IPC, host name, cgroup view |
//! | empty root | every path: `/` is a read-only tmpfs without a file in it |
//! | Landlock | opening files, TCP, abstract sockets, signals to outsiders; as far as the kernel's version knows them |
//! | seccomp | every system call not listed: `execve`, `fork`, `ptrace`, ...; no memory becomes executable |
//!
//! **Rings are outside seccomp.** Opcodes such as `IORING_OP_OPENAT` and
//! `IORING_OP_SOCKET` never pass the filter. They meet the empty root, the
//! empty network namespace and Landlock instead, which is why each of these
//! counts even where seccomp holds. A ring that was created with
//! `IORING_SETUP_R_DISABLED` and restricted to its own opcodes closes this
//! door itself; do that too.
//!
//! **Open descriptors are outside all of it.** None of the measures takes
//! rights from a descriptor that is already open. Open images with no more
//! rights than needed, and inherit nothing.
//!
//! **The user id stays.** A sidecar started as root goes on as uid 0 without
//! capabilities. This owns root's files, but has no path to reach one by. To
//! change the uid would cost the removal of the socket file, which mostly lies
//! in a directory of root, and would win nothing while Landlock or the empty
//! root holds. Who wants another uid starts the sidecar with it: everything
//! here works unprivileged, through a user namespace.
//!
//! **Removing the socket.** [`SocketFile`] keeps the one right a clean exit
//! needs. Landlock grants rights by directory and cannot tell a socket from a
//! file, so code in the sidecar can remove (not read, create, rename or list)
//! any file at or below the directory of its socket that its uid may remove.
//! Give each sidecar a directory of its own.
//!
//! **Connecting to neighbours.** A program that must connect to unix sockets
//! marks the socket they lie beside with [`SocketFile::with_neighbours`] and
//! adds `socket` and `connect` to its profile; the filter then lets unix stream
//! sockets pass and kills on any other. Code in the sidecar can connect to any
//! unix socket at or below that directory that its uid may write to, and to
//! none elsewhere: the directory is a mount of its own, without a parent. That
//! rests on the empty root. Without it, absolute paths lead to every socket of
//! the host, unless Landlock of ABI 9 or later stands in the way.
//!
//! **Opening own descriptors anew.** A memfd that came from a front end can be
//! locked for this process alone only through a file description of its own, and
//! only `/proc/self/fd` gives one. [`enter_reopening`] keeps that directory
//! within reach. From it a path leads to all of `/proc`, and `..` further up
//! where the root is not empty; it is Landlock that refuses to open anything
//! there, while memfds and pipes of this process lie on file systems of the
//! kernel's own, which Landlock lets pass. Without Landlock it is therefore
//! refused altogether. O_PATH, which Landlock does not see, is refused by the
//! filter: it compares the flags. Neither makes the open of a file on a hostile
//! file system safe from waiting: look that it is a memfd first.
//!
//! # Cost for the host's tools
//!
//! A process that cannot be dumped owns its `/proc` entries as root: only root
//! sees `/proc/PID/fd`, `smaps` and the like of a confined sidecar.

mod files;
mod filter;
mod namespaces;
mod privileges;
mod report;
mod socket;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

pub use namespaces::Namespaces;
pub use report::{Confinement, Measure};
pub use socket::SocketFile;

/// What one program needs beyond the set that every sidecar shares.
#[derive(Debug, Clone, Copy)]
pub struct Profile<'a> {
    /// System calls allowed with any arguments, as `libc::SYS_*`. A call which
    /// the common set allows with conditions keeps these conditions, and
    /// `socket` means unix stream sockets only.
    pub syscalls: &'a [i64],
    /// `ioctl` requests allowed on any descriptor, such as `BLKDISCARD`.
    pub ioctls: &'a [u32],
    /// `io_uring_register` operations beyond the common set, such as 16,
    /// `IORING_REGISTER_BUFFERS_UPDATE`.
    pub registrations: &'a [u32],
    /// The namespaces to leave. [`Namespaces::ALL`] unless there is a reason.
    pub namespaces: Namespaces,
}

/// Why the process could not be confined. It is then half confined: end it.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Confinement is one way and happens once.
    #[error("the process is confined already")]
    Again,
    /// A thread exists that would keep what the main thread gives up. Names
    /// that begin with `iou-` are the kernel's workers of a ring.
    #[error("other threads run already ({names}): confine before threads start and rings are used")]
    Threads {
        /// The other threads' names.
        names: String,
    },
    /// A step failed for a reason other than the system not offering it.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The directory of a socket was replaced since [`SocketFile::open`].
    #[error("the directory of socket {path:?} was replaced")]
    Replaced {
        /// The socket's path.
        path: std::path::PathBuf,
    },
    /// Landlock is there and refused the rule set.
    #[error("cannot apply the landlock rules")]
    Landlock(#[source] landlock::RulesetError),
    /// Landlock is there and said that nothing is enforced.
    #[error("landlock is available but enforces nothing")]
    NotEnforced,
    /// The system call filter could not be built.
    #[error("cannot build the system call filter")]
    Build(#[source] seccompiler::BackendError),
    /// Seccomp is there and refused the filter.
    #[error("cannot apply the system call filter")]
    Filter(#[source] seccompiler::Error),
    /// Capabilities are left after all were dropped.
    #[error("capabilities are left after dropping them")]
    Capabilities,
}

/// Attaches the step to an error of the kernel.
fn step<T>(step: &'static str, result: Result<T, impl Into<io::Error>>) -> Result<T, ConfineError> {
    result.map_err(|source| ConfineError::Step {
        step,
        source: source.into(),
    })
}

/// Confines the calling process for the rest of its life.
///
/// `sockets` are the listening sockets' files that are to be removed at exit;
/// their directories stay usable for that and nothing else.
///
/// A measure which the kernel or the system's policy does not offer is named in
/// the [`Confinement`]; the program decides whether it goes on without.
///
/// # Errors
///
/// A measure that the kernel offers and that fails nevertheless, a second call,
/// and a process with more than one thread.
pub fn enter(
    profile: &Profile<'_>,
    sockets: &mut [SocketFile],
) -> Result<Confinement, ConfineError> {
    enter_reopening(profile, sockets, None)
}

/// As [`enter`], for a program that must open descriptors of its own anew, to
/// have a file description that nobody else holds. `descriptors` is an open
/// `/proc/self/fd`; the filter then lets `openat` pass with exactly this
/// descriptor, for reading and writing. Where Landlock does not hold, it lets
/// nothing pass: see "Opening own descriptors anew" above.
///
/// # Errors
///
/// As [`enter`].
pub fn enter_reopening(
    profile: &Profile<'_>,
    sockets: &mut [SocketFile],
    descriptors: Option<BorrowedFd<'_>>,
) -> Result<Confinement, ConfineError> {
    static ENTERED: AtomicBool = AtomicBool::new(false);
    if ENTERED.load(Ordering::Relaxed) {
        return Err(ConfineError::Again);
    }
    only_thread()?;
    ENTERED.store(true, Ordering::Relaxed);

    // The order matters: namespaces need capabilities or (for the maps of a
    // user namespace) a dumpable process, mounting is refused under Landlock,
    // and the filter refuses what every other step needs.
    let mut report = Confinement::default();
    namespaces::leave(profile.namespaces, sockets, &mut report)?;
    if let Some(socket) = sockets.iter().find(|socket| socket.has_neighbours()) {
        socket.enter_directory()?;
    }
    privileges::drop_all(&mut report)?;
    files::forbid(sockets, &mut report)?;
    let descriptors = descriptors.filter(|_| report.has(Measure::Landlock));
    filter::install(profile, descriptors, &mut report)?;
    Ok(report)
}

/// Namespaces, capabilities and Landlock belong to a thread, not to a process:
/// a second thread would stay as it is.
fn only_thread() -> Result<(), ConfineError> {
    let own = rustix::thread::gettid().as_raw_nonzero().to_string();
    let mut others = Vec::new();
    for task in step(
        "list the threads in /proc/self/task",
        std::fs::read_dir("/proc/self/task"),
    )? {
        let task = step("list the threads in /proc/self/task", task)?;
        if task.file_name().to_str() != Some(&own) {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            others.push(name.trim_end().to_owned());
        }
    }
    if others.is_empty() {
        return Ok(());
    }
    Err(ConfineError::Threads {
        names: others.join(", "),
    })
}
