//! Two sessions that are asked the same, and what each has given out.

use pericarp_tests::fs::wire::posix::{O_APPEND, O_RDWR, O_WRONLY};
use pericarp_tests::fs::wire::{Attr, ROOT, Who, set};
use pericarp_tests::fs::{Change, Client, Space, Wrong};
use rustix::io::Errno;

use super::acts::{ATTRIBUTES, Act, Changes, NAMES};

/// What an act is answered, without what may differ: numbers of nodes and
/// inodes, times that are now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    /// Type and permissions, names, bytes, owner, group, device.
    Attributes(u32, u32, u64, u32, u32, u32),
    /// The same and when it was written.
    Changed(Box<Answer>, u64),
    Bytes(Vec<u8>),
    Number(u64),
    Names(Vec<(String, u32, Option<Answer>)>),
    Space(Space),
    /// Not a reply, or none at all.
    Broken(String),
}

pub(super) type Answered = Result<Answer, Errno>;

/// Node or handle, of ours and of theirs.
type Both = (u64, u64);

/// Something open.
#[derive(Clone, Copy)]
struct Open {
    node: Both,
    handle: Both,
    writable: bool,
}

/// A session with each.
pub(super) struct Pair<'c> {
    ours: &'c mut Client,
    theirs: &'c mut Client,
    nodes: Vec<Both>,
    open: Vec<Open>,
}

/// What an act gives out besides its answer.
#[derive(Default)]
struct Given {
    node: Option<u64>,
    handle: Option<(u64, u64)>,
}

fn attributes(attr: &Attr) -> Answer {
    let kind = attr.mode & 0o170_000;
    let size = if kind == 0o040_000 { 0 } else { attr.size };
    let device = matches!(kind, 0o020_000 | 0o060_000);
    let rdev = if device { attr.rdev } else { 0 };
    Answer::Attributes(attr.mode, attr.nlink, size, attr.uid, attr.gid, rdev)
}

fn told<T>(result: Result<T, Wrong>, answer: impl FnOnce(T) -> Answer) -> Answered {
    match result {
        Ok(value) => Ok(answer(value)),
        Err(Wrong::Refused(errno)) => Err(errno),
        Err(wrong) => Ok(Answer::Broken(wrong.to_string())),
    }
}

impl<'c> Pair<'c> {
    /// Both begin in the directory `log`.
    pub(super) fn new(ours: &'c mut Client, theirs: &'c mut Client) -> Self {
        let first = |client: &mut Client| {
            client.who = Who::ROOT;
            client.lookup(ROOT, "log").unwrap().node
        };
        let first = (first(&mut *ours), first(&mut *theirs));
        Self {
            ours,
            theirs,
            nodes: vec![first],
            open: Vec::new(),
        }
    }

    /// Gives all back.
    pub(super) fn end(self) {
        for Open { node, handle, .. } in self.open {
            let _ = self.ours.release(node.0, handle.0);
            let _ = self.theirs.release(node.1, handle.1);
        }
        for node in self.nodes {
            let _ = self.ours.forget(node.0, 1);
            let _ = self.theirs.forget(node.1, 1);
        }
    }

    pub(super) fn play(&mut self, act: &Act) -> (Answered, Answered) {
        if let Act::Forget(place) = act {
            self.forget(place % self.nodes.len());
            return (Ok(Answer::Done), Ok(Answer::Done));
        }
        let node = |place: usize| self.nodes[place % self.nodes.len()];
        // A handle that nobody has is looked up differently by both, and is of no
        // interest.
        let nothing = Open {
            node: self.nodes[0],
            handle: (0, 0),
            writable: false,
        };
        let opened = |place: usize| match self.open.len() {
            0 => nothing,
            count => self.open[place % count],
        };
        let open = |place: usize| (opened(place).node, opened(place).handle);
        let (one, two) = match *act {
            Act::Lookup(p, _)
            | Act::Forget(p)
            | Act::Attributes(p)
            | Act::Change(p, _)
            | Act::ReadLink(p)
            | Act::MakeDir(p, ..)
            | Act::MakeNode(p, ..)
            | Act::Symlink(p, ..)
            | Act::Unlink(p, _)
            | Act::RemoveDir(p, _)
            | Act::Create(p, ..)
            | Act::Open(p, _)
            | Act::List(p, ..)
            | Act::Space(p)
            | Act::SetXattr(p, ..)
            | Act::GetXattr(p, ..)
            | Act::ListXattr(p, _)
            | Act::RemoveXattr(p, _)
            | Act::Access(p, _) => ((node(p), (0, 0)), (node(0), (0, 0))),
            Act::Link(p, q, _) | Act::Rename((p, _), (q, _), _) => {
                ((node(p), (0, 0)), (node(q), (0, 0)))
            }
            Act::AttributesOpen(p)
            | Act::ChangeOpen(p, _)
            | Act::Read(p, ..)
            | Act::Write(p, ..)
            | Act::Release(p)
            | Act::Sync(p)
            | Act::Seek(p, ..)
            | Act::Allocate(p, ..) => (open(p), open(p)),
            Act::Copy((p, _), (q, _), _) => (open(p), open(q)),
            Act::Who(_) => (open(0), open(0)),
        };
        if self.open.is_empty() && act.is_of_something_open() {
            return (Ok(Answer::Done), Ok(Answer::Done));
        }
        if let Act::ChangeOpen(place, changes) = act
            && changes.valid & set::SIZE != 0
            && !opened(*place).writable
        {
            return (Ok(Answer::Done), Ok(Answer::Done));
        }
        let mine = |((node, _), (handle, _)): (Both, Both)| (node, handle);
        let peers = |((_, node), (_, handle)): (Both, Both)| (node, handle);
        let (ours, a) = ask(self.ours, act, mine(one), mine(two));
        let (theirs, b) = ask(self.theirs, act, peers(one), peers(two));
        self.keep(act, one, (a, b));
        (ours, theirs)
    }

    /// What both have given out, or taken back.
    fn keep(&mut self, act: &Act, one: (Both, Both), (a, b): (Given, Given)) {
        if let (Some(a), Some(b)) = (a.node, b.node) {
            self.nodes.push((a, b));
        }
        if let (Some(a), Some(b)) = (a.handle, b.handle) {
            let (Act::Open(_, flags) | Act::Create(_, _, flags, _)) = act else {
                return;
            };
            self.open.push(Open {
                node: (a.0, b.0),
                handle: (a.1, b.1),
                writable: flags & (O_WRONLY | O_RDWR) != 0,
            });
        }
        if let Act::Release(_) = act {
            self.open.retain(|open| open.handle != one.1);
        }
    }

    /// Takes one lookup back of what is not open. The first stays known.
    fn forget(&mut self, place: usize) {
        let node = self.nodes[place];
        if place > 0 && !self.open.iter().any(|open| open.node == node) {
            self.nodes.remove(place);
            self.ours.forget(node.0, 1).unwrap();
            self.theirs.forget(node.1, 1).unwrap();
        }
    }
}

type Target = (u64, u64);

fn ask(c: &mut Client, act: &Act, one: Target, two: Target) -> (Answered, Given) {
    let (node, handle) = one;
    let mut given = Given::default();
    let done = |()| Answer::Done;
    let answered = match act {
        Act::Who(user) => {
            let id = if *user { 1000 } else { 0 };
            c.who = Who { uid: id, gid: id };
            Ok(Answer::Done)
        }
        Act::Lookup(_, name) => told(c.lookup(node, NAMES[*name]), |entry| {
            given.node = Some(entry.node);
            attributes(&entry.attr)
        }),
        // Of both at once.
        Act::Forget(_) => Ok(Answer::Done),
        Act::Attributes(_) => told(c.getattr(node), |attr| attributes(&attr)),
        Act::AttributesOpen(_) => told(c.getattr_of(node, handle), |attr| attributes(&attr)),
        Act::Change(_, changes) => change(c, node, None, changes),
        Act::ChangeOpen(_, changes) => change(c, node, Some(handle), changes),
        Act::ReadLink(_) => told(c.readlink(node), |target| {
            Answer::Bytes(target.into_bytes())
        }),
        Act::MakeDir(_, name, mode) => told(c.mkdir(node, NAMES[*name], *mode), |entry| {
            given.node = Some(entry.node);
            attributes(&entry.attr)
        }),
        Act::MakeNode(_, name, mode, rdev) => {
            told(c.mknod(node, NAMES[*name], *mode, *rdev), |entry| {
                given.node = Some(entry.node);
                attributes(&entry.attr)
            })
        }
        Act::Symlink(_, name, target) => {
            told(c.symlink(node, NAMES[*name], NAMES[*target]), |entry| {
                given.node = Some(entry.node);
                attributes(&entry.attr)
            })
        }
        Act::Link(_, _, name) => told(c.link(node, two.0, NAMES[*name]), |entry| {
            given.node = Some(entry.node);
            attributes(&entry.attr)
        }),
        Act::Unlink(_, name) => told(c.unlink(node, NAMES[*name]), done),
        Act::RemoveDir(_, name) => told(c.rmdir(node, NAMES[*name]), done),
        Act::Rename((_, name), (_, to), flags) => told(
            c.rename((node, NAMES[*name]), (two.0, NAMES[*to]), *flags),
            done,
        ),
        Act::Create(_, name, flags, mode) => {
            let made = c.create(node, NAMES[*name], *mode, *flags);
            told(made, |(entry, handle)| {
                given.node = Some(entry.node);
                given.handle = Some((entry.node, handle));
                attributes(&entry.attr)
            })
        }
        Act::Open(_, flags) => told(c.open(node, *flags), |handle| {
            given.handle = Some((node, handle));
            Answer::Done
        }),
        Act::Read(_, offset, size) => told(c.read(node, handle, *offset, *size), Answer::Bytes),
        Act::Write(_, offset, data, flags, append) => {
            c.file_flags = if *append { O_RDWR | O_APPEND } else { O_RDWR };
            let written = c.write_with(node, handle, *offset, data, *flags);
            told(written, |count| Answer::Number(count.into()))
        }
        Act::Release(_) => told(c.release(node, handle), done),
        Act::Sync(_) => told(c.fsync(node, handle), done),
        Act::List(_, plus, size) => told(listed(c, node, *plus, *size), Answer::Names),
        Act::Space(_) => told(c.statfs(node), Answer::Space),
        Act::SetXattr(_, name, value, flags) => {
            told(c.setxattr(node, ATTRIBUTES[*name], value, *flags), done)
        }
        Act::GetXattr(_, name, size) => {
            told(c.getxattr(node, ATTRIBUTES[*name], *size), Answer::Bytes)
        }
        Act::ListXattr(_, size) => told(c.listxattr(node, *size), |list| {
            // Their order is the file system's.
            let mut names: Vec<&[u8]> = list.split_inclusive(|byte| *byte == 0).collect();
            if *size > 0 {
                names.sort_unstable();
            }
            Answer::Bytes(names.concat())
        }),
        Act::RemoveXattr(_, name) => told(c.removexattr(node, ATTRIBUTES[*name]), done),
        Act::Seek(_, offset, whence) => {
            told(c.lseek(node, handle, *offset, *whence), Answer::Number)
        }
        Act::Allocate(_, offset, len, mode) => {
            told(c.fallocate(node, handle, *offset, *len, *mode), done)
        }
        Act::Copy((_, from), (_, to), len) => {
            let copied = c.copy_file_range((node, handle, *from), (two.0, two.1, *to), *len);
            told(copied, |count| Answer::Number(count.into()))
        }
        Act::Access(_, mask) => told(c.access(node, *mask), done),
    };
    (answered, given)
}

fn change(c: &mut Client, node: u64, handle: Option<u64>, changes: &Changes) -> Answered {
    let mut valid = changes.valid;
    if handle.is_some() {
        valid |= set::FH;
    }
    let change = Change {
        valid,
        fh: handle.unwrap_or_default(),
        size: changes.size,
        mtime: changes.mtime,
        mode: changes.mode,
        uid: changes.owner,
        gid: changes.owner,
    };
    told(c.setattr(node, change), |attr| {
        let what = attributes(&attr);
        match valid & set::MTIME {
            0 => what,
            _ => Answer::Changed(Box::new(what), attr.mtime),
        }
    })
}

type Listed = Vec<(String, u32, Option<Answer>)>;

fn listed(c: &mut Client, node: u64, plus: bool, size: u32) -> Result<Listed, Wrong> {
    let names = c.list(node, plus, size)?;
    let mut all = Vec::new();
    for name in names {
        let found = name.entry.filter(|entry| entry.node != 0);
        if let Some(entry) = found {
            c.forget(entry.node, 1)?;
        }
        all.push((
            name.name,
            name.kind,
            found.map(|entry| attributes(&entry.attr)),
        ));
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}
