//! What can be wrong with an image before any of it is unpacked.
//!
//! Each message names the file, what it says, the rule and what to do about it: the command line
//! prints it as it is.

use std::{io, path::PathBuf};

use thiserror::Error;

use crate::{
    digest::{Digest, DigestError},
    tar::TarError,
};

/// An image that cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file or directory cannot be read.
    #[error("'{path}' cannot be read: {source}", path = path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The archive the image is in.
    #[error("'{path}' cannot be read: {source}; copy or save the image again", path = path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: TarError,
    },
    /// Neither form of image.
    #[error(
        "'{path}' is no OCI image: it is {what}; make one with `skopeo copy SOURCE oci-archive:NEW.tar` \
         or `podman save --format oci-archive`", path = path.display()
    )]
    NotAnImage {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// The whole archive is compressed: blobs could not be found in it without unpacking it.
    #[error(
        "'{path}' is compressed with {how} as a whole; unpack it first: `{cure} {path}`", path = path.display()
    )]
    Compressed {
        /// The file.
        path: PathBuf,
        /// The compression.
        how: &'static str,
        /// The program that undoes it.
        cure: &'static str,
    },
    /// The old format of `docker save`.
    #[error(
        "'{path}' is in docker's own format (manifest.json and no index.json), which has no digests to \
         check; convert it: `skopeo copy docker-archive:{path} oci-archive:NEW.tar`", path = path.display()
    )]
    DockerArchive {
        /// The file.
        path: PathBuf,
    },
    /// A layout of a version that does not exist yet.
    #[error("the image's oci-layout says version '{0}'; 1.0.0 is the one there is")]
    Version(String),
    /// A part is missing.
    #[error("the image has no {0}; it was not copied whole, so copy or save it again")]
    Missing(String),
    /// JSON of a size no honest image has.
    #[error("{what} has {size} bytes; at most {most} are read")]
    TooLarge {
        /// Which document.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        most: u64,
    },
    /// Too many of something.
    #[error("the image has more than {most} {what}; no honest image has")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        most: usize,
    },
    /// A document that does not say what it must.
    #[error("{what} is not what the OCI image specification describes: {source}")]
    Json {
        /// Which document.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A name that is no digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// The bytes of a blob are others than its name says.
    #[error(
        "{what} {named} is damaged: its content has digest {found}; copy or save the image again"
    )]
    Damaged {
        /// What the blob is.
        what: &'static str,
        /// The digest it is named by.
        named: Digest,
        /// The digest it has.
        found: Digest,
    },
    /// The size of a blob is another than its descriptor says.
    #[error("{what} {digest} has {found} bytes and not {named}; copy or save the image again")]
    Size {
        /// What the blob is.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// In the descriptor.
        named: u64,
        /// In fact.
        found: u64,
    },
    /// Several images and no word about which.
    #[error(
        "'{path}' holds several images: {names}; say which with {path}:NAME", path = path.display()
    )]
    Several {
        /// The file.
        path: PathBuf,
        /// Their names.
        names: String,
    },
    /// No image of that name.
    #[error("'{path}' holds no image '{wanted}'; it holds: {names}", path = path.display())]
    NoSuch {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        wanted: String,
        /// The names there are.
        names: String,
    },
    /// Only for other machines.
    #[error(
        "the image is for {found}; only linux/amd64 runs here: build or pull it for that platform"
    )]
    Platform {
        /// The platforms there are.
        found: String,
    },
    /// Something we cannot read.
    #[error("the image's {what} has media type '{media_type}'; {rule}")]
    MediaType {
        /// Which part.
        what: &'static str,
        /// Its media type.
        media_type: String,
        /// What is read.
        rule: &'static str,
    },
    /// Manifest and configuration disagree.
    #[error(
        "the image's manifest has {layers} layers and its configuration {diff_ids}; the two belong to \
         different images"
    )]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
}
