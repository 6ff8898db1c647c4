//! Random operations on a share and, by plain system calls, on a second
//! directory: the same answers, attributes and listings.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use pericarp_share::{Errno, NodeId, SetAttributes, Share, Time, Xattr};
use proptest::prelude::*;
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags, fgetxattr,
    fsetxattr, linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, statat, symlinkat,
    unlinkat, utimensat,
};

use crate::scratch::{Scratch, me, open};

const NAMES: [&CStr; 4] = [c"a", c"b", c"c", c"d"];

/// A place: directories on the way, then a name.
#[derive(Debug, Clone)]
struct Place(Vec<usize>, usize);

impl Place {
    fn name(&self) -> &'static CStr {
        NAMES[self.1]
    }
}

#[derive(Debug, Clone)]
enum Act {
    MakeDir(Place, u32, u32),
    MakeNode(Place, bool, u32),
    Symlink(Place, usize),
    Create(Place, i32, u32, u32),
    Write(Place, u16, Vec<u8>),
    Read(Place),
    Unlink(Place),
    RemoveDir(Place),
    Rename(Place, Place, u32),
    Link(Place, Place),
    Mode(Place, u32),
    Size(Place, u64),
    Times(Place, i32),
    ReadLink(Place),
    SetXattr(Place, Vec<u8>, u32),
    GetXattr(Place),
    List(Place),
}

fn place() -> impl Strategy<Value = Place> {
    (
        proptest::collection::vec(0..NAMES.len(), 0..3),
        0..NAMES.len(),
    )
        .prop_map(|(way, name)| Place(way, name))
}

fn act() -> impl Strategy<Value = Act> {
    let mode = || prop_oneof![Just(0o755u32), Just(0o700), Just(0o6755), Just(0o1777)];
    let umask = || prop_oneof![Just(0u32), Just(0o022), Just(0o077)];
    let flags = prop_oneof![
        Just(libc::O_RDWR),
        Just(libc::O_WRONLY | libc::O_TRUNC),
        Just(libc::O_RDWR | libc::O_EXCL),
        Just(libc::O_RDONLY),
    ];
    let rename = prop_oneof![4 => Just(0u32), 1 => Just(1), 2 => Just(2), 1 => Just(3)];
    let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        4 => (place(), mode(), umask()).prop_map(|(p, m, u)| Act::MakeDir(p, m, u)),
        1 => (place(), any::<bool>(), umask()).prop_map(|(p, f, u)| Act::MakeNode(p, f, u)),
        1 => (place(), 0..NAMES.len()).prop_map(|(p, t)| Act::Symlink(p, t)),
        4 => (place(), flags, mode(), umask()).prop_map(|(p, f, m, u)| Act::Create(p, f, m, u)),
        2 => (place(), any::<u16>(), bytes()).prop_map(|(p, o, d)| Act::Write(p, o, d)),
        1 => place().prop_map(Act::Read),
        2 => place().prop_map(Act::Unlink),
        1 => place().prop_map(Act::RemoveDir),
        4 => (place(), place(), rename).prop_map(|(p, q, f)| Act::Rename(p, q, f)),
        2 => (place(), place()).prop_map(|(p, q)| Act::Link(p, q)),
        1 => (place(), mode()).prop_map(|(p, m)| Act::Mode(p, m)),
        1 => (place(), 0u64..100_000).prop_map(|(p, s)| Act::Size(p, s)),
        1 => (place(), any::<i32>()).prop_map(|(p, t)| Act::Times(p, t)),
        1 => place().prop_map(Act::ReadLink),
        1 => (place(), bytes(), 0u32..3).prop_map(|(p, v, f)| Act::SetXattr(p, v, f)),
        1 => place().prop_map(Act::GetXattr),
        2 => place().prop_map(Act::List),
    ]
}

/// What an operation answers: nothing, bytes, attributes or names.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Done,
    Bytes(Vec<u8>),
    /// Mode, names, size (0 for directories), owner, group, last write as set.
    Attributes(u32, u32, u64, u32, u32),
    Time(i64),
    Names(BTreeMap<CString, u32>),
}

type Answered = Result<Answer, Errno>;

fn size(mode: u32, size: u64) -> u64 {
    if mode & libc::S_IFMT == libc::S_IFDIR {
        0
    } else {
        size
    }
}

/// The share, by nodes that stay known or not.
struct Ours<'a> {
    share: &'a Share,
    forget: bool,
}

impl Ours<'_> {
    fn way(&self, place: &Place) -> Result<NodeId, Errno> {
        let mut at = NodeId::ROOT;
        for step in &place.0 {
            let entry = self.share.lookup(at, NAMES[*step])?;
            if entry.attributes.mode & libc::S_IFMT != libc::S_IFDIR {
                return Err(Errno::NOTDIR);
            }
            self.done(at);
            at = entry.node;
        }
        Ok(at)
    }

    fn done(&self, node: NodeId) {
        if self.forget {
            self.share.forget(node, 1);
        }
    }

    fn node(&self, place: &Place) -> Result<NodeId, Errno> {
        Ok(self.share.lookup(self.way(place)?, place.name())?.node)
    }

    fn entry(entry: pericarp_share::Entry) -> Answered {
        let a = entry.attributes;
        Ok(Answer::Attributes(
            a.mode,
            a.nlink,
            size(a.mode, a.size),
            a.uid,
            a.gid,
        ))
    }

    fn play(&self, act: &Act) -> Answered {
        let (share, me) = (self.share, &me());
        let done = |()| Answer::Done;
        match act {
            Act::MakeDir(p, mode, umask) => {
                Self::entry(share.make_dir(me, self.way(p)?, p.name(), *mode, *umask)?)
            }
            Act::MakeNode(p, fifo, umask) => {
                let kind = if *fifo { libc::S_IFIFO } else { libc::S_IFREG };
                let parent = self.way(p)?;
                Self::entry(share.make_node(me, parent, p.name(), kind | 0o666, *umask, 0)?)
            }
            Act::Symlink(p, target) => {
                Self::entry(share.make_symlink(me, self.way(p)?, p.name(), NAMES[*target])?)
            }
            Act::Create(p, flags, mode, umask) => {
                let parent = self.way(p)?;
                let (entry, opened) =
                    share.create(me, parent, p.name(), *flags, *mode, *umask, false)?;
                share.close_file(opened.handle)?;
                Self::entry(entry)
            }
            Act::Write(p, offset, data) => {
                let opened = share.open_file(self.node(p)?, libc::O_WRONLY, false)?;
                rustix::io::pwrite(&*opened.file, data, (*offset).into())?;
                share.close_file(opened.handle).map(done)
            }
            Act::Read(p) => {
                let opened = share.open_file(self.node(p)?, libc::O_RDONLY, false)?;
                let mut data = vec![0; 200];
                let len = rustix::io::pread(&*opened.file, &mut data, 0)?;
                data.truncate(len);
                share.close_file(opened.handle)?;
                Ok(Answer::Bytes(data))
            }
            Act::Unlink(p) => share.unlink(self.way(p)?, p.name()).map(done),
            Act::RemoveDir(p) => share.remove_dir(self.way(p)?, p.name()).map(done),
            Act::Rename(p, q, flags) => {
                let (from, to) = (self.way(p)?, self.way(q)?);
                share.rename(from, p.name(), to, q.name(), *flags).map(done)
            }
            Act::Link(p, q) => {
                let node = self.node(p)?;
                Self::entry(share.link(node, self.way(q)?, q.name())?)
            }
            Act::Mode(p, mode) => {
                let set = SetAttributes {
                    mode: Some(*mode),
                    ..Default::default()
                };
                share
                    .set_attributes(self.node(p)?, None, &set)
                    .map(|_| Answer::Done)
            }
            Act::Size(p, size) => {
                let set = SetAttributes {
                    size: Some(*size),
                    ..Default::default()
                };
                share
                    .set_attributes(self.node(p)?, None, &set)
                    .map(|_| Answer::Done)
            }
            Act::Times(p, time) => {
                let set = SetAttributes {
                    mtime: Some(Time::At((*time).into(), 5)),
                    ..Default::default()
                };
                let changed = share.set_attributes(self.node(p)?, None, &set)?;
                Ok(Answer::Time(changed.mtime))
            }
            Act::ReadLink(p) => share.read_link(self.node(p)?).map(Answer::Bytes),
            Act::SetXattr(p, value, flags) => share
                .set_xattr(self.node(p)?, c"user.x", value, *flags, false)
                .map(done),
            Act::GetXattr(p) => match share.get_xattr(self.node(p)?, c"user.x", 100)? {
                Xattr::Value(value) => Ok(Answer::Bytes(value)),
                Xattr::Size(_) => panic!("asked for the value"),
            },
            Act::List(p) => {
                let parent = self.way(p)?;
                let handle = share.open_dir(parent)?;
                let mut names = BTreeMap::new();
                share.read_dir_plus(handle, 0, &mut |entry, node| {
                    if let Some(node) = node {
                        let a = node.attributes;
                        assert_eq!((a.ino, a.mode >> 12), (entry.ino, entry.kind));
                        self.done(node.node);
                    }
                    names.insert(entry.name.to_owned(), entry.kind);
                    true
                })?;
                share.close_dir(handle)?;
                Ok(Answer::Names(names))
            }
        }
    }
}

/// The same by system calls, step by step, so that no link is followed.
struct Plain(OwnedFd);

const PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Plain {
    fn way(&self, place: &Place) -> Result<OwnedFd, Errno> {
        let mut at = openat(&self.0, c".", PATH, Mode::empty())?;
        for step in &place.0 {
            at = openat(&at, NAMES[*step], PATH | OFlags::DIRECTORY, Mode::empty())?;
        }
        Ok(at)
    }

    fn kind(&self, place: &Place) -> Result<(OwnedFd, FileType), Errno> {
        let parent = self.way(place)?;
        let stat = statat(&parent, place.name(), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((parent, FileType::from_raw_mode(stat.st_mode)))
    }

    /// What opening says, with the two answers of ours that the kernel has not.
    fn open(&self, place: &Place, flags: OFlags) -> Result<OwnedFd, Errno> {
        let (parent, kind) = self.kind(place)?;
        match kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(parent, place.name(), flags, Mode::empty())
    }

    fn entry(&self, parent: impl AsFd, name: &CStr) -> Answered {
        let s = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(Answer::Attributes(
            s.st_mode,
            s.st_nlink as u32,
            size(s.st_mode, s.st_size as u64),
            s.st_uid,
            s.st_gid,
        ))
    }

    fn play(&self, act: &Act) -> Answered {
        let done = |()| Answer::Done;
        match act {
            Act::MakeDir(p, mode, umask) => {
                let parent = self.way(p)?;
                mkdirat(&parent, p.name(), Mode::from_raw_mode(mode & !umask))?;
                self.entry(parent, p.name())
            }
            Act::MakeNode(p, fifo, umask) => {
                let kind = if *fifo {
                    FileType::Fifo
                } else {
                    FileType::RegularFile
                };
                let parent = self.way(p)?;
                mknodat(
                    &parent,
                    p.name(),
                    kind,
                    Mode::from_raw_mode(0o666 & !umask),
                    0,
                )?;
                self.entry(parent, p.name())
            }
            Act::Symlink(p, target) => {
                let parent = self.way(p)?;
                symlinkat(NAMES[*target], &parent, p.name())?;
                self.entry(parent, p.name())
            }
            Act::Create(p, flags, mode, umask) => {
                let parent = self.way(p)?;
                if *flags & libc::O_EXCL == 0 && self.kind(p).is_ok() {
                    self.open(p, OFlags::from_bits_retain(*flags as u32))?;
                } else {
                    let flags = OFlags::from_bits_retain(*flags as u32) | OFlags::CREATE;
                    openat(&parent, p.name(), flags, Mode::from_raw_mode(mode & !umask))?;
                }
                self.entry(parent, p.name())
            }
            Act::Write(p, offset, data) => {
                let file = self.open(p, OFlags::WRONLY)?;
                rustix::io::pwrite(file, data, (*offset).into())?;
                Ok(Answer::Done)
            }
            Act::Read(p) => {
                let mut data = vec![0; 200];
                let file = self.open(p, OFlags::RDONLY)?;
                let len = rustix::io::pread(file, &mut data, 0)?;
                data.truncate(len);
                Ok(Answer::Bytes(data))
            }
            Act::Unlink(p) => unlinkat(self.way(p)?, p.name(), AtFlags::empty()).map(done),
            Act::RemoveDir(p) => unlinkat(self.way(p)?, p.name(), AtFlags::REMOVEDIR).map(done),
            Act::Rename(p, q, flags) => {
                let (from, to) = (self.way(p)?, self.way(q)?);
                let flags = RenameFlags::from_bits_retain(*flags);
                renameat_with(from, p.name(), to, q.name(), flags).map(done)
            }
            Act::Link(p, q) => {
                let (from, kind) = self.kind(p)?;
                let to = self.way(q)?;
                if kind == FileType::Directory {
                    return Err(Errno::PERM);
                }
                linkat(from, p.name(), &to, q.name(), AtFlags::empty())?;
                self.entry(to, q.name())
            }
            Act::Mode(p, mode) => {
                let (parent, kind) = self.kind(p)?;
                if kind == FileType::Symlink {
                    return Err(Errno::OPNOTSUPP);
                }
                let mode = Mode::from_raw_mode(*mode);
                rustix::fs::chmodat(parent, p.name(), mode, AtFlags::empty()).map(done)
            }
            Act::Size(p, size) => match self.kind(p)?.1 {
                FileType::RegularFile | FileType::Directory => {
                    let file = self.open(p, OFlags::WRONLY)?;
                    rustix::fs::ftruncate(file, *size).map(done)
                }
                _ => Err(Errno::INVAL),
            },
            Act::Times(p, time) => {
                let parent = self.way(p)?;
                let at = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
                let times = Timestamps {
                    last_access: at(0, rustix::fs::UTIME_OMIT),
                    last_modification: at((*time).into(), 5),
                };
                utimensat(&parent, p.name(), &times, AtFlags::SYMLINK_NOFOLLOW)?;
                let stat = statat(parent, p.name(), AtFlags::SYMLINK_NOFOLLOW)?;
                Ok(Answer::Time(stat.st_mtime))
            }
            Act::ReadLink(p) => {
                let link = readlinkat(self.way(p)?, p.name(), Vec::new())?;
                Ok(Answer::Bytes(link.into_bytes()))
            }
            Act::SetXattr(p, value, flags) => {
                let flags = XattrFlags::from_bits_retain(*flags);
                fsetxattr(self.for_xattr(p)?, c"user.x", value, flags).map(done)
            }
            Act::GetXattr(p) => {
                let mut value = vec![0; 100];
                let len = fgetxattr(self.for_xattr(p)?, c"user.x", &mut value[..])?;
                value.truncate(len);
                Ok(Answer::Bytes(value))
            }
            Act::List(p) => {
                let mut names = BTreeMap::new();
                for entry in Dir::read_from(self.way(p).and_then(|d| {
                    openat(d, c".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                })?)? {
                    let entry = entry?;
                    let kind = entry.file_type().as_raw_mode() >> 12;
                    names.insert(entry.file_name().to_owned(), kind);
                }
                Ok(Answer::Names(names))
            }
        }
    }

    /// Only these can have attributes of a user's; the others are not tried.
    fn for_xattr(&self, place: &Place) -> Result<OwnedFd, Errno> {
        let (parent, kind) = self.kind(place)?;
        match kind {
            FileType::RegularFile | FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                openat(parent, place.name(), flags, Mode::empty())
            }
            _ => Err(Errno::PERM),
        }
    }
}

/// What a user's attribute on a special file is refused with differs between
/// getting and setting; that it is, is enough.
fn same(act: &Act, ours: &Answered, plain: &Answered) -> bool {
    match act {
        Act::SetXattr(..) | Act::GetXattr(..) if *plain == Err(Errno::PERM) => ours.is_err(),
        _ => ours == plain,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_share_answers_as_the_kernel_does(
        acts in proptest::collection::vec(act(), 1..80),
        forget: bool,
        handles: bool,
    ) {
        let (scratch, second) = (Scratch::new(), Scratch::new());
        let share = scratch.share_with(|o| (o.xattr, o.file_handles) = (true, handles));
        let ours = Ours { share: &share, forget };
        let plain = Plain(open(&second.root()));
        rustix::process::umask(Mode::empty());
        for (step, act) in acts.iter().enumerate() {
            let (a, b) = (ours.play(act), plain.play(act));
            prop_assert!(same(act, &a, &b), "step {}, {:?}: {:?}, not {:?}", step, act, a, b);
        }
        prop_assert_eq!(share.counts().2, 0);
    }
}
