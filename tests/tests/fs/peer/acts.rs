//! What a log is made of: one request each, of nodes and open files by their
//! place in what both servers have given out.

use pericarp_tests::fs::wire::posix::{
    KEEP_SIZE, O_APPEND, O_EXCL, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY, PUNCH_HOLE, S_IFCHR, S_IFIFO,
    S_IFREG, SEEK_DATA, SEEK_HOLE,
};
use pericarp_tests::fs::wire::set;
use proptest::prelude::*;

pub(super) const NAMES: [&str; 6] = ["a", "b", "c", "d", "a long name with spaces", "\u{e4}"];
pub(super) const ATTRIBUTES: [&str; 4] = ["user.a", "user.b", "trusted.c", "user."];

/// A node, or something open, by its place; more than there are begin anew.
pub(super) type Place = usize;
pub(super) type Name = usize;

#[derive(Debug, Clone)]
pub(super) enum Act {
    /// Who asks from now on.
    Who(bool),
    Lookup(Place, Name),
    Forget(Place),
    Attributes(Place),
    AttributesOpen(Place),
    Change(Place, Changes),
    ChangeOpen(Place, Changes),
    ReadLink(Place),
    MakeDir(Place, Name, u32),
    MakeNode(Place, Name, u32, u32),
    Symlink(Place, Name, Name),
    Link(Place, Place, Name),
    Unlink(Place, Name),
    RemoveDir(Place, Name),
    Rename((Place, Name), (Place, Name), u32),
    Create(Place, Name, u32, u32),
    Open(Place, u32),
    Read(Place, u64, u32),
    Write(Place, u64, Vec<u8>, u32, bool),
    Release(Place),
    Sync(Place),
    List(Place, bool, u32),
    Space(Place),
    SetXattr(Place, usize, Vec<u8>, u32),
    GetXattr(Place, usize, u32),
    ListXattr(Place, u32),
    RemoveXattr(Place, usize),
    Seek(Place, u64, u32),
    Allocate(Place, u64, u64, u32),
    Copy((Place, u64), (Place, u64), u64),
    Access(Place, u32),
}

impl Act {
    pub(super) fn is_of_something_open(&self) -> bool {
        matches!(
            self,
            Act::AttributesOpen(_)
                | Act::ChangeOpen(..)
                | Act::Read(..)
                | Act::Write(..)
                | Act::Release(_)
                | Act::Sync(_)
                | Act::Seek(..)
                | Act::Allocate(..)
                | Act::Copy(..)
        )
    }
}

/// What SETATTR is to change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changes {
    pub(super) valid: u32,
    pub(super) mode: u32,
    pub(super) size: u64,
    pub(super) owner: u32,
    pub(super) mtime: u64,
}

fn place() -> impl Strategy<Value = Place> {
    // The first is the directory that all begins in.
    prop_oneof![1 => Just(0), 2 => 0usize..64]
}

fn name() -> impl Strategy<Value = Name> {
    0..NAMES.len()
}

fn mode() -> impl Strategy<Value = u32> {
    let some = vec![
        0o755, 0o644, 0o600, 0o777, 0o6755, 0o2755, 0o1777, 0o2744, 0,
    ];
    proptest::sample::select(some)
}

fn flags() -> impl Strategy<Value = u32> {
    let some = vec![
        O_RDONLY,
        O_WRONLY,
        O_RDWR,
        O_RDWR,
        O_WRONLY | O_TRUNC,
        O_RDONLY | O_TRUNC,
        O_WRONLY | O_APPEND,
        O_RDWR | O_APPEND,
    ];
    proptest::sample::select(some)
}

fn changes() -> impl Strategy<Value = Changes> {
    let valid = vec![
        set::MODE,
        set::UID,
        set::GID,
        set::UID | set::GID,
        set::SIZE,
        set::MTIME,
        set::SIZE | set::MTIME,
        set::MODE | set::MTIME,
        0,
    ];
    let valid = proptest::sample::select(valid);
    let size = prop_oneof![3 => 0u64..20_000, 1 => Just(1 << 33), 1 => Just(u64::MAX)];
    let owner = proptest::sample::select(vec![0u32, 1000, 1001]);
    (valid, mode(), size, owner, 1u64..2_000_000_000).prop_map(
        |(valid, mode, size, owner, mtime)| Changes {
            valid,
            mode,
            size,
            owner,
            mtime,
        },
    )
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0u64..20_000, 1 => Just(1 << 32), 1 => Just(0)]
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let short = proptest::collection::vec(any::<u8>(), 0..60);
    let long = (any::<u8>(), 0usize..3000).prop_map(|(byte, len)| vec![byte; len]);
    prop_oneof![short, long]
}

/// Any act that both servers can be asked for.
pub(super) fn act() -> impl Strategy<Value = Act> {
    prop_oneof![names(), files(), attributes()]
}

fn names() -> impl Strategy<Value = Act> {
    let kinds = proptest::sample::select(vec![
        S_IFREG | 0o644,
        S_IFREG | 0o6755,
        S_IFIFO | 0o600,
        S_IFCHR | 0o600,
        0o140_000 | 0o666,
        0o060_000 | 0o600,
        0o600,
        0o040_755,
    ]);
    let rename = proptest::sample::select(vec![0u32, 0, 0, 1, 2, 2, 3, 4, 5]);
    prop_oneof![
        6 => (place(), name()).prop_map(|(p, n)| Act::Lookup(p, n)),
        1 => place().prop_map(Act::Forget),
        1 => any::<bool>().prop_map(Act::Who),
        6 => (place(), name(), mode()).prop_map(|(p, n, m)| Act::MakeDir(p, n, m)),
        3 => (place(), name(), kinds, 0u32..70_000).prop_map(|(p, n, m, r)| Act::MakeNode(p, n, m, r)),
        2 => (place(), name(), name()).prop_map(|(p, n, t)| Act::Symlink(p, n, t)),
        1 => place().prop_map(Act::ReadLink),
        3 => (place(), place(), name()).prop_map(|(p, q, n)| Act::Link(p, q, n)),
        3 => (place(), name()).prop_map(|(p, n)| Act::Unlink(p, n)),
        2 => (place(), name()).prop_map(|(p, n)| Act::RemoveDir(p, n)),
        5 => (place(), name(), place(), name(), rename)
            .prop_map(|(p, n, q, m, f)| Act::Rename((p, n), (q, m), f)),
        3 => (place(), any::<bool>(), proptest::sample::select(vec![200u32, 400, 4096]))
            .prop_map(|(p, plus, size)| Act::List(p, plus, size)),
    ]
}

fn files() -> impl Strategy<Value = Act> {
    let new = prop_oneof![4 => flags(), 1 => flags().prop_map(|flags| flags | O_EXCL)];
    // Linux's driver asks for no others; the peer moves what is behind a range, too.
    let modes = vec![
        0,
        0,
        KEEP_SIZE,
        KEEP_SIZE | PUNCH_HOLE,
        0x10,
        0x11,
        PUNCH_HOLE,
    ];
    let whence = proptest::sample::select(vec![SEEK_DATA, SEEK_HOLE]);
    let length = prop_oneof![1u64..30_000, Just(0)];
    prop_oneof![
        5 => (place(), name(), new, mode()).prop_map(|(p, n, f, m)| Act::Create(p, n, f, m)),
        3 => (place(), flags()).prop_map(|(p, f)| Act::Open(p, f)),
        3 => (place(), offset(), 0u32..6000).prop_map(|(p, o, s)| Act::Read(p, o, s)),
        4 => (place(), offset(), bytes(), 0u32..2, any::<bool>())
            .prop_map(|(p, o, d, f, a)| Act::Write(p, o, d, f, a)),
        1 => place().prop_map(Act::Release),
        1 => place().prop_map(Act::Sync),
        2 => (place(), offset(), whence).prop_map(|(p, o, w)| Act::Seek(p, o, w)),
        2 => (place(), offset(), length, proptest::sample::select(modes))
            .prop_map(|(p, o, l, m)| Act::Allocate(p, o, l, m)),
        2 => (place(), offset(), place(), offset(), 0u64..9000)
            .prop_map(|(p, o, q, t, l)| Act::Copy((p, o), (q, t), l)),
    ]
}

fn attributes() -> impl Strategy<Value = Act> {
    let value = proptest::collection::vec(any::<u8>(), 0..50);
    let room = || proptest::sample::select(vec![0u32, 1, 20, 4096]);
    let which = || 0..ATTRIBUTES.len();
    prop_oneof![
        3 => place().prop_map(Act::Attributes),
        1 => place().prop_map(Act::AttributesOpen),
        5 => (place(), changes()).prop_map(|(p, c)| Act::Change(p, c)),
        2 => (place(), changes()).prop_map(|(p, c)| Act::ChangeOpen(p, c)),
        1 => place().prop_map(Act::Space),
        2 => (place(), which(), value, 0u32..4).prop_map(|(p, a, v, f)| Act::SetXattr(p, a, v, f)),
        2 => (place(), which(), room()).prop_map(|(p, a, s)| Act::GetXattr(p, a, s)),
        1 => (place(), room()).prop_map(|(p, s)| Act::ListXattr(p, s)),
        1 => (place(), which()).prop_map(|(p, a)| Act::RemoveXattr(p, a)),
        1 => (place(), 0u32..8).prop_map(|(p, m)| Act::Access(p, m)),
    ]
}
