//! System calls on names in open directories, none of which follows a symbolic link.
//!
//! Used by `tree`.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, chmodat, llistxattr, lremovexattr, openat,
        statat, unlinkat,
    },
    io::Errno,
};

use super::resolve::Open;
use crate::rootfs::error::Problem;

pub(super) fn opened(fd: OwnedFd) -> Result<Open, Errno> {
    let inode = rustix::fs::fstat(&fd)?.st_ino;
    Ok(Open { fd, inode })
}

pub(super) fn stat(directory: &Open, name: &[u8]) -> Result<Option<Stat>, Problem> {
    match statat(&directory.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(Problem::kernel("look at what is there")(errno)),
    }
}

/// A path to a name in an open directory.
pub(super) fn through(directory: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    path
}

pub(super) fn clear_xattrs(directory: BorrowedFd<'_>) -> Result<(), Problem> {
    let path = through(directory, b".");
    let mut names = vec![0; 64 << 10];
    let length = match llistxattr(&path[..], &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(Problem::kernel("list the extended attributes")(errno)),
    };
    for name in names[..length].split(|&byte| byte == 0) {
        // What the host's security modules put there is not ours to take.
        if name.starts_with(b"user.") {
            lremovexattr(&path[..], name)
                .map_err(Problem::kernel("remove an extended attribute"))?;
        }
    }
    Ok(())
}

pub(super) fn open_directory(above: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    openat(
        above,
        name,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

pub(super) fn readable(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    openat(
        directory,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

pub(super) fn children(directory: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, FileType)>, Problem> {
    let failed = Problem::kernel("list a directory");
    let mut found = Vec::new();
    for entry in Dir::new(readable(directory).map_err(&failed)?).map_err(&failed)? {
        let entry = entry.map_err(&failed)?;
        let name = entry.file_name().to_bytes().to_vec();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = statat(directory, &name[..], AtFlags::SYMLINK_NOFOLLOW);
                FileType::from_raw_mode(stat.map_err(&failed)?.st_mode)
            }
            kind => kind,
        };
        found.push((name, kind));
    }
    Ok(found)
}

/// Removes a name and all below it, following nothing. What is not there is removed already.
pub(super) fn remove(directory: BorrowedFd<'_>, name: &[u8]) -> Result<(), Problem> {
    let failed = Problem::kernel("remove what lower layers have");
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // Linux says that it is a directory; POSIX lets it be EPERM.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let below = open_directory(directory, name).map_err(&failed)?;
    // A finished tree of a plain user has directories that its owner may not write to.
    let writable = Mode::RWXU;
    let itself = format!("/proc/self/fd/{}", below.as_raw_fd());
    chmodat(CWD, itself, writable, AtFlags::empty()).map_err(&failed)?;
    for (name, _) in children(below.as_fd())? {
        remove(below.as_fd(), &name)?;
    }
    unlinkat(directory, name, AtFlags::REMOVEDIR).map_err(failed)
}

/// Removes a tree that was unpacked, whatever modes are in it.
pub(in crate::rootfs) fn remove_tree(
    directory: BorrowedFd<'_>,
    name: &[u8],
) -> Result<(), io::Error> {
    remove(directory, name).map_err(|problem| match problem {
        Problem::Kernel { source, .. } => source,
        problem => io::Error::other(problem.to_string()),
    })
}
