//! The same bytes shown to this crate and to `virtio-queue`: both must see the
//! same chains, and want the driver called at the same moments.
//!
//! Where the two differ on purpose, the rule is written out: `virtio-queue`
//! ends a broken chain in silence, we refuse it.

mod life;

use proptest::prelude::*;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::chain::{ChainError, Segments};
use crate::testing::{AVAILABLE, DESCRIPTORS, Guest, MEMORY, USED};

const SIZE: u16 = 8;
/// Where the generated indirect tables lie.
const TABLES: u64 = 0x1_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

type Fields = (u64, u32, u16, u16);

fn oracle_memory(guest: &Guest) -> GuestMemoryMmap<()> {
    let file = FileOffset::new(guest.file.try_clone().unwrap(), 0);
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY as usize, Some(file))])
        .unwrap()
}

/// Mostly sensible descriptors, with every kind of nonsense mixed in.
fn descriptor() -> impl Strategy<Value = Fields> {
    let address = prop_oneof![
        8 => 0x1_8000..MEMORY,
        1 => MEMORY - 64..MEMORY + 64,
        1 => any::<u64>(),
        3 => (0u64..8).prop_map(|n| TABLES + n * 16),
    ];
    let len = prop_oneof![
        8 => 1u32..600,
        3 => (0u32..6).prop_map(|n| n * 16),
        1 => any::<u32>(),
        1 => Just(0),
    ];
    let flags = prop_oneof![
        4 => Just(NEXT),
        4 => Just(NEXT | WRITE),
        3 => Just(WRITE),
        2 => Just(0),
        2 => Just(INDIRECT),
        1 => 0u16..8,
    ];
    (address, len, flags, 0u16..SIZE + 1)
}

/// Joins neighbours of one direction, as we do.
fn joined(segments: impl IntoIterator<Item = (u64, u64, bool)>) -> Vec<(u64, u64, bool)> {
    let mut out: Vec<(u64, u64, bool)> = Vec::new();
    for (address, len, write) in segments {
        match out.last_mut() {
            Some((a, l, w)) if *w == write && *a + *l == address => *l += len,
            _ => out.push((address, len, write)),
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn chains_agree(
        ring in prop::collection::vec(descriptor(), usize::from(SIZE)),
        tables in prop::collection::vec(descriptor(), 12),
        head in 0..SIZE,
    ) {
        let guest = Guest::new(SIZE);
        for (index, &fields) in ring.iter().enumerate() {
            guest.descriptor(index as u16, fields);
        }
        for (index, &fields) in tables.iter().enumerate() {
            guest.descriptor_at(TABLES + 16 * index as u64, fields);
        }
        let queue = guest.queue(false);
        let mut segments = Segments::default();
        let ours = segments.load(&queue, head);

        let memory = oracle_memory(&guest);
        let mut theirs = Queue::new(SIZE).unwrap();
        theirs.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        theirs.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        theirs.set_used_ring_address(Some(USED as u32), Some(0));
        theirs.set_ready(true);
        let mut driver = guest;
        driver.offer(head);
        let chain: DescriptorChain<_> = theirs.pop_descriptor_chain(&memory).unwrap();
        let seen: Vec<_> = chain.collect();

        // What makes a chain sound beyond what the oracle looks at.
        let ended = seen.last().is_some_and(|d| !d.has_next());
        let mapped = seen.iter().all(|d| {
            d.addr().0.checked_add(u64::from(d.len())).is_some_and(|end| end <= MEMORY)
        });
        let filled = seen.iter().all(|d| d.len() > 0);
        let ordered = seen.is_sorted_by_key(|d| d.is_write_only());
        let sound = ended && mapped && filled && ordered;

        match ours {
            Ok(()) => {
                prop_assert!(sound, "we accept what the rules refuse: {seen:?}");
                let base = driver.memory.contiguous(0, 1).unwrap() as u64;
                let list = |iov: &[libc::iovec], write| -> Vec<_> {
                    iov.iter().map(|v| (v.iov_base as u64 - base, v.iov_len as u64, write)).collect()
                };
                let mut got = list(segments.readable(), false);
                got.extend(list(segments.writable(), true));
                let want = joined(seen.iter().map(|d| {
                    (d.addr().0, u64::from(d.len()), d.is_write_only())
                }));
                prop_assert_eq!(got, want);
            }
            // The oracle follows an indirect descriptor that has NEXT set;
            // the specification forbids it.
            Err(ChainError::Indirect) if ended => {
                let both = |f: &Fields| f.2 & (INDIRECT | NEXT) == INDIRECT | NEXT;
                prop_assert!(ring.iter().any(both));
            }
            Err(error) => {
                prop_assert!(!sound, "we refuse a sound chain: {error}: {seen:?}");
                // For a reason that the oracle's chain shows as well. It stops
                // where it cannot go on, at a bad indirect table too.
                // Of a table that is half in memory it reads that half.
                let torn = ring.iter().any(|&(address, len, flags, _)| {
                    let end = address.checked_add(u64::from(len));
                    flags & INDIRECT != 0 && end.is_none_or(|end| end > MEMORY)
                });
                let bytes: u64 = seen.iter().map(|d| u64::from(d.len())).sum();
                let shown = match error {
                    ChainError::Empty => !filled,
                    ChainError::Order => !ordered,
                    ChainError::BadAddress(_) => !mapped || !ended || torn,
                    ChainError::TooManyBytes => bytes > u64::from(u32::MAX),
                    ChainError::BadIndex(_) | ChainError::TooLong | ChainError::Indirect => !ended,
                };
                prop_assert!(shown, "{error}, but: {seen:?}");
            }
        }
    }

    #[test]
    fn calls_agree(
        start in prop_oneof![Just(0u16), 0xfff0u16..=0xffff, any::<u16>()],
        batches in prop::collection::vec((1u16..=SIZE, -3i32..12), 1..60),
    ) {
        let guest = Guest::new(SIZE);
        guest.put(USED + 2, &start.to_le_bytes());
        let mut ours = guest.queue(true);
        // The first publish after a start calls in any case.
        prop_assert!(ours.publish());

        let memory = oracle_memory(&Guest::new(SIZE));
        let mut theirs = Queue::new(SIZE).unwrap();
        theirs.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        theirs.set_used_ring_address(Some(USED as u32), Some(0));
        theirs.set_event_idx(true);
        theirs.set_next_used(start);
        theirs.set_ready(true);

        let mut index = start;
        for (count, ahead) in batches {
            let event = index.wrapping_add_signed(ahead as i16);
            guest.set_used_event(event);
            vm_memory::Bytes::write_obj(
                &memory,
                event.to_le(),
                GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE)),
            ).unwrap();
            for n in 0..count {
                ours.push_used(n % SIZE, u32::from(n));
                theirs.add_used(&memory, n % SIZE, u32::from(n)).unwrap();
            }
            index = index.wrapping_add(count);
            prop_assert_eq!(ours.publish(), theirs.needs_notification(&memory).unwrap());
            prop_assert_eq!(guest.used_idx(), index);
            prop_assert_eq!(theirs.next_used(), index);
        }
    }
}
