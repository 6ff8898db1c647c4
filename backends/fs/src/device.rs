//! The virtio-fs device (virtio 1.3, 5.11).

use std::os::fd::OwnedFd;

use pericarp_ring::{Chain, ChainError};
use pericarp_share::Share;
use pericarp_vhost::{ConfigRefused, Device, Step};

/// Bytes of a tag.
pub const MAX_TAG: usize = 36;

/// What guests may keep of a directory, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Nothing: every look asks again.
    Never,
    /// Names and attributes for a second, data until a file is opened anew.
    #[default]
    Auto,
    /// All, for good: nobody else changes the directory.
    Always,
}

/// How a directory is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settings {
    /// What guests may keep.
    pub cache: Cache,
    /// Guests may keep written data, too, and write it later.
    pub writeback: bool,
    /// The host keeps no pages of what guests read and write (RWF_DONTCACHE).
    pub dont_cache: bool,
}

/// One request in flight.
#[derive(Debug, Default)]
pub struct Request {}

/// A virtio-fs device over one directory.
#[derive(Debug)]
pub struct FsDevice {
    share: Share,
    tag: [u8; MAX_TAG],
    /// Request queues; the high priority queue comes before them.
    queues: u16,
    queue_size: u16,
    settings: Settings,
}

impl FsDevice {
    /// A device that guests mount as `tag`, 1 to [`MAX_TAG`] bytes, with so many
    /// request queues of at most `queue_size` descriptors.
    pub fn new(share: Share, tag: &str, queues: u16, queue_size: u16, settings: Settings) -> Self {
        let mut bytes = [0; MAX_TAG];
        let length = tag.len().min(MAX_TAG);
        bytes[..length].copy_from_slice(&tag.as_bytes()[..length]);
        Self {
            share,
            tag: bytes,
            queues,
            queue_size,
            settings,
        }
    }
}

impl Device for FsDevice {
    type Request = Request;

    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> u16 {
        self.queues + 1
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        config.extend(u32::from(self.queues).to_le_bytes());
        config
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), ConfigRefused> {
        let end = offset.saturating_add(bytes.len());
        Err(ConfigRefused { offset, end })
    }

    fn negotiated(&self, _features: u64) {}

    fn files(&self) -> &[OwnedFd] {
        &[]
    }

    fn start(
        &self,
        _loaded: Result<(), ChainError>,
        _chain: Chain<'_>,
        _request: &mut Request,
    ) -> Step {
        let _ = (&self.share, self.settings);
        Step::Done { written: 0 }
    }

    fn resume(&self, _chain: Chain<'_>, _request: &mut Request, _result: i32) -> Step {
        Step::Done { written: 0 }
    }
}
