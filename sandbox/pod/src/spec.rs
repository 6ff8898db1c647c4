//! What the machine is told of the devices that its sidecars serve.

use pericarp_hypervisor::{CardSpec, DiskSpec, ShareSpec};

use crate::sidecar::{CARD_QUEUE_SIZE, Card, Device, Share};

const DISK_QUEUE_SIZE: u16 = 128;
/// A request for a megabyte of a share takes 256 descriptors and a few.
const SHARE_QUEUE_SIZE: u16 = 1024;

/// A disk.
#[must_use]
pub fn disk_spec(device: &Device) -> DiskSpec {
    DiskSpec {
        id: device.id.clone(),
        socket: device.socket.clone(),
        num_queues: device.queues,
        queue_size: DISK_QUEUE_SIZE,
    }
}

/// A directory; its id is its tag.
#[must_use]
pub fn share_spec(share: &Share) -> ShareSpec {
    ShareSpec {
        id: share.id.clone(),
        socket: share.socket.clone(),
        tag: share.id.clone(),
        num_queues: share.queues,
        queue_size: SHARE_QUEUE_SIZE,
    }
}

/// A network card.
#[must_use]
pub fn card_spec(card: &Card) -> CardSpec {
    CardSpec {
        id: card.id.clone(),
        socket: card.socket.clone(),
        mac: card.mac,
        queue_pairs: u16::try_from(card.queues.len()).unwrap_or(1),
        queue_size: CARD_QUEUE_SIZE,
    }
}
