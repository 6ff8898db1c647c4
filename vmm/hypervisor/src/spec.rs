//! What a virtual machine consists of, independent of the driver.
//!
//! Filled in by the caller and checked as a whole by [`MachineSpec::check`] before a driver starts
//! anything. Nothing here opens, reads or creates a file.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::console::ConsoleSpec;

/// Most CPUs a machine may have.
pub const MAX_CPUS: u32 = 255;
/// Least memory with which the stock kernel boots, in bytes.
pub const MIN_MEMORY: u64 = 128 << 20;
/// Memory comes in units of this many bytes.
pub const MEMORY_UNIT: u64 = 1 << 20;
/// Most characters of kernel parameters. The kernel's own limit on x86 is 2047; the driver adds to
/// them.
pub const MAX_CMDLINE: usize = 1900;
/// Most shares a machine may have, a container's root and sixteen volumes: what its driver has places
/// for.
pub const MAX_SHARES: usize = 17;
/// Most network cards a machine may have: what its driver has places for.
pub const MAX_CARDS: usize = 8;
/// Most bytes of a share's tag (virtio 1.3, 5.11.4).
pub const MAX_TAG: usize = 36;
/// A socket address holds no longer path.
const MAX_SOCKET_PATH: usize = 107;

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial file system.
    pub initramfs: PathBuf,
    /// Kernel parameters; the driver adds the console it provides.
    pub cmdline: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Disks, in the order the guest's bus shows them.
    pub disks: Vec<DiskSpec>,
    /// Directories of the host, which the guest mounts by their tags.
    pub shares: Vec<ShareSpec>,
    /// Network cards.
    pub cards: Vec<CardSpec>,
    /// The socket family by which the guest and host programs reach each other.
    pub vsock: Option<VsockSpec>,
    /// Free slots on the bus for devices that come later.
    pub spare_slots: u8,
    /// What is kept of the console.
    pub console: ConsoleSpec,
}

/// A disk served by a vhost-user backend. Whether it is read-only is the backend's matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Name of the device: a letter, then letters, digits, `-`, `_` and `.`.
    pub id: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// Request queues.
    pub num_queues: u16,
    /// Descriptors per queue, a power of two.
    pub queue_size: u16,
}

/// A directory served by a vhost-user backend, as a virtio-fs device. Which one it is, and whether
/// it is read-only, is the backend's matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareSpec {
    /// Name of the device: a letter, then letters, digits, `-`, `_` and `.`.
    pub id: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// What the guest mounts it by: 1 to [`MAX_TAG`] letters, digits, `-`, `_` and `.`.
    pub tag: String,
    /// Request queues; there is one more, for what must not wait.
    pub num_queues: u16,
    /// Descriptors per queue, a power of two.
    pub queue_size: u16,
}

/// A network card served by a vhost-user backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardSpec {
    /// Name of the device: a letter, then letters, digits, `-`, `_` and `.`.
    pub id: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// The guest's Ethernet address, of one station.
    pub mac: [u8; 6],
    /// Pairs of queues.
    pub queue_pairs: u16,
    /// Descriptors per queue, a power of two.
    pub queue_size: u16,
}

impl CardSpec {
    /// The address as it is written.
    pub(crate) fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// A vsock device served by a vhost-user backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockSpec {
    /// Name of the device: a letter, then letters, digits, `-`, `_` and `.`.
    pub id: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// The guest's address. The backend tells it to the guest; a driver that brings a backend of
    /// its own needs it, too.
    pub guest_cid: u32,
}

/// A description no machine can be made of.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecError {
    /// CPUs out of range.
    #[error("{0} CPUs: a machine has 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// Memory out of range.
    #[error("{0} bytes of memory: a machine has at least {MIN_MEMORY}, in units of {MEMORY_UNIT}")]
    Memory(u64),
    /// A name with characters that are not allowed, or one that occurs twice.
    #[error(
        "'{0}' is no usable name: a letter, then letters, digits, '-', '_' and '.', each name once"
    )]
    Name(String),
    /// Queues out of range.
    #[error("device '{0}': 1 to 64 queues of a power of two between 2 and 1024 entries")]
    Queues(String),
    /// More shares than there are places.
    #[error("{0} shares: a machine has at most {MAX_SHARES}")]
    Shares(usize),
    /// More cards than there are places.
    #[error("{0} network cards: a machine has at most {MAX_CARDS}")]
    Cards(usize),
    /// An Ethernet address of a group, or none.
    #[error("network card '{0}': its address must be that of one station, and not all zero")]
    Mac(String),
    /// A tag that is too long or has other characters, or one that occurs twice.
    #[error(
        "'{0}' is no usable tag of a share: 1 to {MAX_TAG} letters, digits, '-', '_' and '.', each \
         tag once"
    )]
    Tag(String),
    /// A context id that is not a guest's: 0 to 2 are the host's, the highest means any.
    #[error("vsock '{0}': a guest's context id is 3 to {highest}", highest = u32::MAX - 1)]
    Cid(String),
    /// A path the driver cannot pass on.
    #[error("'{}': the path is not text, or too long for a socket", .0.display())]
    Path(PathBuf),
    /// Kernel parameters with line ends or too long.
    #[error("the kernel's parameters must be one line of at most {MAX_CMDLINE} characters")]
    Cmdline,
}

impl MachineSpec {
    /// The devices behind vhost-user backends: names and sockets.
    pub(crate) fn backends(&self) -> impl Iterator<Item = (&str, &PathBuf)> {
        let disks = self.disks.iter().map(|disk| (&disk.id, &disk.socket));
        let shares = self.shares.iter().map(|share| (&share.id, &share.socket));
        let vsock = self.vsock.iter().map(|vsock| (&vsock.id, &vsock.socket));
        let cards = self.cards.iter().map(|card| (&card.id, &card.socket));
        let all = disks.chain(shares).chain(cards).chain(vsock);
        all.map(|(id, socket)| (id.as_str(), socket))
    }

    /// Checks everything that can be wrong without looking at the host.
    ///
    /// # Errors
    ///
    /// The first thing found.
    pub fn check(&self) -> Result<(), SpecError> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(SpecError::Cpus(self.cpus));
        }
        if self.memory < MIN_MEMORY || !self.memory.is_multiple_of(MEMORY_UNIT) {
            return Err(SpecError::Memory(self.memory));
        }
        if self.cmdline.len() > MAX_CMDLINE || self.cmdline.contains(['\n', '\r', '\0']) {
            return Err(SpecError::Cmdline);
        }
        if self.shares.len() > MAX_SHARES {
            return Err(SpecError::Shares(self.shares.len()));
        }
        if self.cards.len() > MAX_CARDS {
            return Err(SpecError::Cards(self.cards.len()));
        }
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in self.backends() {
            if !is_name(name) || names.contains(&name) {
                return Err(SpecError::Name(name.to_owned()));
            }
            names.push(name);
        }
        let mut tags: Vec<&str> = Vec::new();
        for share in &self.shares {
            let tag = share.tag.as_str();
            if !(1..=MAX_TAG).contains(&tag.len())
                || !tag.chars().all(is_usable)
                || tags.contains(&tag)
            {
                return Err(SpecError::Tag(tag.to_owned()));
            }
            tags.push(tag);
        }
        let disks = self.disks.iter();
        let disks = disks.map(|disk| (&disk.id, disk.num_queues, disk.queue_size));
        let shares = self.shares.iter();
        let shares = shares.map(|share| (&share.id, share.num_queues, share.queue_size));
        let cards = self.cards.iter();
        let cards = cards.map(|card| (&card.id, card.queue_pairs, card.queue_size));
        for (id, queues, size) in disks.chain(shares).chain(cards) {
            if !are_queues(queues, size) {
                return Err(SpecError::Queues(id.clone()));
            }
        }
        let station = |mac: [u8; 6]| mac[0] & 1 == 0 && mac != [0; 6];
        if let Some(card) = self.cards.iter().find(|card| !station(card.mac)) {
            return Err(SpecError::Mac(card.id.clone()));
        }
        if let Some(vsock) = &self.vsock
            && !(3..u32::MAX).contains(&vsock.guest_cid)
        {
            return Err(SpecError::Cid(vsock.id.clone()));
        }
        for (_, socket) in self.backends() {
            check_socket(socket)?;
        }
        let files = [&self.kernel, &self.initramfs];
        if let Some(path) = files.into_iter().find(|path| path.to_str().is_none()) {
            return Err(SpecError::Path(path.clone()));
        }
        Ok(())
    }
}

impl DiskSpec {
    /// Checks a disk that is to be added to a machine.
    ///
    /// # Errors
    ///
    /// The first thing found.
    pub fn check(&self) -> Result<(), SpecError> {
        if !is_name(&self.id) {
            return Err(SpecError::Name(self.id.clone()));
        }
        if !are_queues(self.num_queues, self.queue_size) {
            return Err(SpecError::Queues(self.id.clone()));
        }
        check_socket(&self.socket)
    }
}

fn is_usable(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_.".contains(c)
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(is_usable)
}

fn are_queues(count: u16, size: u16) -> bool {
    (1..=64).contains(&count) && (2..=1024).contains(&size) && size.is_power_of_two()
}

fn check_socket(path: &Path) -> Result<(), SpecError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH || path.to_str().is_none() {
        return Err(SpecError::Path(path.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> MachineSpec {
        MachineSpec {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: "panic=-1".into(),
            cpus: 2,
            memory: 256 << 20,
            disks: vec![DiskSpec {
                id: "root".into(),
                socket: "/run/x/root,1.sock".into(),
                num_queues: 2,
                queue_size: 128,
            }],
            shares: vec![ShareSpec {
                id: "data".into(),
                socket: "/run/x/data.sock".into(),
                tag: "share.1".into(),
                num_queues: 2,
                queue_size: 1024,
            }],
            cards: vec![CardSpec {
                id: "eth0".into(),
                socket: "/run/x/eth,0.sock".into(),
                mac: [2, 0, 0, 0, 0, 10],
                queue_pairs: 2,
                queue_size: 256,
            }],
            vsock: Some(VsockSpec {
                id: "vsock".into(),
                socket: "/run/x/vsock.sock".into(),
                guest_cid: 3,
            }),
            spare_slots: 2,
            console: ConsoleSpec::default(),
        }
    }

    fn vsock(spec: &mut MachineSpec) -> &mut VsockSpec {
        spec.vsock.as_mut().unwrap()
    }

    #[test]
    fn a_disk_is_checked_by_the_same_rules() {
        let disk = &sample().disks[0];
        assert_eq!(disk.check(), Ok(()));
        type Case = (fn(&mut DiskSpec), SpecError);
        let cases: [Case; 3] = [
            (|disk| disk.id = "a,b".into(), SpecError::Name("a,b".into())),
            (|disk| disk.queue_size = 3, SpecError::Queues("root".into())),
            (
                |disk| disk.socket = "/".repeat(120).into(),
                SpecError::Path("/".repeat(120).into()),
            ),
        ];
        for (spoil, error) in cases {
            let mut disk = disk.clone();
            spoil(&mut disk);
            assert_eq!(disk.check(), Err(error));
        }
    }

    #[test]
    fn each_rule_is_checked() {
        type Case = (fn(&mut MachineSpec), SpecError);
        assert_eq!(sample().check(), Ok(()));
        let long = PathBuf::from("/".repeat(120));
        let cases: Vec<Case> = vec![
            (|s| s.cpus = 0, SpecError::Cpus(0)),
            (|s| s.cpus = 256, SpecError::Cpus(256)),
            (|s| s.memory = 64 << 20, SpecError::Memory(64 << 20)),
            (|s| s.memory += 1, SpecError::Memory((256 << 20) + 1)),
            (
                |s| s.disks[0].id = "a,b".into(),
                SpecError::Name("a,b".into()),
            ),
            (
                |s| s.disks[0].id = "1disk".into(),
                SpecError::Name("1disk".into()),
            ),
            (
                |s| s.disks[0].num_queues = 0,
                SpecError::Queues("root".into()),
            ),
            (
                |s| s.disks[0].queue_size = 100,
                SpecError::Queues("root".into()),
            ),
            (
                |s| s.disks[0].socket = "/".repeat(120).into(),
                SpecError::Path(long),
            ),
            (
                |s| s.shares[0].id = "root".into(),
                SpecError::Name("root".into()),
            ),
            (
                |s| s.shares[0].tag = String::new(),
                SpecError::Tag(String::new()),
            ),
            (
                |s| s.shares[0].tag = "a,b".into(),
                SpecError::Tag("a,b".into()),
            ),
            (
                |s| s.shares[0].tag = "t".repeat(MAX_TAG + 1),
                SpecError::Tag("t".repeat(MAX_TAG + 1)),
            ),
            (
                |s| {
                    s.shares.push(ShareSpec {
                        id: "other".into(),
                        ..s.shares[0].clone()
                    });
                },
                SpecError::Tag("share.1".into()),
            ),
            (
                |s| s.shares[0].queue_size = 2048,
                SpecError::Queues("data".into()),
            ),
            (
                |s| s.shares[0].socket = "/".repeat(120).into(),
                SpecError::Path("/".repeat(120).into()),
            ),
            (
                |s| s.shares = vec![s.shares[0].clone(); MAX_SHARES + 1],
                SpecError::Shares(MAX_SHARES + 1),
            ),
            (
                |s| s.cards = vec![s.cards[0].clone(); MAX_CARDS + 1],
                SpecError::Cards(MAX_CARDS + 1),
            ),
            (|s| s.cards[0].mac[0] = 1, SpecError::Mac("eth0".into())),
            (|s| s.cards[0].mac = [0; 6], SpecError::Mac("eth0".into())),
            (
                |s| s.cards[0].queue_pairs = 0,
                SpecError::Queues("eth0".into()),
            ),
            (|s| s.cmdline = "a\nb".into(), SpecError::Cmdline),
            (
                |s| s.cmdline = "a".repeat(MAX_CMDLINE + 1),
                SpecError::Cmdline,
            ),
            (|s| vsock(s).guest_cid = 2, SpecError::Cid("vsock".into())),
            (
                |s| vsock(s).guest_cid = u32::MAX,
                SpecError::Cid("vsock".into()),
            ),
            (
                |s| vsock(s).id = "root".into(),
                SpecError::Name("root".into()),
            ),
            (
                |s| vsock(s).socket = "/".repeat(120).into(),
                SpecError::Path("/".repeat(120).into()),
            ),
        ];
        for (spoil, error) in cases {
            let mut spec = sample();
            spoil(&mut spec);
            assert_eq!(spec.check(), Err(error));
        }
    }
}
