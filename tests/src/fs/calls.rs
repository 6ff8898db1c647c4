//! The calls of a guest's kernel, by name, on [`Client`]. Each is one request,
//! well-formed; what tests send besides goes through [`Client::send`].

use rustix::io::Errno;

use super::client::{Client, Wrong};
use super::wire::{
    Agreed, Attr, Body, ENTRY, Entry, Name, ROOT, feature, handle, listing, long, op, set, word,
};

/// Bytes of attributes with their validity.
const ATTRIBUTES: u32 = 104;

/// What SETATTR changes: a field counts if its bit is in `valid`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    /// Bits of [`set`].
    pub valid: u32,
    /// Handle.
    pub fh: u64,
    /// Bytes.
    pub size: u64,
    /// Seconds.
    pub mtime: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What STATFS says, as far as a test can know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Units of `frsize`.
    pub blocks: u64,
    /// Longest name.
    pub namelen: u32,
    /// Bytes of a unit.
    pub frsize: u32,
}

/// The body of INIT for a version and features.
pub fn init_body(major: u32, minor: u32, features: u64) -> Body {
    let body = Body::new().u32(major).u32(minor).u32(1 << 17);
    let body = body.u32(features as u32).u32((features >> 32) as u32);
    body.bytes(&[0; 44])
}

/// The body of READ or the head of that of WRITE.
pub fn transfer_body(fh: u64, offset: u64, size: u32, flags: u32) -> Body {
    let body = Body::new().u64(fh).u64(offset).u32(size).u32(flags);
    body.u64(0).u32(0).u32(0)
}

/// The body of RELEASE and RELEASEDIR.
pub fn release_body(fh: u64) -> Body {
    Body::new().u64(fh).u32(0).u32(0).u64(0)
}

#[expect(missing_docs, reason = "each call is one request of the protocol")]
#[expect(clippy::missing_errors_doc, reason = "as Client::ask, each of them")]
impl Client {
    pub fn init(&mut self) -> Result<Agreed, Wrong> {
        self.init_as(7, 41, feature::LINUX)
    }

    pub fn init_as(&mut self, major: u32, minor: u32, features: u64) -> Result<Agreed, Wrong> {
        let body = self.ask(op::INIT, 0, init_body(major, minor, features), 64)?;
        self.agreed = Agreed::parse(&body);
        Ok(self.agreed)
    }

    pub fn destroy(&mut self) -> Result<(), Wrong> {
        self.ask(op::DESTROY, 0, [], 0).map(drop)
    }

    fn entry(&mut self, opcode: u32, node: u64, body: Body) -> Result<Entry, Wrong> {
        let body = self.ask(opcode, node, body, ENTRY as u32)?;
        if body.len() == ENTRY {
            Ok(Entry::parse(&body))
        } else {
            Err(Wrong::Malformed(format!("{} bytes of entry", body.len())))
        }
    }

    fn attr(&mut self, opcode: u32, node: u64, body: Body) -> Result<Attr, Wrong> {
        let body = self.ask(opcode, node, body, ATTRIBUTES)?;
        if body.len() == ATTRIBUTES as usize {
            Ok(Attr::parse(&body[16..]))
        } else {
            let said = format!("{} bytes of attributes", body.len());
            Err(Wrong::Malformed(said))
        }
    }

    /// An entry without a node says that there is none, and for how long to
    /// believe it: ENOENT, as any guest takes it.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, Wrong> {
        match self.entry(op::LOOKUP, parent, Body::new().name(name))? {
            Entry { node: 0, .. } => Err(Wrong::Refused(Errno::NOENT)),
            entry => Ok(entry),
        }
    }

    /// Looks a path of several names up from the root.
    pub fn walk(&mut self, path: &str) -> Result<Entry, Wrong> {
        let mut entry = Entry {
            node: ROOT,
            ..Entry::default()
        };
        for name in path.split('/') {
            entry = self.lookup(entry.node, name)?;
        }
        Ok(entry)
    }

    pub fn forget(&mut self, node: u64, count: u64) -> Result<(), Wrong> {
        self.tell(op::FORGET, node, Body::new().u64(count))
    }

    pub fn batch_forget(&mut self, nodes: &[(u64, u64)]) -> Result<(), Wrong> {
        let mut body = Body::new().u32(nodes.len() as u32).u32(0);
        for (node, count) in nodes {
            body = body.u64(*node).u64(*count);
        }
        self.tell(op::BATCH_FORGET, 0, body)
    }

    pub fn getattr(&mut self, node: u64) -> Result<Attr, Wrong> {
        self.attr(op::GETATTR, node, Body::new().u64(0).u64(0))
    }

    pub fn getattr_of(&mut self, node: u64, fh: u64) -> Result<Attr, Wrong> {
        self.attr(op::GETATTR, node, Body::new().u32(1).u32(0).u64(fh))
    }

    pub fn setattr(&mut self, node: u64, change: Change) -> Result<Attr, Wrong> {
        let body = Body::new().u32(change.valid).u32(0).u64(change.fh);
        let body = body.u64(change.size).u64(0).u64(0).u64(change.mtime).u64(0);
        let body = body.u32(0).u32(0).u32(0).u32(change.mode).u32(0);
        let body = body.u32(change.uid).u32(change.gid).u32(0);
        self.attr(op::SETATTR, node, body)
    }

    pub fn truncate(&mut self, node: u64, size: u64) -> Result<Attr, Wrong> {
        let valid = set::SIZE;
        let change = Change {
            valid,
            size,
            ..Change::default()
        };
        self.setattr(node, change)
    }

    pub fn open(&mut self, node: u64, flags: u32) -> Result<u64, Wrong> {
        let body = self.ask(op::OPEN, node, Body::new().u32(flags).u32(0), 16)?;
        Ok(handle(&body))
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Result<(), Wrong> {
        self.ask(op::RELEASE, node, release_body(fh), 0).map(drop)
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Wrong> {
        self.ask(op::READ, node, transfer_body(fh, offset, size, 0), size)
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, Wrong> {
        self.write_with(node, fh, offset, data, 0)
    }

    pub fn write_with(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: u32,
    ) -> Result<u32, Wrong> {
        let body = transfer_body(fh, offset, data.len() as u32, flags).bytes(data);
        let body = self.ask(op::WRITE, node, body, 8)?;
        Ok(word(&body, 0))
    }

    fn creation(
        &mut self,
        opcode: u32,
        parent: u64,
        name: &str,
        mode: u32,
        flags: u32,
    ) -> Result<(Entry, u64), Wrong> {
        let body = Body::new().u32(flags).u32(mode).u32(0).u32(0).name(name);
        let body = self.ask(opcode, parent, body, ENTRY as u32 + 16)?;
        if body.len() == ENTRY + 16 {
            Ok((Entry::parse(&body), handle(&body[ENTRY..])))
        } else {
            Err(Wrong::Malformed(format!("{} bytes of CREATE", body.len())))
        }
    }

    pub fn create(
        &mut self,
        parent: u64,
        name: &str,
        mode: u32,
        flags: u32,
    ) -> Result<(Entry, u64), Wrong> {
        self.creation(op::CREATE, parent, name, mode, flags)
    }

    /// An open file without a name; Linux sends "/" for it.
    pub fn tmpfile(&mut self, parent: u64, mode: u32, flags: u32) -> Result<(Entry, u64), Wrong> {
        self.creation(op::TMPFILE, parent, "/", mode, flags)
    }

    pub fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<Entry, Wrong> {
        let body = Body::new().u32(mode).u32(0).name(name);
        self.entry(op::MKDIR, parent, body)
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<Entry, Wrong> {
        let body = Body::new().u32(mode).u32(rdev).u32(0).u32(0).name(name);
        self.entry(op::MKNOD, parent, body)
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Entry, Wrong> {
        let body = Body::new().name(name).name(target);
        self.entry(op::SYMLINK, parent, body)
    }

    pub fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<Entry, Wrong> {
        self.entry(op::LINK, parent, Body::new().u64(node).name(name))
    }

    pub fn readlink(&mut self, node: u64) -> Result<String, Wrong> {
        let body = self.ask(op::READLINK, node, [], 4096)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Result<(), Wrong> {
        let body = Body::new().name(name);
        self.ask(op::UNLINK, parent, body, 0).map(drop)
    }

    pub fn rmdir(&mut self, parent: u64, name: &str) -> Result<(), Wrong> {
        let body = Body::new().name(name);
        self.ask(op::RMDIR, parent, body, 0).map(drop)
    }

    pub fn rename(&mut self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), Wrong> {
        let body = Body::new().u64(to.0).u32(flags).u32(0);
        let body = body.name(from.1).name(to.1);
        self.ask(op::RENAME2, from.0, body, 0).map(drop)
    }

    pub fn opendir(&mut self, node: u64) -> Result<u64, Wrong> {
        let body = self.ask(op::OPENDIR, node, Body::new().u64(0), 16)?;
        Ok(handle(&body))
    }

    pub fn releasedir(&mut self, node: u64, fh: u64) -> Result<(), Wrong> {
        let body = release_body(fh);
        self.ask(op::RELEASEDIR, node, body, 0).map(drop)
    }

    pub fn readdir(
        &mut self,
        node: u64,
        fh: u64,
        cookie: u64,
        size: u32,
    ) -> Result<Vec<Name>, Wrong> {
        let body = transfer_body(fh, cookie, size, 0);
        let body = self.ask(op::READDIR, node, body, size)?;
        listing(&body, false).map_err(Wrong::Malformed)
    }

    pub fn readdirplus(
        &mut self,
        node: u64,
        fh: u64,
        cookie: u64,
        size: u32,
    ) -> Result<Vec<Name>, Wrong> {
        let body = transfer_body(fh, cookie, size, 0);
        let body = self.ask(op::READDIRPLUS, node, body, size)?;
        listing(&body, true).map_err(Wrong::Malformed)
    }

    /// All names of a directory, `.` and `..` left out, `size` bytes at a time.
    pub fn list(&mut self, node: u64, plus: bool, size: u32) -> Result<Vec<Name>, Wrong> {
        let fh = self.opendir(node)?;
        let mut all: Vec<Name> = Vec::new();
        let mut cookie = 0;
        loop {
            let some = if plus {
                self.readdirplus(node, fh, cookie, size)?
            } else {
                self.readdir(node, fh, cookie, size)?
            };
            let Some(last) = some.last() else { break };
            cookie = last.cookie;
            all.extend(some);
            if all.len() > 100_000 {
                return Err(Wrong::Malformed("a listing without an end".into()));
            }
        }
        self.releasedir(node, fh)?;
        all.retain(|name| name.name != "." && name.name != "..");
        Ok(all)
    }

    pub fn statfs(&mut self, node: u64) -> Result<Space, Wrong> {
        let body = self.ask(op::STATFS, node, [], 80)?;
        Ok(Space {
            blocks: long(&body, 0),
            namelen: word(&body, 44),
            frsize: word(&body, 48),
        })
    }

    pub fn fsync(&mut self, node: u64, fh: u64) -> Result<(), Wrong> {
        let body = Body::new().u64(fh).u64(0);
        self.ask(op::FSYNC, node, body, 0).map(drop)
    }

    pub fn fsyncdir(&mut self, node: u64, fh: u64) -> Result<(), Wrong> {
        let body = Body::new().u64(fh).u64(0);
        self.ask(op::FSYNCDIR, node, body, 0).map(drop)
    }

    pub fn flush(&mut self, node: u64, fh: u64) -> Result<(), Wrong> {
        let body = Body::new().u64(fh).u64(0).u64(0);
        self.ask(op::FLUSH, node, body, 0).map(drop)
    }

    pub fn lseek(&mut self, node: u64, fh: u64, offset: u64, whence: u32) -> Result<u64, Wrong> {
        let body = Body::new().u64(fh).u64(offset).u32(whence).u32(0);
        let body = self.ask(op::LSEEK, node, body, 8)?;
        Ok(long(&body, 0))
    }

    /// Copies `len` bytes from (node, handle, offset) to another.
    pub fn copy_file_range(
        &mut self,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        len: u64,
    ) -> Result<u32, Wrong> {
        let body = Body::new().u64(from.1).u64(from.2);
        let body = body.u64(to.0).u64(to.1).u64(to.2).u64(len).u64(0);
        let body = self.ask(op::COPY_FILE_RANGE, from.0, body, 8)?;
        Ok(word(&body, 0))
    }

    pub fn fallocate(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        len: u64,
        mode: u32,
    ) -> Result<(), Wrong> {
        let body = Body::new().u64(fh).u64(offset).u64(len).u32(mode).u32(0);
        self.ask(op::FALLOCATE, node, body, 0).map(drop)
    }

    pub fn access(&mut self, node: u64, mask: u32) -> Result<(), Wrong> {
        let body = Body::new().u32(mask).u32(0);
        self.ask(op::ACCESS, node, body, 0).map(drop)
    }

    pub fn setxattr(
        &mut self,
        node: u64,
        name: &str,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Wrong> {
        let mut body = Body::new().u32(value.len() as u32).u32(flags);
        if self.agreed.features & feature::SETXATTR_EXT != 0 {
            body = body.u64(0);
        }
        let body = body.name(name).bytes(value);
        self.ask(op::SETXATTR, node, body, 0).map(drop)
    }

    pub fn getxattr(&mut self, node: u64, name: &str, size: u32) -> Result<Vec<u8>, Wrong> {
        let body = Body::new().u32(size).u32(0).name(name);
        self.ask(op::GETXATTR, node, body, size.max(8))
    }

    pub fn listxattr(&mut self, node: u64, size: u32) -> Result<Vec<u8>, Wrong> {
        let body = Body::new().u32(size).u32(0);
        self.ask(op::LISTXATTR, node, body, size.max(8))
    }

    pub fn removexattr(&mut self, node: u64, name: &str) -> Result<(), Wrong> {
        let body = Body::new().name(name);
        self.ask(op::REMOVEXATTR, node, body, 0).map(drop)
    }
}
