//! Bodies of FUSE requests (linux/fuse.h, protocol 7), from a script's picks:
//! mostly numbers and names that mean something, seldom anything at all.
//!
//! Written from the protocol, and from nothing in `pericarp-fs`.

use std::collections::BTreeMap;

use crate::script::Script;

/// The kinds a script names by their place in this table.
pub(super) const KINDS: [(u32, &str); 43] = [
    (1, "lookup"),
    (2, "forget"),
    (3, "getattr"),
    (4, "setattr"),
    (5, "readlink"),
    (6, "symlink"),
    (8, "mknod"),
    (9, "mkdir"),
    (10, "unlink"),
    (11, "rmdir"),
    (12, "rename"),
    (13, "link"),
    (14, "open"),
    (15, "read"),
    (16, "write"),
    (17, "statfs"),
    (18, "release"),
    (20, "fsync"),
    (21, "setxattr"),
    (22, "getxattr"),
    (23, "listxattr"),
    (24, "removexattr"),
    (25, "flush"),
    (27, "opendir"),
    (28, "readdir"),
    (29, "releasedir"),
    (30, "fsyncdir"),
    (31, "getlk"),
    (32, "setlk"),
    (34, "access"),
    (35, "create"),
    (36, "interrupt"),
    (39, "ioctl"),
    (42, "batch-forget"),
    (43, "fallocate"),
    (44, "readdirplus"),
    (45, "rename2"),
    (46, "lseek"),
    (47, "copy-file-range"),
    (48, "setupmapping"),
    (50, "syncfs"),
    (51, "tmpfile"),
    (52, "statx"),
];

/// Numbers of requests that the player and the judge know by name.
pub(super) mod code {
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const TMPFILE: u32 = 51;
}

/// The place of a kind in [`KINDS`].
pub(super) fn kind(name: &str) -> u8 {
    let place = KINDS.iter().position(|(_, known)| *known == name);
    place.expect("a kind of request") as u8
}

/// What a guest has been told of something open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opened {
    pub(super) directory: bool,
    /// Inode number.
    pub(super) ino: u64,
}

/// What a guest has been told: nodes with their types and inode numbers in the
/// order it learnt them, and what is open.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) nodes: Vec<u64>,
    pub(super) kinds: BTreeMap<u64, (u32, u64)>,
    pub(super) order: Vec<u64>,
    pub(super) open: BTreeMap<u64, Opened>,
    /// It may have been told what it could not read back.
    pub(super) blind: bool,
}

impl Known {
    fn pick(list: &[u64], place: u8, root: u64) -> u64 {
        match usize::from(place) % (list.len() + 1) {
            0 => root,
            place => list[place - 1],
        }
    }

    pub(super) fn node(&self, script: &mut Script<'_>) -> u64 {
        match script.u8() {
            0xff => script.u64(),
            special @ 0xe0..=0xfe => {
                let known = self.nodes.first().copied().unwrap_or(1);
                let far = [
                    0,
                    2,
                    u64::MAX,
                    known ^ 1 << 40,
                    known + 16,
                    1 << 63,
                    known ^ 1,
                ];
                far[usize::from(special) % far.len()]
            }
            place => Self::pick(&self.nodes, place, 1),
        }
    }

    /// The first is place 0.
    fn handle(&self, script: &mut Script<'_>) -> u64 {
        match script.u8() {
            0xff => script.u64(),
            special @ 0xe0..=0xfe => {
                let known = self.order.first().copied().unwrap_or(1);
                let far = [1, u64::MAX, known ^ 1 << 32, known + 1, 1 << 63];
                far[usize::from(special) % far.len()]
            }
            place => {
                let count = self.order.len().max(1);
                let at = usize::from(place) % count;
                self.order.get(at).copied().unwrap_or(0)
            }
        }
    }
}

fn offset(script: &mut Script<'_>) -> u64 {
    match script.u8() {
        0xff => script.u64(),
        special @ 0xc0..=0xfe => {
            let far = [
                1 << 63,
                u64::MAX,
                i64::MAX as u64,
                i64::MAX as u64 - 100,
                1 << 40,
                1 << 32,
                (1 << 63) + 4096,
            ];
            far[usize::from(special) % far.len()]
        }
        near => u64::from(near) * 29,
    }
}

fn size(script: &mut Script<'_>) -> u32 {
    match script.u8() {
        0xff => script.u32(),
        special @ 0xe0..=0xfe => {
            let far = [u32::MAX, 1 << 20, 1 << 31, (1 << 20) + 1, 65_537];
            far[usize::from(special) % far.len()]
        }
        near => u32::from(near) * 7,
    }
}

/// Names that are there in the beginning, then those that lead elsewhere or
/// are none.
const NAMES: [&[u8]; 24] = [
    b"file",
    b"dir",
    b"link",
    b"up",
    b"fifo",
    b"zero",
    b"..",
    b".",
    b"",
    b"dir/inner",
    b"inner",
    b"/",
    b"new",
    b"other",
    b"third",
    b"../secret",
    b"/etc/passwd",
    b"dir/../../secret",
    b"a\xff\xfe\x01",
    b"file/",
    b"...",
    b"sub",
    b"/proc/self/fd/0",
    b"passwd",
];

/// A name and its end, or seldom one without.
pub(super) fn name(script: &mut Script<'_>) -> Vec<u8> {
    let mut name = match script.u8() {
        0xff => {
            let len = script.u8();
            script.take(usize::from(len)).to_vec()
        }
        0xfe => return NAMES[usize::from(script.u8()) % NAMES.len()].to_vec(),
        0xfd => vec![b'n'; 255],
        0xfc => vec![b'n'; 256],
        0xfb => vec![b'n'; 400],
        numbered @ 0x80..=0xfa => format!("n{numbered}").into_bytes(),
        place => NAMES[usize::from(place) % NAMES.len()].to_vec(),
    };
    name.push(0);
    name
}

/// Names of attributes.
const ATTRIBUTES: [&[u8]; 10] = [
    b"user.x\0",
    b"user.y\0",
    b"security.capability\0",
    b"system.posix_acl_access\0",
    b"system.posix_acl_default\0",
    b"trusted.x\0",
    b"user.\0",
    b"\0",
    b"system.nfs4_acl\0",
    b"security.selinux\0",
];

fn attribute(script: &mut Script<'_>) -> Vec<u8> {
    match script.u8() {
        0xff => name(script),
        0xfe => [&b"user."[..], &[b'n'; 260], b"\0"].concat(),
        place => ATTRIBUTES[usize::from(place) % ATTRIBUTES.len()].to_vec(),
    }
}

/// An access control list of the kernel's own form, more or less.
fn list(script: &mut Script<'_>) -> Vec<u8> {
    let mut list = 2u32.to_le_bytes().to_vec();
    for tag in [1u16, 2, 4, 16, 32] {
        list.extend(tag.to_le_bytes());
        list.extend(u16::from(script.u8() % 8).to_le_bytes());
        let id = if tag == 2 { 1000 } else { u32::MAX };
        list.extend(id.to_le_bytes());
    }
    let cut = usize::from(script.u8() % 16 == 15) * 3;
    list.truncate(list.len() - cut);
    list
}

fn open_flags(script: &mut Script<'_>) -> u32 {
    const FLAGS: [u32; 16] = [
        0,
        1,
        2,
        3,
        0o1001,
        0o2002,
        0o2001,
        0o40000,
        0o10002,
        0o200_000,
        0o400_000,
        0o10_000_000,
        0o20_200_002,
        0o4_010_002,
        0o1002,
        0o202,
    ];
    match script.u8() {
        0xff => script.u32(),
        place => FLAGS[usize::from(place) % FLAGS.len()],
    }
}

fn mode(script: &mut Script<'_>) -> u32 {
    const MODES: [u32; 10] = [
        0o644,
        0o755,
        0o6755,
        0o2777,
        0o1777,
        0,
        0o100_644,
        0o177_777,
        0o040_755,
        u32::MAX,
    ];
    MODES[usize::from(script.u8()) % MODES.len()]
}

/// A body under construction.
struct Body(Vec<u8>);

impl Body {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }
}

/// The body of a request of this number.
pub(super) fn body(code: u32, known: &Known, s: &mut Script<'_>) -> Vec<u8> {
    let mut body = Body(Vec::new());
    let b = &mut body;
    match code {
        1 | 10 | 11 => b.bytes(&name(s)),
        2 => {
            let count = s.u8();
            b.u64(if count == 0xff {
                u64::MAX
            } else {
                count.into()
            })
        }
        3 => b.u32(u32::from(s.u8() & 1)).u32(0).u64(known.handle(s)),
        4 => {
            let valid = u32::from(s.u16());
            b.u32(valid)
                .u32(0)
                .u64(known.handle(s))
                .u64(offset(s))
                .u64(0);
            b.u64(offset(s)).u64(offset(s)).u64(0);
            b.u32(size(s)).u32(size(s)).u32(0).u32(mode(s)).u32(0);
            b.u32(u32::from(s.u8())).u32(u32::from(s.u8())).u32(0)
        }
        6 => b.bytes(&name(s)).bytes(&name(s)),
        8 => {
            let kinds = [
                0o100_000, 0o010_000, 0o140_000, 0o020_000, 0o060_000, 0o040_000, 0,
            ];
            let kind = kinds[usize::from(s.u8()) % kinds.len()];
            let rdev = u32::from(s.u16());
            b.u32(kind | mode(s) & 0o7777)
                .u32(rdev)
                .u32(0o22)
                .u32(0)
                .bytes(&name(s))
        }
        9 => b.u32(mode(s)).u32(0o22).bytes(&name(s)),
        12 => b.u64(known.node(s)).bytes(&name(s)).bytes(&name(s)),
        13 => b.u64(known.node(s)).bytes(&name(s)),
        14 | 27 => b.u32(open_flags(s)).u32(u32::from(s.u8() & 1)),
        15 | 28 | 44 => {
            let (handle, at, size) = (known.handle(s), offset(s), size(s));
            b.u64(handle).u64(at).u32(size).u32(0).u64(0).u64(0)
        }
        16 => {
            let (handle, at, len) = (known.handle(s), offset(s), size(s));
            let flags = u32::from(s.u8() & 7);
            b.u64(handle).u64(at).u32(len).u32(flags).u64(0).u64(0);
            b.bytes(&vec![s.u8(); (len as usize).min(300)])
        }
        18 | 29 => b.u64(known.handle(s)).u64(0).u64(0),
        20 | 30 => b.u64(known.handle(s)).u32(u32::from(s.u8() & 1)).u32(0),
        21 => {
            let attribute = attribute(s);
            let value = if attribute.starts_with(b"system.posix") {
                list(s)
            } else {
                let len = usize::from(s.u8());
                s.take(len).to_vec()
            };
            let lie = u32::from(s.u8() % 8 == 7) * 1000;
            b.u32(value.len() as u32 + lie).u32(u32::from(s.u8() % 4));
            if s.u8() & 1 == 0 {
                b.u64(0);
            }
            b.bytes(&attribute).bytes(&value)
        }
        22 => b.u32(size(s)).u32(0).bytes(&attribute(s)),
        23 => b.u32(size(s)).u32(0),
        24 => b.bytes(&attribute(s)),
        25 => b.u64(known.handle(s)).u64(0).u64(0),
        34 => b.u32(u32::from(s.u8())).u32(0),
        35 => {
            b.u32(open_flags(s))
                .u32(mode(s))
                .u32(0o22)
                .u32(u32::from(s.u8() & 1));
            b.bytes(&name(s))
        }
        36 => b.u64(s.u8().into()),
        42 => {
            let count = s.u8();
            b.u32(if count == 0xff {
                u32::MAX
            } else {
                count.into()
            })
            .u32(0);
            for _ in 0..count % 20 {
                b.u64(known.node(s)).u64(s.u8().into());
            }
            b
        }
        43 => {
            let (handle, at, len) = (known.handle(s), offset(s), offset(s));
            b.u64(handle)
                .u64(at)
                .u64(len)
                .u32(u32::from(s.u8() % 32))
                .u32(0)
        }
        45 => {
            b.u64(known.node(s)).u32(u32::from(s.u8() % 10)).u32(0);
            b.bytes(&name(s)).bytes(&name(s))
        }
        46 => b
            .u64(known.handle(s))
            .u64(offset(s))
            .u32(u32::from(s.u8() % 8))
            .u32(0),
        47 => {
            b.u64(known.handle(s)).u64(offset(s)).u64(known.node(s));
            b.u64(known.handle(s)).u64(offset(s)).u64(offset(s));
            b.u64(u64::from(s.u8() == 0xff))
        }
        50 => b.u64(0),
        51 => b
            .u32(open_flags(s))
            .u32(mode(s))
            .u32(0)
            .u32(0)
            .bytes(b"/\0"),
        5 | 17 | 38 => b,
        _ => {
            let len = usize::from(s.u8());
            let rest = s.take(len).to_vec();
            b.bytes(&rest)
        }
    };
    body.0
}

/// The body of INIT.
pub(super) fn init(major: u32, minor: u32, features: u64) -> Vec<u8> {
    let mut body = Body(Vec::new());
    body.u32(major).u32(minor).u32(1 << 17);
    body.u32(features as u32)
        .u32((features >> 32) as u32)
        .bytes(&[0; 44]);
    body.0
}
