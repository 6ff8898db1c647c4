//! A network of the test's own: a namespace that the test's thread is in, and what it
//! starts, with a tap for a guest to be behind. For the suite `net`.

use std::io;
use std::path::PathBuf;
use std::process::Command;

use rustix::thread::UnshareFlags;
use serde_json::Value;

use crate::parts::{Part, have, skip};

/// The host's end of the tap.
pub const HOST: [u8; 4] = [10, 99, 0, 1];
/// The guest's.
pub const GUEST: [u8; 4] = [10, 99, 0, 2];
/// The host's address on the tap.
pub const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The guest's.
pub const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The tap.
pub const TAP: &str = "t0";

/// The namespace of this thread.
#[derive(Debug)]
pub struct Network {
    ip: PathBuf,
}

impl Network {
    /// Puts the calling thread into a namespace with a tap of so many queue pairs.
    /// `None` is a skipped test, and says so.
    ///
    /// # Panics
    /// As [`have`]; when the kernel has no taps.
    pub fn here(test: &str, parts: &[Part], pairs: u16) -> Option<Self> {
        let network = Self::empty(test, parts)?;
        network.tap(pairs);
        Some(network)
    }

    /// The same with nothing but the loopback interface.
    ///
    /// # Panics
    /// As [`have`].
    pub fn empty(test: &str, parts: &[Part]) -> Option<Self> {
        if !have(test, &[&[Part::Ip], parts].concat()) {
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            skip(test, "takes root, for a network of its own");
            return None;
        }
        #[expect(
            unsafe_code,
            reason = "no descriptors are unshared, which is what is unsafe"
        )]
        // SAFETY: as said.
        let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
        unshared.expect("a network namespace");
        let network = Self {
            ip: Part::Ip.find().unwrap_or_default(),
        };
        network.ip("link set lo up");
        Some(network)
    }

    /// Makes the tap.
    ///
    /// # Panics
    /// When it is there already.
    pub fn tap(&self, pairs: u16) {
        let queues = if pairs > 1 { " multi_queue" } else { "" };
        self.ip(&format!("tuntap add {TAP} mode tap vnet_hdr{queues}"));
        self.ip(&format!("link set {TAP} address {}", mac(HOST_MAC)));
        self.ip(&format!("link set {TAP} addrgenmode none"));
        self.ip(&format!("link set {TAP} up"));
        self.ip(&format!("addr add {}/24 dev {TAP}", dotted(HOST)));
        self.ip(&Self::neighbour());
    }

    /// What tells the host where the guest is, which a link that goes down forgets.
    pub fn neighbour() -> String {
        let (guest, mac) = (dotted(GUEST), mac(GUEST_MAC));
        format!("neigh replace {guest} lladdr {mac} dev {TAP} nud permanent")
    }

    /// Whether the tap is somebody's and passes packets on: the kernel sees to that a
    /// moment after it was opened, and drops what comes before.
    pub fn is_up() -> bool {
        let ip = Part::Ip.find().unwrap_or_default();
        let shown = Command::new(ip).args(["-o", "link", "show", TAP]).output();
        shown.is_ok_and(|shown| String::from_utf8_lossy(&shown.stdout).contains("state UP"))
    }

    /// Packets that came out of the tap on the host's side, ever.
    ///
    /// # Errors
    /// When `ip` does not say.
    pub fn arrived(&self) -> io::Result<u64> {
        let shown = Command::new(&self.ip)
            .args(["-s", "-j", "link", "show", TAP])
            .output()?;
        let shown: Value = serde_json::from_slice(&shown.stdout).map_err(io::Error::other)?;
        let count = shown[0]["stats64"]["rx"]["packets"].as_u64();
        count.ok_or_else(|| io::Error::other(format!("no count of packets: {shown}")))
    }

    /// Runs `ip` with these words.
    ///
    /// # Panics
    /// When it fails.
    pub fn ip(&self, words: &str) {
        let output = Command::new(&self.ip).args(words.split(' ')).output();
        let output = output.expect("ip can be started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {words}: {said}");
    }
}

/// As people write it.
pub fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

/// As people write it.
pub fn dotted(address: [u8; 4]) -> String {
    std::net::Ipv4Addr::from(address).to_string()
}

/// Ethernet's and IPv4's headers of a frame of so many bytes, from the guest to the host.
///
/// # Panics
/// When it has more bytes than an IPv4 packet can.
pub fn headers(len: usize, protocol: u8) -> Vec<u8> {
    let total = u16::try_from(len - 14).expect("an IPv4 packet");
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    ip.extend(GUEST);
    ip.extend(HOST);
    let words = ip.chunks(2);
    let sum: u32 = words
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [&HOST_MAC[..], &GUEST_MAC, &[8, 0], &ip].concat()
}

/// A frame from the guest to a UDP port of the host.
pub fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = headers(42 + payload.len(), 17);
    frame.extend(7u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend((8 + payload.len() as u16).to_be_bytes());
    // No checksum, which IPv4 allows.
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}
