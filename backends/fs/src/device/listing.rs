//! Reading directories, with lookups and without.

use pericarp_share::Errno;

use super::FsDevice;
use crate::wire::{ENTRY, Fields, MAX_TRANSFER, Reply, dirent_size, feature, push_entry_bare};

impl FsDevice {
    /// READDIR and, with `lookups`, READDIRPLUS.
    pub(super) fn list(
        &self,
        node: u64,
        fields: &mut Fields<'_>,
        room: usize,
        lookups: bool,
    ) -> Result<Reply, Errno> {
        let (handle, offset) = (fields.u64()?, fields.u64()?);
        let directory = self.directory(node, handle)?;
        let room = room.min(fields.u32()?.min(MAX_TRANSFER) as usize);
        let mut reply = Reply::with_capacity(room.min(64 * 1024));
        // Nothing would mean the end.
        let mut too_small = false;
        if lookups {
            let (valid, submounts) = (self.validity(), self.session.has(feature::SUBMOUNTS));
            self.share
                .read_dir_plus_of(&directory, offset, &mut |entry, found| {
                    if reply.0.len() + ENTRY + dirent_size(&entry) > room {
                        too_small = reply.0.is_empty();
                        return false;
                    }
                    match found {
                        Some(found) => {
                            let valid = (self.name_validity(found), valid);
                            reply.entry(found, valid, submounts);
                        }
                        None => push_entry_bare(&mut reply),
                    }
                    reply.dirent(&entry);
                    true
                })?;
        } else {
            directory.read(offset, &mut |entry| {
                if reply.0.len() + dirent_size(&entry) > room {
                    too_small = reply.0.is_empty();
                    return false;
                }
                reply.dirent(&entry);
                true
            })?;
        }
        if too_small {
            return Err(Errno::INVAL);
        }
        Ok(reply)
    }
}
