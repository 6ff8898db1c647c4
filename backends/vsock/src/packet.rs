//! The packet header (virtio 1.3, 5.10.6), encoded and decoded without unsafe
//! code. Every value in it is the guest's claim: nothing is checked here except
//! that the bytes are there.

/// Bytes of a header.
pub(crate) const HEADER: usize = 44;
/// The host's context id.
pub(crate) const HOST_CID: u64 = 2;
/// The only socket type this device offers.
pub(crate) const STREAM: u16 = 1;
/// The most payload of one packet, either way: what Linux sends at most.
pub(crate) const MAX_PAYLOAD: usize = 64 * 1024;

/// Operations (5.10.6, `enum virtio_vsock_event` and `op`).
pub(crate) mod op {
    /// Open a connection.
    pub(crate) const REQUEST: u16 = 1;
    /// It is open.
    pub(crate) const RESPONSE: u16 = 2;
    /// It is closed, or never was.
    pub(crate) const RST: u16 = 3;
    /// One or both directions end.
    pub(crate) const SHUTDOWN: u16 = 4;
    /// Data.
    pub(crate) const RW: u16 = 5;
    /// How much room the sender has.
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    /// Ask for the former.
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN.
pub(crate) mod shutdown {
    /// The sender will receive no more.
    pub(crate) const RECEIVE: u32 = 1;
    /// The sender will send no more.
    pub(crate) const SEND: u32 = 2;
    /// Both.
    pub(crate) const BOTH: u32 = RECEIVE | SEND;
}

/// One header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Header {
    /// Sender's context id.
    pub(crate) src_cid: u64,
    /// Receiver's context id.
    pub(crate) dst_cid: u64,
    /// Sender's port.
    pub(crate) src_port: u32,
    /// Receiver's port.
    pub(crate) dst_port: u32,
    /// Bytes of payload behind the header.
    pub(crate) len: u32,
    /// Socket type.
    pub(crate) kind: u16,
    /// One of [`op`].
    pub(crate) op: u16,
    /// Depends on the operation.
    pub(crate) flags: u32,
    /// The sender's receive buffer.
    pub(crate) buf_alloc: u32,
    /// Bytes that have left this buffer, modulo 2^32.
    pub(crate) fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Self {
        let mut at = 0;
        let mut field = |len: usize| {
            let mut value = [0; 8];
            value[..len].copy_from_slice(&bytes[at..at + len]);
            at += len;
            u64::from_le_bytes(value)
        };
        // The casts lose nothing: the field has as many bytes.
        Self {
            src_cid: field(8),
            dst_cid: field(8),
            src_port: field(4) as u32,
            dst_port: field(4) as u32,
            len: field(4) as u32,
            kind: field(2) as u16,
            op: field(2) as u16,
            flags: field(4) as u32,
            buf_alloc: field(4) as u32,
            fwd_cnt: field(4) as u32,
        }
    }

    /// Writes a header.
    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub(crate) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_survive_both_ways(bytes in proptest::collection::vec(any::<u8>(), HEADER)) {
            let bytes: [u8; HEADER] = bytes.try_into().unwrap();
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let mut bytes = [0; HEADER];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = index as u8;
        }
        let header = Header::decode(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!(
            (header.len, header.kind, header.op),
            (0x1b1a_1918, 0x1d1c, 0x1f1e)
        );
        assert_eq!((header.flags, header.fwd_cnt), (0x2322_2120, 0x2b2a_2928));
    }

    #[test]
    fn a_reset_goes_back_to_the_sender() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 4,
            dst_port: 5,
            len: 6,
            kind: 1,
            op: op::RW,
            flags: 7,
            buf_alloc: 8,
            fwd_cnt: 9,
        };
        let reset = header.reset();
        assert_eq!((reset.src_cid, reset.dst_cid), (2, 3));
        assert_eq!((reset.src_port, reset.dst_port), (5, 4));
        assert_eq!(
            (reset.len, reset.kind, reset.op, reset.flags),
            (0, 1, op::RST, 0)
        );
    }
}
