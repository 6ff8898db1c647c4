//! Where the blobs are: a directory with an OCI layout, or a tar of one.
//!
//! Used by `image`. Gives out files and spans of a file by name; knows nothing of what is in them.
//! An archive is read through once for the positions of its members and never unpacked.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    rc::Rc,
};

use crate::{
    digest::Digest,
    image::error::ImageError,
    tar::{Archive, Kind, Source, TarError},
};

/// Members of an archive; an image has a few more than it has layers.
const MOST_MEMBERS: usize = 16_384;

/// Where to find a file of the layout by its name in it.
#[derive(Debug)]
pub(crate) enum Store {
    Directory(PathBuf),
    Archive {
        file: Rc<File>,
        members: HashMap<String, (u64, u64)>,
    },
}

/// Part of a file.
#[derive(Debug)]
pub(crate) struct Span {
    file: Rc<File>,
    at: u64,
    left: u64,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Read {
            path: path.to_owned(),
            source,
        };
        let meta = std::fs::metadata(path).map_err(failed)?;
        if meta.is_dir() {
            return if path.join("index.json").exists() {
                Ok(Self::Directory(path.to_owned()))
            } else {
                Err(ImageError::NotAnImage {
                    path: path.to_owned(),
                    what: "a directory without an index.json",
                })
            };
        }
        let file = regular(path).map_err(failed)?;
        let mut start = [0; 512];
        let read = read_start(&file, &mut start).map_err(failed)?;
        if let Some((how, cure)) = compression(&start[..read]) {
            return Err(ImageError::Compressed {
                path: path.to_owned(),
                how,
                cure,
            });
        }
        // Every tar since 1988 has the magic; ours and everybody's builders write it.
        if read < 512 || &start[257..262] != b"ustar" {
            return Err(ImageError::NotAnImage {
                path: path.to_owned(),
                what: "neither a directory nor a tar archive",
            });
        }
        let members = members(&file, path)?;
        if !members.contains_key("index.json") {
            return Err(if members.contains_key("manifest.json") {
                ImageError::DockerArchive {
                    path: path.to_owned(),
                }
            } else {
                ImageError::NotAnImage {
                    path: path.to_owned(),
                    what: "a tar archive without an index.json at its top",
                }
            });
        }
        Ok(Self::Archive {
            file: Rc::new(file),
            members,
        })
    }

    /// The file `name`, `None` when it is not there.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Span>, ImageError> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(name);
                match regular(&path).and_then(|file| Ok((file.metadata()?.len(), file))) {
                    Ok((left, file)) => Ok(Some(Span {
                        file: Rc::new(file),
                        at: 0,
                        left,
                    })),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(source) => Err(ImageError::Read { path, source }),
                }
            }
            Self::Archive { file, members } => Ok(members.get(name).map(|&(at, left)| Span {
                file: Rc::clone(file),
                at,
                left,
            })),
        }
    }

    /// The blob, of the size its descriptor says.
    pub(crate) fn blob(
        &self,
        what: &'static str,
        digest: Digest,
        size: u64,
    ) -> Result<Span, ImageError> {
        let span = self
            .find(&format!("blobs/sha256/{}", digest.hex()))?
            .ok_or_else(|| ImageError::Missing(format!("{what} {digest}")))?;
        if span.left != size {
            return Err(ImageError::Size {
                what,
                digest,
                named: size,
                found: span.left,
            });
        }
        Ok(span)
    }
}

impl Span {
    pub(crate) fn len(&self) -> u64 {
        self.left
    }
}

impl Read for Span {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut into[..most], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

/// A file that has an end: a pipe in its place must not block us.
fn regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is not a regular file"))
    }
}

fn read_start(file: &File, into: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match file.read_at(&mut into[filled..], filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

fn compression(start: &[u8]) -> Option<(&'static str, &'static str)> {
    [
        (&b"\x1f\x8b"[..], "gzip", "gunzip"),
        (&b"\x28\xb5\x2f\xfd"[..], "zstd", "unzstd"),
        (&b"\xfd7zXZ"[..], "xz", "unxz"),
        (&b"BZh"[..], "bzip2", "bunzip2"),
    ]
    .into_iter()
    .find(|(magic, ..)| start.starts_with(magic))
    .map(|(_, how, cure)| (how, cure))
}

/// Positions and sizes of an archive's regular members. Of two of one name the last counts, as for
/// whoever unpacks it.
fn members(file: &File, path: &Path) -> Result<HashMap<String, (u64, u64)>, ImageError> {
    let failed = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let size = file.metadata().map_err(failed)?.len();
    let mut archive = Archive::new(Within { file, at: 0, size });
    let mut found = HashMap::new();
    loop {
        let member = archive.next().map_err(|source| ImageError::Archive {
            path: path.to_owned(),
            source,
        })?;
        let Some(member) = member else {
            return Ok(found);
        };
        if member.kind != Kind::File {
            continue;
        }
        let at = archive.source().at;
        if at.checked_add(member.size).is_none_or(|end| end > size) {
            return Err(ImageError::Archive {
                path: path.to_owned(),
                source: TarError::Cut,
            });
        }
        let name = String::from_utf8_lossy(&member.name).into_owned();
        let name = name.strip_prefix("./").unwrap_or(&name).to_owned();
        found.insert(name, (at, member.size));
        if found.len() > MOST_MEMBERS {
            return Err(ImageError::TooMany {
                what: "files in its archive",
                most: MOST_MEMBERS,
            });
        }
    }
}

/// A file read at its own position, so that others may read it too.
struct Within<'a> {
    file: &'a File,
    at: u64,
    size: u64,
}

impl Read for Within<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(into, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Source for Within<'_> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        self.at = self
            .at
            .checked_add(bytes)
            .filter(|&at| at <= self.size)
            .ok_or_else(|| io::Error::other(TarError::Cut))?;
        Ok(())
    }
}
