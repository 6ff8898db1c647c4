//! How much a container has put into a volume. Called by `worker` for volumes with a limit.
//!
//! The containers may be writing, and may be hostile: links are not followed, and one directory is
//! open at a time.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2, statat,
};
use rustix::io::Errno;

/// What a name costs at least, in bytes: one with nothing in it has to be kept in mind here, too.
const LEAST: u64 = 512;

/// The bytes on disk below `top`, or some number above `limit`: it is not looked further then. More
/// than can be looked at is as much as can be.
pub(in crate::node) fn used(top: &Path, limit: u64) -> io::Result<u64> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, top, flags, Mode::empty())?;
    let mut bytes = 0;
    let mut twice = HashSet::new();
    let mut todo = vec![PathBuf::from(".")];
    while bytes <= limit
        && let Some(path) = todo.pop()
    {
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match openat2(root.as_fd(), &path, flags, Mode::empty(), within) {
            Ok(dir) => {
                let mut found = Found {
                    bytes,
                    limit,
                    twice: &mut twice,
                    todo: &mut todo,
                };
                found.one(dir.as_fd(), &path)?;
                bytes = found.bytes;
            }
            // Nobody needs so deep a tree but to hide in it.
            Err(Errno::NAMETOOLONG) => return Ok(u64::MAX),
            // It went or became something else meanwhile.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

/// What has been found so far.
struct Found<'a> {
    bytes: u64,
    limit: u64,
    /// Files of several names that have been counted.
    twice: &'a mut HashSet<u64>,
    /// Directories that have not been looked at.
    todo: &'a mut Vec<PathBuf>,
}

impl Found<'_> {
    /// Adds one directory's.
    fn one(&mut self, dir: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
        use std::os::unix::ffi::OsStrExt as _;
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            // A file of several names is there once.
            if stat.st_nlink > 1 && !is_directory && !self.twice.insert(stat.st_ino) {
                continue;
            }
            let blocks = u64::try_from(stat.st_blocks).unwrap_or_default();
            let bytes = blocks.saturating_mul(512).max(LEAST);
            self.bytes = self.bytes.saturating_add(bytes);
            if self.bytes > self.limit {
                return Ok(());
            }
            if is_directory {
                let name = std::ffi::OsStr::from_bytes(name.to_bytes());
                self.todo.push(path.join(name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;
    use std::fs;

    #[test]
    fn files_count_once_and_links_do_not() {
        let scratch = Scratch::new();
        let top = scratch.path().join("top");
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::write(top.join("a/b/f"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(top.join("a/b/f"), top.join("g")).unwrap();
        let outside = scratch.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("large"), vec![1; 4 << 20]).unwrap();
        std::os::unix::fs::symlink(&outside, top.join("link")).unwrap();
        let bytes = used(&top, u64::MAX).unwrap();
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
        // Beyond the limit nothing more is looked at.
        assert!(used(&top, 1000).unwrap() > 1000);
    }
}
