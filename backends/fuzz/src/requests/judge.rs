//! What a request must lead to, and what a reply must be.

use pericarp_share::NodeId;
use pericarp_vhost::Step;

use super::bodies::{Known, Opened, code};
use super::rig::{Rig, SECRET};
use crate::chain::Named;
use crate::memory::Memory;

const IN_HEADER: usize = 40;
const OUT_HEADER: u32 = 16;
const ENTRY: usize = 128;

/// The first words of a request as it was when it was popped.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Header {
    pub(super) len: u64,
    pub(super) code: u32,
    unique: u64,
    pub(super) node: u64,
    /// The first words of the body: of many the handle, an offset and a size.
    pub(super) words: [u64; 3],
}

impl Header {
    pub(super) fn read(named: &Named, memory: &Memory) -> Option<Self> {
        let bytes = named.read(memory, IN_HEADER)?;
        let mut header = Self {
            len: little(&bytes[..4]),
            code: little(&bytes[4..8]) as u32,
            unique: little(&bytes[8..16]),
            node: little(&bytes[16..24]),
            words: [0; 3],
        };
        for (n, word) in header.words.iter_mut().enumerate() {
            let end = IN_HEADER + 8 * (n + 1);
            let bytes = named.read(memory, end).unwrap_or_default();
            *word = bytes.get(end - 8..).map_or(0, little);
        }
        Some(header)
    }

    /// Its length is the truth, and not more than a body can have.
    pub(super) fn is_whole(&self, named: &Named) -> bool {
        let body = self.len.checked_sub(IN_HEADER as u64);
        let most = 72 * 1024;
        self.len <= Named::bytes(&named.readable) && body.is_some_and(|body| body <= most)
    }
}

/// One request in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) named: Named,
    /// There is one.
    pub(super) header: Option<Header>,
    /// The guest was mounted when it came.
    pub(super) mounted: bool,
    pub(super) step: Step,
    /// Nobody else was in flight, and the guest left its memory alone.
    pub(super) alone: bool,
    /// Nobody else writes where its reply is.
    pub(super) own: bool,
    /// Device and inode number of the file that its step is about.
    pub(super) file: Option<(u64, u64)>,
    /// Bytes of memory that were written meanwhile, if alone.
    pub(super) touched: Vec<u64>,
}

impl Flight {
    /// A request that is over: what it says, and what the guest learns.
    pub(super) fn judge(&self, rig: &Rig, read_only: bool, written: u32, known: &mut Known) {
        let room = Named::bytes(&self.named.writable);
        if !self.named.sound {
            assert_eq!(written, 0, "a chain that is none: {self:?}");
            return;
        }
        assert!(
            u64::from(written) <= room,
            "{written} bytes in {room}: {self:?}"
        );
        if self.alone && self.named.is_disjoint() {
            let mut left = u64::from(written);
            let mut allowed = Vec::new();
            for (at, len) in &self.named.writable {
                allowed.push((*at, (*len).min(left)));
                left -= (*len).min(left);
            }
            let stray = |at: &u64| {
                !allowed
                    .iter()
                    .any(|(start, len)| at >= start && at - start < *len)
            };
            let stray = self.touched.iter().find(|at| stray(at));
            assert!(
                stray.is_none(),
                "{stray:x?} is beyond {written} bytes: {self:?}"
            );
        }
        let Some(header) = self.header else {
            assert_eq!(written, 0, "no header: {self:?}");
            return;
        };
        if matches!(
            header.code,
            code::FORGET | code::BATCH_FORGET | code::INTERRUPT
        ) || room < u64::from(OUT_HEADER)
        {
            assert_eq!(written, 0, "no reply is due: {self:?}");
            return;
        }
        // Where a byte is named twice the reply lies over itself, and where the
        // guest or another request writes it may be gone.
        if !self.own || !self.named.is_disjoint() {
            known.blind |= written > OUT_HEADER;
            return;
        }
        let reply = self.named.written(&rig.memory, written as usize);
        let reply = reply.expect("the reply is in memory");
        assert!(written >= OUT_HEADER, "no reply: {self:?}");
        assert_eq!(
            little(&reply[..4]),
            u64::from(written),
            "its length: {self:?}"
        );
        assert_eq!(little(&reply[8..16]), header.unique, "its number: {self:?}");
        let error = little(&reply[4..8]) as u32 as i32;
        assert!((-133..=0).contains(&error), "errno {error}: {self:?}");
        let body = &reply[OUT_HEADER as usize..];
        assert!(
            error == 0 || body.is_empty(),
            "error {error} with a body: {self:?}"
        );
        let all = Named::bytes(&self.named.readable);
        if header.len < IN_HEADER as u64 || header.len > all {
            assert_eq!(error, -libc::EINVAL, "its length is a lie: {self:?}");
        } else if !self.mounted && !matches!(header.code, code::INIT | code::DESTROY) {
            assert_eq!(error, -libc::ENOTCONN, "not mounted: {self:?}");
        }
        if error == 0 {
            self.judge_body(rig, read_only, &header, body, known);
        }
    }

    fn judge_body(
        &self,
        rig: &Rig,
        read_only: bool,
        header: &Header,
        body: &[u8],
        known: &mut Known,
    ) {
        assert!(
            !body.windows(SECRET.len()).any(|window| window == SECRET),
            "from outside of the directory: {self:?}"
        );
        let right = match header.code {
            1 | 6 | 8 | 9 | 13 => body.len() == ENTRY,
            3 | 4 => body.len() == 104,
            code::OPEN | code::OPENDIR => body.len() == 16,
            16 => body.len() == 8,
            17 => body.len() == 80,
            code::CREATE | code::TMPFILE => body.len() == ENTRY + 16,
            46 | 47 => body.len() == 8,
            code::INIT => body.len() == 64,
            // As much as was asked for, or how much there is.
            22 | 23 => {
                let size = (header.words[0] & 0xffff_ffff) as usize;
                body.len() <= size || (size == 0 && body.len() == 8)
            }
            code::READ => body.len() as u64 <= header.words[2] & 0xffff_ffff,
            5 | code::READDIR | code::READDIRPLUS => true,
            _ => body.is_empty(),
        };
        assert!(right, "{} bytes of body: {self:?}", body.len());
        let changes = matches!(
            header.code,
            4 | 6 | 8..=13 | 16 | 21 | 24 | 43 | 45 | 47 | code::TMPFILE
        );
        assert!(
            !(read_only && changes),
            "a change to a read-only directory: {self:?}"
        );
        match header.code {
            // A name that is not there, for as long as it says.
            1 if little(&body[..8]) == 0 => {}
            1 | 6 | 8 | 9 | 13 => self.learn(rig, body, known),
            code::CREATE | code::TMPFILE => {
                self.learn(rig, body, known);
                let node = little(&body[..8]);
                known.opened(little(&body[ENTRY..ENTRY + 8]), node, false);
            }
            code::OPEN => known.opened(little(&body[..8]), header.node, false),
            code::OPENDIR => known.opened(little(&body[..8]), header.node, true),
            code::RELEASE | code::RELEASEDIR => {
                known.open.remove(&header.words[0]);
                known.order.retain(|handle| *handle != header.words[0]);
            }
            3 | 4 => self.attributes(rig, &body[16..]),
            code::READDIR => self.listing(rig, body, 0, known),
            code::READDIRPLUS => self.listing(rig, body, ENTRY, known),
            _ => {}
        }
    }

    /// `struct fuse_attr`.
    fn attributes(&self, rig: &Rig, attr: &[u8]) {
        let ino = little(&attr[..8]);
        assert!(
            !rig.hidden.contains(&ino),
            "inode {ino} is outside: {self:?}"
        );
    }

    /// `struct fuse_entry_out`.
    fn learn(&self, rig: &Rig, entry: &[u8], known: &mut Known) {
        let node = little(&entry[..8]);
        self.attributes(rig, &entry[40..]);
        let (ino, mode) = (little(&entry[40..48]), little(&entry[100..104]));
        let kind = mode as u32 & libc::S_IFMT;
        if node == NodeId::ROOT.0 {
            return;
        }
        let first = known.kinds.insert(node, (kind, ino)).is_none();
        if first {
            known.nodes.push(node);
        }
    }

    /// Records of a listing, each with `fixed` bytes before it.
    fn listing(&self, rig: &Rig, mut body: &[u8], fixed: usize, known: &mut Known) {
        while !body.is_empty() {
            let record = body.get(fixed..fixed + 24).expect("a whole record");
            let (ino, len) = (little(&record[..8]), little(&record[16..20]) as usize);
            let name = body
                .get(fixed + 24..fixed + 24 + len)
                .expect("a whole name");
            assert!(
                !name.is_empty()
                    && name.len() <= 255
                    && !name.contains(&b'/')
                    && !name.contains(&0),
                "name {name:?}: {self:?}"
            );
            assert!(!rig.hidden.contains(&ino), "{name:?} is outside: {self:?}");
            if fixed > 0 && little(&body[..8]) != 0 {
                assert!(
                    name != b"." && name != b"..",
                    "{name:?} is a node: {self:?}"
                );
                self.learn(rig, body, known);
            }
            let whole = (fixed + 24 + len).next_multiple_of(8);
            body = body.get(whole..).expect("records are padded");
        }
    }
}

impl Known {
    fn opened(&mut self, handle: u64, node: u64, directory: bool) {
        let (kind, ino) = self.kinds.get(&node).copied().unwrap_or_default();
        let wanted = if directory {
            libc::S_IFDIR
        } else {
            libc::S_IFREG
        };
        let root = node == NodeId::ROOT.0;
        assert!(
            self.blind || kind == wanted || (root && directory),
            "node {node:#x} of type {kind:o} was opened"
        );
        let before = self.open.insert(handle, Opened { directory, ino });
        assert!(self.blind || before.is_none(), "handle {handle:#x} twice");
        self.order.push(handle);
    }

    /// The file of a handle that a step is to be made for.
    pub(super) fn check(&self, handle: u64, ino: u64) {
        if self.blind {
            return;
        }
        let open = self.open.get(&handle);
        let known = open.unwrap_or_else(|| panic!("handle {handle:#x} is not open"));
        assert!(
            known.ino == ino || (known.directory && known.ino == 0),
            "handle {handle:#x} is inode {known:?}, not {ino}"
        );
    }

    /// The mount is gone.
    pub(super) fn forget_all(&mut self) {
        *self = Self {
            nodes: std::mem::take(&mut self.nodes),
            ..Self::default()
        };
    }
}

fn little(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
}
