//! Whether a disk's device can be polled, asked at open where the operator wants
//! it: [`super::Disk::open`] calls this before the program confines itself.
//!
//! The device says whether it has poll queues, and one polled read shows that
//! all that lies between, the file system above all, passes it on.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use pericarp_uring::try_polling;
use thiserror::Error;

use super::topology::of_queue;

/// Why a disk cannot be polled: the rule and the cure.
#[derive(Debug, Error)]
pub enum NoPolling {
    /// btrfs, overlayfs, network and memory file systems.
    #[error(
        "it lies on no block device that could be polled: use one with poll queues, \
         or leave iopoll out"
    )]
    NoDevice,
    /// The driver made no poll queues.
    #[error(
        "its block device {major}:{minor} has no poll queues (queue/io_poll is 0): have its driver \
         make some, as with nvme.poll_queues=2 on the kernel's command line, or leave iopoll out"
    )]
    NoQueues {
        /// Of the device.
        major: u32,
        /// Of the device.
        minor: u32,
    },
    /// The file system or the kernel knows no polled I/O.
    #[error("a polled read of it failed ({0}): use another file system, or leave iopoll out")]
    Failed(#[source] io::Error),
}

pub(super) fn probe(file: &File, block: u32) -> Result<(), NoPolling> {
    let found = file.metadata().map_err(NoPolling::Failed)?;
    let device = if found.file_type().is_block_device() {
        found.rdev()
    } else {
        found.dev()
    };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    match of_queue(device, "io_poll") {
        None => Err(NoPolling::NoDevice),
        Some(0) => Err(NoPolling::NoQueues { major, minor }),
        Some(_) => try_polling(file.as_raw_fd(), block).map_err(NoPolling::Failed),
    }
}
