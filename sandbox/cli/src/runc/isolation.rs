//! Mounts and a PID namespace that end with this process.
//!
//! Used by `--runtime runc` so that even SIGKILL leaves no container, mount or loop device: both
//! live in namespaces whose only members are this process and what it starts.

// UNSAFETY: leaving a namespace has no safe form.
#![expect(unsafe_code)]

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Child, Command},
};

use pericarp_hypervisor::{Confinement, Process};
use rustix::{
    fd::AsFd,
    fs::{Gid, Mode, Uid},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    thread::{LinkNameSpaceType, UnshareFlags},
};

use crate::failure::{Failure, during};

/// Gives this thread, and what it starts from here on, mounts of their own.
pub(crate) fn private_mounts() -> Result<(), Failure> {
    // SAFETY: does not concern file descriptors or memory.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(during("private mounts"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(during("private mounts"))
}

/// Starts `command`, with our own standard streams, as the first process of a new PID namespace.
pub(crate) fn spawn_first_process(mut command: Command) -> io::Result<Child> {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    let confinement = Confinement {
        first_process: true,
        ..Confinement::default()
    };
    Process::prepare(&mut command, confinement);
    let own = File::open("/proc/self/ns/pid")?;
    // SAFETY: does not concern file descriptors or memory; it decides about children only.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID)? };
    let child = command.spawn();
    // Later children, and threads, belong to our own namespace again.
    rustix::thread::move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    child
}

/// Mounts a writable layer over a directory.
pub(crate) fn mount_overlay(
    lower: &Path,
    upper: &Path,
    work: &Path,
    target: &Path,
) -> rustix::io::Result<()> {
    // The paths are in the run's directory, whose name we chose.
    let data = format!(
        "lowerdir={},upperdir={},workdir={}\0",
        lower.display(),
        upper.display(),
        work.display()
    );
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes())
        .map_err(|_| rustix::io::Errno::INVAL)?;
    rustix::mount::mount("overlay", target, "overlay", MountFlags::NODEV, data)
}

/// Gives a directory the owner and mode of another.
pub(crate) fn copy_owner_and_mode(of: &Metadata, to: &Path) -> rustix::io::Result<()> {
    let (user, group) = (Uid::from_raw(of.uid()), Gid::from_raw(of.gid()));
    rustix::fs::chown(to, Some(user), Some(group))?;
    rustix::fs::chmod(to, Mode::from_raw_mode(of.mode()))
}

/// Unmounts. The directory is removed afterwards with all it contains, so a mount that stays would
/// cost the user's files: then this process ends at once, and the kernel unmounts.
pub(crate) fn unmount_or_end(path: &Path) {
    let orderly = rustix::mount::unmount(path, UnmountFlags::NOFOLLOW);
    if orderly.is_err()
        && let Err(error) =
            rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
    {
        crate::report::warn(&format!(
            "'{}' cannot be unmounted: {error}",
            path.display()
        ));
        std::process::exit(125);
    }
}
