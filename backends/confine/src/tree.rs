//! A directory tree that a program passes on: opened by `main`, handed to
//! [`crate::enter_sharing`], which makes it a mount of its own. What that mount
//! allows is decided here; what is below is the host's.

#![expect(unsafe_code)]
// UNSAFETY: `mount_setattr`, which rustix does not have.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, statat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, mount_bind_recursive, open_tree};

use crate::socket::id;
use crate::{ConfineError, step};

/// Why a directory cannot be shared. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// There is nothing.
    #[error("{path:?} does not exist")]
    Missing {
        /// What was asked for.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{path:?} is not a directory")]
    NotADirectory {
        /// What was asked for.
        path: PathBuf,
    },
    /// This user may not read or search it, or a directory on the way to it.
    #[error("{path:?} may not be read by this user")]
    Refused {
        /// What was asked for.
        path: PathBuf,
    },
    /// What is mounted below it later would not be seen.
    #[error("{path:?} is no shared mount")]
    NotShared {
        /// What was asked for.
        path: PathBuf,
    },
    /// Another answer of the kernel's.
    #[error("cannot open the directory {path:?}")]
    Open {
        /// What was asked for.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A directory that is shared, with all that is below and, unless it is to be
/// [`Tree::alone`], mounted below.
///
/// Keep it for as long as it is used: the mount is taken apart with its last
/// descriptor, of which copies (`dup`) count and descriptors opened below it do
/// not.
#[derive(Debug)]
pub struct Tree {
    /// Canonical, good until the root directory is swapped.
    path: PathBuf,
    file: OwnedFd,
    id: (u64, u64),
    read_only: bool,
    alone: bool,
    follows: bool,
    state: State,
}

/// What became of it.
#[derive(Debug, Default)]
struct State {
    detached: bool,
    /// Why it has not the attributes it should have.
    attributes: Option<io::Error>,
    /// It has no file that its file systems have not, and they have none that
    /// it has not.
    whole: bool,
}

impl Tree {
    /// Opens the directory at `path`, as O_PATH.
    ///
    /// # Errors
    ///
    /// It is not there, is no directory, or may not be read by this user.
    pub fn open(path: &Path) -> Result<Self, TreeError> {
        let failed = |source: io::Error| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => TreeError::Missing { path },
                io::ErrorKind::NotADirectory => TreeError::NotADirectory { path },
                io::ErrorKind::PermissionDenied => TreeError::Refused { path },
                _ => TreeError::Open { path, source },
            }
        };
        let open = |path: &Path| -> io::Result<Self> {
            let canonical = path.canonicalize()?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = openat(CWD, &canonical, flags, Mode::empty())?;
            let id = id(&rustix::fs::fstat(&file)?);
            // O_PATH needs no right to the directory itself; guests will.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            openat(CWD, &canonical, flags, Mode::empty())?;
            statat(&file, ".", AtFlags::empty())?;
            Ok(Self {
                path: canonical,
                file,
                id,
                read_only: false,
                alone: false,
                follows: false,
                state: State::default(),
            })
        };
        open(path).map_err(failed)
    }

    /// Lets nothing in it be changed.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Leaves out what is mounted below it, once it is a mount of its own. In a
    /// user namespace, which has the mounts of another, it comes along all the
    /// same.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Shows what the host mounts below it later, and no longer what it unmounts there. Such a
    /// tree keeps a place in the process's own namespace, since only mounts that have one are
    /// told of others: `..` leads from its root to the empty one. What is mounted later has the
    /// attributes that the host gives it, so that the process may make no devices.
    ///
    /// # Errors
    ///
    /// It is no mount point, or its mount is private.
    pub fn following(mut self) -> Result<Self, TreeError> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if !is_shared(&mounts, &self.path) {
            return Err(TreeError::NotShared { path: self.path });
        }
        self.follows = true;
        Ok(self)
    }

    pub(crate) fn follows(&self) -> bool {
        self.follows
    }

    /// Its canonical path as the host had it; it leads nowhere once confined.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing in it may be changed.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether it is a mount of its own: `..` ends at its root, or at the empty one.
    pub fn is_detached(&self) -> bool {
        self.state.detached
    }

    /// The directory, an O_PATH descriptor; another one after
    /// [`crate::enter_sharing`].
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The same, to be kept open.
    pub fn into_fd(self) -> OwnedFd {
        self.file
    }

    pub(crate) fn attributes_missing(&self) -> Option<&io::Error> {
        self.state.attributes.as_ref()
    }

    pub(crate) fn forbids_devices(&self) -> bool {
        self.state.detached && self.state.attributes.is_none() && !self.follows
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.state.detached && self.state.whole && !self.follows
    }

    /// Replaces the descriptor by a mount of this directory and, unless it is to be
    /// alone, what is mounted below it, without a parent and without a place in any namespace.
    pub(crate) fn detach(&mut self) -> Result<(), ConfineError> {
        let whole = whole_file_systems(&self.path).unwrap_or(false);
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let recursive = flags | OpenTreeFlags::AT_RECURSIVE;
        let clone = match self.alone {
            // Mounts of another user namespace cannot be left out.
            true => match open_tree(CWD, &self.path, flags) {
                Err(Errno::INVAL) => open_tree(CWD, &self.path, recursive),
                other => other,
            },
            false => open_tree(CWD, &self.path, recursive),
        };
        self.settle(step("mount the shared directory", clone)?, whole)
    }

    /// The same for one that follows its host: it gets a place in the working directory, which is the
    /// empty root and has a directory of this name. Copied and placed in one step, it misses nothing
    /// that is mounted meanwhile.
    pub(crate) fn attach(&mut self, name: &str) -> Result<(), ConfineError> {
        let bound = mount_bind_recursive(&self.path, name);
        step("mount the shared directory below the new root", bound)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let opened = openat(CWD, name, flags, Mode::empty());
        self.settle(step("open the shared directory", opened)?, false)
    }

    /// From here on it is this mount, without devices, and read-only if it is to be so.
    fn settle(&mut self, mount: OwnedFd, whole: bool) -> Result<(), ConfineError> {
        let seen = rustix::fs::fstat(&mount);
        if id(&step("look at the shared directory", seen)?) != self.id {
            return Err(ConfineError::ReplacedTree {
                path: self.path.clone(),
            });
        }
        // No devices: who may make one and open it has the disks of the host.
        // Guests' devices are for their own kernels, nobody here opens one. Not
        // nosuid nor noexec: neither is of use where nothing is executed, and
        // noexec would have `access` say that no file can be.
        let mut attributes = libc::MOUNT_ATTR_NODEV;
        if self.read_only {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        self.state = State {
            detached: true,
            attributes: set_attributes(mount.as_fd(), attributes).err(),
            whole,
        };
        self.file = mount;
        Ok(())
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Adds attributes to a mount and all below it.
pub(crate) fn set_attributes(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is empty and static, and the kernel reads as many bytes
    // of the attributes as there are.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Whether `path` is a mount point and every mount at or below it begins at the
/// root of its file system. Then no handle of a file leads out of the tree.
fn whole_file_systems(path: &Path) -> io::Result<bool> {
    let mounts = File::open("/proc/self/mountinfo").and_then(io::read_to_string)?;
    Ok(are_whole(&mounts, path))
}

/// The same of the text; proc(5) describes its lines.
fn are_whole(mounts: &str, path: &Path) -> bool {
    let mut found = false;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else {
            return false;
        };
        let point = unescaped(point);
        if point.starts_with(path) {
            found |= point == path;
            if root != "/" {
                return false;
            }
        }
    }
    found
}

/// Whether the topmost mount at `path` is shared, from `/proc/self/mountinfo`.
fn is_shared(mounts: &str, path: &Path) -> bool {
    let at = |line: &&str| {
        let point = line.split(' ').nth(4);
        point.is_some_and(|point| unescaped(point) == path)
    };
    // Optional fields end with a dash.
    let shared = |line: &str| {
        line.split(' ')
            .skip(6)
            .take_while(|field| *field != "-")
            .any(|field| field.starts_with("shared:"))
    };
    mounts.lines().rfind(at).is_some_and(shared)
}

/// Blanks and the like are written in octal there.
fn unescaped(field: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let code = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

/// The descriptors of the process itself, `/proc/self/fd`, as a mount without a
/// parent, under the number that it has. `false` where the path leads to
/// another directory than the one that is open.
pub(crate) fn detach_descriptors(directory: &mut OwnedFd) -> Result<bool, ConfineError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = match open_tree(CWD, "/proc/self/fd", flags) {
        Err(Errno::NOENT | Errno::INVAL) => return Ok(false),
        other => step("mount /proc/self/fd", other)?,
    };
    let look = |file: &OwnedFd| step("look at /proc/self/fd", rustix::fs::fstat(file));
    if id(&look(&clone)?) != id(&look(directory)?) {
        return Ok(false);
    }
    let flags = rustix::io::DupFlags::CLOEXEC;
    step(
        "keep /proc/self/fd",
        rustix::io::dup3(&clone, directory, flags),
    )?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_tree_is_whole_where_its_mounts_are() {
        let line = |root: &str, point: &str| {
            format!("36 35 98:0 {root} {point} rw,noatime shared:1 - ext4 /dev/sda rw\n")
        };
        let tree = Path::new("/srv/a b");
        let host = line("/", "/") + &line("/x", "/srv/a") + &line("/x", "/srv/a\\040bc");
        assert!(!are_whole(&host, tree), "a directory of the host's root");
        let own = host.clone() + &line("/", "/srv/a\\040b");
        assert!(are_whole(&own, tree));
        assert!(are_whole(
            &(own.clone() + &line("/", "/srv/a\\040b/c")),
            tree
        ));
        assert!(!are_whole(&(own + &line("/etc", "/srv/a\\040b/c")), tree));
        assert!(!are_whole(&(host + &line("/d", "/srv/a\\040b")), tree));
        assert!(!are_whole("nonsense", tree));
    }

    #[test]
    fn only_the_topmost_mount_counts_as_shared() {
        let line =
            |fields: &str| format!("36 35 98:0 / /srv/a\\040b rw {fields}- ext4 /dev/sda rw\n");
        let path = Path::new("/srv/a b");
        assert!(is_shared(&line("master:2 shared:7 "), path));
        assert!(!is_shared(&line("master:2 "), path));
        assert!(!is_shared(&(line("shared:7 ") + &line("")), path));
        assert!(!is_shared(&line("shared:7 "), Path::new("/srv/a")));
    }

    #[test]
    fn what_cannot_be_shared_is_said() {
        let open = |path| Tree::open(Path::new(path)).unwrap_err();
        assert!(matches!(open("/nowhere"), TreeError::Missing { .. }));
        assert!(matches!(open("/dev/null"), TreeError::NotADirectory { .. }));
        assert!(matches!(
            open("/dev/null/x"),
            TreeError::NotADirectory { .. }
        ));
        let tree = Tree::open(Path::new("/proc/self/..")).unwrap();
        assert_eq!(tree.path(), Path::new("/proc"));
        assert!(!tree.is_detached() && !tree.is_read_only());
        let tree = Tree::open(Path::new("/proc/self")).unwrap();
        assert!(matches!(tree.following(), Err(TreeError::NotShared { .. })));
    }

    #[test]
    fn octal_numbers_are_characters() {
        for (field, path) in [("a\\040b", "a b"), ("\\134x", "\\x"), ("a\\04", "a\\04")] {
            assert_eq!(unescaped(field).as_os_str().as_bytes(), path.as_bytes());
        }
    }
}
