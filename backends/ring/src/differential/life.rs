//! A driver's random life on two rings of equal content, one served by this
//! crate and one by `virtio-queue`: the same heads come out, the same bytes go
//! into the used ring, and kicks and calls are wanted at the same moments,
//! across the wrap of every index.
//!
//! `virtio-queue` knows no NO_INTERRUPT: without EVENT_IDX the rule for calls is
//! written out here (virtio 1.3, 2.7.7).

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::{SIZE, oracle_memory};
use crate::queue::{QueueError, SplitQueue};
use crate::testing::{AVAILABLE, DESCRIPTORS, Guest, USED};

/// Bytes of the used ring, avail_event included.
const USED_BYTES: usize = 6 + 8 * SIZE as usize;

#[derive(Debug, Clone, Copy)]
enum Act {
    /// The driver offers so many heads, if it has them.
    Offer(u16),
    /// The device takes so many, if they are there.
    Pop(u16),
    /// It completes the oldest or the newest of those, and publishes.
    Complete(u16, bool),
    /// The driver wants a call beyond so many elements from now.
    Event(i16),
    /// The driver wants no calls, or all.
    Quiet(bool),
    /// The device would sleep.
    Sleep,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1..=SIZE).prop_map(Act::Offer),
        4 => (1..=SIZE).prop_map(Act::Pop),
        4 => (1..=SIZE, any::<bool>()).prop_map(|(count, old)| Act::Complete(count, old)),
        2 => (-3i16..12).prop_map(Act::Event),
        1 => any::<bool>().prop_map(Act::Quiet),
        3 => Just(Act::Sleep),
    ]
}

/// One of the two rings, with what its driver does.
struct Side {
    guest: Guest,
    avail: u16,
}

impl Side {
    fn new(start: u16) -> Self {
        let guest = Guest::new(SIZE);
        guest.put(AVAILABLE + 2, &start.to_le_bytes());
        guest.put(USED + 2, &start.to_le_bytes());
        Self {
            guest,
            avail: start,
        }
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % SIZE);
        let place = AVAILABLE + 4 + 2 * slot;
        self.guest.put(place, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.guest.put(AVAILABLE + 2, &self.avail.to_le_bytes());
    }

    fn used_ring(&self) -> [u8; USED_BYTES] {
        self.guest.get(USED)
    }
}

fn ours(side: &Side, start: u16, event_idx: bool) -> SplitQueue {
    let memory = std::sync::Arc::clone(&side.guest.memory);
    SplitQueue::new(memory, side.guest.layout(), start, event_idx).unwrap()
}

fn theirs(start: u16, event_idx: bool) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_event_idx(event_idx);
    queue.set_next_avail(start);
    queue.set_next_used(start);
    queue.set_ready(true);
    queue
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn rings_agree(
        start in prop_oneof![Just(0u16), 0xfff0u16..=0xffff, any::<u16>()],
        event_idx in any::<bool>(),
        acts in prop::collection::vec(act(), 1..120),
        jump in SIZE + 1..=u16::MAX - SIZE,
    ) {
        let (mut left, mut right) = (Side::new(start), Side::new(start));
        let mut ours = ours(&left, start, event_idx);
        let memory = oracle_memory(&right.guest);
        let mut theirs = theirs(start, event_idx);
        // The first publish after a start calls in any case.
        prop_assert!(ours.publish());

        let mut free: Vec<u16> = (0..SIZE).collect();
        let mut taken: Vec<u16> = Vec::new();
        let (mut published, mut quiet) = (start, false);
        for act in acts {
            match act {
                Act::Offer(count) => {
                    for head in free.drain(..free.len().min(usize::from(count))) {
                        left.offer(head);
                        right.offer(head);
                    }
                }
                Act::Pop(count) => {
                    for _ in 0..count {
                        let head = ours.pop().unwrap();
                        let chain = theirs.pop_descriptor_chain(&memory);
                        prop_assert_eq!(head, chain.map(|chain| chain.head_index()));
                        taken.extend(head);
                    }
                    prop_assert_eq!(ours.next_avail(), theirs.next_avail());
                }
                Act::Complete(count, oldest) => {
                    let old = published;
                    for n in 0..count.min(taken.len() as u16) {
                        let at = if oldest { 0 } else { taken.len() - 1 };
                        let head = taken.remove(at);
                        ours.push_used(head, u32::from(n) * 512 + 1);
                        theirs.add_used(&memory, head, u32::from(n) * 512 + 1).unwrap();
                        published = published.wrapping_add(1);
                        free.push(head);
                    }
                    let called = ours.publish();
                    let wanted = if event_idx {
                        theirs.needs_notification(&memory).unwrap()
                    } else {
                        old != published && !quiet
                    };
                    prop_assert_eq!(called, wanted, "the call for {}..{}", old, published);
                }
                Act::Event(ahead) => {
                    let event = published.wrapping_add_signed(ahead);
                    left.guest.set_used_event(event);
                    right.guest.set_used_event(event);
                }
                Act::Quiet(on) => {
                    quiet = on;
                    for side in [&left, &right] {
                        side.guest.put(AVAILABLE, &u16::from(on).to_le_bytes());
                    }
                }
                Act::Sleep => {
                    let more = ours.enable_kicks().unwrap();
                    prop_assert_eq!(more, theirs.enable_notification(&memory).unwrap());
                    if more {
                        ours.disable_kicks();
                        theirs.disable_notification(&memory).unwrap();
                        if event_idx {
                            // Ours takes back what it asked for, the oracle lets
                            // it stand.
                            let behind = ours.next_avail().wrapping_sub(1).to_le_bytes();
                            let avail_event = USED + 4 + 8 * u64::from(SIZE);
                            right.guest.put(avail_event, &behind);
                        }
                    }
                }
            }
            prop_assert_eq!(left.used_ring(), right.used_ring(), "after {:?}", act);
        }

        // A driver that goes further ahead than the ring is long, counted from
        // where it stands: what ours saw of that may still be popped, and brings
        // it closer.
        let jump = left.avail.wrapping_add(jump);
        for side in [&left, &right] {
            side.guest.put(AVAILABLE + 2, &jump.to_le_bytes());
        }
        prop_assert!(theirs.iter(&memory).is_err());
        let refused = (0..=SIZE).find_map(|_| ours.pop().err());
        prop_assert!(matches!(refused, Some(QueueError::AvailJump(_))), "{refused:?}");
    }
}
