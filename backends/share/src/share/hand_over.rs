//! A share that goes on in another process while its guest does: what it knows
//! and has open, as lines with descriptors. Files without a name and locks go along,
//! since the open files themselves do.
//!
//! | line | what |
//! |---|---|
//! | `g shard used` | how often slots of nodes were used at most |
//! | `n ...` | a node, see `nodes::hand_over` |
//! | `h used` | how often places of open files were used at most |
//! | `f number node` | an open file |
//! | `d number node` | an open directory |
//! | `l node owner through` | an owner's file for its locks on ranges |

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags, fcntl_getfl, statx};

use super::Share;
use super::restore::Restored;
use crate::attributes::{WANTED, identity, kind};
use crate::handles::{Handle, Open};
use crate::pieces::{MALFORMED, Passed, Piece, Pieces, read};
use crate::table::NodeId;

impl Share {
    /// Writes down all that the guest knows and has open. Nothing is under way.
    pub fn pack(&self) -> Vec<Piece<Passed>> {
        let mut pieces = Pieces::default();
        self.nodes.pack(&mut pieces);
        let (used, open) = self.handles.all();
        pieces.line(format_args!("h {used}"), None);
        for (number, open) in &open {
            let node = open.node().0;
            let (letter, file): (_, Passed) = match open {
                Open::File(file) => ("f", file.clone()),
                Open::Directory(directory) => ("d", directory.clone()),
            };
            pieces.line(format_args!("{letter} {number} {node}"), Some(file));
        }
        for (node, owner, through, file) in self.owners.all() {
            let through = open.iter().find_map(|(number, open)| match open {
                Open::File(file) if Arc::as_ptr(file) == through => Some(*number),
                _ => None,
            });
            let through = through.unwrap_or(u64::MAX);
            pieces.line(format_args!("l {} {owner} {through}", node.0), Some(file));
        }
        pieces.finish()
    }

    /// Goes on with what a predecessor wrote down. Called before anything else is.
    /// A state that is [kept](Self::keep) is the predecessor's, and goes on as it is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn unpack(&self, pieces: Vec<Piece<OwnedFd>>) -> Result<Restored, String> {
        let (mut used, mut before, mut elsewhere) = ([0; 16], 0, Vec::new());
        let (mut opened, mut owners) = (Vec::new(), Vec::new());
        read(pieces, |first, mut words, descriptor| {
            match first {
                "n" => {
                    elsewhere.extend(self.nodes.unpack(words, descriptor)?);
                    return Ok(());
                }
                "g" => {
                    let (shard, count): (usize, u32) = (words.small()?, words.small()?);
                    *used.get_mut(shard).ok_or(MALFORMED)? = count;
                }
                "h" => before = words.small()?,
                "f" | "d" => {
                    let (number, node) = (words.number()?, NodeId(words.number()?));
                    let file = descriptor.ok_or(MALFORMED)?;
                    opened.push((number, node, first == "d", file));
                }
                "l" => {
                    let (node, owner) = (NodeId(words.number()?), words.number()?);
                    let through = Handle(words.number()?);
                    owners.push((node, owner, through, descriptor.ok_or(MALFORMED)?));
                }
                _ => return Err(MALFORMED),
            }
            words.end()
        })?;
        self.nodes.unpacked(&used, &elsewhere);
        let mut restored = Restored {
            nodes: self.nodes.counts().1,
            ..Restored::default()
        };
        let mut back = Vec::with_capacity(opened.len());
        for (number, node, directory, file) in opened {
            let open = self.passed(node, directory, file);
            match &open {
                Some(_) => restored.open += 1,
                None => restored.lost += 1,
            }
            back.push((number, open));
        }
        self.handles.put_back_all(before, back)?;
        for (node, owner, through, file) in owners {
            let permit = self.handles.permit().map_err(|errno| errno.to_string())?;
            let through = self.handles.file(through).ok();
            self.owners
                .put_back((node, owner), through.as_ref(), file, permit);
        }
        Ok(restored)
    }

    /// What was open in the other process, here.
    fn passed(&self, node: NodeId, directory: bool, file: OwnedFd) -> Option<Open> {
        if directory {
            // On a mount of ours, if it has a name.
            if let Ok(directory) = self.opened_dir(node) {
                return Some(Open::Directory(Arc::new(directory)));
            }
            let found = self.nodes.get(node).ok()?;
            let permit = self.handles.permit().ok()?;
            let directory = self.directory_of(file, found, permit);
            return Some(Open::Directory(Arc::new(directory)));
        }
        let permit = self.handles.permit().ok()?;
        let mount = match self.nodes.get(node) {
            Ok(found) => found.mount,
            Err(_) => {
                let stat = statx(&file, c"", AtFlags::EMPTY_PATH, WANTED).ok()?;
                self.nodes
                    .mount_of(&identity(&stat), file.as_fd(), kind(&stat))
            }
        };
        let flags: OFlags = fcntl_getfl(&file).ok()?;
        Some(Open::File(Self::open_of(file, permit, node, flags, mount)))
    }
}
