//! Why layers could not be unpacked, with the layer and the entry it happened at.
//!
//! Printed as it is by the command line. Names in it come from the image: they are escaped and
//! cut.

use std::{io, path::PathBuf};

use thiserror::Error;

use crate::{digest::Digest, image::ImageError, tar::TarError};

/// Layers that could not be unpacked.
#[derive(Debug, Error)]
pub enum RootfsError {
    /// A layer is not there any more.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A layer cannot be decompressed or is no tar.
    #[error("layer {layer} of the image cannot be read: {source}")]
    Layer {
        /// Counted from 1, the lowest.
        layer: usize,
        /// Why not.
        source: TarError,
    },
    /// A layer's blob is not what it is named by.
    #[error(
        "layer {layer} of the image, {named}, is damaged: its content has digest {found}; copy or \
         save the image again"
    )]
    Damaged {
        /// Counted from 1.
        layer: usize,
        /// Its name.
        named: Digest,
        /// Its digest.
        found: Digest,
    },
    /// The tar in a layer is not what the configuration names.
    #[error(
        "layer {layer} of the image holds a tar with digest {found} where its configuration says \
         {named}; the image was put together wrongly, build it again"
    )]
    DiffId {
        /// Counted from 1.
        layer: usize,
        /// In the configuration.
        named: Digest,
        /// In fact.
        found: Digest,
    },
    /// One entry cannot be unpacked.
    #[error("layer {layer} of the image, entry '{name}': {problem}")]
    Entry {
        /// Counted from 1.
        layer: usize,
        /// Its name, printable.
        name: String,
        /// What is wrong with it.
        problem: Problem,
    },
    /// More than the caller allows.
    #[error("the image unpacks to more than {most} {what}, which is the limit")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The limit.
        most: u64,
    },
    /// The directory to unpack into.
    #[error("'{path}' cannot be used to unpack an image into: {source}", path = path.display())]
    Target {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The caller does not want to go on.
    #[error("stopped while unpacking the image")]
    Stopped,
}

/// What is wrong with an entry.
#[derive(Debug, Error)]
pub enum Problem {
    /// A name that leads out.
    #[error("its name leads outside with '..'; an image that tries this is not to be trusted")]
    Outside,
    /// The same for a hard link's target.
    #[error(
        "it links to '{0}', outside of the image; an image that tries this is not to be trusted"
    )]
    LinkOutside(String),
    /// A name no file can have.
    #[error("its name {0}")]
    Name(&'static str),
    /// A directory on the way is none.
    #[error("'{0}' on its way is no directory but a file, or a symbolic link to nothing")]
    Way(String),
    /// A hard link to nothing, or to a directory.
    #[error("it links to '{0}', which is not there or is a directory")]
    Link(String),
    /// A number the kernel has no room for.
    #[error("its {0} is larger than 4294967294")]
    Id(&'static str),
    /// Device numbers.
    #[error("its device number is larger than Linux knows")]
    Device,
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl Problem {
    pub(super) fn kernel(what: &'static str) -> impl Fn(rustix::io::Errno) -> Self {
        move |source| Self::Kernel {
            what,
            source: source.into(),
        }
    }
}

/// Bytes from an image, safe to print on a terminal and not endless.
pub(super) fn shown(name: &[u8]) -> String {
    let most = name.len().min(200);
    let text = name[..most].escape_ascii().to_string();
    if most < name.len() {
        text + "..."
    } else {
        text
    }
}
