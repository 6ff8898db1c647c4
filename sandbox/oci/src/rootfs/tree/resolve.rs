//! Where names lead, and which of them the current layer made.
//!
//! Used by `tree`. Directories are known by their inodes, because symbolic links give one
//! directory many paths; all of them were made here, on one file system.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2},
    io::Errno,
};

use super::{
    PRIVATE, Tree,
    calls::{children, open_directory, opened, remove, stat},
};
use crate::rootfs::{
    error::{Problem, shown},
    name::{MOST_DEPTH, MOST_PATH, Name},
};

/// The kernel answers EAGAIN when anything anywhere was renamed while it resolved a `..`.
const TRIES: usize = 1000;

/// By inode: a directory can be reached by many paths.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) above: u64,
    pub(super) name: Vec<u8>,
    pub(super) depth: usize,
    pub(super) path_length: usize,
    pub(super) mode: u32,
    pub(super) mtime: (u64, u32),
}

/// An open directory of the tree.
pub(super) struct Open {
    pub(super) fd: OwnedFd,
    pub(super) inode: u64,
}

/// A name in an open directory.
pub(in crate::rootfs) struct Place {
    pub(super) directory: Open,
    pub(super) name: Vec<u8>,
}

impl Tree {
    /// A place with nothing at it and all directories before it.
    pub(super) fn fresh(&mut self, name: &Name) -> Result<Place, Problem> {
        let place = self
            .place(name)?
            .ok_or(Problem::Name("is that of the root"))?;
        self.clear(&place)?;
        self.touch(&place);
        Ok(place)
    }

    pub(super) fn clear(&mut self, place: &Place) -> Result<(), Problem> {
        remove(place.directory.fd.as_fd(), &place.name)
    }

    /// Where a name is, with the directories before it; `None` for the root itself.
    pub(super) fn place(&mut self, name: &Name) -> Result<Option<Place>, Problem> {
        let Some((way, last)) = name.split() else {
            return Ok(None);
        };
        Ok(Some(Place {
            directory: self.way(way)?,
            name: last.to_vec(),
        }))
    }

    /// The directory at the end of a way, made where it is missing.
    pub(super) fn way(&mut self, way: &[Vec<u8>]) -> Result<Open, Problem> {
        let mut there = way.len();
        let mut open = loop {
            match self.find_exactly(&way[..there]) {
                Ok(open) => break open,
                Err(Errno::NOENT) if there > 0 => there -= 1,
                Err(errno) => return Err(self.no_way(&way[..there], errno)),
            }
        };
        for at in there..way.len() {
            open = self
                .make_directory(&open, &way[at])
                .map_err(|problem| match problem {
                    Problem::Kernel { source, .. }
                        if source.raw_os_error() == Some(Errno::EXIST.raw_os_error()) =>
                    {
                        Problem::Way(shown(&way[..=at].join(&b'/')))
                    }
                    problem => problem,
                })?;
        }
        Ok(open)
    }

    fn no_way(&self, way: &[Vec<u8>], errno: Errno) -> Problem {
        match errno {
            Errno::NOTDIR | Errno::LOOP => Problem::Way(shown(&way.join(&b'/'))),
            errno => Problem::kernel("open its directory")(errno),
        }
    }

    /// The directory at the end of a way, `None` when it is not there.
    pub(super) fn find(&self, way: &[Vec<u8>]) -> Result<Option<Open>, Problem> {
        match self.find_exactly(way) {
            Ok(open) => Ok(Some(open)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(errno) => Err(self.no_way(way, errno)),
        }
    }

    pub(super) fn open(&self, way: &[Vec<u8>]) -> Result<Open, Problem> {
        self.find_exactly(way)
            .map_err(|errno| self.no_way(way, errno))
    }

    fn find_exactly(&self, way: &[Vec<u8>]) -> Result<Open, Errno> {
        let path = if way.is_empty() {
            b".".to_vec()
        } else {
            way.join(&b'/')
        };
        let mut tries = 0;
        let fd = loop {
            tries += 1;
            match openat2(
                &self.root,
                &path[..],
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
            ) {
                Err(Errno::AGAIN) if tries < TRIES => {}
                result => break result?,
            }
        };
        opened(fd)
    }

    pub(super) fn open_child(&self, above: &Open, name: &[u8]) -> Result<Open, Problem> {
        open_directory(above.fd.as_fd(), name)
            .and_then(opened)
            .map_err(Problem::kernel("open the directory"))
    }

    pub(super) fn make_directory(&mut self, above: &Open, name: &[u8]) -> Result<Open, Problem> {
        let (depth, path_length) = self.directories.get(&above.inode).map_or((1, 1), |above| {
            (above.depth + 1, above.path_length + 1 + name.len())
        });
        // Through symbolic links a short name can reach deep.
        if depth > MOST_DEPTH || path_length > MOST_PATH {
            return Err(Problem::Name("makes a directory too deep in the tree"));
        }
        mkdirat(&above.fd, name, PRIVATE).map_err(Problem::kernel("create the directory"))?;
        let open = self.open_child(above, name)?;
        let directory = Directory {
            above: above.inode,
            name: name.to_vec(),
            depth,
            path_length,
            mode: 0o755,
            mtime: (0, 0),
        };
        self.directories.insert(open.inode, directory);
        self.touch_key((above.inode, name.to_vec()));
        Ok(open)
    }

    pub(super) fn touch(&mut self, place: &Place) {
        self.touch_key(place.key());
    }

    /// Marks a name and the directories it is in.
    fn touch_key(&mut self, mut key: (u64, Vec<u8>)) {
        loop {
            let above = key.0;
            if !self.touched.insert(key) {
                return;
            }
            match self.directories.get(&above) {
                Some(directory) if directory.above != above => {
                    key = (directory.above, directory.name.clone());
                }
                _ => return,
            }
        }
    }

    pub(super) fn remove_lower(&self, open: &Open) -> Result<(), Problem> {
        for (name, kind) in children(open.fd.as_fd())? {
            if !self.touched.contains(&(open.inode, name.clone())) {
                remove(open.fd.as_fd(), &name)?;
            } else if kind == FileType::Directory {
                let below = self.open_child(open, &name)?;
                self.remove_lower(&below)?;
            }
        }
        Ok(())
    }
}

impl Place {
    pub(super) fn key(&self) -> (u64, Vec<u8>) {
        (self.directory.inode, self.name.clone())
    }

    pub(super) fn kind(&self) -> Result<Option<FileType>, Problem> {
        let found = stat(&self.directory, &self.name)?;
        Ok(found.map(|stat| FileType::from_raw_mode(stat.st_mode)))
    }
}
