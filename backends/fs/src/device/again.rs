//! Requests of a killed predecessor, done again: what is written down of each
//! before it is done and after, and what that says about one that comes again.
//!
//! READ, WRITE, SYNC, SETATTR and all that only looks are simply done again. A
//! change of names is written down first, with the file it is about, so that a
//! name which is there, or gone, by our own doing is no error; what was answered
//! is answered again. A FORGET is counted before it is done, so that a kill can
//! have a node remembered too long and never too short.

use std::ffi::CStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pericarp_ring::Chain;
use pericarp_share::{
    Caller, Errno, Glimpse, Handle, Intent, NodeId, OpenFile, Phase, Slot, Xattr,
};
use rustix::fs::{FileType, RenameFlags, fstat};

use super::{FsDevice, Request};
use crate::wire::{ENTRY, Fields, Header, Reply, SETXATTR_EXTENDED, feature, names, opcode};

/// Times of files are those of the last tick of the clock.
const TICK: Duration = Duration::from_millis(20);

/// Where a request is on record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Recorded {
    queue: u16,
    head: u16,
    /// A predecessor has begun it.
    again: bool,
}

impl Recorded {
    pub(super) fn new(queue: u16, head: u16, again: bool) -> Self {
        Self { queue, head, again }
    }
}

/// What a call is about, as it came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) header: &'a Header,
    pub(super) caller: &'a Caller,
    pub(super) fields: Fields<'a>,
}

/// Whether a call changes names, or anything that the guest counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    /// It can be done any number of times.
    None,
    /// What it was answered with.
    Answer,
    /// That it is about to be done, too.
    Change,
}

fn weight(code: u32) -> Weight {
    match code {
        opcode::LOOKUP | opcode::OPEN | opcode::OPENDIR | opcode::RELEASE | opcode::RELEASEDIR => {
            Weight::Answer
        }
        opcode::MKNOD
        | opcode::MKDIR
        | opcode::SYMLINK
        | opcode::LINK
        | opcode::CREATE
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::SETXATTR
        | opcode::REMOVEXATTR => Weight::Change,
        _ => Weight::None,
    }
}

/// FNV-1a over what a request says, eight bytes at a time.
fn digest(header: &Header, body: &[u8]) -> u64 {
    let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(23);
    let begin = step(0xcbf2_9ce4_8422_2325, header.node);
    body.chunks(8).fold(begin, |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        step(hash, u64::from_le_bytes(word))
    })
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.saturating_sub(TICK).as_nanos() as u64)
}

impl FsDevice {
    /// Makes a call whose place is on record: as if it were the first time, or
    /// as what a predecessor has left of it says.
    pub(super) fn call_recorded(
        &self,
        recorded: Option<Recorded>,
        asked: Asked<'_>,
        room: usize,
    ) -> Result<Reply, Errno> {
        let (header, weight) = (asked.header, weight(asked.header.opcode));
        let slot = recorded
            .filter(|_| weight != Weight::None)
            .and_then(|at| Some((at.again, self.share.state()?.slot(at.queue, at.head)?)));
        let Some((again, slot)) = slot else {
            return self.act(asked, room);
        };
        let mut intent = Intent {
            unique: header.unique,
            opcode: header.opcode,
            digest: digest(header, asked.fields.0),
            ..Intent::default()
        };
        let before = again.then(|| slot.read(header.unique, header.opcode));
        let before = before.flatten().filter(|b| b.digest == intent.digest);
        let answer = match before.map(|before| (before.phase, before)) {
            Some((Phase::Done, done)) => match self.told(&done, asked) {
                Some(answer) => return answer,
                None => self.act(asked, room),
            },
            Some((Phase::Begun, begun)) => self.act_again(&begun, asked, room),
            _ => {
                if weight == Weight::Change {
                    // What cannot be looked at fails when it is done.
                    let _ = self.describe(&mut intent, asked);
                    slot.begin(&intent);
                }
                match self.act(asked, room) {
                    // A predecessor has closed it.
                    Err(Errno::BADF) if again && releases(header.opcode) => Ok(Reply::default()),
                    answer => answer,
                }
            }
        };
        note(&slot, intent, &answer);
        answer
    }

    /// Fills in the files that a change is about, and when.
    fn describe(&self, intent: &mut Intent, asked: Asked<'_>) -> Result<(), Errno> {
        let (parent, mut fields) = (NodeId(asked.header.node), asked.fields);
        intent.time = now();
        match intent.opcode {
            opcode::UNLINK | opcode::RMDIR => {
                intent.subject = self.share.glimpse(parent, fields.name()?)?.identity;
            }
            opcode::LINK => {
                let node = NodeId(fields.u64()?);
                intent.subject = self.share.glimpse_node(node)?.identity;
            }
            opcode::RENAME | opcode::RENAME2 => {
                let (to, flags, name, new_name) = renaming(intent.opcode, &mut fields)?;
                intent.subject = self.share.glimpse(parent, name)?.identity;
                if flags & RenameFlags::EXCHANGE.bits() != 0 {
                    intent.other = self.share.glimpse(to, new_name)?.identity;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What a request was answered with, if that can be said again.
    fn told(&self, done: &Intent, asked: Asked<'_>) -> Option<Result<Reply, Errno>> {
        if done.errno != 0 {
            return Some(Err(Errno::from_raw_os_error(done.errno)));
        }
        let (node, handle) = (NodeId(done.node), Handle(done.handle));
        let entry = || {
            let entry = self.share.entry_again(NodeId(asked.header.node), node)?;
            Ok(self.entry(&entry))
        };
        match done.opcode {
            // There was no such name.
            opcode::LOOKUP if done.node == 0 => None,
            opcode::LOOKUP | opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => {
                Some(entry())
            }
            // What could not be opened again is opened as if it were new.
            opcode::CREATE => match self.share.file(handle) {
                Ok(file) => Some(entry().map(|reply| self.opened(reply, handle, &file))),
                Err(_) => Some(self.created(asked)),
            },
            opcode::OPEN => {
                let file = self.share.file(handle).ok()?;
                Some(Ok(self.opened(Reply::default(), handle, &file)))
            }
            opcode::OPENDIR if !self.share.is_open(handle) => None,
            opcode::OPENDIR => Some(Ok(self.opened_dir(handle))),
            _ => Some(Ok(Reply::default())),
        }
    }

    /// A change that was begun and may have been done.
    fn act_again(&self, begun: &Intent, asked: Asked<'_>, room: usize) -> Result<Reply, Errno> {
        let (parent, mut fields) = (NodeId(asked.header.node), asked.fields);
        let gone = (0, 0);
        match begun.opcode {
            opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::CREATE | opcode::LINK => {
                let (name, kind) = making(begun.opcode, &mut fields)?;
                let made = self.share.glimpse(parent, name);
                if !made.is_ok_and(|made| is_ours(&made, begun, kind)) {
                    return self.act(asked, room);
                }
                if begun.opcode == opcode::CREATE {
                    return self.created(asked);
                }
                let entry = self.share.lookup(parent, name)?;
                Ok(self.entry(&entry))
            }
            opcode::UNLINK | opcode::RMDIR if begun.subject != gone => {
                match self.share.glimpse(parent, fields.name()?) {
                    Ok(there) if there.identity == begun.subject => self.act(asked, room),
                    // Gone by us, or another's by now.
                    Ok(_) | Err(Errno::NOENT) => Ok(Reply::default()),
                    Err(errno) => Err(errno),
                }
            }
            opcode::RENAME | opcode::RENAME2 if begun.subject != gone => {
                let (to, flags, name, new_name) = renaming(begun.opcode, &mut fields)?;
                let there = self.share.glimpse(to, new_name);
                let here = self.share.glimpse(parent, name);
                let arrived = there.is_ok_and(|there| there.identity == begun.subject);
                let left = match flags & RenameFlags::EXCHANGE.bits() != 0 {
                    true => here.is_ok_and(|here| here.identity == begun.other),
                    false => !here.is_ok_and(|here| here.identity == begun.subject),
                };
                if arrived && left {
                    return Ok(Reply::default());
                }
                self.act(asked, room)
            }
            opcode::SETXATTR => match self.act(asked, room) {
                Err(Errno::EXIST) => self.is_set(asked).map(|()| Reply::default()),
                answer => answer,
            },
            opcode::REMOVEXATTR => match self.act(asked, room) {
                Err(Errno::NODATA) => Ok(Reply::default()),
                answer => answer,
            },
            _ => self.act(asked, room),
        }
    }

    /// CREATE of a file that a predecessor made.
    fn created(&self, asked: Asked<'_>) -> Result<Reply, Errno> {
        let (parent, mut fields) = (NodeId(asked.header.node), asked.fields);
        let flags = fields.u32()? as i32;
        fields.bytes(12)?;
        let name = fields.name()?;
        let made = self.share.create_again(asked.caller, parent, name, flags);
        let (entry, opened) = made?;
        Ok(self.opened(self.entry(&entry), opened.handle, &opened.file))
    }

    /// Whether an attribute that was to be new has the value that it was to get.
    fn is_set(&self, asked: Asked<'_>) -> Result<(), Errno> {
        let (node, mut fields) = (NodeId(asked.header.node), asked.fields);
        let (size, _flags) = (fields.u32()?, fields.u32()?);
        if self.session.has(feature::SETXATTR_EXT) {
            fields.bytes(SETXATTR_EXTENDED)?;
        }
        let name = fields.name()?;
        let value = fields.bytes(size as usize)?;
        // One byte more, so that a longer one is seen.
        match self.share.get_xattr(node, name, size.saturating_add(1)) {
            Ok(Xattr::Value(is)) if is == value => Ok(()),
            _ => Err(Errno::EXIST),
        }
    }

    /// Takes lookups back, `all` of them, which a kill may interrupt.
    pub(super) fn forget_recorded(
        &self,
        recorded: Option<Recorded>,
        header: &Header,
        mut one: impl FnMut() -> Option<(NodeId, u64)>,
    ) {
        let state = self.share.state();
        let slot = recorded.and_then(|at| Some((at.again, state?.slot(at.queue, at.head)?)));
        let mut done = 0;
        if let Some((again, slot)) = &slot {
            let before = again.then(|| slot.read(header.unique, header.opcode));
            match before.flatten() {
                Some(before) => done = before.progress,
                None => slot.begin(&Intent {
                    unique: header.unique,
                    opcode: header.opcode,
                    ..Intent::default()
                }),
            }
        }
        let mut at = 0;
        while let Some((node, count)) = one() {
            at += 1;
            if at <= done {
                continue;
            }
            if let Some((_, slot)) = &slot {
                slot.progress(at);
            }
            self.share.forget(node, count);
        }
    }

    /// How many bytes of an append a predecessor has written, of `size` in all.
    /// Those of one that is new are none, and it is written down where it begins.
    pub(super) fn appended(
        &self,
        request: &Request,
        file: &OpenFile,
        chain: &mut Chain<'_>,
        size: u64,
    ) -> Result<u64, Errno> {
        let slot = request
            .recorded
            .and_then(|at| Some((at.again, self.share.state()?.slot(at.queue, at.head)?)));
        let Some((again, slot)) = slot else {
            return Ok(0);
        };
        let length = fstat(file)?.st_size as u64;
        let before = again.then(|| slot.read(request.unique, opcode::WRITE));
        let Some(before) = before.flatten() else {
            slot.begin(&Intent {
                unique: request.unique,
                opcode: opcode::WRITE,
                progress: length,
                ..Intent::default()
            });
            return Ok(0);
        };
        let written = length.saturating_sub(before.progress).min(size);
        if written == 0 {
            return Ok(0);
        }
        let mut wanted = vec![0; written as usize];
        let mut found = wanted.clone();
        let read = self
            .share
            .read_again(file.node(), before.progress, &mut found);
        let same = chain.peek(&mut wanted) && read == Ok(found.len()) && found == wanted;
        // Else somebody else has appended, and ours is still to come.
        if !same || !chain.read(&mut wanted) {
            return Ok(0);
        }
        Ok(written)
    }
}

fn releases(code: u32) -> bool {
    matches!(code, opcode::RELEASE | opcode::RELEASEDIR)
}

/// Whether what is there is what was to be made.
fn is_ours(made: &Glimpse, begun: &Intent, kind: Option<FileType>) -> bool {
    match kind {
        // A link is to a file that was there.
        None => made.identity == begun.subject && (made.changed == 0 || made.changed >= begun.time),
        Some(kind) => {
            FileType::from_raw_mode(made.kind) == kind
                && (made.born == 0 || made.born >= begun.time)
        }
    }
}

/// The name that a request makes, and what is to be there; `None` for a link.
fn making<'a>(code: u32, fields: &mut Fields<'a>) -> Result<(&'a CStr, Option<FileType>), Errno> {
    let kind = match code {
        opcode::MKNOD => {
            let kind = FileType::from_raw_mode(fields.u32()?);
            fields.bytes(12)?;
            kind
        }
        opcode::MKDIR => {
            fields.bytes(8)?;
            FileType::Directory
        }
        opcode::SYMLINK => FileType::Symlink,
        opcode::CREATE => {
            fields.bytes(16)?;
            FileType::RegularFile
        }
        _ => {
            fields.bytes(8)?;
            return Ok((fields.name()?, None));
        }
    };
    Ok((fields.name()?, Some(kind)))
}

type Renaming<'a> = (NodeId, u32, &'a CStr, &'a CStr);

/// Where a request moves what: new parent, flags, name, new name.
pub(super) fn renaming<'a>(code: u32, fields: &mut Fields<'a>) -> Result<Renaming<'a>, Errno> {
    let parent = NodeId(fields.u64()?);
    let flags = match code {
        opcode::RENAME2 => (fields.u32()?, fields.u32()?).0,
        _ => 0,
    };
    let (name, new_name) = names(fields)?;
    Ok((parent, flags, name, new_name))
}

/// Writes down what came of a call.
fn note(slot: &Slot<'_>, mut intent: Intent, answer: &Result<Reply, Errno>) {
    let word = |reply: &Reply, at: usize| {
        let bytes = reply.0.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    match answer {
        Err(errno) => intent.errno = errno.raw_os_error(),
        Ok(reply) => match intent.opcode {
            opcode::OPEN | opcode::OPENDIR => intent.handle = word(reply, 0),
            opcode::CREATE => (intent.node, intent.handle) = (word(reply, 0), word(reply, ENTRY)),
            _ => intent.node = word(reply, 0),
        },
    }
    slot.done(&intent);
}

#[cfg(test)]
mod tests;
