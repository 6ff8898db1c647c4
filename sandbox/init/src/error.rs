//! What can go wrong in the guest, as the host will print it.

use std::{io, path::PathBuf};

use pericarp_protocol::{FrameError, SpecError, WindowError};
use thiserror::Error;

/// Any failure of the guest's first process.
#[derive(Debug, Error)]
pub(crate) enum InitError {
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
    #[error("the kernel module '{}' cannot be loaded: {source}", .path.display())]
    Module { path: PathBuf, source: io::Error },
    #[error("the host's channel '{}' is missing", pericarp_protocol::PORT_NAME)]
    NoChannel,
    #[error("the host closed its channel")]
    HostGone,
    #[error("the host sent {0}")]
    Frame(#[from] FrameError),
    #[error("the host sent {0}")]
    Window(#[from] WindowError),
    #[error("the host sent a frame that has no place here")]
    Unexpected,
    #[error("{0}")]
    Spec(#[from] SpecError),
    #[error("the disk '{0}' did not appear; its backend must report that serial")]
    NoDisk(String),
    #[error("the root disk holds no ext4 file system that can be mounted: {0}")]
    Root(io::Error),
    #[error(
        "the root disk's file system was not unmounted cleanly and is to be used read-only: \
         run e2fsck on the image, or use it without ':ro' once"
    )]
    RootNeedsRecovery,
    #[error("the root file system has no directory '{0}', and is read-only")]
    NoDirectory(String),
    #[error("the directory '{0}' to start in is missing in the root file system")]
    NoWorkingDirectory(String),
    #[error("'{0}': no such program in the root file system")]
    NotFound(String),
    #[error("'{program}' cannot be executed: {source}")]
    NotExecutable { program: String, source: io::Error },
    #[error("the disk '{disk}' could not be flushed: {source}")]
    Flush { disk: String, source: io::Error },
}

/// Names what was tried.
pub(crate) fn during<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> InitError {
    move |source| InitError::System {
        what: what.into(),
        source: source.into(),
    }
}
