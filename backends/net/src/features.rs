//! Feature bits of the network device (virtio 1.3, 5.1.3), and what they mean to a tap.

/// The driver takes packets whose checksum is not made.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The device takes packets whose checksum is not made.
pub const CSUM: u64 = 1;
/// What the driver takes can be changed on the control queue.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The configuration has an MTU.
pub const MTU: u64 = 1 << 3;
/// The configuration has an address.
pub const MAC: u64 = 1 << 5;
/// The driver takes TCP over IPv4 in pieces larger than a frame.
pub const GUEST_TSO4: u64 = 1 << 7;
/// The driver takes TCP over IPv6 in pieces larger than a frame.
pub const GUEST_TSO6: u64 = 1 << 8;
/// The driver takes these with ECN.
pub const GUEST_ECN: u64 = 1 << 9;
/// The device takes TCP over IPv4 in pieces larger than a frame.
pub const HOST_TSO4: u64 = 1 << 11;
/// The device takes TCP over IPv6 in pieces larger than a frame.
pub const HOST_TSO6: u64 = 1 << 12;
/// The device takes these with ECN.
pub const HOST_ECN: u64 = 1 << 13;
/// A packet may be spread over several buffers of the driver's.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The configuration has a status.
pub const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// There may be several pairs of queues.
pub const MQ: u64 = 1 << 22;
/// The driver takes UDP over IPv4 in pieces larger than a frame.
pub const GUEST_USO4: u64 = 1 << 54;
/// The driver takes UDP over IPv6 in pieces larger than a frame.
pub const GUEST_USO6: u64 = 1 << 55;
/// The device takes UDP in pieces larger than a frame.
pub const HOST_USO: u64 = 1 << 56;

/// What the driver may take, of which the control queue can change the choice.
pub const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

/// Any of them makes packets larger than a frame.
pub const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;

/// What the driver takes, in the words of TUNSETOFFLOAD.
pub(crate) fn tap_offloads(features: u64) -> libc::c_uint {
    // Nothing without checksums (virtio 1.3, 5.1.3.1); the kernel wants both kinds of
    // USO or neither.
    if features & GUEST_CSUM == 0 {
        return 0;
    }
    let both = GUEST_USO4 | GUEST_USO6;
    let mut offloads = libc::TUN_F_CSUM;
    for (bits, offload) in [
        (GUEST_TSO4, libc::TUN_F_TSO4),
        (GUEST_TSO6, libc::TUN_F_TSO6),
        (GUEST_ECN, libc::TUN_F_TSO_ECN),
        (both, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ] {
        if features & bits == bits {
            offloads |= offload;
        }
    }
    // ECN means nothing without TSO, and is refused.
    if offloads & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        offloads &= !libc::TUN_F_TSO_ECN;
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_are_those_that_go_together() {
        for (features, want) in [
            (GUEST_TSO4 | GUEST_USO4 | GUEST_USO6, 0),
            (GUEST_CSUM | GUEST_ECN, libc::TUN_F_CSUM),
            (GUEST_CSUM | GUEST_USO4, libc::TUN_F_CSUM),
            (
                GUEST_CSUM | GUEST_USO4 | GUEST_USO6,
                libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6,
            ),
            (
                GUEST_CSUM | GUEST_TSO6 | GUEST_ECN,
                libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN,
            ),
        ] {
            assert_eq!(tap_offloads(features), want, "{features:#x}");
        }
    }
}
