//! Directories of the host: virtio-fs devices, each mounted once and shown to containers as bind
//! mounts, or as their root.
//!
//! Called by `container` and `root` when a container is created and by `pod` at power-off. A share stays mounted while
//! the machine runs, since the next container may be shown it, too. Whether it may be changed is
//! the host's server's decision; what is mounted read-only here says so earlier.
//!
//! ```text
//! /run/pericarp/shares/<tag>   the share with this tag
//! /run/pericarp/shm            memory that containers share
//! ```
//!
//! A share can be shown in parts, too, each to one container: what the host has mounted below the
//! shared directory for it. Such mounts are mounts here as well, made by the kernel when a path
//! leads there; the last who is done with a part lets go of its mount, and the host's is free. As
//! long as one container has it, others are shown the same mount: another would have other inodes
//! for the same files.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::{
    agent::Share,
    share::{MAX_SHARES, check_place, is_part, is_tag},
};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2},
    io::Errno,
    mount::{
        MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree,
        unmount,
    },
};

use crate::{
    boot::STATE,
    error::{RequestError, trying},
    root::put_away,
};

/// Name of the file system.
pub(crate) const KIND: &str = "virtiofs";
/// How long a device may take to appear.
const LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);
/// As containerd gives a pod.
const SHARED_MEMORY: &std::ffi::CStr = c"mode=1777,size=65536k";

/// The shares that are mounted.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    mounted: Mutex<BTreeMap<String, Mounted>>,
    /// By tag and path, with how many containers are shown each.
    parts: Mutex<BTreeMap<(String, String), usize>>,
}

#[derive(Debug)]
struct Mounted {
    place: PathBuf,
    read_only: bool,
}

/// Checks what a container is to be shown, before anything is mounted.
pub(crate) fn check(shares: &[Share]) -> Result<(), RequestError> {
    if shares.len() > MAX_SHARES {
        return Err(RequestError::Invalid(format!(
            "a container is shown {MAX_SHARES} shares at most"
        )));
    }
    for (index, share) in shares.iter().enumerate() {
        let path = &share.path;
        if !is_tag(&share.tag) {
            return Err(RequestError::Invalid(format!(
                "'{}' is no tag of a share",
                share.tag
            )));
        }
        check_place(path).map_err(|error| {
            RequestError::Invalid(format!("'{path}' is no place for a share: it {error}"))
        })?;
        if shares[..index].iter().any(|earlier| earlier.path == *path) {
            return Err(RequestError::Invalid(format!(
                "'{path}' is no place for a share: there is another"
            )));
        }
    }
    Ok(())
}

impl Shares {
    /// Mounts the share with this checked tag unless it is mounted; returns where.
    pub(crate) fn mount(&self, tag: &str, read_only: bool) -> Result<PathBuf, RequestError> {
        // Held meanwhile: another container may want the same one.
        let mut mounted = self.lock();
        if let Some(there) = mounted.get(tag) {
            if there.read_only != read_only {
                return Err(RequestError::Invalid(format!(
                    "the share '{tag}' is shown to another container with other access"
                )));
            }
            return Ok(there.place.clone());
        }
        let place = Path::new(STATE).join("shares").join(tag);
        fs::create_dir_all(&place).map_err(trying(place.display().to_string()))?;
        // A set-user-id program is as good as one in the image.
        let mut flags = MountFlags::NODEV;
        if read_only {
            flags |= MountFlags::RDONLY;
        }
        let end = Instant::now() + LIMIT;
        loop {
            match mount(tag, &place, KIND, flags, None) {
                Ok(()) => break,
                // There is no device with this tag, virtio_fs_get_tree.
                Err(Errno::INVAL) if Instant::now() < end => thread::sleep(PAUSE),
                Err(Errno::INVAL) => {
                    return Err(RequestError::NotFound(format!(
                        "the share '{tag}' did not appear; the machine has no device with that tag"
                    )));
                }
                Err(Errno::NODEV) => {
                    return Err(RequestError::State(format!(
                        "the guest's kernel knows no {KIND}; its module must be loaded"
                    )));
                }
                Err(error) => {
                    return Err(trying(format!("the share '{tag}' cannot be mounted"))(
                        error,
                    ));
                }
            }
        }
        let there = Mounted {
            place: place.clone(),
            read_only,
        };
        mounted.insert(tag.to_owned(), there);
        Ok(place)
    }

    /// Shows a part of a share, a directory or a file, at `place`, which is made.
    pub(crate) fn show(&self, tag: &str, path: &str, place: &Path) -> Result<(), RequestError> {
        if !is_tag(tag) || !is_part(path) {
            return Err(RequestError::Invalid(format!(
                "'{path}' is no part of a share '{tag}'"
            )));
        }
        let top = self.mount(tag, false)?;
        let failed = || trying(format!("'{path}' of the share '{tag}'"));
        // Held meanwhile: nobody lets go of what is being shown.
        let mut parts = self.parts();
        let shown =
            open_part(&top, path).and_then(|(part, is_directory)| show(&part, is_directory, place));
        let users = parts.entry((tag.into(), path.into())).or_default();
        match shown {
            Ok(()) => *users += 1,
            Err(_) if *users > 0 => {}
            Err(_) => {
                parts.remove(&(tag.into(), path.into()));
                let _ = unmount(top.join(path), UnmountFlags::DETACH);
            }
        }
        shown.map_err(failed())
    }

    /// Opens a part of a share, by its place alone. A directory is to be closed: the kernel mounts what
    /// the host has mounted there.
    pub(crate) fn open(&self, tag: &str, path: &str) -> Result<OwnedFd, RequestError> {
        if !is_tag(tag) || !is_part(path) {
            return Err(RequestError::Invalid(format!(
                "'{path}' is no part of a share '{tag}'"
            )));
        }
        let top = self.mount(tag, false)?;
        let opened = open_part(&top, path);
        opened
            .map(|(part, _)| part)
            .map_err(trying(format!("'{path}' of the share '{tag}'")))
    }

    /// Lets go of what the kernel has mounted for a part that was shown, if nobody else is shown it.
    pub(crate) fn let_go(&self, tag: &str, path: &str) {
        let mut parts = self.parts();
        let part = (tag.to_owned(), path.to_owned());
        if let Some(users) = parts.get_mut(&part) {
            *users -= 1;
            if *users > 0 {
                return;
            }
            parts.remove(&part);
        }
        self.leave(tag, path);
    }

    /// The same for a part that was opened, and is shown to nobody by that.
    pub(crate) fn close(&self, tag: &str, path: &str) {
        // Held meanwhile: nobody is shown it at this moment.
        let parts = self.parts();
        if !parts.contains_key(&(tag.to_owned(), path.to_owned())) {
            self.leave(tag, path);
        }
    }

    fn leave(&self, tag: &str, path: &str) {
        let Some(top) = self.lock().get(tag).map(|there| there.place.clone()) else {
            return;
        };
        // Most parts are no mounts of their own.
        let _ = unmount(top.join(path), UnmountFlags::DETACH);
    }

    /// Shows the memory that all containers share at `place`, which is made.
    pub(crate) fn show_memory(&self, place: &Path) -> Result<(), RequestError> {
        let memory = Path::new(STATE).join("shm");
        // As for the others: two containers may want it.
        let _mounted = self.lock();
        if !memory.exists() {
            fs::create_dir(&memory).map_err(trying("shared memory"))?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            mount("shm", &memory, "tmpfs", flags, Some(SHARED_MEMORY))
                .map_err(trying("shared memory"))?;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&memory, flags, Mode::empty())
            .map_err(std::io::Error::from)
            .and_then(|memory| show(&memory, true, place))
            .map_err(trying("shared memory"))
    }

    /// Unmounts everything. Goes on after an error, and gives the first.
    ///
    /// Nothing is written back: what the processes wrote went to the host when they closed or
    /// unmapped their files, fuse_flush and fuse_vma_close. A syncfs(2) here would have the host
    /// write back a whole file system of its own, which no plain container does at its end.
    pub(crate) fn put_away(&self) -> Result<(), RequestError> {
        let mounted = std::mem::take(&mut *self.lock());
        let mut outcome = Ok(());
        for share in mounted.values() {
            outcome = outcome.and(put_away(&share.place, false));
        }
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Mounted>> {
        // A panic ends this program, so nobody sees a state left half changed.
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn parts(&self) -> MutexGuard<'_, BTreeMap<(String, String), usize>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a part below `top`, and says whether it is a directory.
fn open_part(top: &Path, path: &str) -> std::io::Result<(OwnedFd, bool)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(top, flags, Mode::empty())?;
    let open = |flags| {
        // The host has no links there, and nothing leads out.
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&top, path, flags, Mode::empty(), how)
    };
    let part = open(OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)?;
    if FileType::from_raw_mode(fstat(&part)?.st_mode) != FileType::Directory {
        return Ok((part, false));
    }
    // Only who asks for a directory gets what the host has mounted on it, follow_automount.
    Ok((open(flags)?, true))
}

/// Mounts what is open at `place`, which is made. Used by `volumes`, too.
pub(crate) fn show(part: &OwnedFd, is_directory: bool, place: &Path) -> std::io::Result<()> {
    if is_directory {
        fs::create_dir_all(place)?;
    } else {
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::File::create_new(place)?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let clone = open_tree(part, c"", flags)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&clone, c"", CWD, place, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(tag: &str, path: &str) -> Share {
        Share {
            tag: tag.into(),
            path: path.into(),
            ..Share::default()
        }
    }

    #[test]
    fn what_a_container_may_be_shown_is_checked() {
        check(&[share("a", "/a"), share("b", "/a/b"), share("a", "/c")]).unwrap();
        let many: Vec<Share> = (0..=MAX_SHARES)
            .map(|number| share("a", &format!("/{number}")))
            .collect();
        check(&many[1..]).unwrap();
        for (bad, message) in [
            (vec![share("../a", "/a")], "'../a' is no tag of a share"),
            (vec![share("", "/a")], "'' is no tag of a share"),
            (
                vec![share("a", "/a/../proc")],
                "'/a/../proc' is no place for a share: it has an empty part, '.', '..' or a slash \
                 at its end",
            ),
            (
                vec![share("a", "/sys/x")],
                "'/sys/x' is no place for a share: it lies in the container's own /sys",
            ),
            (
                vec![share("a", "/a"), share("b", "/a")],
                "'/a' is no place for a share: there is another",
            ),
            (many, "a container is shown 16 shares at most"),
        ] {
            assert_eq!(check(&bad).unwrap_err().to_string(), message);
        }
    }
}
