//! FUSE requests (linux/fuse.h, protocol 7) answered out of a [`Tree`].
//! The workers of `pericarp-vhost` call it.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use pericarp_ring::{Chain, ChainError};
use pericarp_vhost::{ConfigRefused, Device, Step};

use crate::tree::{Node, ROOT, Tree};

const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// How long guests may keep names and attributes: as `--cache auto`.
const VALID_S: u64 = 1;
/// FUSE_ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, DO_READDIRPLUS, ASYNC_DIO,
/// PARALLEL_DIROPS, MAX_PAGES, HANDLE_KILLPRIV_V2.
const WANTED: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 13 | 1 << 15 | 1 << 18 | 1 << 22 | 1 << 28;
const ZEROES: [u8; 4096] = [0; 4096];

/// The device.
#[derive(Debug)]
pub(crate) struct NullFs {
    tag: [u8; 36],
    tree: Mutex<Tree>,
}

/// What becomes of a request.
enum Answer {
    Body(Vec<u8>),
    /// So many bytes of zeroes.
    Zeroes(u64),
    Error(i32),
    /// FORGET and its like have none.
    Nothing,
}

impl NullFs {
    pub(crate) fn new(tag: &str, file: Option<(&str, u64)>) -> Self {
        let mut bytes = [0; 36];
        let length = tag.len().min(bytes.len());
        bytes[..length].copy_from_slice(&tag.as_bytes()[..length]);
        let mut tree = Tree::default();
        if let Some((name, size)) = file {
            let (node, _) = tree.make(ROOT, name.as_bytes(), libc::S_IFREG | 0o644);
            tree.grow(node, size);
        }
        Self {
            tag: bytes,
            tree: Mutex::new(tree),
        }
    }

    fn answer(&self, header: &[u8], chain: &mut Chain<'_>) -> Answer {
        let (code, node) = (u32_at(header, 4), u64_at(header, 16));
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        // WRITE: its data stays where it is.
        let length = match code {
            16 => 40,
            _ => chain.readable_len().min(8192),
        };
        let mut body = vec![0; length as usize];
        if !chain.read(&mut body) {
            return Answer::Error(libc::EINVAL);
        }
        // Short requests read as zeroes: nobody here sends any.
        body.resize(body.len().max(112), 0);
        match code {
            // FORGET, INTERRUPT, BATCH_FORGET.
            2 | 36 | 42 => Answer::Nothing,
            // LOOKUP.
            1 => match tree.find(node, name_at(&body, 0)) {
                Some(found) => Answer::Body(entry(found)),
                None => Answer::Error(libc::ENOENT),
            },
            // GETATTR, SETATTR.
            3 => attributes(node, tree.get(node)),
            4 => {
                let sized = u32_at(&body, 0) & 1 << 3 != 0;
                match sized {
                    true => attributes(node, tree.resize(node, u64_at(&body, 16))),
                    false => attributes(node, tree.get(node)),
                }
            }
            // MKDIR, CREATE.
            9 => {
                let mode = libc::S_IFDIR | u32_at(&body, 0) & 0o7777;
                Answer::Body(entry(tree.make(node, name_at(&body, 8), mode)))
            }
            35 => {
                let mode = libc::S_IFREG | u32_at(&body, 4) & 0o7777;
                let (made, found) = tree.make(node, name_at(&body, 16), mode);
                let mut reply = entry((made, found));
                reply.extend(opened(made));
                Answer::Body(reply)
            }
            // UNLINK, RMDIR.
            10 | 11 => match tree.remove(node, name_at(&body, 0)) {
                true => Answer::Body(Vec::new()),
                false => Answer::Error(libc::ENOENT),
            },
            // OPEN, OPENDIR: the node is the handle.
            14 | 27 => Answer::Body(opened(node)),
            // READ.
            15 => {
                let (offset, size) = (u64_at(&body, 8), u32_at(&body, 16));
                let end = tree.get(node).map_or(0, |found| found.size);
                Answer::Zeroes(end.saturating_sub(offset).min(u64::from(size)))
            }
            // WRITE.
            16 => {
                let (offset, size) = (u64_at(&body, 8), u32_at(&body, 16));
                tree.grow(node, offset.saturating_add(u64::from(size)));
                let mut reply = size.to_le_bytes().to_vec();
                reply.extend([0; 4]);
                Answer::Body(reply)
            }
            // STATFS.
            17 => Answer::Body(vec![0; 80]),
            // RELEASE, FSYNC, FLUSH, READDIR, RELEASEDIR, FSYNCDIR, ACCESS,
            // DESTROY, READDIRPLUS: done, and no directory is ever listed.
            18 | 20 | 25 | 28 | 29 | 30 | 34 | 38 | 44 => Answer::Body(Vec::new()),
            26 => Answer::Body(init(&body)),
            _ => Answer::Error(libc::ENOSYS),
        }
    }
}

/// `fuse_init_out`: version 7.31, transfers of up to 1 MiB.
fn init(body: &[u8]) -> Vec<u8> {
    let (readahead, flags) = (u32_at(body, 8), u32_at(body, 12));
    let mut reply = Vec::new();
    for word in [7, 31, readahead, flags & WANTED, u32::MAX, 1 << 20, 1, 256] {
        reply.extend(word.to_le_bytes());
    }
    reply.resize(64, 0);
    reply
}

/// `fuse_entry_out`.
fn entry((node, found): (u64, Node)) -> Vec<u8> {
    let mut reply = Vec::with_capacity(144);
    for word in [node, 0, VALID_S, VALID_S, 0] {
        reply.extend(word.to_le_bytes());
    }
    attribute(&mut reply, node, found);
    reply
}

/// `fuse_attr_out`.
fn attributes(node: u64, found: Option<Node>) -> Answer {
    let Some(found) = found else {
        return Answer::Error(libc::ENOENT);
    };
    let mut reply = Vec::with_capacity(104);
    for word in [VALID_S, 0] {
        reply.extend(word.to_le_bytes());
    }
    attribute(&mut reply, node, found);
    Answer::Body(reply)
}

/// `fuse_attr`.
fn attribute(reply: &mut Vec<u8>, node: u64, found: Node) {
    for word in [node, found.size, found.size.div_ceil(512), 0, 0, 0] {
        reply.extend(word.to_le_bytes());
    }
    for word in [0, 0, 0, found.mode, 1, 0, 0, 0, 4096, 0] {
        reply.extend(u32::to_le_bytes(word));
    }
}

/// `fuse_open_out`.
fn opened(node: u64) -> Vec<u8> {
    let mut reply = node.to_le_bytes().to_vec();
    reply.extend([0; 8]);
    reply
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u64_at(bytes, at) as u32
}

/// Eight bytes from here on, or as many as there are.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}

fn name_at(body: &[u8], at: usize) -> &[u8] {
    let rest = body.get(at..).unwrap_or_default();
    rest.split(|byte| *byte == 0).next().unwrap_or_default()
}

impl Device for NullFs {
    type Request = ();

    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        1024
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        config.extend(1u32.to_le_bytes());
        config
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), ConfigRefused> {
        let end = offset.saturating_add(bytes.len());
        Err(ConfigRefused { offset, end })
    }

    fn negotiated(&self, _features: u64) {}

    fn files(&self) -> &[OwnedFd] {
        &[]
    }

    fn start(&self, loaded: Result<(), ChainError>, mut chain: Chain<'_>, (): &mut ()) -> Step {
        let mut header = [0; IN_HEADER];
        if loaded.is_err() || !chain.read(&mut header) {
            return Step::Done { written: 0 };
        }
        let room = chain.take_front(OUT_HEADER as u64);
        let answer = self.answer(&header, &mut chain);
        let (error, bytes) = match answer {
            Answer::Nothing => return Step::Done { written: 0 },
            _ if !room => return Step::Done { written: 0 },
            Answer::Error(errno) => (-errno, 0),
            Answer::Body(body) => (0, chain.write(&body)),
            Answer::Zeroes(count) => {
                let mut left = count as usize;
                while left > 0 {
                    let written = chain.write(&ZEROES[..left.min(ZEROES.len())]);
                    if written == 0 {
                        break;
                    }
                    left -= written;
                }
                (0, count as usize - left)
            }
        };
        let len = (OUT_HEADER + bytes) as u32;
        let mut head = [0; OUT_HEADER];
        head[..4].copy_from_slice(&len.to_le_bytes());
        head[4..8].copy_from_slice(&error.to_le_bytes());
        head[8..].copy_from_slice(&header[8..16]);
        chain.write_front(&head);
        Step::Done { written: len }
    }

    fn resume(&self, _chain: Chain<'_>, (): &mut (), _result: i32) -> Step {
        Step::Done { written: 0 }
    }
}
