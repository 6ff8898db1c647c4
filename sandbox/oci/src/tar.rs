//! Reads tar archives: an image's own, and the one in each layer.
//!
//! Used by `image::store` and `rootfs`. Understands what image builders write: ustar, the long names
//! of GNU, the extended records of pax with attributes in them. Everything else (sparse files,
//! multi-volume archives) is an error, never a guess, and what an archive makes us keep in memory
//! is bounded. The `tar` crate is the oracle of the tests; it splits extended records at line ends,
//! and a file capability is free to contain one.

use std::io::{self, Read};

use thiserror::Error;

const BLOCK: usize = 512;
/// Extended headers and long names of one member.
const MOST_EXTRA: u64 = 1 << 20;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Why an archive cannot be read.
#[derive(Debug, Error)]
pub enum TarError {
    /// What it is read from failed.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// It ends within a member.
    #[error("the archive is cut off")]
    Cut,
    /// Not a header where one has to be.
    #[error("a header's checksum is wrong; the archive is damaged or no tar")]
    Checksum,
    /// A header with something else than a number in a number's place.
    #[error("a header's {0} is not a number that fits")]
    Number(&'static str),
    /// An extended header that cannot be taken apart.
    #[error("an extended header is malformed")]
    Record,
    /// More about one member than we keep.
    #[error("the extended headers of one member are longer than 1 MiB")]
    TooLong,
    /// A member with holes.
    #[error("a member is stored sparsely, which no image builder does")]
    Sparse,
    /// A member of no known type, or one that cannot have content and has.
    #[error("a member has type '{}' and {size} bytes of content, which makes no sense", kind.escape_ascii())]
    Kind {
        /// The type as stored.
        kind: u8,
        /// Its size.
        size: u64,
    },
    /// An end that is none.
    #[error("there is something behind the archive's end mark")]
    Trailer,
}

/// What an archive is read from.
pub(crate) trait Source: Read {
    /// Leaves bytes out.
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        if io::copy(&mut self.take(bytes), &mut io::sink())? < bytes {
            return Err(io::Error::other(TarError::Cut));
        }
        Ok(())
    }
}

impl Source for &[u8] {}

/// Key and value of an extended record, or of an attribute.
pub(crate) type Record = (Vec<u8>, Vec<u8>);

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Directory,
    Fifo,
}

/// All that is said about a member, names not yet checked for anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) kind: Kind,
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Seconds and nanoseconds; what is before 1970 counts as 1970.
    pub(crate) mtime: (u64, u32),
    pub(crate) device: (u64, u64),
    pub(crate) xattrs: Vec<Record>,
}

/// An archive read from its beginning to its end.
pub(crate) struct Archive<S> {
    from: S,
    /// Content of the current member not yet read, and the filling after it.
    left: u64,
    filling: u64,
}

/// What comes before a member's own header.
#[derive(Default)]
struct Extra {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<Record>,
}

impl<S: Source> Archive<S> {
    pub(crate) fn new(from: S) -> Self {
        Self {
            from,
            left: 0,
            filling: 0,
        }
    }

    pub(crate) fn source(&mut self) -> &mut S {
        &mut self.from
    }

    pub(crate) fn into_source(self) -> S {
        self.from
    }

    /// The next member; its content is read from the archive itself.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, TarError> {
        let mut extra = Extra::default();
        let mut extra_left = MOST_EXTRA;
        let mut described = false;
        loop {
            self.from.skip(self.left + self.filling)?;
            (self.left, self.filling) = (0, 0);
            let Some(header) = self.header()? else {
                // What was announced never came.
                return if described {
                    Err(TarError::Cut)
                } else {
                    Ok(None)
                };
            };
            let size = header.number(124, 12, "size")?;
            let kind = header.0[156];
            match kind {
                b'x' | b'g' | b'L' | b'K' => {
                    let text = self.extra(size, &mut extra_left)?;
                    match kind {
                        b'x' => extra.records.extend(records(&text)?),
                        b'L' => extra.name = Some(until_nul(&text).to_vec()),
                        b'K' => extra.link = Some(until_nul(&text).to_vec()),
                        // Defaults for all that follows: nobody but git writes them, a comment.
                        _ => drop(records(&text)?),
                    }
                    described |= kind != b'g';
                }
                b'S' => return Err(TarError::Sparse),
                _ => {
                    let member = header.member(kind, size, extra)?;
                    self.begin(member.size);
                    return Ok(Some(member));
                }
            }
        }
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.filling = size.wrapping_neg() % BLOCK as u64;
    }

    /// `None` at the end.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block == [0; BLOCK] {
            // Two such blocks are the end. One alone has been seen at the end of a file.
            return match self.block()? {
                Some(block) if block != [0; BLOCK] => Err(TarError::Trailer),
                _ => Ok(None),
            };
        }
        let header = Header(block);
        header.check()?;
        Ok(Some(header))
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.from.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Cut),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(block))
    }

    /// The content of an extended header.
    fn extra(&mut self, size: u64, left: &mut u64) -> Result<Vec<u8>, TarError> {
        *left = left.checked_sub(size).ok_or(TarError::TooLong)?;
        self.begin(size);
        let mut text = Vec::new();
        self.read_to_end(&mut text)?;
        Ok(text)
    }
}

impl<S: Source> Read for Archive<S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.from.read(&mut into[..most])?;
        if read == 0 && most > 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                TarError::Cut.to_string(),
            ));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

struct Header([u8; BLOCK]);

impl Header {
    fn check(&self) -> Result<(), TarError> {
        let stored = self.number(148, 8, "checksum")?;
        // Once upon a time some added the bytes up as signed numbers.
        let sums = self
            .0
            .iter()
            .enumerate()
            .fold((0_i64, 0_i64), |sums, (at, &byte)| {
                let byte = if (148..156).contains(&at) { b' ' } else { byte };
                (
                    sums.0 + i64::from(byte),
                    sums.1 + i64::from(byte.cast_signed()),
                )
            });
        let stored = i64::try_from(stored).map_err(|_| TarError::Checksum)?;
        if stored == sums.0 || stored == sums.1 {
            Ok(())
        } else {
            Err(TarError::Checksum)
        }
    }

    fn text(&self, at: usize, length: usize) -> &[u8] {
        until_nul(&self.0[at..at + length])
    }

    fn number(&self, at: usize, length: usize, what: &'static str) -> Result<u64, TarError> {
        let field = &self.0[at..at + length];
        if field[0] & 0x80 != 0 {
            // Two's complement over the whole field without its first bit.
            let negative = field[0] & 0x40 != 0;
            if negative {
                return if what == "time" {
                    Ok(0)
                } else {
                    Err(TarError::Number(what))
                };
            }
            let mut value = u64::from(field[0] & 0x3f);
            for &byte in &field[1..] {
                value = value
                    .checked_mul(256)
                    .ok_or(TarError::Number(what))?
                    .wrapping_add(byte.into());
            }
            return Ok(value);
        }
        let digits = until_nul(field).trim_ascii();
        digits.iter().try_fold(0_u64, |value, digit| {
            let digit = digit.wrapping_sub(b'0');
            if digit > 7 {
                return Err(TarError::Number(what));
            }
            let value = value.checked_mul(8).ok_or(TarError::Number(what))?;
            Ok(value + u64::from(digit))
        })
    }

    fn name(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        let prefix = match (&self.0[257..263], &self.0[508..]) {
            (b"ustar\0", b"tar\0") => self.text(345, 131),
            (b"ustar\0", _) => self.text(345, 155),
            _ => &[],
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    fn member(&self, kind: u8, size: u64, extra: Extra) -> Result<Member, TarError> {
        let has_devices = self.0[257..262] == *b"ustar" && matches!(kind, b'3' | b'4');
        let device = |at, what| {
            if has_devices {
                self.number(at, 8, what)
            } else {
                Ok(0)
            }
        };
        let mode = self.number(100, 8, "mode")?;
        let mut member = Member {
            kind: Kind::File,
            name: self.name(),
            link: self.text(157, 100).to_vec(),
            size,
            mode: u32::try_from(mode & 0o7777).unwrap_or_default(),
            uid: self.number(108, 8, "owner")?,
            gid: self.number(116, 8, "group")?,
            mtime: (self.number(136, 12, "time")?, 0),
            device: (device(329, "device number")?, device(337, "device number")?),
            xattrs: Vec::new(),
        };
        member.extend(extra.records)?;
        if let Some(name) = extra.name {
            member.name = name;
        }
        if let Some(link) = extra.link {
            member.link = link;
        }
        member.kind = match (kind, member.size) {
            // From before there were types.
            (b'\0' | b'0', 0) if member.name.ends_with(b"/") => Kind::Directory,
            (b'\0' | b'0' | b'7', _) => Kind::File,
            (b'1', 0) => Kind::HardLink,
            (b'2', 0) => Kind::Symlink,
            (b'3', 0) => Kind::Char,
            (b'4', 0) => Kind::Block,
            (b'5', 0) => Kind::Directory,
            (b'6', 0) => Kind::Fifo,
            (kind, size) => return Err(TarError::Kind { kind, size }),
        };
        Ok(member)
    }
}

impl Member {
    /// Takes over what extended records say. An empty value withdraws what came before.
    fn extend(&mut self, records: Vec<Record>) -> Result<(), TarError> {
        for (key, value) in records {
            if let Some(name) = key.strip_prefix(XATTR) {
                self.xattrs.retain(|(other, _)| other != name);
                self.xattrs.push((name.to_vec(), value));
                continue;
            }
            if key.starts_with(b"GNU.sparse.") {
                return Err(TarError::Sparse);
            }
            if value.is_empty() {
                continue;
            }
            match &key[..] {
                b"path" => self.name = value,
                b"linkpath" => self.link = value,
                b"size" => self.size = decimal(&value).ok_or(TarError::Number("size"))?,
                b"uid" => self.uid = decimal(&value).ok_or(TarError::Number("owner"))?,
                b"gid" => self.gid = decimal(&value).ok_or(TarError::Number("group"))?,
                b"mtime" => self.mtime = time(&value).ok_or(TarError::Number("time"))?,
                _ => {}
            }
        }
        Ok(())
    }
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn decimal(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn time(text: &[u8]) -> Option<(u64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let seconds = decimal(parts.next()?).filter(|_| !text.is_empty())?;
    let mut fraction = parts.next().unwrap_or_default().to_vec();
    fraction.resize(9, b'0');
    let nanoseconds = u32::try_from(decimal(&fraction)?).ok()?;
    Some(if negative {
        (0, 0)
    } else {
        (seconds, nanoseconds)
    })
}

/// The records of an extended header: `LENGTH KEY=VALUE\n`, the length being that of all of it.
fn records(mut text: &[u8]) -> Result<Vec<Record>, TarError> {
    let mut found = Vec::new();
    while !text.is_empty() {
        let space = text.iter().position(|&byte| byte == b' ');
        let record = space
            .and_then(|space| {
                let length = usize::try_from(decimal(&text[..space])?).ok()?;
                let (record, rest) = text.split_at_checked(length)?;
                let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
                let equals = record.iter().position(|&byte| byte == b'=')?;
                text = rest;
                Some((record[..equals].to_vec(), record[equals + 1..].to_vec()))
            })
            .filter(|(key, _)| !key.is_empty() && !key.contains(&0))
            .ok_or(TarError::Record)?;
        found.push(record);
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
