//! What guests are sent.

use std::time::Duration;

use pericarp_share::{Attributes, DirEntry, Entry, FileSystem};

use super::{ATTRIBUTE_SUBMOUNT, DIRENT, ENTRY};

/// How long a guest may keep what it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Validity(pub(crate) Duration);

/// The body of a reply under construction.
#[derive(Debug, Default)]
pub(crate) struct Reply(pub(crate) Vec<u8>);

impl Reply {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn zeroes(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// `fuse_entry_out`, with how long its name is valid and its attributes. With `submounts` the
    /// guest is told of those.
    pub(crate) fn entry(
        &mut self,
        entry: &Entry,
        (name, attributes): (Validity, Validity),
        submounts: bool,
    ) -> &mut Self {
        let submount = submounts && entry.submount;
        let flags = u32::from(submount) * ATTRIBUTE_SUBMOUNT;
        // Linux keeps no generation of what it mounts on (`fuse_iget`): any but 0 is another
        // than it has when it looks again, and takes down all that is mounted there.
        let generation = if submount { 0 } else { entry.generation };
        self.u64(entry.node.0).u64(generation);
        self.validity(name, attributes);
        self.attributes(&entry.attributes, flags)
    }

    /// A `fuse_entry_out` that says that there is no such name.
    pub(crate) fn no_entry(&mut self, valid: Validity) -> &mut Self {
        self.u64(0).u64(0).validity(valid, Validity::default());
        self.zeroes(ENTRY - 40)
    }

    fn validity(&mut self, entry: Validity, attributes: Validity) -> &mut Self {
        self.u64(entry.0.as_secs()).u64(attributes.0.as_secs());
        self.u32(entry.0.subsec_nanos());
        self.u32(attributes.0.subsec_nanos())
    }

    /// `fuse_attr_out`.
    pub(crate) fn valid_attributes(&mut self, of: &Attributes, valid: Validity) -> &mut Self {
        self.u64(valid.0.as_secs()).u32(valid.0.subsec_nanos());
        self.u32(0).attributes(of, 0)
    }

    /// `fuse_attr`.
    fn attributes(&mut self, of: &Attributes, flags: u32) -> &mut Self {
        self.u64(of.ino).u64(of.size).u64(of.blocks);
        // Times before 1970 keep their sign: the guest reads them as signed.
        self.u64(of.atime as u64);
        self.u64(of.mtime as u64);
        self.u64(of.ctime as u64);
        self.u32(of.atime_ns).u32(of.mtime_ns).u32(of.ctime_ns);
        self.u32(of.mode).u32(of.nlink).u32(of.uid).u32(of.gid);
        self.u32(of.rdev).u32(of.blksize).u32(flags)
    }

    /// `fuse_statfs_out`.
    pub(crate) fn file_system(&mut self, of: &FileSystem) -> &mut Self {
        self.u64(of.blocks).u64(of.blocks_free);
        self.u64(of.blocks_available).u64(of.files);
        self.u64(of.files_free).u32(of.block_size);
        self.u32(of.name_length).u32(of.fragment_size);
        self.zeroes(4 + 6 * 4)
    }

    /// `fuse_dirent`, and what follows its name up to a multiple of 8.
    pub(crate) fn dirent(&mut self, entry: &DirEntry<'_>) -> &mut Self {
        let name = entry.name.to_bytes();
        self.u64(entry.ino).u64(entry.offset);
        self.u32(name.len() as u32).u32(entry.kind);
        self.0.extend(name);
        self.zeroes(padding(name.len()))
    }
}

/// Bytes of a directory entry with this name.
pub(crate) fn dirent_size(entry: &DirEntry<'_>) -> usize {
    let name = entry.name.count_bytes();
    DIRENT + name + padding(name)
}

fn padding(name: usize) -> usize {
    name.next_multiple_of(8) - name
}

/// An entry that was not looked up, in a listing with lookups: the guest takes
/// its name, kind and inode number from the rest.
pub(crate) fn push_entry_bare(reply: &mut Reply) {
    reply.zeroes(ENTRY);
}

#[cfg(test)]
mod tests {
    use super::super::ATTRIBUTES;
    use super::*;

    fn attributes() -> Attributes {
        Attributes {
            ino: 1,
            size: 2,
            blocks: 3,
            atime: -4,
            mtime: 5,
            ctime: 6,
            atime_ns: 7,
            mtime_ns: 8,
            ctime_ns: 9,
            mode: 10,
            nlink: 11,
            uid: 12,
            gid: 13,
            rdev: 14,
            blksize: 15,
        }
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn replies_have_the_sizes_of_the_protocol() {
        let mut reply = Reply::default();
        let valid = Validity(Duration::from_millis(1500));
        reply.valid_attributes(&attributes(), valid);
        assert_eq!(reply.0.len(), ATTRIBUTES);
        assert_eq!(word(&reply.0, 0), 1);
        assert_eq!(word(&reply.0, 8), 500_000_000);
        assert_eq!(word(&reply.0, 16), 1);
        assert_eq!(word(&reply.0, 40) as i64, -4);
        assert_eq!(&reply.0[96..100], &15u32.to_le_bytes());
        let mut reply = Reply::default();
        let figures = FileSystem {
            blocks: 1,
            blocks_free: 2,
            blocks_available: 3,
            files: 4,
            files_free: 5,
            block_size: 6,
            name_length: 7,
            fragment_size: 8,
        };
        reply.file_system(&figures);
        assert_eq!(reply.0.len(), 80);
        let mut reply = Reply::default();
        reply.no_entry(valid);
        assert_eq!(reply.0.len(), ENTRY);
        assert_eq!((word(&reply.0, 0), word(&reply.0, 16)), (0, 1));
    }

    #[test]
    fn directory_entries_are_padded() {
        for (name, size) in [(c"a", 32), (c"12345678", 32), (c"123456789", 40)] {
            let entry = DirEntry {
                ino: 1,
                offset: 2,
                kind: 8,
                name,
            };
            let mut reply = Reply::default();
            reply.dirent(&entry);
            assert_eq!((reply.0.len(), dirent_size(&entry)), (size, size));
            assert_eq!(&reply.0[DIRENT..][..name.count_bytes()], name.to_bytes());
        }
    }
}
