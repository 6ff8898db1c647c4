//! A directory: FUSE requests that are nearly right, and I/O that shows that all is well.

use std::fs;
use std::path::Path;

use super::chance::Chance;
use super::session::{Request, Victim};
use super::witness::Innocent;
use crate::fs::wire::{Answer, Body, Header, IN_HEADER, OUT_HEADER, ROOT, Who, feature, op, posix};
use crate::fs::{Client, init_body, release_body, transfer_body};

/// Names that lead somewhere, and such as should lead nowhere.
const NAMES: [&str; 18] = [
    "a",
    "b",
    "dir",
    "dir2",
    "link",
    "link-up",
    "new",
    "other",
    ".",
    "..",
    "/",
    "../secret",
    "a/b",
    "/etc/passwd",
    "a\0b",
    "",
    "..\0",
    "dir/../../secret",
];
/// Nodes and handles that are remembered.
const KNOWN: usize = 64;

/// The directory that is attacked.
#[derive(Debug, Default)]
pub(super) struct Directory {
    nodes: Vec<u64>,
    handles: Vec<u64>,
    unique: u64,
}

impl Directory {
    fn node(&self, chance: &mut Chance) -> u64 {
        match chance.below(12) {
            0 => chance.number(),
            1..=4 => ROOT,
            _ if self.nodes.is_empty() => ROOT,
            _ => chance.pick(&self.nodes),
        }
    }

    fn handle(&self, chance: &mut Chance) -> u64 {
        match chance.below(8) {
            0 => chance.number(),
            1 => chance.below(8),
            _ if self.handles.is_empty() => 0,
            _ => chance.pick(&self.handles),
        }
    }

    fn remember(list: &mut Vec<u64>, value: u64) {
        if list.len() >= KNOWN {
            list.remove(0);
        }
        list.push(value);
    }

    /// A number, the body and the room of a request of some kind.
    fn body(&self, chance: &mut Chance) -> (u32, Body, u32) {
        let offset = match chance.below(6) {
            0 => chance.number(),
            _ => chance.below(1 << 16),
        };
        let fh = self.handle(chance);
        let size = chance.pick(&[0, 1, 512, 4096, 0x7000, 1 << 20, u32::MAX]);
        let room = size.min(0x7000);
        let mode = match chance.one_in(4) {
            true => 0o644 | (chance.word() & 0o7777),
            false => 0o644,
        };
        let new = Body::new;
        match chance.below(40) {
            0..=3 => (op::LOOKUP, named(new(), chance), 128),
            4 => (op::FORGET, new().u64(chance.number()), 0),
            5 => {
                let count = chance.below(40);
                let claimed = if chance.one_in(3) {
                    chance.word()
                } else {
                    count as u32
                };
                let mut body = new().u32(claimed).u32(0);
                for _ in 0..count {
                    body = body.u64(self.node(chance)).u64(chance.number());
                }
                (op::BATCH_FORGET, body, 0)
            }
            6 => (
                op::GETATTR,
                new().u32(chance.below(3) as u32).u32(0).u64(fh),
                104,
            ),
            7 => {
                let valid = chance.word() & 0xfff;
                let body = new().u32(valid).u32(0).u64(fh).u64(offset).u64(0);
                let times = body.u64(chance.number()).u64(chance.number()).u64(0);
                let times = times.u32(chance.word()).u32(0).u32(0).u32(mode);
                let owner = times.u32(0).u32(chance.word() % 3).u32(chance.word() % 3);
                (op::SETATTR, owner.u32(0), 104)
            }
            8 => (op::READLINK, new(), 4096),
            9 => (op::SYMLINK, named(named(new(), chance), chance), 128),
            10 => {
                let kind = chance.pick(&[
                    posix::S_IFREG,
                    posix::S_IFIFO,
                    posix::S_IFCHR,
                    posix::S_IFLNK,
                    0,
                ]);
                let body = new().u32(kind | mode).u32(chance.word()).u32(0).u32(0);
                (op::MKNOD, named(body, chance), 128)
            }
            11 => (op::MKDIR, named(new().u32(mode).u32(0), chance), 128),
            12 => (op::UNLINK, named(new(), chance), 0),
            13 => (op::RMDIR, named(new(), chance), 0),
            14 => {
                let body = new()
                    .u64(self.node(chance))
                    .u32(chance.below(8) as u32)
                    .u32(0);
                (op::RENAME2, named(named(body, chance), chance), 0)
            }
            15 => (op::LINK, named(new().u64(self.node(chance)), chance), 128),
            16 | 17 => (op::OPEN, new().u32(flags(chance)).u32(0), 16),
            18 | 19 => {
                let body = transfer_body(fh, offset, size, 0);
                (op::READ, body, room)
            }
            20 | 21 => {
                let data = chance.bytes(room.min(4096) as usize);
                let claimed = match chance.one_in(4) {
                    true => size,
                    false => data.len() as u32,
                };
                let body = transfer_body(fh, offset, claimed, chance.below(8) as u32);
                (op::WRITE, body.bytes(&data), 8)
            }
            22 => (op::STATFS, new(), 80),
            23 => (op::RELEASE, release_body(fh), 0),
            24 => (
                op::FSYNC,
                new().u64(fh).u32(chance.below(3) as u32).u32(0),
                0,
            ),
            25 => {
                let len = chance.below(64) as usize;
                let value = chance.bytes(len);
                let claimed = match chance.one_in(4) {
                    true => chance.word(),
                    false => len as u32,
                };
                let body = new().u32(claimed).u32(chance.below(3) as u32);
                let name = chance.pick(&["user.a", "security.capability", "trusted.x", ""]);
                (op::SETXATTR, body.u64(0).name(name).bytes(&value), 0)
            }
            26 => (op::GETXATTR, named(new().u32(size).u32(0), chance), room),
            27 => (op::LISTXATTR, new().u32(size).u32(0), room),
            28 => (
                op::FLUSH,
                new().u64(fh).u32(0).u32(0).u64(chance.number()),
                0,
            ),
            29 => {
                let minor = chance.pick(&[0, 30, 41, u32::MAX]);
                let major = chance.pick(&[7, 7, 7, 6, 8, 0]);
                let features = feature::LINUX ^ (1 << chance.below(64));
                (op::INIT, init_body(major, minor, features), 64)
            }
            30 => (op::OPENDIR, new().u32(flags(chance)).u32(0), 16),
            31 => (op::READDIR, transfer_body(fh, offset, size, 0), room),
            32 => (op::READDIRPLUS, transfer_body(fh, offset, size, 0), room),
            33 => (op::RELEASEDIR, release_body(fh), 0),
            34 => {
                let lock = chance.pick(&[op::GETLK, op::SETLK, op::SETLKW]);
                let body = new()
                    .u64(fh)
                    .u64(chance.number())
                    .u64(offset)
                    .u64(chance.number());
                let body = body
                    .u32(chance.below(4) as u32)
                    .u32(1)
                    .u32(chance.below(2) as u32);
                (lock, body.u32(0), 24)
            }
            35 => {
                let body = new().u32(flags(chance)).u32(mode).u32(0).u32(0);
                (op::CREATE, named(body, chance), 144)
            }
            36 => (
                op::INTERRUPT,
                new().u64(self.unique.wrapping_sub(chance.below(9))),
                0,
            ),
            37 => {
                let what = chance.pick(&[0, 1, 2, 3, 16, 64]);
                let length = chance.number();
                (
                    op::FALLOCATE,
                    new().u64(fh).u64(offset).u64(length).u32(what).u32(0),
                    0,
                )
            }
            38 => {
                let to = (self.node(chance), self.handle(chance));
                let body = new().u64(fh).u64(offset).u64(to.0).u64(to.1);
                (
                    op::COPY_FILE_RANGE,
                    body.u64(chance.number()).u64(chance.number()).u64(0),
                    8,
                )
            }
            _ => {
                let number = chance.pick(&[op::LSEEK, op::DESTROY, op::TMPFILE, 0, 3, 52, 4096]);
                let len = chance.below(80) as usize;
                (number, new().bytes(&chance.bytes(len)), 128)
            }
        }
    }
}

/// A name, mostly a short one, behind what is there.
fn named(body: Body, chance: &mut Chance) -> Body {
    match chance.below(12) {
        0 => body.name(&"x".repeat(chance.pick(&[254, 255, 256, 4095]))),
        // Without an end.
        1 => body.bytes(b"unending"),
        2 => {
            let len = chance.below(12) as usize;
            body.bytes(&chance.bytes(len))
        }
        _ => body.name(chance.pick(&NAMES)),
    }
}

fn flags(chance: &mut Chance) -> u32 {
    match chance.below(4) {
        0 => chance.word(),
        1 => posix::O_RDWR | posix::O_CREAT | posix::O_TRUNC,
        2 => posix::O_RDWR | posix::O_APPEND,
        _ => posix::O_RDWR,
    }
}

impl Victim for Directory {
    fn queues(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        0
    }

    fn first(&mut self) -> Option<Request> {
        self.nodes.clear();
        self.handles.clear();
        self.unique = 2;
        let body = init_body(7, 41, feature::LINUX).0;
        let header = Header {
            len: (IN_HEADER + body.len()) as u32,
            opcode: op::INIT,
            unique: self.unique,
            node: 0,
            who: Who::ROOT,
        };
        Some(Request {
            queue: 1,
            readable: vec![header.bytes(), body],
            writable: vec![OUT_HEADER as u32, 64],
            what: op::INIT,
        })
    }

    fn request(&mut self, chance: &mut Chance) -> Request {
        let (opcode, body, room) = self.body(chance);
        let mut body = body.0;
        self.unique += 2;
        let mut header = Header {
            len: (IN_HEADER + body.len()) as u32,
            opcode,
            unique: self.unique,
            node: self.node(chance),
            who: Who::ROOT,
        };
        match chance.below(40) {
            0 => header.len = chance.word(),
            1 => header.opcode = chance.below(64) as u32,
            2 => header.unique -= 2,
            3 => header.node = chance.number(),
            4 => {
                header.who = Who {
                    uid: chance.word(),
                    gid: chance.word(),
                };
            }
            5 => body.truncate(chance.below(body.len() as u64 + 1) as usize),
            6 | 7 => chance.spoil(&mut body),
            8 => body.extend([0; 40]),
            _ => {}
        }
        let mut readable = vec![header.bytes(), body];
        if chance.one_in(40) {
            let kept = chance.below(IN_HEADER as u64) as usize;
            readable.truncate(1);
            readable[0].truncate(kept);
        }
        readable.retain(|piece| !piece.is_empty());
        let mut writable = vec![OUT_HEADER as u32, room];
        match chance.below(24) {
            0 => writable.clear(),
            1 => writable = vec![chance.below(16) as u32],
            2 => writable = vec![OUT_HEADER as u32],
            _ => {}
        }
        writable.retain(|len| *len > 0);
        Request {
            queue: usize::from(!chance.one_in(8)),
            readable,
            writable,
            what: opcode,
        }
    }

    fn answer(&mut self, what: u32, reply: &[u8]) {
        let answer = Answer::parse(reply.len() as u32, reply);
        if answer.error != 0 {
            return;
        }
        let first = |at: usize| {
            let field = answer.body.get(at..at + 8);
            field
                .and_then(|field| field.try_into().ok())
                .map(u64::from_le_bytes)
        };
        match what {
            op::LOOKUP | op::MKDIR | op::MKNOD | op::SYMLINK | op::LINK | op::CREATE => {
                if let Some(node) = first(0) {
                    Self::remember(&mut self.nodes, node);
                }
                if let (op::CREATE, Some(fh)) = (what, first(128)) {
                    Self::remember(&mut self.handles, fh);
                }
            }
            op::OPEN | op::OPENDIR => {
                if let Some(fh) = first(0) {
                    Self::remember(&mut self.handles, fh);
                }
            }
            _ => {}
        }
    }
}

/// Whoever has a directory of the same process.
pub(super) struct Neighbour {
    client: Client,
    /// What is in the files, and is for nobody else.
    content: Vec<u8>,
    round: u32,
}

impl Neighbour {
    /// Connects.
    pub(super) fn connect(socket: &Path, content: Vec<u8>) -> Result<Self, String> {
        let mut client = Client::connect(socket, &Client::setup()).map_err(|e| e.to_string())?;
        client.init().map_err(|e| e.to_string())?;
        Ok(Self {
            client,
            content,
            round: 0,
        })
    }

    fn files(&mut self) -> Result<bool, crate::fs::Wrong> {
        self.round += 1;
        let name = format!("file{}", self.round % 7);
        let client = &mut self.client;
        let (entry, fh) = client.create(ROOT, &name, 0o600, posix::O_RDWR)?;
        for part in 0..4 {
            let offset = part * self.content.len() as u64;
            client.write(entry.node, fh, offset, &self.content)?;
        }
        let len = self.content.len() as u32;
        let mut right = true;
        for part in (0..4).rev() {
            let read = client.read(entry.node, fh, part * u64::from(len), len)?;
            right &= read == self.content;
        }
        right &= client.getattr(entry.node)?.size == 4 * u64::from(len);
        right &= client.lookup(ROOT, &name)?.node == entry.node;
        client.release(entry.node, fh)?;
        client.unlink(ROOT, &name)?;
        client.forget(entry.node, 2)?;
        Ok(right)
    }
}

impl Innocent for Neighbour {
    fn turn(&mut self) -> Result<(), String> {
        match self.files() {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!(
                "round {}: what was read is something else",
                self.round
            )),
            Err(wrong) => Err(format!("round {}: {wrong}", self.round)),
        }
    }
}

/// Puts a directory in order on the host's side: what is in it is what a guest finds first.
pub(super) fn renew(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let kind = fs::symlink_metadata(&path)?.file_type();
        match kind.is_dir() {
            true => fs::remove_dir_all(&path)?,
            false => fs::remove_file(&path)?,
        }
    }
    fs::write(directory.join("a"), "some bytes")?;
    fs::write(directory.join("b"), vec![7; 100_000])?;
    fs::create_dir(directory.join("dir"))?;
    fs::write(directory.join("dir/a"), "in a directory")?;
    std::os::unix::fs::symlink("../secret", directory.join("link"))?;
    std::os::unix::fs::symlink("..", directory.join("link-up"))
}

/// One who comes in between finds what the host has put there.
pub(super) fn probe(socket: &Path, directory: &Path) -> Result<(), String> {
    renew(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    let look = || -> Result<bool, crate::fs::Wrong> {
        let mut client = Client::connect(socket, &Client::setup())?;
        client.init()?;
        let entry = client.lookup(ROOT, "b")?;
        let fh = client.open(entry.node, posix::O_RDONLY)?;
        let read = client.read(entry.node, fh, 0, 100_000)?;
        client.release(entry.node, fh)?;
        let entry = client.walk("dir/a")?;
        let fh = client.open(entry.node, posix::O_RDONLY)?;
        let inner = client.read(entry.node, fh, 0, 100)?;
        client.release(entry.node, fh)?;
        Ok(read == vec![7; 100_000] && inner == b"in a directory")
    };
    match look() {
        Ok(true) => Ok(()),
        Ok(false) => Err("what is read is not what is there".into()),
        Err(wrong) => Err(wrong.to_string()),
    }
}
