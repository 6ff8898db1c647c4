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
//! | no capabilities | root's powers: all five sets are emptied; who shares files keeps those that count for them |
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
//! **Sharing directories.** A file server opens files by names that a guest
//! chooses, so [`enter_sharing`] lets it open anything, and takes away all that
//! there is besides the trees it shares. Each [`Tree`] becomes a mount without a
//! parent: `..` ends at its root, and the process has no other path. Landlock
//! says the same once more, and that nothing is executed. So does `/proc/self/fd`,
//! through which files are opened by number: a mount of that one directory.
//! Code in the server can do to the trees what a guest may ask of it, but not:
//!
//! - *open a device.* It may make one (CAP_MKNOD), since guests have them, but
//!   the mounts are nodev. Where they could not be made so, CAP_MKNOD is dropped.
//!   They are not nosuid or noexec: nothing is executed here anyway, and noexec
//!   would have `faccessat` say that nothing can be;
//! - *change a read-only tree*, attributes included, of which Landlock knows
//!   nothing: the mount is read-only;
//! - *open by handle*, unless each tree is a whole file system. A handle leads to
//!   any file of its file system, and neither the root of a mount nor Landlock
//!   stands in its way (Landlock grants what it grants to the mount where a file
//!   has no path). Even so, a descriptor on another file system that the process
//!   happens to have, such as a log file as stderr, opens that one's metadata:
//!   give such a server a pipe.
//!
//! Capabilities that count for files are kept, see [`Sharing`]: in the permitted,
//! effective and bounding sets. A process that has none of them (a user's own)
//! keeps none and changes what its user may. It gets a user namespace, in which
//! the user and the group are the only ones: files of others seem to belong to
//! nobody, and files cannot be given to the user's other groups. A process that
//! has some stays in its user namespace, in which they mean something; without
//! CAP_SYS_ADMIN it then has no mounts of its own, and only Landlock bounds it.
//! Where that does not hold either, nothing does: look at the [`Confinement`]
//! for [`Measure::Trees`] and [`Measure::Landlock`].
//!
//! What the host mounts below a tree later is not seen; what it unmounts there
//! stays until the server ends. A tree that is [`Tree::following`] sees both, from the
//! moment on at which the process gets mounts of its own: it is the slave of a shared
//! mount, and all that is not below a tree goes with the old root. Whoever mounts there
//! keeps devices out (nodev), since the image of a container may have the node of a disk.
//!
//! ```no_run
//! use pericarp_confine::{Namespaces, Profile, Sharing, Tree, enter_sharing};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut trees = [Tree::open("/srv/pod-1".as_ref())?];
//! let mut descriptors = std::fs::File::open("/proc/self/fd")?.into();
//! # let (syscalls, ioctls, registrations) = (&[], &[], &[]);
//! # let namespaces = Namespaces::ALL;
//! # let profile = Profile { syscalls, ioctls, registrations, namespaces };
//! let sharing = Sharing {
//!     descriptors: &mut descriptors,
//!     capabilities: Sharing::CAPABILITIES,
//!     handles: false,
//! };
//! let confinement = enter_sharing(&profile, &mut [], &mut trees, sharing)?;
//! eprintln!("{confinement}");
//! let root = trees[0].descriptor().try_clone_to_owned()?;
//! // Serve what is below `root`; keep `trees` and `descriptors`.
//! # drop((root, descriptors));
//! # Ok(())
//! # }
//! ```
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
mod sharing;
mod socket;
mod tree;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

pub use namespaces::Namespaces;
pub use report::{Confinement, Measure};
pub use rustix::thread::CapabilitySet;
pub use sharing::Sharing;
pub use socket::SocketFile;
pub use tree::{Tree, TreeError};

use filter::Opening;
use sharing::Kept;

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
    /// The path of a shared directory leads to another since [`Tree::open`].
    #[error("the shared directory {path:?} was replaced")]
    ReplacedTree {
        /// Its path.
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
    let reach = match descriptors {
        Some(descriptors) => Reach::Descriptors(descriptors),
        None => Reach::Nothing,
    };
    confine(profile, sockets, reach)
}

/// As [`enter`], for a program that shares directory trees: the files below
/// `trees` stay within reach, and with them what `pericarp-share` does to files.
/// See "Sharing directories" above.
///
/// The trees' descriptors are others afterwards: copy them then.
///
/// # Errors
///
/// As [`enter`], and a tree whose path leads to another directory by now.
pub fn enter_sharing(
    profile: &Profile<'_>,
    sockets: &mut [SocketFile],
    trees: &mut [Tree],
    sharing: Sharing<'_>,
) -> Result<Confinement, ConfineError> {
    confine(profile, sockets, Reach::Trees(trees, sharing))
}

/// Leaves the calling thread these system calls, and `ioctl` with these requests, of those that
/// the process has. For a thread that does one thing: the program's [`Profile`] must have
/// `seccomp`, which can only take away. It does nothing in a process that is not confined, or
/// in a kernel without seccomp, as [`enter`] has reported.
///
/// # Errors
///
/// The kernel's refusal.
pub fn narrow(syscalls: &[i64], ioctls: &[u32]) -> Result<(), ConfineError> {
    filter::narrow(syscalls, ioctls)
}

/// What stays within reach besides the sockets.
enum Reach<'a> {
    Nothing,
    Descriptors(BorrowedFd<'a>),
    Trees(&'a mut [Tree], Sharing<'a>),
}

fn confine(
    profile: &Profile<'_>,
    sockets: &mut [SocketFile],
    reach: Reach<'_>,
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
    let mut kept = Kept::NOTHING;
    let mut trees: &mut [Tree] = &mut [];
    let (mut descriptors, mut reopened) = (None, None);
    match reach {
        Reach::Nothing => {}
        Reach::Descriptors(directory) => reopened = Some(directory),
        Reach::Trees(shared, sharing) => {
            kept = Kept::plan(&sharing, shared)?;
            (trees, descriptors) = (shared, Some((sharing.descriptors, false)));
        }
    }
    let mut mounts = namespaces::Kept {
        sockets,
        trees,
        descriptors,
        user: !kept.capabilities.is_empty(),
    };
    namespaces::leave(profile.namespaces, &mut mounts, &mut report)?;
    let namespaces::Kept {
        sockets,
        trees,
        descriptors,
        ..
    } = mounts;
    if let Some((_, detached)) = &descriptors {
        sharing::account(trees, *detached, &mut report);
        kept.bound(trees, &mut report);
    }
    if let Some(socket) = sockets.iter().find(|socket| socket.has_neighbours()) {
        socket.enter_directory()?;
    }
    privileges::drop_all(&kept, &mut report)?;
    files::forbid(sockets, trees, &mut report)?;
    let opening = match (descriptors, reopened) {
        (Some(_), _) => Opening::Trees {
            writable: trees.iter().any(|tree| !tree.is_read_only()),
            handles: kept.handles,
        },
        (None, Some(directory)) if report.has(Measure::Landlock) => Opening::Descriptors(directory),
        _ => Opening::Nothing,
    };
    filter::install(profile, opening, &mut report)?;
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
