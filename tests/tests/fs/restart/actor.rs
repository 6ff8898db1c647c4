//! Somebody in a guest who does one thing after another in a directory of its
//! own, and knows what must come of each. Who is alone in a directory is never
//! told anything else, however often the server dies.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pericarp_tests::fs::wire::posix::{
    O_APPEND, O_EXCL, O_RDWR, RENAME_EXCHANGE, RENAME_NOREPLACE, S_IFREG, XATTR_CREATE,
};
use pericarp_tests::fs::wire::{Answer, Body, ENTRY, Entry, handle, op, set, word};
use pericarp_tests::fs::{Client, Wrong, release_body, transfer_body};
use pericarp_tests::model::Sequence;
use rustix::io::Errno;

/// Files have at most so many bytes, so that they fit an answer.
const MOST: usize = 3000;
/// Names at a time.
const NAMES: usize = 8;

/// What a name is.
#[derive(Clone, Debug, Default)]
struct Thing {
    kind: Kind,
    node: u64,
    lookups: u64,
    content: Vec<u8>,
    open: Option<u64>,
    append: bool,
    xattr: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    File,
    Directory,
    Symlink,
}

/// What was asked for.
#[derive(Clone, Debug)]
enum Asked {
    Make(u32, String, Thing),
    Look(String),
    LookForNobody,
    Write(String, usize, Vec<u8>),
    Read(String),
    Truncate(String, usize),
    Open(String),
    Release(String),
    Rename(String, String),
    Exchange(String, String),
    RefusedRename,
    Link(String, String),
    Remove(String),
    Forget,
    SetXattr(String),
    RemoveXattr(String),
}

/// The actor.
pub(crate) struct Actor {
    slot: u16,
    dir: u64,
    path: PathBuf,
    random: Sequence,
    things: BTreeMap<String, Thing>,
    /// Nodes without a name that are to be forgotten.
    gone: Vec<(u64, u64)>,
    asked: Option<(u64, Asked)>,
    count: u64,
}

impl Actor {
    pub(crate) fn new(slot: u16, dir: u64, path: PathBuf) -> Self {
        Actor {
            slot,
            dir,
            path,
            random: Sequence::new(1000 + u64::from(slot)),
            things: BTreeMap::new(),
            gone: Vec::new(),
            asked: None,
            count: 0,
        }
    }

    fn new_name(&mut self) -> String {
        self.count += 1;
        match self.random.below(8) {
            0 => format!("{:0>200}", self.count),
            _ => format!("n{}", self.count),
        }
    }

    /// Some name of which this holds.
    fn some(&mut self, holds: impl Fn(&Thing) -> bool) -> Option<String> {
        let names: Vec<_> = self.things.iter().filter(|(_, t)| holds(t)).collect();
        let index = self.random.below(names.len().max(1) as u64) as usize;
        names.get(index).map(|(name, _)| (*name).clone())
    }

    /// Asks for the next thing.
    pub(crate) fn begin(&mut self, client: &mut Client) -> Result<(), Wrong> {
        let (asked, opcode, node, body, room) = loop {
            if let Some(request) = self.choose() {
                break request;
            }
        };
        let unique = client.begin(self.slot, opcode, node, body, room)?;
        self.asked = Some((unique, asked));
        Ok(())
    }

    fn choose(&mut self) -> Option<(Asked, u32, u64, Body, u32)> {
        let (dir, entry) = (self.dir, ENTRY as u32);
        if let Some((node, lookups)) = self.gone.pop() {
            let body = Body::new().u64(lookups);
            return Some((Asked::Forget, op::FORGET, node, body, 0));
        }
        let is_file = |t: &Thing| t.kind == Kind::File;
        let closed = |t: &Thing| t.open.is_none();
        Some(match self.random.below(20) {
            0..=2 if self.things.len() < NAMES => {
                let append = self.random.below(3) == 0;
                let thing = Thing {
                    append,
                    ..Thing::default()
                };
                let flags = O_RDWR | O_EXCL | if append { O_APPEND } else { 0 };
                let name = self.new_name();
                let body = Body::new().u32(flags).u32(0o644).u32(0).u32(0);
                let body = body.name(&name);
                let asked = Asked::Make(op::CREATE, name, thing);
                (asked, op::CREATE, dir, body, entry + 16)
            }
            3 if self.things.len() < NAMES => {
                let (name, kind) = (self.new_name(), Kind::Directory);
                let body = Body::new().u32(0o755).u32(0).name(&name);
                let thing = Thing {
                    kind,
                    ..Thing::default()
                };
                let asked = Asked::Make(op::MKDIR, name, thing);
                (asked, op::MKDIR, dir, body, entry)
            }
            4 if self.things.len() < NAMES => {
                let (name, kind) = (self.new_name(), Kind::Symlink);
                let body = Body::new().name(&name).name("nowhere");
                let thing = Thing {
                    kind,
                    ..Thing::default()
                };
                let asked = Asked::Make(op::SYMLINK, name, thing);
                (asked, op::SYMLINK, dir, body, entry)
            }
            5 if self.things.len() < NAMES => {
                let name = self.new_name();
                let body = Body::new().u32(S_IFREG | 0o600).u32(0).u32(0).u32(0);
                let body = body.name(&name);
                let asked = Asked::Make(op::MKNOD, name, Thing::default());
                (asked, op::MKNOD, dir, body, entry)
            }
            6 => {
                let name = self.some(|_| true)?;
                let body = Body::new().name(&name);
                (Asked::Look(name), op::LOOKUP, dir, body, entry)
            }
            7 => {
                let body = Body::new().name("nobody");
                (Asked::LookForNobody, op::LOOKUP, dir, body, entry)
            }
            8..=10 => {
                let name = self.some(|t| t.open.is_some() && t.content.len() < MOST - 600)?;
                let length = 1 + self.random.below(500) as usize;
                let data = self.random.bytes(length);
                let thing = &self.things[&name];
                let at = match thing.append {
                    true => thing.content.len(),
                    false => self.random.below(thing.content.len() as u64 + 50) as usize,
                };
                // What an append says of its place does not count.
                let offset = if thing.append { 0 } else { at as u64 };
                let body = Body::new().u64(thing.open?).u64(offset);
                let flags = O_RDWR | if thing.append { O_APPEND } else { 0 };
                let body = body.u32(data.len() as u32).u32(0).u64(0).u32(flags).u32(0);
                let (node, body) = (thing.node, body.bytes(&data));
                (Asked::Write(name, at, data), op::WRITE, node, body, 8)
            }
            11 => {
                let name = self.some(|t| t.open.is_some())?;
                let thing = &self.things[&name];
                let body = transfer_body(thing.open?, 0, MOST as u32, 0);
                let node = thing.node;
                (Asked::Read(name), op::READ, node, body, MOST as u32)
            }
            12 => {
                let name = self.some(|t| is_file(t) && !t.content.is_empty())?;
                let thing = &self.things[&name];
                let (node, length) = (thing.node, thing.content.len() as u64);
                let size = self.random.below(length) as usize;
                let body = Body::new().u32(set::SIZE).u32(0).u64(0).u64(size as u64);
                let body = body.bytes(&[0; 64]);
                (Asked::Truncate(name, size), op::SETATTR, node, body, 104)
            }
            13 => {
                let name = self.some(|t| is_file(t) && closed(t))?;
                let thing = &self.things[&name];
                let flags = O_RDWR | if thing.append { O_APPEND } else { 0 };
                let (node, body) = (thing.node, Body::new().u32(flags).u32(0));
                (Asked::Open(name), op::OPEN, node, body, 16)
            }
            14 => {
                let name = self.some(|t| t.open.is_some())?;
                let thing = &self.things[&name];
                let (node, body) = (thing.node, release_body(thing.open?));
                (Asked::Release(name), op::RELEASE, node, body, 8)
            }
            15 => {
                let name = self.some(|_| true)?;
                // Over something of its kind that nobody has open, or to nobody.
                let kind = self.things[&name].kind;
                let other = self.some(|t| t.kind == kind && closed(t));
                let over = self.random.below(3) == 0;
                let new = other.filter(|other| over && *other != name);
                let new = new.unwrap_or_else(|| self.new_name());
                self.renaming(Asked::Rename(name.clone(), new.clone()), (name, new), 0)
            }
            16 => {
                let (one, other) = (self.some(|_| true)?, self.some(|_| true)?);
                if one == other {
                    return None;
                }
                match self.random.below(3) {
                    0 => self.renaming(Asked::RefusedRename, (one, other), RENAME_NOREPLACE),
                    _ => self.renaming(
                        Asked::Exchange(one.clone(), other.clone()),
                        (one, other),
                        RENAME_EXCHANGE,
                    ),
                }
            }
            17 if self.things.len() < NAMES => {
                // The old name goes: a file has one at a time here.
                let name = self.some(|t| is_file(t) && closed(t))?;
                let new = self.new_name();
                let body = Body::new().u64(self.things[&name].node).name(&new);
                (Asked::Link(name, new), op::LINK, dir, body, entry)
            }
            18 => {
                let name = self.some(closed)?;
                let code = match self.things[&name].kind {
                    Kind::Directory => op::RMDIR,
                    _ => op::UNLINK,
                };
                let body = Body::new().name(&name);
                (Asked::Remove(name), code, dir, body, 8)
            }
            19 => {
                let name = self.some(is_file)?;
                let thing = &self.things[&name];
                let node = thing.node;
                if thing.xattr {
                    let body = Body::new().name("user.x");
                    (Asked::RemoveXattr(name), op::REMOVEXATTR, node, body, 8)
                } else {
                    let body = Body::new().u32(3).u32(XATTR_CREATE);
                    let body = body.name("user.x").bytes(b"abc");
                    (Asked::SetXattr(name), op::SETXATTR, node, body, 8)
                }
            }
            _ => return None,
        })
    }

    fn renaming(
        &self,
        asked: Asked,
        (from, to): (String, String),
        flags: u32,
    ) -> (Asked, u32, u64, Body, u32) {
        let body = Body::new().u64(self.dir).u32(flags).u32(0);
        (asked, op::RENAME2, self.dir, body.name(&from).name(&to), 8)
    }

    /// What came of it must be what this says.
    pub(crate) fn end(&mut self, answer: &Answer) -> Result<(), String> {
        let (unique, asked) = self.asked.take().ok_or("an answer to nothing")?;
        let slot = self.slot;
        let wrong = |what: &str| format!("actor {slot}: {asked:?}: {what}: {answer:?}");
        if let Asked::Forget = asked {
            return match answer.used {
                0 => Ok(()),
                _ => Err(wrong("an answer to FORGET")),
            };
        }
        if answer.unique != unique {
            return Err(wrong("another request's answer"));
        }
        let expected = match asked {
            Asked::LookForNobody => Some(Errno::NOENT),
            Asked::RefusedRename => Some(Errno::EXIST),
            _ => None,
        };
        if answer.errno() != expected {
            return Err(wrong("unexpected"));
        }
        let body = &answer.body;
        match &asked {
            Asked::Make(code, name, thing) => {
                let mut thing = thing.clone();
                thing.node = Entry::parse(body).node;
                thing.lookups = 1;
                if *code == op::CREATE {
                    thing.open = Some(handle(&body[ENTRY..]));
                }
                if self.things.values().any(|other| other.node == thing.node) {
                    return Err(wrong("the node of another"));
                }
                self.things.insert(name.clone(), thing);
            }
            Asked::Look(name) => {
                let thing = self.thing(name);
                thing.lookups += 1;
                if Entry::parse(body).node != thing.node {
                    return Err(wrong("another node"));
                }
            }
            Asked::LookForNobody | Asked::RefusedRename | Asked::Forget => {}
            Asked::Write(name, at, data) => {
                if word(body, 0) as usize != data.len() {
                    return Err(wrong("a short write"));
                }
                let content = &mut self.thing(name).content;
                let end = at + data.len();
                content.resize(content.len().max(end), 0);
                content[*at..end].copy_from_slice(data);
            }
            Asked::Read(name) => {
                if self.thing(name).content != *body {
                    return Err(wrong("other content"));
                }
            }
            Asked::Truncate(name, size) => self.thing(name).content.truncate(*size),
            Asked::Open(name) => self.thing(name).open = Some(handle(body)),
            Asked::Release(name) => self.thing(name).open = None,
            Asked::Rename(name, new) => {
                let thing = self.things.remove(name).ok_or("nothing moved")?;
                if let Some(over) = self.things.insert(new.clone(), thing) {
                    self.gone.push((over.node, over.lookups));
                }
            }
            Asked::Exchange(one, other) => {
                let (a, b) = (self.thing(one).clone(), self.thing(other).clone());
                self.things.insert(one.clone(), b);
                self.things.insert(other.clone(), a);
            }
            Asked::Link(name, new) => {
                if Entry::parse(body).node != self.thing(name).node {
                    return Err(wrong("another node"));
                }
                // The file is known by its new name; the old one is somebody's
                // whom nobody asks for, and stays.
                let mut thing = self.things.remove(name).ok_or("nothing linked")?;
                thing.lookups += 1;
                self.things.insert(new.clone(), thing);
                std::fs::remove_file(self.path.join(name)).map_err(|e| e.to_string())?;
            }
            Asked::Remove(name) => {
                let thing = self.things.remove(name).ok_or("nothing removed")?;
                self.gone.push((thing.node, thing.lookups));
            }
            Asked::SetXattr(name) => self.thing(name).xattr = true,
            Asked::RemoveXattr(name) => self.thing(name).xattr = false,
        }
        Ok(())
    }

    fn thing(&mut self, name: &str) -> &mut Thing {
        self.things.entry(name.to_owned()).or_default()
    }

    /// The directory is as it must be by now.
    pub(crate) fn compare(&mut self) {
        let mut names: Vec<_> = std::fs::read_dir(&self.path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let wanted: Vec<_> = self.things.keys().cloned().collect();
        assert_eq!(names, wanted, "actor {}", self.slot);
        for (name, thing) in &self.things {
            let path = self.path.join(name);
            let is = std::fs::symlink_metadata(&path).unwrap();
            let kind = match thing.kind {
                Kind::File => is.is_file(),
                Kind::Directory => is.is_dir(),
                Kind::Symlink => is.is_symlink(),
            };
            assert!(kind, "actor {}: {name}", self.slot);
            if thing.kind == Kind::File {
                let content = std::fs::read(&path).unwrap();
                assert!(content == thing.content, "actor {}: {name}", self.slot);
            }
        }
    }
}
