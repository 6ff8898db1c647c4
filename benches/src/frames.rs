//! Packets that the network benches send: behind virtio's header, to an address that
//! nobody has, so that whoever gets one drops it at once.

use pericarp_tests::network::{datagram, headers};

/// Bytes of virtio's header before a packet (virtio 1.3, 5.1.6).
pub const HEADER: usize = 12;

/// A frame behind virtio's header, to an address that nobody has: it ends at once.
fn to_nobody(frame: Vec<u8>) -> Vec<u8> {
    let mut packet = [vec![0; HEADER], frame].concat();
    packet[HEADER + 5] = 9;
    packet
}

/// A UDP frame of so many bytes.
///
/// # Panics
/// With fewer than its headers have.
pub fn frame(len: usize) -> Vec<u8> {
    to_nobody(datagram(9, &vec![0; len - 42]))
}

/// A TCP segment with so much payload, to be cut by whoever has to, behind a header that
/// says so.
///
/// # Panics
/// With more than an IPv4 packet can have.
pub fn large(payload: usize) -> Vec<u8> {
    let len = 54 + payload;
    let mut frame = headers(len, 6);
    frame.extend([0, 7, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff]);
    frame.resize(len, 0);
    let mut packet = to_nobody(frame);
    // NEEDS_CSUM, TCPv4; 54 bytes of headers, pieces of 1448, the checksum of TCP.
    packet[0] = 1;
    packet[1] = 1;
    for (at, field) in [(2, 54u16), (4, 1448), (6, 34), (8, 16)] {
        packet[at..at + 2].copy_from_slice(&field.to_le_bytes());
    }
    packet
}
