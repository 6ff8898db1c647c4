//! Own namespaces and an empty root directory: the first step of
//! [`crate::enter`], since it needs rights that the later steps drop. It must
//! not run in a process with more than one thread.

#![expect(unsafe_code)]
// UNSAFETY: `unshare` is unsafe in rustix because it can split the table of
// descriptors between threads. This is its only use.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, mkdirat, stat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{Gid, Uid, chroot, fchdir, getegid, geteuid, pivot_root};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, unshare_unsafe};

use crate::report::{Confinement, Measure};
use crate::socket::SocketFile;
use crate::tree::{Tree, detach_descriptors, set_attributes};
use crate::{ConfineError, step};

/// The namespaces of the host to leave.
///
/// Time and process id are not among them: the first protects nothing, the
/// second applies to children only, and there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespaces {
    /// Mounts, and with them every path: the new root is empty.
    pub mount: bool,
    /// Network devices, addresses, abstract sockets. Open sockets and taps stay.
    pub network: bool,
    /// System V and POSIX message queues, semaphores and shared memory.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
    /// The view of the cgroup tree.
    pub cgroup: bool,
}

impl Namespaces {
    /// Leave all of them.
    pub const ALL: Self = Self {
        mount: true,
        network: true,
        ipc: true,
        uts: true,
        cgroup: true,
    };
    /// Stay in all of them.
    pub const NONE: Self = Self {
        mount: false,
        network: false,
        ipc: false,
        uts: false,
        cgroup: false,
    };
}

const NO_MOUNTS: &str = "empty root (no mount namespace)";

/// The first step of the empty root. It is refused in a chroot whose root is
/// not a mount point; nothing is mounted then, or the host would see it.
const MAKE_PRIVATE: &str = "make the mounts private";

fn unshare(flag: UnshareFlags) -> rustix::io::Result<()> {
    debug_assert!(!flag.contains(UnshareFlags::FILES));
    // SAFETY: no caller passes FILES, so the table of descriptors stays shared.
    unsafe { unshare_unsafe(flag) }
}

/// Whether the system does not offer this, as opposed to a failure: the kernel
/// lacks it (INVAL, NOSYS), forbids it to this user (PERM, ACCESS: a sysctl, an
/// LSM or the filter of a container), or has a limit of zero (NOSPC, USERS).
fn refused(error: Errno) -> bool {
    matches!(
        error,
        Errno::INVAL | Errno::NOSYS | Errno::PERM | Errno::ACCESS | Errno::NOSPC | Errno::USERS
    )
}

/// The same for mounts: the kernel has no `fsopen` or no tmpfs, or an LSM or a
/// filter keeps even a mount namespace's owner from mounting.
fn mounting_refused(error: Errno) -> bool {
    matches!(
        error,
        Errno::NOSYS | Errno::NODEV | Errno::PERM | Errno::ACCESS
    )
}

/// What is to live on without a place in the tree of mounts.
pub(crate) struct Kept<'a> {
    pub(crate) sockets: &'a mut [SocketFile],
    pub(crate) trees: &'a mut [Tree],
    /// `/proc/self/fd`, and whether it was detached.
    pub(crate) descriptors: Option<(&'a mut OwnedFd, bool)>,
    /// Stay in the user namespace, in which capabilities count for files.
    pub(crate) user: bool,
}

pub(crate) fn leave(
    wanted: Namespaces,
    kept: &mut Kept<'_>,
    report: &mut Confinement,
) -> Result<(), ConfineError> {
    if wanted == Namespaces::NONE {
        return Ok(());
    }
    let mut entered = Vec::new();
    let effective = step("read the capabilities", capabilities(None))?.effective;
    if !effective.contains(CapabilitySet::SYS_ADMIN) && !kept.user {
        let (uid, gid) = (geteuid(), getegid());
        // The kernel lets uid 0 map itself with this capability only, and
        // says so after the namespace is entered, which cannot be undone.
        let own = if uid.is_root() && !effective.contains(CapabilitySet::SETFCAP) {
            Err(Errno::PERM)
        } else {
            unshare(UnshareFlags::NEWUSER)
        };
        match own {
            Ok(()) => step("map the user into its namespace", map_self(uid, gid))?,
            Err(error) if refused(error) => {
                let reason = format!("user namespace and all others ({error})");
                report.lacks(Measure::Namespaces, reason);
                if wanted.mount {
                    report.lacks(Measure::EmptyRoot, NO_MOUNTS);
                }
                return Ok(());
            }
            error => step("create a user namespace", error)?,
        }
        entered.push("user");
    }
    for (on, flag, name) in [
        (wanted.mount, UnshareFlags::NEWNS, "mount"),
        (wanted.network, UnshareFlags::NEWNET, "network"),
        (wanted.ipc, UnshareFlags::NEWIPC, "ipc"),
        (wanted.uts, UnshareFlags::NEWUTS, "uts"),
        (wanted.cgroup, UnshareFlags::NEWCGROUP, "cgroup"),
    ] {
        if !on {
            continue;
        }
        match unshare(flag) {
            Ok(()) => entered.push(name),
            Err(error) if refused(error) => {
                report.lacks(Measure::Namespaces, format!("{name} namespace ({error})"));
            }
            error => step("create a namespace", error)?,
        }
    }
    if !entered.is_empty() {
        report.holds(
            Measure::Namespaces,
            format!("own namespaces ({})", entered.join(" ")),
        );
    }
    if !wanted.mount {
        return Ok(());
    }
    if !entered.contains(&"mount") {
        report.lacks(Measure::EmptyRoot, NO_MOUNTS);
        return Ok(());
    }
    match empty_root(kept) {
        Ok(()) => report.holds(Measure::EmptyRoot, "empty root"),
        Err(ConfineError::Step { step, source })
            // A tree that follows has lost its place by then.
            if !kept.trees.iter().any(Tree::follows)
                && Errno::from_io_error(&source).is_some_and(|error| {
                    mounting_refused(error) || (step == MAKE_PRIVATE && error == Errno::INVAL)
                }) =>
        {
            report.lacks(
                Measure::EmptyRoot,
                format!("empty root (cannot {step}: {source})"),
            );
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Maps the user and group onto themselves, so that files keep their owners.
fn map_self(uid: Uid, gid: Gid) -> io::Result<()> {
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// Swaps the root for a read-only tmpfs that never held a file. The sockets'
/// directories and the shared ones live on as mounts without a place in the tree, but for those
/// that follow the host's mounts and get places below the new root. For their sake the mounts of our
/// namespace, which began as a copy of the host's, are told what happens at their originals until
/// they go with the old root; what has no place is told nothing.
fn empty_root(kept: &mut Kept<'_>) -> Result<(), ConfineError> {
    let own = match kept.trees.iter().any(Tree::follows) {
        true => MountPropagationFlags::DOWNSTREAM,
        false => MountPropagationFlags::PRIVATE,
    };
    let changed = mount_change("/", own | MountPropagationFlags::REC);
    step(MAKE_PRIVATE, changed)?;
    for socket in &mut *kept.sockets {
        socket.detach()?;
    }
    for tree in kept.trees.iter_mut().filter(|tree| !tree.follows()) {
        tree.detach()?;
    }
    let followers: Vec<&mut Tree> = kept
        .trees
        .iter_mut()
        .filter(|tree| tree.follows())
        .collect();
    if let Some((descriptors, detached)) = &mut kept.descriptors {
        *detached = detach_descriptors(descriptors)?;
    }
    let tmpfs = step(
        "prepare a tmpfs",
        fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC),
    )?;
    step(
        "set up the tmpfs",
        fsconfig_set_string(&tmpfs, "mode", "0555"),
    )?;
    step("create a tmpfs", fsconfig_create(&tmpfs))?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    if !followers.is_empty() {
        // Not before the places for them are made.
        attributes.remove(MountAttrFlags::MOUNT_ATTR_RDONLY);
    }
    let root = step(
        "mount a tmpfs",
        fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes),
    )?;
    // On top of `/` itself: no directory has to exist for it.
    let moved = move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    step("mount the tmpfs on the root", moved)?;
    step("enter the new root", fchdir(&root))?;
    if !followers.is_empty() {
        let places: Vec<String> = (0..followers.len()).map(|n| n.to_string()).collect();
        for name in &places {
            step("make a directory", mkdirat(&root, name, 0o555.into()))?;
        }
        // Before anything is mounted below it.
        let fixed = set_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY);
        step("make the root read-only", fixed)?;
        for (tree, name) in followers.into_iter().zip(&places) {
            tree.attach(name)?;
        }
    }
    match pivot_root(".", ".") {
        // `.` is now the old root, stacked upon the new one.
        Ok(()) => step("detach the old root", unmount(".", UnmountFlags::DETACH))?,
        // An initramfs cannot be pivoted away from. Its root stays mounted but
        // out of reach: leaving a chroot takes CAP_SYS_CHROOT.
        Err(Errno::INVAL) => step("change the root", chroot("."))?,
        error => step("pivot the root", error)?,
    }
    step("enter the new root", std::env::set_current_dir("/"))?;
    let seen = step("look at the new root", stat("/"))?;
    let made = step("look at the new root", rustix::fs::fstat(&root))?;
    if (seen.st_dev, seen.st_ino) != (made.st_dev, made.st_ino) {
        let source = io::Error::other("the root directory is not the new one");
        return Err(ConfineError::Step {
            step: "change the root",
            source,
        });
    }
    Ok(())
}
