//! Network namespaces: opening, making and entering them. The command line and the shim call
//! this; the thread that calls never changes its own namespace.
#![expect(unsafe_code)]
// UNSAFETY: an ioctl without an argument, and unshare of the network alone.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, fstatfs, open},
    io::Errno,
    mount::{
        MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change,
        unmount,
    },
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use thiserror::Error;

use crate::{link::links, netlink::Netlink};

/// The file system that open namespaces are files of (linux/magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;
/// Of the thread that asks.
const OURS: &str = "/proc/thread-self/ns/net";

/// Why there is no such namespace.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// Nothing to open.
    #[error("{}: cannot be opened: {source}", .path.display())]
    Open {
        /// What was to be a namespace.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file, a directory, or a namespace of another kind.
    #[error(
        "{}: is no network namespace: make one with ip netns add NAME, its path is /run/netns/NAME",
        .path.display()
    )]
    Kind {
        /// What was to be a namespace.
        path: PathBuf,
    },
    /// The namespace of this process, or of the host's first, whose interfaces are not a pod's
    /// to take.
    #[error(
        "{}: is the host's own network (hostNetwork), which no guest can have: use a namespace of the pod's own",
        .path.display()
    )]
    Host {
        /// What was to be a pod's namespace.
        path: PathBuf,
    },
    /// Something has that name.
    #[error("{}: is there already: use another name, or remove it first", .path.display())]
    Exists {
        /// Where the namespace was to be.
        path: PathBuf,
    },
    /// It cannot be made or removed.
    #[error("{}: {tried}: {source}", .path.display())]
    Change {
        /// Which namespace.
        path: PathBuf,
        /// What was tried.
        tried: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A thread cannot go there.
    #[error("{}: cannot be entered: {source}", .path.display())]
    Enter {
        /// Which namespace.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A network namespace that is open: it lasts as long as this, even if its path is removed.
#[derive(Debug)]
pub struct Namespace {
    file: OwnedFd,
    path: PathBuf,
}

impl Namespace {
    /// Opens the namespace at this path, which is neither that of this process nor the host's.
    ///
    /// # Errors
    /// [`NamespaceError::Open`], [`NamespaceError::Kind`], [`NamespaceError::Host`].
    pub fn open(path: &Path) -> Result<Self, NamespaceError> {
        let failed = |error: Errno| NamespaceError::Open {
            path: path.to_owned(),
            source: error.into(),
        };
        // Without NONBLOCK, a FIFO would keep us until somebody writes to it.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open(path, flags, Mode::empty()).map_err(failed)?;
        let stat = fstatfs(&file).map_err(failed)?;
        // SAFETY: takes no argument; where it means nothing, the kernel says so.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if stat.f_type as u64 != NSFS_MAGIC || kind != libc::CLONE_NEWNET {
            return Err(NamespaceError::Kind {
                path: path.to_owned(),
            });
        }
        let this = Self {
            file,
            path: path.to_owned(),
        };
        if this.is_host().map_err(|source| NamespaceError::Open {
            path: path.to_owned(),
            source,
        })? {
            return Err(NamespaceError::Host { path: this.path });
        }
        Ok(this)
    }

    /// Makes a namespace at this path, which lasts until [`Namespace::remove`]. A directory
    /// that is missing is made as `ip netns add` makes it: a shared mount, so that the namespace
    /// is there, and goes, in the mount namespaces of others, too.
    ///
    /// # Errors
    /// [`NamespaceError::Exists`], [`NamespaceError::Change`].
    pub fn create(path: &Path) -> Result<Self, NamespaceError> {
        let failed = |tried, source| NamespaceError::Change {
            path: path.to_owned(),
            tried,
            source,
        };
        if let Some(directory) = path.parent()
            && !directory.exists()
        {
            shared_directory(directory).map_err(|error| failed("making its directory", error))?;
        }
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o444);
        match options.open(path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(NamespaceError::Exists {
                    path: path.to_owned(),
                });
            }
            Err(error) => return Err(failed("making the file", error)),
        }
        let made = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: no descriptors are unshared, which is what is unsafe.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                    .map_err(|error| failed("a network namespace", error.into()))?;
                mount_bind(OURS, path).map_err(|error| failed("mounting it", error.into()))
            });
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        });
        let opened = made.and_then(|()| Self::open(path));
        if opened.is_err() {
            let _ = unmount(path, UnmountFlags::DETACH);
            let _ = fs::remove_file(path);
        }
        opened
    }

    /// Makes a namespace without a name: it lasts as long as this and whoever else uses it. Its
    /// path leads through this process's descriptors, for as long as that is there.
    ///
    /// # Errors
    /// [`NamespaceError::Change`].
    pub fn unnamed() -> Result<Self, NamespaceError> {
        let failed = |tried, source| NamespaceError::Change {
            path: OURS.into(),
            tried,
            source,
        };
        let file = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: no descriptors are unshared, which is what is unsafe.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                    .map_err(|error| failed("a network namespace", error.into()))?;
                // As those who make containers leave it to those who make namespaces.
                loopback_up().map_err(|error| failed("its loopback interface", error))?;
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                open(OURS, flags, Mode::empty()).map_err(|error| failed("opening it", error.into()))
            });
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })?;
        let (process, number) = (std::process::id(), file.as_raw_fd());
        let path = format!("/proc/{process}/fd/{number}").into();
        Ok(Self { file, path })
    }

    /// Removes the path. The namespace itself goes with the last that uses it.
    ///
    /// # Errors
    /// [`NamespaceError::Change`], also for a namespace that has no path of its own, as those
    /// in /proc.
    pub fn remove(self) -> Result<(), NamespaceError> {
        let failed = |tried, source| NamespaceError::Change {
            path: self.path.clone(),
            tried,
            source,
        };
        unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|error| failed("unmounting it", error.into()))?;
        fs::remove_file(&self.path).map_err(|error| failed("removing the file", error))
    }

    /// Where it was opened or made.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle of the same namespace.
    ///
    /// # Errors
    /// [`NamespaceError::Open`], when there are too many open files.
    pub fn try_clone(&self) -> Result<Self, NamespaceError> {
        let file = self.file.try_clone();
        Ok(Self {
            file: file.map_err(|source| NamespaceError::Open {
                path: self.path.clone(),
                source,
            })?,
            path: self.path.clone(),
        })
    }

    /// Has it for one guest, for as long as what is returned lives; `None` where another has it.
    ///
    /// # Errors
    /// [`NamespaceError::Open`].
    pub(crate) fn claim(&self) -> Result<Option<OwnedFd>, NamespaceError> {
        let failed = |error: Errno| NamespaceError::Open {
            path: self.path.clone(),
            source: error.into(),
        };
        // Opened once more: duplicates of a descriptor share its lock.
        let again = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = open(again, flags, Mode::empty()).map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// Runs this on a thread in the namespace and waits for it. The thread ends with it.
    ///
    /// # Errors
    /// [`NamespaceError::Enter`]: the closure has not run.
    ///
    /// # Panics
    /// When the closure does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        let failed = |source| NamespaceError::Enter {
            path: self.path.clone(),
            source,
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("netns".into());
            let thread = thread.spawn_scoped(scope, || {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(|error| failed(error.into()))?;
                Ok(work())
            });
            let thread = thread.map_err(failed)?;
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Whether it is that of this process, or of the host's first one.
    fn is_host(&self) -> io::Result<bool> {
        let this = rustix::fs::fstat(&self.file)?;
        let is = |host: fs::Metadata| (this.st_dev, this.st_ino) == (host.dev(), host.ino());
        // That of the first is a secret where we are not root, and then we open nothing at all.
        let first = fs::metadata("/proc/1/ns/net");
        Ok(is(fs::metadata("/proc/self/ns/net")?) || first.is_ok_and(is))
    }
}

/// Brings the loopback interface of this thread's namespace up. The kernel gives it its
/// addresses then. For guests, and namespaces that nobody else looks after.
///
/// # Errors
/// The kernel's answer.
pub fn loopback_up() -> io::Result<()> {
    let mut netlink = Netlink::open().map_err(io::Error::other)?;
    let all = links(&mut netlink).map_err(io::Error::other)?;
    let loopback = all.iter().find(|link| link.loopback);
    let loopback = loopback.ok_or(io::ErrorKind::NotFound)?;
    loopback.bring(&mut netlink, true).map_err(io::Error::other)
}

/// Makes the directory and mounts it on itself, shared. Two that do so at once mount it
/// twice, which harms nobody.
fn shared_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o755))?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    match mount_change(path, shared) {
        // Not a mount yet.
        Err(Errno::INVAL) => {
            mount_bind_recursive(path, path)?;
            Ok(mount_change(path, shared)?)
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_namespaces_of_others_are_opened() {
        let open = |path: &str| Namespace::open(Path::new(path));
        let host = open("/proc/self/ns/net");
        assert!(
            matches!(&host, Err(NamespaceError::Host { .. })),
            "{host:?}"
        );
        assert!(host.unwrap_err().to_string().contains("hostNetwork"));
        for other in ["/dev/null", "/", "/proc/self/ns/uts", "/proc/self/status"] {
            let opened = open(other);
            assert!(
                matches!(opened, Err(NamespaceError::Kind { .. })),
                "{other}"
            );
        }
        let missing = open("/nowhere/at/all");
        assert!(matches!(missing, Err(NamespaceError::Open { .. })));
    }
}
