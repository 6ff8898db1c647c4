//! Unpacks an image: its layers, lowest first, into one directory.
//!
//! Called by `disk` for a virtual machine's root and by whoever starts a plain container. Layers
//! are hostile: nothing in them reaches anything outside the directory (`tree`), and what they
//! unpack to is bounded. Their digests are checked on the way; the directory is complete and
//! trustworthy when [`unpack`] returns, and gone when it fails.
//!
//! As root, owners, devices, file capabilities and modes are the image's. A plain user gets all
//! files as its own, readable to itself, without devices and file capabilities.
//!
//! Of extended attributes `security.capability` and `user.*` are taken over. The others mean
//! something to the host that unpacks (security labels) or to overlayfs (`trusted.overlay.*`, with
//! which a layer could redirect lookups), and not to the container.

mod error;
mod name;
mod tree;

use std::{
    fs::{self, File},
    io::{self, Read, Write as _},
    os::{fd::AsFd as _, unix::ffi::OsStrExt as _, unix::fs::DirBuilderExt as _},
    path::Path,
};

use rustix::fs::{FileType, Mode, OFlags};

pub use error::{Problem, RootfsError};
use name::{Meaning, Name};
pub use tree::LeftOut;
use tree::{Meta, Tree};

use crate::{
    image::{Image, Layer},
    layer::{LayerReader, Mismatch},
    tar::{Archive, Kind, Member, Record, Source, TarError},
};

/// What the caller may do to files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// Give them to anybody.
    Root,
    /// Only have them.
    User,
}

/// Bounds on what an image may unpack to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of all layers' archives.
    pub bytes: u64,
    /// Entries in all layers.
    pub entries: u64,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes of all layers' archives.
    pub bytes: u64,
    /// Entries in all layers, deletions too.
    pub entries: u64,
    /// What could not be taken over.
    pub left_out: LeftOut,
    /// The latest modification time in the tree, seconds since 1970.
    pub newest: u64,
}

impl Rights {
    /// Of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        if rustix::process::geteuid().is_root() {
            Self::Root
        } else {
            Self::User
        }
    }
}

impl Default for Limits {
    /// Several times the largest images in use.
    fn default() -> Self {
        Self {
            bytes: 64 << 30,
            entries: 2_000_000,
        }
    }
}

/// Unpacks `image` into the directory `target`, which must not be there yet.
///
/// The directory above must be closed to other users: what is unpacked has set-id programs.
pub fn unpack(
    image: &Image,
    target: &Path,
    rights: Rights,
    limits: &Limits,
    should_stop: &dyn Fn() -> bool,
) -> Result<Report, RootfsError> {
    let failed = |source: io::Error| RootfsError::Target {
        path: target.to_owned(),
        source,
    };
    fs::DirBuilder::new()
        .mode(0o700)
        .create(target)
        .map_err(failed)?;
    let result = rustix::fs::open(
        target,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|root| Tree::new(root, rights))
    .map_err(|errno| failed(errno.into()))
    .and_then(|tree| Unpacking::new(tree, limits, should_stop).all(image));
    if result.is_err() {
        // The first failure is the one to report.
        let _ = remove(target);
    }
    result
}

/// Removes a directory that was unpacked. Unlike the standard library's function it can do so
/// for a plain user, whatever the modes of the directories in it.
pub fn remove(target: &Path) -> io::Result<()> {
    let name = target
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let above = match target.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    };
    tree::remove_tree(File::open(above)?.as_fd(), name.as_bytes())
}

struct Unpacking<'a> {
    tree: Tree,
    limits: &'a Limits,
    should_stop: &'a dyn Fn() -> bool,
    report: Report,
}

/// A failure within a layer, not yet said which.
enum Failed {
    Archive(TarError),
    Entry(Vec<u8>, Problem),
    Whole(RootfsError),
}

impl<'a> Unpacking<'a> {
    fn new(tree: Tree, limits: &'a Limits, should_stop: &'a dyn Fn() -> bool) -> Self {
        Self {
            tree,
            limits,
            should_stop,
            report: Report::default(),
        }
    }

    fn all(mut self, image: &Image) -> Result<Report, RootfsError> {
        for (index, layer) in image.layers().iter().enumerate() {
            self.tree.next_layer();
            let reader = LayerReader::new(layer, image.layer_blob(layer)?);
            self.layer(index + 1, layer, reader)?;
        }
        self.tree.finish().map_err(|problem| RootfsError::Entry {
            layer: image.layers().len(),
            name: "/".to_owned(),
            problem,
        })?;
        self.report.newest = self.tree.newest;
        self.report.left_out.devices += self.tree.left_out.devices;
        self.report.left_out.xattrs += self.tree.left_out.xattrs;
        Ok(self.report)
    }

    fn layer(
        &mut self,
        number: usize,
        layer: &Layer,
        reader: LayerReader,
    ) -> Result<(), RootfsError> {
        let unreadable = |source: TarError| RootfsError::Layer {
            layer: number,
            source,
        };
        let mismatch = |mismatch| match mismatch {
            Mismatch::Blob(found) => RootfsError::Damaged {
                layer: number,
                named: layer.digest,
                found,
            },
            Mismatch::Tar(found) => RootfsError::DiffId {
                layer: number,
                named: layer.diff_id,
                found,
            },
        };
        let mut archive = Archive::new(reader);
        let result = self.entries(&mut archive);
        let mut reader = archive.into_source();
        match result {
            Ok(()) => {
                self.report.bytes += reader.count();
                reader
                    .finish()
                    .map_err(|error| unreadable(error.into()))?
                    .map_err(mismatch)
            }
            Err(Failed::Whole(error)) => Err(error),
            Err(other) => {
                // Nonsense in a layer is most often a damaged file: that is the better message.
                if let Ok(Err(found)) = reader.blob_digest() {
                    return Err(mismatch(found));
                }
                Err(match other {
                    Failed::Entry(name, problem) => RootfsError::Entry {
                        layer: number,
                        name: error::shown(&name),
                        problem,
                    },
                    Failed::Archive(source) => unreadable(source),
                    Failed::Whole(error) => error,
                })
            }
        }
    }

    fn entries(&mut self, archive: &mut Archive<LayerReader>) -> Result<(), Failed> {
        while let Some(member) = archive.next().map_err(Failed::Archive)? {
            if (self.should_stop)() {
                return Err(Failed::Whole(RootfsError::Stopped));
            }
            self.report.entries += 1;
            self.hold(self.report.entries, self.limits.entries, "entries")?;
            let end = (self.report.bytes + archive.source().count()).saturating_add(member.size);
            self.hold(end, self.limits.bytes, "bytes")?;
            let name = member.name.clone();
            self.entry(member, archive).map_err(|failed| match failed {
                Failed::Entry(_, problem) => Failed::Entry(name, problem),
                other => other,
            })?;
        }
        // What follows the archive is part of what its digest is over.
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = archive
                .source()
                .read(&mut buffer)
                .map_err(|error| Failed::Archive(error.into()))?;
            if read == 0 {
                return Ok(());
            }
            self.hold(
                self.report.bytes + archive.source().count(),
                self.limits.bytes,
                "bytes",
            )?;
        }
    }

    fn hold(&self, value: u64, most: u64, what: &'static str) -> Result<(), Failed> {
        if value > most {
            return Err(Failed::Whole(RootfsError::Limit { what, most }));
        }
        Ok(())
    }

    fn entry(&mut self, member: Member, archive: &mut Archive<LayerReader>) -> Result<(), Failed> {
        let meta = self.meta(&member)?;
        let name = match Name::parse(&member.name)?.meaning()? {
            Meaning::Thing(name) => name,
            Meaning::Whiteout(name) => return Ok(self.tree.whiteout(&name)?),
            Meaning::Opaque(name) => return Ok(self.tree.opaque(&name)?),
            Meaning::Nothing => return Ok(()),
        };
        match member.kind {
            Kind::Directory => self.tree.directory(&name, &meta)?,
            Kind::File => {
                let (place, fd) = self.tree.file(&name)?;
                let mut file = File::from(fd);
                self.copy(archive, &mut file)?;
                self.tree.close_file(&place, &file.into(), &meta)?;
            }
            Kind::Symlink => self.tree.symlink(&name, &member.link, &meta)?,
            Kind::HardLink => {
                let target = Name::parse(&member.link).map_err(|problem| match problem {
                    Problem::Outside => Problem::LinkOutside(error::shown(&member.link)),
                    _ => Problem::Link(error::shown(&member.link)),
                })?;
                self.tree.hard_link(&name, &target)?;
            }
            Kind::Fifo => self.tree.fifo(&name, &meta)?,
            Kind::Char => {
                self.tree
                    .device(&name, FileType::CharacterDevice, member.device, &meta)?;
            }
            Kind::Block => {
                self.tree
                    .device(&name, FileType::BlockDevice, member.device, &meta)?;
            }
        }
        Ok(())
    }

    fn copy(&self, archive: &mut Archive<LayerReader>, file: &mut File) -> Result<(), Failed> {
        let mut buffer = vec![0; 128 << 10];
        loop {
            let read = archive
                .read(&mut buffer)
                .map_err(|error| Failed::Archive(error.into()))?;
            if read == 0 {
                return Ok(());
            }
            file.write_all(&buffer[..read])
                .map_err(|source| Problem::Kernel {
                    what: "write the file",
                    source,
                })?;
            if (self.should_stop)() {
                return Err(Failed::Whole(RootfsError::Stopped));
            }
        }
    }

    fn meta(&mut self, member: &Member) -> Result<Meta, Problem> {
        // The largest number means "leave it" to the kernel.
        let id = |id: u64, what| {
            let id = u32::try_from(id).ok().filter(|&id| id != u32::MAX);
            id.ok_or(Problem::Id(what))
        };
        let wanted =
            |(key, _): &&Record| key == b"security.capability" || key.starts_with(b"user.");
        let xattrs: Vec<_> = member.xattrs.iter().filter(wanted).cloned().collect();
        self.report.left_out.xattrs += (member.xattrs.len() - xattrs.len()) as u64;
        Ok(Meta {
            mode: member.mode,
            uid: id(member.uid, "owner")?,
            gid: id(member.gid, "group")?,
            mtime: member.mtime,
            xattrs,
        })
    }
}

impl Source for LayerReader {}

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Self {
        Self::Entry(Vec::new(), problem)
    }
}

#[cfg(test)]
mod tests;
