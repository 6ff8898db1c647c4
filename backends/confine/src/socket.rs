//! The file of a listening socket and the right to remove it: opened by `main`
//! after `bind`, handed to [`crate::enter`], used once at exit. It never
//! removes a socket that another process has put in its place.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::fchdir;

use crate::{ConfineError, step};

/// The file of a socket this process listens on.
#[derive(Debug)]
pub struct SocketFile {
    /// The canonical directory, good until the root directory is swapped.
    parent: PathBuf,
    name: OsString,
    dir: OwnedFd,
    /// Device and inode of the directory and of the socket.
    dir_id: (u64, u64),
    socket_id: (u64, u64),
    neighbours: bool,
}

pub(crate) fn id(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

impl SocketFile {
    /// Remembers the socket at `path`, which must exist: call it after `bind`.
    ///
    /// # Errors
    ///
    /// `path` does not name a socket, or its directory cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let not_a_socket = || io::Error::new(io::ErrorKind::InvalidInput, "not a socket");
        let name = path.file_name().ok_or_else(not_a_socket)?.to_owned();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.canonicalize()?,
            _ => Path::new(".").canonicalize()?,
        };
        let dir = openat(
            CWD,
            &parent,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let dir_id = id(&rustix::fs::fstat(&dir)?);
        let stat = statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(not_a_socket());
        }
        Ok(Self {
            parent,
            name,
            dir,
            dir_id,
            socket_id: id(&stat),
            neighbours: false,
        })
    }

    /// The same of a socket that the caller has bound just now: where that fails, it is
    /// removed, since nobody else will.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open): no descriptors are left, say.
    pub fn of_own(path: &Path) -> io::Result<Self> {
        // Which takes no descriptor.
        let look = || {
            let stat = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            (FileType::from_raw_mode(stat.st_mode) == FileType::Socket).then(|| id(&stat))
        };
        let bound = look();
        Self::open(path).inspect_err(|_| {
            // Where it could not be looked at either, there is the promise that it is the caller's.
            let is_own = |found| bound.is_none_or(|bound| bound == found);
            if look().is_some_and(is_own) {
                // What counts is why it cannot be kept.
                let _ = std::fs::remove_file(path);
            }
        })
    }

    /// Keeps the sockets beside this one within reach: [`crate::enter`] makes
    /// its directory the working directory, from which they can be connected
    /// to by bare name, and where `..` ends. The program must add `connect`
    /// and `socket` to its profile. Of several, the first one's is entered.
    #[must_use]
    pub fn with_neighbours(mut self) -> Self {
        self.neighbours = true;
        self
    }

    /// The same once more, for another owner.
    ///
    /// # Errors
    ///
    /// No descriptors are left.
    pub fn again(&self) -> io::Result<Self> {
        Ok(Self {
            parent: self.parent.clone(),
            name: self.name.clone(),
            dir: self.dir.try_clone()?,
            ..*self
        })
    }

    /// The socket at `path` if that is beside this one, as [`open`](Self::open)
    /// would have it and where that no longer can: `None` where it is elsewhere.
    ///
    /// # Errors
    ///
    /// There is no socket.
    pub fn neighbour(&self, path: &Path) -> io::Result<Option<Self>> {
        let Some(name) = path
            .file_name()
            .filter(|_| path.parent() == Some(&self.parent))
        else {
            return Ok(None);
        };
        let stat = statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a socket"));
        }
        Ok(Some(Self {
            name: name.to_owned(),
            socket_id: id(&stat),
            ..self.again()?
        }))
    }

    /// Connects to the socket, or to who has taken its name since, by entering its
    /// directory: the working directory changes. Confined, it takes
    /// [`with_neighbours`](Self::with_neighbours), and `fchdir` beside the calls
    /// named there.
    ///
    /// # Errors
    ///
    /// Nobody listens.
    pub fn connect(&self) -> io::Result<UnixStream> {
        // One at a time: the working directory is the process's.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        fchdir(&self.dir)?;
        UnixStream::connect(&self.name)
    }

    /// The socket with this name, device and inode number in the same directory,
    /// if it is there: bound by another process, and to be removed by this one.
    pub fn beside(&self, name: &OsStr, id: (u64, u64)) -> Option<Self> {
        let single = Path::new(name).file_name() == Some(name);
        let stat = single.then(|| statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW));
        let found = self::id(&stat?.ok()?) == id;
        found
            .then(|| self.dir.try_clone().ok())
            .flatten()
            .map(|dir| Self {
                parent: self.parent.clone(),
                name: name.to_owned(),
                dir,
                dir_id: self.dir_id,
                socket_id: id,
                neighbours: false,
            })
    }

    pub(crate) fn has_neighbours(&self) -> bool {
        self.neighbours
    }

    /// Makes its directory the working directory.
    pub(crate) fn enter_directory(&self) -> Result<(), ConfineError> {
        step("enter the directory of the socket", fchdir(&self.dir))
    }

    /// Removes the socket; `false` when the name is gone or is another file by
    /// now. A replacement in the instant between the look and the removal goes
    /// unnoticed: no system call removes a name by its inode.
    ///
    /// # Errors
    ///
    /// The kernel's answer to `unlinkat`: a read-only file system, or a
    /// directory that this uid may not write.
    pub fn remove(&self) -> io::Result<bool> {
        match statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if id(&stat) == self.socket_id => {}
            Ok(_) | Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        unlinkat(&self.dir, &self.name, AtFlags::empty())?;
        Ok(true)
    }

    /// Replaces the descriptor by a mount of this directory alone: `..` then
    /// ends there. The plain descriptor still climbs to the root of its mount
    /// after the process has lost its own root.
    pub(crate) fn detach(&mut self) -> Result<(), ConfineError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let clone = match open_tree(CWD, &self.parent, flags) {
            // In a user namespace mounts below the directory must come along.
            Err(Errno::INVAL) => open_tree(CWD, &self.parent, flags | OpenTreeFlags::AT_RECURSIVE),
            other => other,
        };
        let clone = step("mount the directory of the socket", clone)?;
        if id(&step(
            "look at the directory of the socket",
            rustix::fs::fstat(&clone),
        )?) != self.dir_id
        {
            return Err(ConfineError::Replaced {
                path: self.parent.join(&self.name),
            });
        }
        self.dir = clone;
        Ok(())
    }
}

impl AsFd for SocketFile {
    /// The directory, an `O_PATH` descriptor.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}
