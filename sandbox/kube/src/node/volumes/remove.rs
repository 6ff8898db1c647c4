//! Removes what containers left in a volume. Called by `volumes`, when no container runs any more.
//!
//! Its depth is the container's choice, so nothing here recurses and no path gets long: what is in
//! a directory is moved to the top before the directory goes. Links are never followed.

use std::fs;
use std::io;
use std::path::Path;

/// Removes a directory and all that is below it, in one file system. What is not there is fine.
pub(in crate::node) fn tree(top: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(top) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        kind => kind?.file_type(),
    };
    if !kind.is_dir() {
        return fs::remove_file(top);
    }
    let mut moved = 0_u64;
    loop {
        let mut empty = true;
        for entry in fs::read_dir(top)? {
            empty = false;
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                flat(&entry.path(), top, &mut moved)?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        if empty {
            return fs::remove_dir(top);
        }
    }
}

/// Removes a directory whose directories are moved to `top`.
fn flat(dir: &Path, top: &Path, moved: &mut u64) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path())?;
            continue;
        }
        loop {
            let to = top.join(format!("..removed-{moved}"));
            *moved += 1;
            // A container may have guessed the name; an empty directory of it is replaced.
            match fs::rename(entry.path(), to) {
                Err(error) if is_taken(&error) => {}
                done => break done?,
            }
        }
    }
    fs::remove_dir(dir)
}

fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::DirectoryNotEmpty
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;
    use std::os::unix::fs::symlink;

    #[test]
    fn deep_trees_and_links_are_removed() {
        let scratch = Scratch::new();
        let top = scratch.path().join("top");
        fs::create_dir_all(top.join("a/b/c")).unwrap();
        fs::write(top.join("a/b/f"), "x").unwrap();
        fs::create_dir_all(top.join("..removed-0/x")).unwrap();
        fs::write(top.join("..removed-1"), "in the way").unwrap();
        fs::write(scratch.path().join("outside"), "stays").unwrap();
        symlink(scratch.path(), top.join("a/link")).unwrap();
        // Deeper than a path can be long: each step is made below the last.
        let mut at = rustix::fs::open(
            top.as_path(),
            rustix::fs::OFlags::PATH,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "deep", rustix::fs::Mode::RWXU).unwrap();
            let below = rustix::fs::openat(
                &at,
                "deep",
                rustix::fs::OFlags::PATH,
                rustix::fs::Mode::empty(),
            );
            at = below.unwrap();
        }
        drop(at);
        tree(&top).unwrap();
        assert!(!top.exists());
        assert!(scratch.path().join("outside").exists());
        tree(&top).unwrap();
    }
}
