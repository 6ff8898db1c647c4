//! FUSE as a guest's kernel writes it (linux/fuse.h, protocol 7): numbers, the
//! bytes of requests, and what replies mean. Used by [`super::Client`] and by
//! the suite in `tests/tests/fs`. Nothing here checks what a test sends.

use rustix::io::Errno;

/// The node that a session begins with.
pub const ROOT: u64 = 1;
/// Bytes of the header of a request.
pub const IN_HEADER: usize = 40;
/// Bytes of the header of a reply.
pub const OUT_HEADER: usize = 16;
/// Bytes of an entry.
pub const ENTRY: usize = 128;

/// Request numbers.
pub mod op {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
}

/// Bits of INIT: the upper half goes into `flags2`.
pub mod feature {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const NO_OPEN: u64 = 1 << 17;
    pub const NO_OPENDIR: u64 = 1 << 24;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    /// What Linux 6.12 asks for, without a write-back cache.
    pub const LINUX: u64 = ASYNC_READ
        | ATOMIC_O_TRUNC
        | BIG_WRITES
        | DONT_MASK
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | POSIX_ACL
        | MAX_PAGES
        | SUBMOUNTS
        | HANDLE_KILLPRIV_V2
        | SETXATTR_EXT
        | INIT_EXT;
}

/// Bits of SETATTR's `valid`.
pub mod set {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// In WRITE's flags: pages that were cached.
pub const WRITE_CACHE: u32 = 1 << 0;
/// In WRITE's flags: the writer may not keep set-user-ID bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;

/// Flags of OPEN as Linux numbers them on x86-64, and modes.
pub mod posix {
    #![expect(missing_docs, reason = "the names are the system's")]
    pub const O_RDONLY: u32 = 0;
    pub const O_WRONLY: u32 = 1;
    pub const O_RDWR: u32 = 2;
    pub const O_CREAT: u32 = 0o100;
    pub const O_EXCL: u32 = 0o200;
    pub const O_TRUNC: u32 = 0o1000;
    pub const O_APPEND: u32 = 0o2000;
    pub const S_IFMT: u32 = 0o170_000;
    pub const S_IFIFO: u32 = 0o010_000;
    pub const S_IFCHR: u32 = 0o020_000;
    pub const S_IFDIR: u32 = 0o040_000;
    pub const S_IFREG: u32 = 0o100_000;
    pub const S_IFLNK: u32 = 0o120_000;
    pub const SEEK_DATA: u32 = 3;
    pub const SEEK_HOLE: u32 = 4;
    pub const RENAME_NOREPLACE: u32 = 1;
    pub const RENAME_EXCHANGE: u32 = 2;
    pub const KEEP_SIZE: u32 = 1;
    pub const PUNCH_HOLE: u32 = 2;
    pub const XATTR_CREATE: u32 = 1;
    pub const XATTR_REPLACE: u32 = 2;
}

/// Little-endian bytes, one field after another.
#[derive(Clone, Debug, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A field of four bytes.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A field of eight bytes.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Bytes as they are.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// A name and its end.
    pub fn name(self, name: &str) -> Self {
        self.bytes(name.as_bytes()).bytes(&[0])
    }
}

impl From<Body> for Vec<u8> {
    fn from(body: Body) -> Self {
        body.0
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Who {
    /// The superuser.
    pub const ROOT: Who = Who { uid: 0, gid: 0 };
}

/// The header of a request; `len` may be anything.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Bytes of the whole request, as claimed.
    pub len: u32,
    /// One of [`op`], or not.
    pub opcode: u32,
    /// Comes back in the reply.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// Who asks.
    pub who: Who,
}

impl Header {
    /// As it lies in memory.
    pub fn bytes(self) -> Vec<u8> {
        Body::new()
            .u32(self.len)
            .u32(self.opcode)
            .u64(self.unique)
            .u64(self.node)
            .u32(self.who.uid)
            .u32(self.who.gid)
            .u32(4711)
            .u32(0)
            .into()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    field.map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    field.map_or(0, u64::from_le_bytes)
}

/// A reply in the writable part of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Bytes that the used ring speaks of.
    pub used: u32,
    /// Bytes that the reply claims to have.
    pub len: u32,
    /// Zero or a negative error number.
    pub error: i32,
    /// Of the request.
    pub unique: u64,
    /// Everything behind the header that the reply claims.
    pub body: Vec<u8>,
}

impl Answer {
    /// Reads the whole writable part of a chain.
    pub fn parse(used: u32, area: &[u8]) -> Self {
        let len = u32_at(area, 0);
        let end = (len as usize).min(area.len()).max(OUT_HEADER);
        Answer {
            used,
            len,
            error: u32_at(area, 4) as i32,
            unique: u64_at(area, 8),
            body: area.get(OUT_HEADER..end).unwrap_or_default().to_vec(),
        }
    }

    /// The error, if it is one.
    pub fn errno(&self) -> Option<Errno> {
        (self.error != 0).then(|| Errno::from_raw_os_error(self.error.wrapping_neg()))
    }
}

/// What INIT agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// The server's version.
    pub major: u32,
    /// Of that version.
    pub minor: u32,
    /// Features of both.
    pub features: u64,
    /// Most bytes of one WRITE.
    pub max_write: u32,
    /// Most pages of one request.
    pub max_pages: u16,
}

impl Agreed {
    /// Reads the body of INIT's reply.
    pub fn parse(body: &[u8]) -> Self {
        let low = u64::from(u32_at(body, 12));
        let high = if low & feature::INIT_EXT == 0 {
            0
        } else {
            u64::from(u32_at(body, 32)) << 32
        };
        Agreed {
            major: u32_at(body, 0),
            minor: u32_at(body, 4),
            features: low | high,
            max_write: u32_at(body, 20),
            max_pages: u32_at(body, 28) as u16,
        }
    }
}

/// Attributes of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes on the disk.
    pub blocks: u64,
    /// Seconds of the last change.
    pub mtime: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a device node.
    pub rdev: u32,
}

impl Attr {
    /// Reads `struct fuse_attr`.
    pub fn parse(bytes: &[u8]) -> Self {
        Attr {
            ino: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            blocks: u64_at(bytes, 16),
            mtime: u64_at(bytes, 32),
            mode: u32_at(bytes, 60),
            nlink: u32_at(bytes, 64),
            uid: u32_at(bytes, 68),
            gid: u32_at(bytes, 72),
            rdev: u32_at(bytes, 76),
        }
    }
}

/// A name that was looked up or made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its node; 0 is no entry.
    pub node: u64,
    /// Tells two nodes of one number apart.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
}

impl Entry {
    /// Reads `struct fuse_entry_out`.
    pub fn parse(bytes: &[u8]) -> Self {
        Entry {
            node: u64_at(bytes, 0),
            generation: u64_at(bytes, 8),
            attr: Attr::parse(bytes.get(40..).unwrap_or_default()),
        }
    }
}

/// One name of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// Inode number.
    pub ino: u64,
    /// Where to go on behind it.
    pub cookie: u64,
    /// Type, as in the upper bits of a mode.
    pub kind: u32,
    /// The name itself.
    pub name: String,
    /// What a lookup would have given; READDIRPLUS only.
    pub entry: Option<Entry>,
}

/// Reads a listing; what does not fit its own lengths is an error.
///
/// # Errors
/// What is wrong with it.
pub fn listing(mut bytes: &[u8], plus: bool) -> Result<Vec<Name>, String> {
    let fixed = if plus { ENTRY } else { 0 };
    let mut names = Vec::new();
    while !bytes.is_empty() {
        let record = bytes
            .get(fixed..fixed + 24)
            .ok_or("a record is cut off in its header")?;
        let len = u32_at(record, 16) as usize;
        let name = bytes
            .get(fixed + 24..(fixed + 24).saturating_add(len))
            .ok_or("a record is cut off in its name")?;
        names.push(Name {
            ino: u64_at(record, 0),
            cookie: u64_at(record, 8),
            kind: u32_at(record, 20),
            name: String::from_utf8_lossy(name).into_owned(),
            entry: plus.then(|| Entry::parse(bytes)),
        });
        // The last one may do without its padding.
        let whole = (fixed + 24 + len).next_multiple_of(8);
        bytes = bytes.get(whole..).unwrap_or_default();
    }
    Ok(names)
}

/// The handle in the body of OPEN's reply.
pub fn handle(body: &[u8]) -> u64 {
    u64_at(body, 0)
}

/// A number of four bytes at `at`.
pub fn word(body: &[u8], at: usize) -> u32 {
    u32_at(body, at)
}

/// A number of eight bytes at `at`.
pub fn long(body: &[u8], at: usize) -> u64 {
    u64_at(body, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_that_lies_about_its_lengths_is_an_error() {
        let one = Body::new()
            .u64(7)
            .u64(1)
            .u32(3)
            .u32(8)
            .bytes(b"abc\0\0\0\0\0");
        assert_eq!(listing(&one.0, false).unwrap()[0].name, "abc");
        let long = Body::new()
            .u64(7)
            .u64(1)
            .u32(30)
            .u32(8)
            .bytes(b"abc\0\0\0\0\0");
        assert!(listing(&long.0, false).is_err());
        assert!(listing(&one.0[..20], false).is_err());
        assert!(listing(&one.0, true).is_err());
    }

    #[test]
    fn a_short_reply_is_no_panic() {
        let answer = Answer::parse(0, &[1, 2, 3]);
        assert_eq!((answer.error, answer.body.len()), (0, 0));
    }
}
