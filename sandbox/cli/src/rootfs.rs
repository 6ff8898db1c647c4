//! What a machine's container starts from, for each kind of root.
//!
//! An OCI image becomes a read-only EROFS disk, kept for the next run. A directory is shared as it
//! is, read-only. Both come with an empty disk for what the container writes. A disk image is used
//! as it is. What is made for one run has no name (see `scratch`) and goes with it.

use std::path::PathBuf;

use crate::{failure::Failure, images, input::check::Root, scratch::Unnamed, signals::Signals};

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

/// Where the container's root comes from.
#[derive(Debug)]
pub(crate) enum Source {
    /// A disk with this file system.
    Disk(Disk, &'static str),
    /// A directory of this host, which stays as it is.
    Directory(PathBuf),
}

impl Source {
    /// The kind of file system, as the agent knows it.
    pub(crate) fn fs_type(&self) -> &'static str {
        match self {
            Self::Disk(_, fs_type) => fs_type,
            Self::Directory(_) => "virtiofs",
        }
    }

    /// Whether the guest changes nothing in it.
    pub(crate) fn is_read_only(&self) -> bool {
        match self {
            Self::Disk(disk, _) => disk.read_only,
            Self::Directory(_) => true,
        }
    }
}

/// What the container's root is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) source: Source,
    /// Takes what the container writes, where the source takes nothing.
    pub(crate) scratch: Option<Disk>,
    /// Keeps it there.
    _unnamed: Option<Unnamed>,
}

/// Makes what the root needs.
pub(crate) fn for_machine(root: &Root, signals: &mut Signals) -> Result<Parts, Failure> {
    let source = match root {
        Root::Oci(image) => {
            let disk = Disk {
                path: images::disk(image, signals)?,
                read_only: true,
            };
            Source::Disk(disk, "erofs")
        }
        Root::Directory(directory) => Source::Directory(directory.clone()),
        Root::Image(image) => {
            let disk = Disk {
                path: image.path.clone(),
                read_only: image.read_only,
            };
            return Ok(Parts {
                source: Source::Disk(disk, "ext4"),
                scratch: None,
                _unnamed: None,
            });
        }
    };
    let writable = Unnamed::writable(signals)?;
    Ok(Parts {
        source,
        scratch: Some(Disk {
            path: writable.path(),
            read_only: false,
        }),
        _unnamed: Some(writable),
    })
}
