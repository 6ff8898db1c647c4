//! Packets in and out of descriptor chains. A chain is the guest's: it may be
//! cut short, point anywhere, or have any number of pieces. `virtio-queue` ends
//! a chain it cannot follow without a word, so that only the bytes found count.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::packet::{HEADER, Header, MAX_PAYLOAD};

/// The most descriptors looked at; Linux uses fewer than 20. An indirect table
/// could have 65535 for each of hundreds of packets.
const MAX_PIECES: usize = 64;

/// What a chain of the transmit queue turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Gathered {
    /// A packet; this much of the buffer is its payload.
    Packet(Header, usize),
    /// A header whose length is not true.
    BadLength(Header),
    /// Not even a header.
    Garbage,
}

/// The pieces of a chain that the device may read, or write.
fn pieces(
    chain: DescriptorChain<&GuestMemoryMmap>,
    writable: bool,
) -> impl Iterator<Item = (GuestAddress, usize)> {
    chain
        .take(MAX_PIECES)
        .filter(move |piece| piece.is_write_only() == writable)
        .map(|piece| (piece.addr(), piece.len() as usize))
}

/// Bytes of a chain that the device may write.
pub(crate) fn room(chain: DescriptorChain<&GuestMemoryMmap>) -> usize {
    pieces(chain, true).map(|(_, len)| len).sum()
}

/// Copies a packet out of guest memory, which the guest may change meanwhile:
/// each byte is read once. `payload` holds [`MAX_PAYLOAD`] bytes.
pub(crate) fn gather(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    payload: &mut [u8],
) -> Gathered {
    let mut bytes = [0; HEADER];
    let mut at = 0;
    let (mut header, mut done) = (None, 0);
    for (mut address, mut len) in pieces(chain, false) {
        if at < HEADER {
            let part = len.min(HEADER - at);
            if memory
                .read_slice(&mut bytes[at..at + part], address)
                .is_err()
            {
                break;
            }
            at += part;
            len -= part;
            // It was read up to there, so the sum is a valid address.
            address = GuestAddress(address.0.saturating_add(part as u64));
            if at < HEADER {
                continue;
            }
            header = Some(Header::decode(&bytes));
        }
        let Some(header) = &header else { break };
        let want = header.len as usize;
        if want > MAX_PAYLOAD.min(payload.len()) {
            break;
        }
        let part = len.min(want - done);
        if memory
            .read_slice(&mut payload[done..done + part], address)
            .is_err()
        {
            break;
        }
        done += part;
        if done == want {
            break;
        }
    }
    match header {
        Some(header) if header.len as usize == done => Gathered::Packet(header, done),
        Some(header) => Gathered::BadLength(header),
        None => Gathered::Garbage,
    }
}

/// Writes a packet into a chain with enough [`room`]; gives the bytes written,
/// which are fewer when the chain leads out of guest memory.
pub(crate) fn scatter(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    header: &Header,
    payload: &[u8],
) -> u32 {
    let header = header.encode();
    let mut done = 0;
    for (mut address, mut len) in pieces(chain, true) {
        for source in [
            header.get(done..),
            payload.get(done.saturating_sub(HEADER)..),
        ] {
            let Some(source) = source.filter(|source| !source.is_empty()) else {
                continue;
            };
            let part = len.min(source.len());
            if part == 0 {
                break;
            }
            if memory.write_slice(&source[..part], address).is_err() {
                return done as u32;
            }
            address = GuestAddress(address.0.saturating_add(part as u64));
            len -= part;
            done += part;
        }
    }
    done as u32
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::{Queue, QueueT};
    use vm_memory::GuestMemoryBackend;

    use super::*;

    const SIZE: usize = 1 << 20;

    /// Lays out one chain by hand and hands it to `look`.
    fn with_chain<T>(
        pieces: &[(u64, u32, bool)],
        fill: &[(u64, &[u8])],
        look: impl FnOnce(&GuestMemoryMmap, DescriptorChain<&GuestMemoryMmap>) -> T,
    ) -> T {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
        for (index, (address, len, writable)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let flags = if last { 0 } else { VRING_DESC_F_NEXT }
                | if *writable { VRING_DESC_F_WRITE } else { 0 };
            let piece = Descriptor::new(*address, *len, flags as u16, index as u16 + 1);
            let at = GuestAddress(0x1000 + index as u64 * 16);
            memory.write_obj(RawDescriptor::from(piece), at).unwrap();
        }
        memory.write_obj(1u16, GuestAddress(0x8002)).unwrap();
        for (address, bytes) in fill {
            memory.write_slice(bytes, GuestAddress(*address)).unwrap();
        }
        let mut queue = Queue::new(256).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(0x1000))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(0x8000))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(0x9000))
            .unwrap();
        queue.set_ready(true);
        assert!(memory.check_address(GuestAddress(0)).is_some());
        let chain = queue.pop_descriptor_chain(&memory).unwrap();
        look(&memory, chain)
    }

    fn data(len: u32) -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            op: 5,
            kind: 1,
            len,
            ..Header::default()
        }
    }

    fn gathered(pieces: &[(u64, u32, bool)], fill: &[(u64, &[u8])]) -> (Gathered, Vec<u8>) {
        let mut payload = vec![0; MAX_PAYLOAD];
        let found = with_chain(pieces, fill, |memory, chain| {
            gather(memory, chain, &mut payload)
        });
        (found, payload)
    }

    #[test]
    fn a_packet_may_be_cut_anywhere() {
        let header = data(5).encode();
        let all: Vec<u8> = header.iter().copied().chain(*b"hello").collect();
        for cut in 1..all.len() {
            let pieces = [
                (0x1_0000, cut as u32, false),
                (0x2_0000, (all.len() - cut) as u32 + 7, false),
            ];
            let fill = [(0x1_0000, &all[..cut]), (0x2_0000, &all[cut..])];
            let (found, payload) = gathered(&pieces, &fill);
            assert_eq!(found, Gathered::Packet(data(5), 5), "{cut}");
            assert_eq!(&payload[..5], b"hello");
        }
    }

    #[test]
    fn lengths_must_be_true() {
        let one = |len: u32, piece: u32| {
            gathered(
                &[(0x1_0000, piece, false)],
                &[(0x1_0000, &data(len).encode())],
            )
            .0
        };
        assert_eq!(one(0, 44), Gathered::Packet(data(0), 0));
        assert_eq!(one(1, 44), Gathered::BadLength(data(1)));
        assert_eq!(one(u32::MAX, 100), Gathered::BadLength(data(u32::MAX)));
        let full = MAX_PAYLOAD as u32;
        assert_eq!(
            one(full, 44 + full),
            Gathered::Packet(data(full), MAX_PAYLOAD)
        );
        assert_eq!(
            one(full + 1, 44 + full + 1),
            Gathered::BadLength(data(full + 1))
        );
        assert_eq!(one(0, 43), Gathered::Garbage);
        assert_eq!(one(0, 0), Gathered::Garbage);
    }

    #[test]
    fn addresses_must_be_in_memory() {
        let end = SIZE as u64;
        let fill: &[(u64, &[u8])] = &[(0x1_0000, &data(5).encode())];
        for outside in [end, end - 4, u64::MAX, u64::MAX - 2] {
            let (found, _) = gathered(&[(outside, 44, false)], &[]);
            assert_eq!(found, Gathered::Garbage, "{outside:#x}");
            let (found, _) = gathered(&[(0x1_0000, 44, false), (outside, 5, false)], fill);
            assert_eq!(found, Gathered::BadLength(data(5)), "{outside:#x}");
        }
        let (found, _) = gathered(&[(0x1_0000, 100, true)], fill);
        assert_eq!(found, Gathered::Garbage, "not readable");
    }

    #[test]
    fn endless_chains_end() {
        let pieces = vec![(0x1_0000, 1, false); 200];
        // The first 44 of these bytes are a header of zeros without payload.
        let empty = Gathered::Packet(Header::default(), 0);
        assert_eq!(gathered(&pieces, &[]).0, empty);
        let header = data(200).encode();
        let mut pieces = vec![(0x1_0000, 44, false)];
        pieces.resize(201, (0x2_0000, 1, false));
        let (found, _) = gathered(&pieces, &[(0x1_0000, &header)]);
        assert_eq!(found, Gathered::BadLength(data(200)));
    }

    #[test]
    fn what_is_scattered_can_be_gathered() {
        let payload = b"some bytes";
        let header = data(payload.len() as u32);
        for cut in 1..54u64 {
            let pieces = [(0x1_0000, cut as u32, true), (0x2_0000, 100, true)];
            with_chain(&pieces, &[], |memory, chain| {
                assert_eq!(room(chain.clone()), cut as usize + 100);
                assert_eq!(scatter(memory, chain, &header, payload), 54);
                let mut all = [0; 54];
                let (front, back) = all.split_at_mut(cut as usize);
                memory.read_slice(front, GuestAddress(0x1_0000)).unwrap();
                memory.read_slice(back, GuestAddress(0x2_0000)).unwrap();
                assert_eq!(all[..44], header.encode(), "{cut}");
                assert_eq!(&all[44..], payload, "{cut}");
            });
        }
        let outside = [(0x1_0000, 44, true), (SIZE as u64, 100, true)];
        with_chain(&outside, &[], |memory, chain| {
            assert_eq!(scatter(memory, chain, &header, payload), 44);
        });
    }
}
