//! Nodes on their way to another process. Its mounts are others, so that a node
//! goes there as a killed server's does, by handle or by place; where neither leads
//! to it, its descriptor goes with it. Called by `share::hand_over`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::FileType;

use super::Nodes;
use crate::calls::FileHandle;
use crate::pieces::{Hex, MALFORMED, Passed, Pieces, Words};
use crate::state::Stored;
use crate::table::{Held, Hold, Identity, Known, NodeId, Record};

impl Nodes {
    /// Writes all nodes down.
    pub(crate) fn pack(&self, pieces: &mut Pieces) {
        for (shard, used) in self.table.generations().into_iter().enumerate() {
            pieces.line(format_args!("g {shard} {used}"), None);
        }
        for known in self.table.all() {
            self.pack_one(&known, pieces);
        }
    }

    fn pack_one(&self, known: &Known, pieces: &mut Pieces) {
        let record = &known.record;
        let mut handle = None;
        let mut descriptor: Option<Passed> = None;
        match &record.hold {
            Hold::Handle(there) => handle = Some(there.as_ref().clone()),
            Hold::Place => {}
            Hold::Descriptor(held) => match record.mount.handle(held.as_fd()) {
                Ok(there) if known.mount == 0 => handle = Some(there),
                _ if known.place.is_some() && self.is_in_place(known.id, held) => {}
                _ => descriptor = Some(held.clone()),
            },
        }
        let (kind, bytes) = handle.as_ref().map_or((0, &[][..]), FileHandle::parts);
        // A descriptor is where no place leads, whatever was seen.
        let place = known.place.as_ref().filter(|_| descriptor.is_none());
        let (parent, name) =
            place.map_or((0, &[][..]), |(parent, name)| (parent.0, name.to_bytes()));
        pieces.line(
            format_args!(
                "n {} {} {} {} {} {} {} {parent} {} {} {}",
                known.id.0,
                known.lookups,
                record.identity.device,
                record.identity.ino,
                record.kind.as_raw_mode(),
                known.born,
                known.mount,
                Hex(name),
                kind.cast_unsigned(),
                Hex(bytes),
            ),
            descriptor,
        );
    }

    /// Knows a node of a predecessor's; says what is to be done once all are known.
    pub(crate) fn unpack(
        &self,
        mut words: Words<'_>,
        descriptor: Option<OwnedFd>,
    ) -> Result<Option<Stored>, &'static str> {
        let id = NodeId(words.number()?);
        let lookups = words.number()?;
        let (device, ino) = (words.number()?, words.number()?);
        let kind = FileType::from_raw_mode(words.small()?);
        let (born, mount) = (words.number()?, words.number()?);
        let parent = NodeId(words.number()?);
        let place = words.name()?.map(|name| (parent, name));
        let handle_kind: u32 = words.small()?;
        let handle = words.bytes()?;
        words.end()?;
        let root = &self.root;
        let here = mount == 0 && device == root.identity.device;
        let by_handle = !handle.is_empty() && here && root.mount.has_handles();
        let hold = match descriptor {
            Some(file) => {
                let permit = self.permit().map_err(|_| "its files are too many here")?;
                Hold::Descriptor(Held::new(file, Some(permit)))
            }
            None if by_handle => {
                let handle = FileHandle::from_parts(handle_kind.cast_signed(), &handle);
                Hold::Handle(Arc::new(handle))
            }
            None => Hold::Place,
        };
        let record = Record {
            identity: Identity {
                // Of other mounts it is not known yet.
                mount: if here { root.identity.mount } else { 0 },
                device,
                ino,
            },
            kind,
            mount: root.mount.clone(),
            hold,
        };
        let known = Known {
            id,
            lookups,
            record,
            place,
            born,
            mount,
        };
        if !self.table.put_back_known(known) {
            return Err(MALFORMED);
        }
        Ok((mount != 0).then_some(Stored {
            id,
            lookups,
            device,
            ino,
            kind,
            mount,
            handle: None,
        }))
    }

    /// All nodes are known: ids go on after these, and mounts are found again.
    pub(crate) fn unpacked(&self, used: &[u32], elsewhere: &[Stored]) {
        let used = |shard: usize| used.get(shard).copied().unwrap_or(0);
        self.table.put_back_all(used);
        self.crowded.store(true, Ordering::Relaxed);
        self.find_mounts(elsewhere);
    }
}
