//! Removes what a container has written, however it is shaped.
//!
//! Called by `root` when a container is removed. The tree is hostile: it may be a hundred thousand
//! directories deep, so nothing here goes down into it. Directories found on the way are moved
//! up instead, and each is emptied in its turn.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags, mkdirat, openat, renameat, unlinkat},
    io::Errno,
};

/// The place for directories that are still to be emptied.
const PLACE: &str = ".trash";

/// Removes the directory `name` in `parent` and all it holds.
pub(crate) fn remove(parent: &Path, name: &str) -> io::Result<()> {
    let parent = directory(CWD, parent)?;
    match mkdirat(&parent, PLACE, 0o700.into()) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let place = directory(parent.as_fd(), Path::new(PLACE))?;
    let mut next = 0;
    match take_over(&parent, &CString::new(name)?, &place, &mut next) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    // What an earlier attempt has left is emptied with it.
    loop {
        let found = entries(&place)?;
        if found.is_empty() {
            return Ok(());
        }
        for name in found {
            empty(&place, &name, &mut next)?;
            unlinkat(&place, &name, AtFlags::REMOVEDIR)?;
        }
    }
}

/// Unlinks what is in the directory, and moves the directories in it to the place.
fn empty(place: &OwnedFd, name: &CString, next: &mut u64) -> io::Result<()> {
    let inside = openat(place, name, FLAGS, Mode::empty())?;
    loop {
        let found = entries(&inside)?;
        if found.is_empty() {
            return Ok(());
        }
        for name in &found {
            match unlinkat(&inside, name, AtFlags::empty()) {
                Ok(()) => {}
                // Both mean a directory, unlink(2) and POSIX.
                Err(Errno::ISDIR | Errno::PERM) => take_over(&inside, name, place, next)?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Moves a directory to the place, under a number that is free there.
fn take_over(from: &OwnedFd, name: &CString, place: &OwnedFd, next: &mut u64) -> Result<(), Errno> {
    loop {
        let number = next.to_string();
        *next += 1;
        match renameat(from, name, place, &number) {
            // Left by an earlier attempt.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            other => return other,
        }
    }
}

const FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

fn directory(at: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(at, path, FLAGS, Mode::empty())?)
}

/// Some of the names in a directory; none when it is empty.
fn entries(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    /// A bound on memory: a directory may hold millions.
    const SOME: usize = 256;
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
            if names.len() == SOME {
                break;
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::PathBuf};

    use super::*;

    fn place(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("pericarp-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("layer")).unwrap();
        dir
    }

    #[test]
    fn a_tree_goes_with_all_it_holds_and_nothing_else() {
        let dir = place("trash-wide");
        fs::create_dir_all(dir.join("kept/below")).unwrap();
        for number in 0..600 {
            fs::write(dir.join(format!("layer/{number}")), "x").unwrap();
            fs::create_dir_all(dir.join(format!("layer/d{number}/e"))).unwrap();
        }
        symlink("../kept", dir.join("layer/d1/link")).unwrap();
        remove(&dir, "layer").unwrap();
        remove(&dir, "layer").unwrap();
        assert!(dir.join("kept/below").is_dir());
        let mut left: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, [".trash", "kept"]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn depth_does_not_matter() {
        let dir = place("trash-deep");
        let mut here = directory(CWD, &dir.join("layer")).unwrap();
        for _ in 0..4_000 {
            mkdirat(&here, "d", 0o700.into()).unwrap();
            here = directory(here.as_fd(), Path::new("d")).unwrap();
        }
        drop(here);
        // As little stack as a thread can have.
        let thread = std::thread::Builder::new().stack_size(64 * 1024);
        let at = dir.clone();
        let done = thread.spawn(move || remove(&at, "layer")).unwrap();
        done.join().unwrap().unwrap();
        assert!(!dir.join("layer").exists());
        fs::remove_dir_all(dir).unwrap();
    }
}
