//! A container's root as seen from outside: reading small files in it and making directories.
//!
//! Names are the container's, and so are the links they meet: every lookup is one openat2(2) with
//! `RESOLVE_IN_ROOT`, which keeps them inside, and nothing but regular files is read. Used before
//! a process starts, by `user` and `container`.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fstat, openat2},
    io::Errno,
};

/// Times a lookup is repeated when somebody renames directories meanwhile.
const TRIES: usize = 32;
/// Deepest directory that is made.
const MAX_DEPTH: usize = 64;

/// A root.
pub(crate) struct Inside(OwnedFd);

impl Inside {
    /// The root mounted at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    fn lookup(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        loop {
            tries += 1;
            match openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                Err(Errno::AGAIN | Errno::INTR) if tries < TRIES => {}
                other => return other,
            }
        }
    }

    /// The text of a regular file, at most `limit` bytes of it; nothing when it is not there.
    pub(crate) fn read(&self, path: &str, limit: u64) -> io::Result<String> {
        // Looked at before it is opened for reading: opening a pipe or a device can do things.
        let place = match self.lookup(Path::new(path), OFlags::PATH) {
            Ok(place) => place,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
            Err(error) => return Err(error.into()),
        };
        if FileType::from_raw_mode(fstat(&place)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "is no regular file",
            ));
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(self.lookup(Path::new(path), flags)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "is no regular file",
            ));
        }
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Makes a directory and those above it where they are missing. What is made belongs to
    /// `owner`.
    pub(crate) fn make_directory(&self, path: &Path, owner: (u32, u32)) -> io::Result<()> {
        let names: Vec<_> = path
            .components()
            .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
            .collect();
        if names.len() > MAX_DEPTH
            || names
                .iter()
                .any(|part| !matches!(part, Component::Normal(_)))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let directory = OFlags::PATH | OFlags::DIRECTORY;
        let mut above = PathBuf::from("/");
        for name in names {
            let here = above.join(name);
            match self.lookup(&here, directory) {
                Ok(_) => {}
                Err(Errno::NOENT) => {
                    let parent = self.lookup(&above, directory)?;
                    match rustix::fs::mkdirat(&parent, name.as_os_str(), 0o755.into()) {
                        Ok(()) => give(&parent, name.as_os_str(), owner)?,
                        Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            }
            above = here;
        }
        Ok(())
    }
}

fn give(parent: &OwnedFd, name: &OsStr, (uid, gid): (u32, u32)) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // Not through a link, should somebody have put one in its place.
    rustix::fs::chownat(
        parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn tree(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("pericarp-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("etc")).unwrap();
        dir
    }

    #[test]
    fn links_do_not_lead_out() {
        let dir = tree("inside-links");
        fs::write(dir.join("secret"), "outer").unwrap();
        fs::create_dir_all(dir.join("root/etc")).unwrap();
        fs::write(dir.join("root/secret"), "inner").unwrap();
        symlink("../../../secret", dir.join("root/etc/up")).unwrap();
        symlink("/secret", dir.join("root/etc/absolute")).unwrap();
        symlink("/etc/loop", dir.join("root/etc/loop")).unwrap();
        let inside = Inside::open(&dir.join("root")).unwrap();
        assert_eq!(inside.read("/etc/up", 100).unwrap(), "inner");
        assert_eq!(inside.read("/etc/absolute", 3).unwrap(), "inn");
        assert_eq!(inside.read("/etc/absent", 100).unwrap(), "");
        assert!(inside.read("/etc/loop", 100).is_err());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn only_regular_files_are_read() {
        let dir = tree("inside-kinds");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.join("etc/pipe"),
            FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let inside = Inside::open(&dir).unwrap();
        assert!(inside.read("/etc/pipe", 100).is_err());
        assert!(inside.read("/etc", 100).is_err());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn directories_are_made_inside_only() {
        let dir = tree("inside-made");
        fs::create_dir_all(dir.join("root")).unwrap();
        symlink("/../..", dir.join("root/up")).unwrap();
        let inside = Inside::open(&dir.join("root")).unwrap();
        let me = (
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw(),
        );
        inside.make_directory(Path::new("/up/a/b"), me).unwrap();
        inside.make_directory(Path::new("/up/a/b"), me).unwrap();
        assert!(dir.join("root/a/b").is_dir());
        assert!(inside.make_directory(Path::new("/x/../y"), me).is_err());
        fs::write(dir.join("root/file"), "").unwrap();
        assert!(inside.make_directory(Path::new("/file/a"), me).is_err());
        fs::remove_dir_all(dir).unwrap();
    }
}
