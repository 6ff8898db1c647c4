//! What this monitor must know of a kind of device, and it is not much: how many
//! queues a driver expects, and whose the configuration is. Everything else is
//! between the driver and the backend. Used when a device is made.

use crate::virtio::function::QUEUES_MAX;

/// Virtio device ids (virtio 1.3, 5).
pub const NET: u16 = 1;
/// Block.
pub const BLOCK: u16 = 2;
/// Sockets between host and guest.
pub const VSOCK: u16 = 19;
/// A shared directory.
pub const FS: u16 = 26;

/// VIRTIO_BLK_F_MQ.
const BLOCK_MQ: u64 = 1 << 12;
/// VIRTIO_NET_F_MAC.
const NET_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_CTRL_VQ.
const NET_CONTROL: u64 = 1 << 17;
/// VIRTIO_NET_F_MQ.
const NET_MQ: u64 = 1 << 22;

/// Bytes of a share's tag.
pub const TAG: usize = 36;

/// What an operator says of a device besides where its backend is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A disk.
    Disk,
    /// A shared directory under this name. Without one the backend has it.
    Fs {
        /// What the guest mounts.
        tag: Option<String>,
    },
    /// A network card with this address. Without one the backend has it.
    Net {
        /// Of the card.
        mac: Option<[u8; 6]>,
    },
    /// Sockets, with this address of the guest. Without one the backend has it.
    Vsock {
        /// Context id.
        cid: Option<u64>,
    },
    /// Anything else.
    Other {
        /// Virtio device id.
        id: u16,
        /// Bytes of its configuration.
        config_size: u32,
    },
}

/// What a backend says of itself.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// Its features.
    pub features: u64,
    /// Queues it can serve.
    pub queues: usize,
    /// The configuration, if it gives one.
    pub config: Option<Vec<u8>>,
}

/// What the guest is shown of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Features.
    pub features: u64,
    /// Queues, of which the first ones are the backend's.
    pub queues: usize,
    /// Configuration.
    pub config: Vec<u8>,
}

impl Kind {
    /// Its virtio id.
    pub fn id(&self) -> u16 {
        match self {
            Self::Disk => BLOCK,
            Self::Fs { .. } => FS,
            Self::Net { .. } => NET,
            Self::Vsock { .. } => VSOCK,
            Self::Other { id, .. } => *id,
        }
    }

    /// Bytes of configuration to ask the backend for.
    pub fn config_size(&self) -> u32 {
        match self {
            // struct virtio_blk_config up to the zones, which backends of 2022 do not know.
            Self::Disk => 60,
            Self::Fs { .. } => (TAG + 4) as u32,
            // Address, status, pairs and MTU.
            Self::Net { .. } => 12,
            Self::Vsock { .. } => 8,
            Self::Other { config_size, .. } => *config_size,
        }
    }

    /// Features that the guest is shown whether or not the backend knows of them, and
    /// that it is not told of.
    pub fn features_of_ours(&self) -> u64 {
        match self {
            Self::Net { mac: Some(_) } => NET_MAC,
            _ => 0,
        }
    }

    /// Entries of a queue when nothing is said.
    pub fn queue_size(&self) -> u16 {
        match self {
            Self::Fs { .. } => 1024,
            _ => 256,
        }
    }

    /// What the guest sees. `wanted` request queues (or pairs), the CPUs' number
    /// when nothing is said.
    ///
    /// # Errors
    /// The backend has less than that, or no configuration.
    pub fn show(&self, offer: &Offer, wanted: Option<usize>, cpus: usize) -> Result<Shown, String> {
        let (mut features, mut config) = (offer.features, offer.config.clone());
        let lacking = || "it gives no configuration: VHOST_USER_PROTOCOL_F_CONFIG".to_owned();
        let limited = |fixed: usize, step: usize| -> Result<usize, String> {
            let most = offer.queues.saturating_sub(fixed) / step;
            let most = most.min((QUEUES_MAX - fixed) / step);
            match wanted {
                Some(wanted) if wanted > most => Err(format!(
                    "it serves {most} request queues or pairs of them, and {wanted} are wanted: \
                     start it with more, or ask for fewer"
                )),
                Some(wanted) => Ok(wanted),
                None => Ok(most.min(cpus)),
            }
        };
        let queues = match self {
            Self::Disk => {
                let count = match features & BLOCK_MQ {
                    0 if wanted.unwrap_or(1) == 1 => 1,
                    _ => limited(0, 1)?,
                };
                let config = config.as_mut().ok_or_else(lacking)?;
                put(config, 34, &(count as u16).to_le_bytes());
                count
            }
            Self::Fs { tag } => {
                let count = limited(1, 1)?;
                match tag {
                    Some(tag) => {
                        let mut made = vec![0; TAG + 4];
                        put(&mut made, 0, tag.as_bytes());
                        config = Some(made);
                    }
                    None if config.is_none() => {
                        return Err(format!("{}; or say its tag", lacking()));
                    }
                    None => {}
                }
                let config = config.as_mut().ok_or_else(lacking)?;
                put(config, TAG, &(count as u32).to_le_bytes());
                1 + count
            }
            Self::Net { mac } => {
                let control = usize::from(features & NET_CONTROL != 0);
                let pairs = match features & NET_MQ {
                    0 if wanted.unwrap_or(1) == 1 => 1,
                    // The control queue comes after all pairs, in the backend's count.
                    _ if control == 1 => {
                        let all = limited(1, 2)?.max(offer.queues.saturating_sub(1) / 2);
                        if all > (QUEUES_MAX - 1) / 2 || wanted.is_some_and(|some| some != all) {
                            return Err(format!(
                                "it serves {all} pairs of queues and a control queue: \
                                 start it with as many as are wanted, {} at most",
                                (QUEUES_MAX - 1) / 2
                            ));
                        }
                        all
                    }
                    _ => limited(0, 2)?,
                };
                let config = config.get_or_insert_with(|| vec![0; 12]);
                put(config, 8, &(pairs as u16).to_le_bytes());
                if let Some(mac) = mac {
                    features |= NET_MAC;
                    put(config, 0, mac);
                }
                2 * pairs + control
            }
            Self::Vsock { cid } => {
                if let Some(cid) = cid {
                    config = Some(cid.to_le_bytes().to_vec());
                }
                // Received, sent, events. Backends without the third have nothing to tell.
                3
            }
            Self::Other { .. } => wanted.unwrap_or(offer.queues.min(QUEUES_MAX)),
        };
        if queues == 0 {
            return Err("it serves no queue".to_owned());
        }
        Ok(Shown {
            features,
            queues,
            config: config.ok_or_else(lacking)?,
        })
    }

    /// What the guest sees after the backend has changed its configuration: the
    /// parts that are ours stay.
    pub fn refresh(&self, shown: &[u8], new: Vec<u8>) -> Vec<u8> {
        let keep = |ranges: &[(usize, usize)]| {
            let mut new = new.clone();
            for (start, end) in ranges {
                if let (Some(to), Some(from)) = (new.get_mut(*start..*end), shown.get(*start..*end))
                {
                    to.copy_from_slice(from);
                }
            }
            new
        };
        match self {
            Self::Disk => keep(&[(34, 36)]),
            Self::Fs { tag: Some(_) } => shown.to_vec(),
            Self::Fs { tag: None } => keep(&[(TAG, TAG + 4)]),
            Self::Net { mac: Some(_) } => keep(&[(0, 6), (8, 10)]),
            Self::Net { mac: None } => keep(&[(8, 10)]),
            Self::Vsock { cid: Some(_) } => shown.to_vec(),
            _ => new,
        }
    }
}

fn put(config: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = config.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(features: u64, queues: usize, config: Option<usize>) -> Offer {
        Offer {
            features,
            queues,
            config: config.map(|size| vec![0; size]),
        }
    }

    #[test]
    fn a_disk_has_a_queue_for_each_cpu_or_what_is_wanted() {
        let disk = offer(BLOCK_MQ, 8, Some(60));
        let shown = Kind::Disk.show(&disk, None, 4).unwrap();
        assert_eq!((shown.queues, shown.config[34]), (4, 4));
        assert_eq!(Kind::Disk.show(&disk, None, 32).unwrap().queues, 8);
        assert_eq!(Kind::Disk.show(&disk, Some(2), 32).unwrap().queues, 2);
        let error = Kind::Disk.show(&disk, Some(9), 1).unwrap_err();
        assert!(error.contains("8 request queues"), "{error}");
        let one = offer(0, 1, Some(60));
        assert_eq!(Kind::Disk.show(&one, None, 4).unwrap().queues, 1);
        assert!(Kind::Disk.show(&offer(0, 1, None), None, 1).is_err());
    }

    #[test]
    fn a_share_has_the_tag_that_was_said_or_its_backends() {
        let fs = Kind::Fs {
            tag: Some("data".into()),
        };
        let shown = fs.show(&offer(0, 3, None), None, 8).unwrap();
        assert_eq!(shown.queues, 3);
        assert_eq!(&shown.config[..5], b"data\0");
        assert_eq!(shown.config[TAG], 2);
        let unnamed = Kind::Fs { tag: None };
        assert!(unnamed.show(&offer(0, 3, None), None, 8).is_err());
        let mut own = offer(0, 3, Some(40));
        own.config.as_mut().unwrap()[0] = b'x';
        assert_eq!(unnamed.show(&own, None, 1).unwrap().config[0], b'x');
        // A hiprio queue alone serves nobody.
        assert_eq!(fs.show(&offer(0, 1, None), None, 8).unwrap().queues, 1);
    }

    #[test]
    fn a_card_has_pairs_and_the_address_that_was_said() {
        let mac = [2, 0, 0, 0, 0, 1];
        let net = Kind::Net { mac: Some(mac) };
        let shown = net.show(&offer(0, 2, None), None, 4).unwrap();
        assert_eq!((shown.queues, &shown.config[..6]), (2, &mac[..]));
        assert_ne!(shown.features & NET_MAC, 0);
        let many = offer(NET_MQ | NET_CONTROL, 9, Some(12));
        let shown = net.show(&many, None, 3).unwrap();
        assert_eq!((shown.queues, shown.config[8]), (9, 4));
        assert!(net.show(&many, Some(3), 3).is_err());
        let uncontrolled = offer(NET_MQ, 8, Some(12));
        let shown = net.show(&uncontrolled, None, 3).unwrap();
        assert_eq!((shown.queues, shown.config[8]), (6, 3));
        assert_eq!(net.features_of_ours(), NET_MAC);
    }

    #[test]
    fn what_is_ours_stays_when_the_backend_changes_the_rest() {
        let shown = Kind::Disk
            .show(&offer(BLOCK_MQ, 4, Some(60)), None, 2)
            .unwrap();
        let refreshed = Kind::Disk.refresh(&shown.config, vec![7; 60]);
        assert_eq!((refreshed[34], refreshed[0]), (2, 7));
        let vsock = Kind::Vsock { cid: Some(9) };
        let shown = vsock.show(&offer(0, 2, None), None, 1).unwrap();
        assert_eq!(vsock.refresh(&shown.config, vec![1; 8]), shown.config);
    }
}
