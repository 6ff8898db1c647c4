//! Commands of the control queue (virtio 1.3, 5.1.6.5). A front end that keeps the
//! queue to itself, as QEMU does, passes none on.

use pericarp_ring::Chain;

/// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const PAIRS_SET: [u8; 2] = [4, 0];
/// VIRTIO_NET_CTRL_GUEST_OFFLOADS and VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
const OFFLOADS_SET: [u8; 2] = [5, 0];

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Use so many pairs of queues.
    Pairs(u16),
    /// Send packets that make use of these features alone.
    Offloads(u64),
}

impl Wish {
    /// Reads a command; `None` where it is none of these.
    pub(crate) fn read(chain: &mut Chain<'_>) -> Option<Self> {
        let mut command = [0; 2];
        if !chain.read(&mut command) {
            return None;
        }
        match command {
            PAIRS_SET => {
                let mut pairs = [0; 2];
                chain
                    .read(&mut pairs)
                    .then(|| Self::Pairs(u16::from_le_bytes(pairs)))
            }
            OFFLOADS_SET => {
                let mut offloads = [0; 8];
                chain
                    .read(&mut offloads)
                    .then(|| Self::Offloads(u64::from_le_bytes(offloads)))
            }
            _ => None,
        }
    }
}
