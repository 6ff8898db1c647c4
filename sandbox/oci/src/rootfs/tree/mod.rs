//! The tree that layers are unpacked into, and the only code that touches it.
//!
//! Used by `rootfs`. Every path is resolved by the kernel with the tree's directory as its root
//! (`openat2`, `RESOLVE_IN_ROOT`): a symbolic link on the way, absolute or climbing, ends inside,
//! as it would for a process in the container. The last part of a name is never followed.
//!
//! Directories stay open to us until [`Tree::finish`] gives each its own mode and time, whatever
//! order the entries come in.

mod calls;
mod resolve;

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
        chownat, fchmod, fchown, futimens, linkat, lsetxattr, makedev, mknodat, openat, symlinkat,
        utimensat,
    },
    io::Errno,
};

use super::{
    Rights,
    error::{Problem, shown},
    name::Name,
};
use crate::tar::Record;
pub(super) use calls::remove_tree;
use calls::{children, clear_xattrs, readable, remove, stat, through};
use resolve::{Directory, Open, Place};

/// Of the work in progress: nobody but us may look into it.
const PRIVATE: Mode = Mode::RWXU;
/// Beyond the year 36 000; leaves room for sums.
const LATEST: u64 = 1 << 40;
const CREATE_NODE: &str = "create the node";

/// What all kinds of entries have.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (u64, u32),
    pub(super) xattrs: Vec<Record>,
}

/// What was left out because the caller has not the right or the file system not the room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Device nodes.
    pub devices: u64,
    /// Extended attributes.
    pub xattrs: u64,
}

/// The directory and what is known of the directories in it, all of which we made.
pub(super) struct Tree {
    root: OwnedFd,
    rights: Rights,
    directories: HashMap<u64, Directory>,
    /// Names that the current layer made or passed through: a deletion in it spares them.
    touched: HashSet<(u64, Vec<u8>)>,
    pub(super) left_out: LeftOut,
    /// The latest time of anything in the tree.
    pub(super) newest: u64,
}

impl Tree {
    /// Takes an empty directory over.
    pub(super) fn new(root: OwnedFd, rights: Rights) -> Result<Self, Errno> {
        let inode = rustix::fs::fstat(&root)?.st_ino;
        fchmod(&root, PRIVATE)?;
        let directory = Directory {
            above: inode,
            name: Vec::new(),
            depth: 0,
            path_length: 0,
            mode: 0o755,
            mtime: (0, 0),
        };
        Ok(Self {
            root,
            rights,
            directories: HashMap::from([(inode, directory)]),
            touched: HashSet::new(),
            left_out: LeftOut::default(),
            newest: 0,
        })
    }

    /// From here on, what is in the tree is from lower layers.
    pub(super) fn next_layer(&mut self) {
        self.touched.clear();
    }

    pub(super) fn directory(&mut self, name: &Name, meta: &Meta) -> Result<(), Problem> {
        let Some(place) = self.place(name)? else {
            let root = self.open(&[])?;
            return self.describe(&root, meta);
        };
        let open = if place.kind()? == Some(FileType::Directory) {
            self.touch(&place);
            self.open_child(&place.directory, &place.name)?
        } else {
            self.clear(&place)?;
            self.make_directory(&place.directory, &place.name)?
        };
        self.describe(&open, meta)
    }

    /// Makes an empty file; it gets its properties with [`Tree::close_file`] after its content.
    pub(super) fn file(&mut self, name: &Name) -> Result<(Place, OwnedFd), Problem> {
        let place = self.fresh(name)?;
        let fd = openat(
            &place.directory.fd,
            &place.name[..],
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )
        .map_err(Problem::kernel("create the file"))?;
        Ok((place, fd))
    }

    pub(super) fn close_file(
        &mut self,
        place: &Place,
        fd: &OwnedFd,
        meta: &Meta,
    ) -> Result<(), Problem> {
        if self.rights == Rights::Root {
            let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
            fchown(fd, Some(uid), Some(gid)).map_err(Problem::kernel("set the owner"))?;
        }
        // After the owner: changing that drops both set-id bits and file capabilities.
        self.set_xattrs(place.directory.fd.as_fd(), &place.name, meta)?;
        fchmod(fd, self.mode_of_file(meta.mode)).map_err(Problem::kernel("set the mode"))?;
        futimens(fd, &self.times(meta.mtime)).map_err(Problem::kernel("set the time"))
    }

    pub(super) fn symlink(
        &mut self,
        name: &Name,
        target: &[u8],
        meta: &Meta,
    ) -> Result<(), Problem> {
        if target.is_empty() || target.contains(&0) {
            return Err(Problem::Link(shown(target)));
        }
        let place = self.fresh(name)?;
        symlinkat(target, &place.directory.fd, &place.name[..])
            .map_err(Problem::kernel("create the symbolic link"))?;
        self.finish_node(&place, meta, None)
    }

    /// The target keeps its properties: they are those of the file both names stand for.
    pub(super) fn hard_link(&mut self, name: &Name, target: &Name) -> Result<(), Problem> {
        let missing = || Problem::Link(shown(&target.parts().join(&b'/')));
        let (way, last) = target.split().ok_or_else(missing)?;
        let from = self.find(way)?.ok_or_else(missing)?;
        let from_stat = stat(&from, last)?.ok_or_else(missing)?;
        if FileType::from_raw_mode(from_stat.st_mode) == FileType::Directory {
            return Err(missing());
        }
        let place = self
            .place(name)?
            .ok_or(Problem::Name("is that of the root"))?;
        if stat(&place.directory, &place.name)?.is_some_and(|it| it.st_ino == from_stat.st_ino) {
            self.touch(&place);
            return Ok(());
        }
        self.clear(&place)?;
        linkat(
            &from.fd,
            last,
            &place.directory.fd,
            &place.name[..],
            AtFlags::empty(),
        )
        .map_err(|errno| match errno {
            Errno::NOENT => missing(),
            errno => Problem::kernel("create the hard link")(errno),
        })?;
        self.touch(&place);
        Ok(())
    }

    pub(super) fn fifo(&mut self, name: &Name, meta: &Meta) -> Result<(), Problem> {
        self.node(name, FileType::Fifo, 0, meta)
    }

    /// Left out where only root may make one. The runtime gives a container its usual devices.
    pub(super) fn device(
        &mut self,
        name: &Name,
        kind: FileType,
        (major, minor): (u64, u64),
        meta: &Meta,
    ) -> Result<(), Problem> {
        // Linux has 12 and 20 bits for them.
        let major = u32::try_from(major).ok().filter(|&it| it < 1 << 12);
        let minor = u32::try_from(minor).ok().filter(|&it| it < 1 << 20);
        let (major, minor) = major.zip(minor).ok_or(Problem::Device)?;
        match self.node(name, kind, makedev(major, minor), meta) {
            Err(Problem::Kernel { what, source })
                if what == CREATE_NODE
                    && source.raw_os_error() == Some(Errno::PERM.raw_os_error()) =>
            {
                self.left_out.devices += 1;
                Ok(())
            }
            result => result,
        }
    }

    /// Takes away what lower layers have by this name.
    pub(super) fn whiteout(&mut self, name: &Name) -> Result<(), Problem> {
        let Some((way, last)) = name.split() else {
            return Ok(());
        };
        let Some(directory) = self.find(way)? else {
            return Ok(());
        };
        let place = Place {
            directory,
            name: last.to_vec(),
        };
        if !self.touched.contains(&place.key()) {
            return remove(place.directory.fd.as_fd(), &place.name);
        }
        // Made or changed by this very layer: only what is below it from lower ones goes.
        if place.kind()? == Some(FileType::Directory) {
            let open = self.open_child(&place.directory, &place.name)?;
            self.remove_lower(&open)?;
        }
        Ok(())
    }

    /// Takes away all that lower layers have in this directory.
    pub(super) fn opaque(&mut self, name: &Name) -> Result<(), Problem> {
        match self.find(name.parts())? {
            Some(open) => self.remove_lower(&open),
            None => Ok(()),
        }
    }

    /// Gives every directory its mode and its time.
    pub(super) fn finish(&mut self) -> Result<(), Problem> {
        let root = self.open(&[])?;
        self.finish_below(&root)
    }

    fn finish_below(&mut self, open: &Open) -> Result<(), Problem> {
        for (name, _) in children(open.fd.as_fd())?
            .iter()
            .filter(|(_, kind)| *kind == FileType::Directory)
        {
            let below = self.open_child(open, name)?;
            self.finish_below(&below)?;
        }
        let Some(directory) = self.directories.get(&open.inode) else {
            return Ok(());
        };
        let (mode, mtime) = (directory.mode, directory.mtime);
        // A plain user reads the tree later with no more rights than it gives its owner.
        let mode = match self.rights {
            Rights::Root => mode,
            Rights::User => mode | 0o500,
        };
        let fd = readable(open.fd.as_fd()).map_err(Problem::kernel("open the directory"))?;
        fchmod(&fd, Mode::from_raw_mode(mode)).map_err(Problem::kernel("set the mode"))?;
        futimens(&fd, &self.times(mtime)).map_err(Problem::kernel("set the time"))
    }

    fn node(
        &mut self,
        name: &Name,
        kind: FileType,
        device: u64,
        meta: &Meta,
    ) -> Result<(), Problem> {
        let place = self.fresh(name)?;
        mknodat(
            &place.directory.fd,
            &place.name[..],
            kind,
            Mode::empty(),
            device,
        )
        .map_err(Problem::kernel(CREATE_NODE))?;
        self.finish_node(&place, meta, Some(self.mode_of_file(meta.mode)))
    }

    /// Owner, attributes, mode and time of what cannot be opened.
    fn finish_node(
        &mut self,
        place: &Place,
        meta: &Meta,
        mode: Option<Mode>,
    ) -> Result<(), Problem> {
        let (fd, name) = (&place.directory.fd, &place.name[..]);
        if self.rights == Rights::Root {
            let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
            chownat(fd, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(Problem::kernel("set the owner"))?;
        }
        self.set_xattrs(fd.as_fd(), name, meta)?;
        if let Some(mode) = mode {
            // Made by us a moment ago and no link, so nothing is followed.
            chmodat(fd, name, mode, AtFlags::empty()).map_err(Problem::kernel("set the mode"))?;
        }
        utimensat(fd, name, &self.times(meta.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Problem::kernel("set the time"))
    }

    /// A directory's owner and attributes now, its mode and time at the end.
    fn describe(&mut self, open: &Open, meta: &Meta) -> Result<(), Problem> {
        if self.rights == Rights::Root {
            chownat(
                &open.fd,
                c"",
                Some(Uid::from_raw(meta.uid)),
                Some(Gid::from_raw(meta.gid)),
                AtFlags::EMPTY_PATH,
            )
            .map_err(Problem::kernel("set the owner"))?;
        }
        clear_xattrs(open.fd.as_fd())?;
        self.set_xattrs(open.fd.as_fd(), b".", meta)?;
        if let Some(directory) = self.directories.get_mut(&open.inode) {
            directory.mode = meta.mode;
            directory.mtime = meta.mtime;
        }
        Ok(())
    }

    /// By a path through the descriptor: there are no calls for what is only a place.
    fn set_xattrs(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        meta: &Meta,
    ) -> Result<(), Problem> {
        for (key, value) in &meta.xattrs {
            match lsetxattr(
                through(directory, name),
                &key[..],
                value,
                XattrFlags::empty(),
            ) {
                Ok(()) => {}
                // The file system has none, no more room for one, or we have not the right.
                Err(
                    Errno::OPNOTSUPP | Errno::NOSPC | Errno::TOOBIG | Errno::RANGE | Errno::PERM,
                ) => {
                    self.left_out.xattrs += 1;
                }
                Err(errno) => return Err(Problem::kernel("set an extended attribute")(errno)),
            }
        }
        Ok(())
    }

    fn mode_of_file(&self, mode: u32) -> Mode {
        Mode::from_raw_mode(match self.rights {
            Rights::Root => mode,
            Rights::User => mode | 0o400,
        })
    }

    fn times(&mut self, (seconds, nanoseconds): (u64, u32)) -> Timestamps {
        // The file system cuts what it has no room for.
        let seconds = seconds.min(LATEST);
        self.newest = self.newest.max(seconds);
        let time = Timespec {
            tv_sec: seconds.cast_signed(),
            tv_nsec: nanoseconds.into(),
        };
        Timestamps {
            last_access: time,
            last_modification: time,
        }
    }
}
