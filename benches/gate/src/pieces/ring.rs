//! The ring alone: heads out, elements in, who is woken, and chains.

use std::hint::black_box;

use pericarp_ring::{RequestQueue, SplitQueue};

use super::{BATCH, Piece};
use crate::guest::{Guest, Layout};

/// Heads out of the available ring.
struct Pop {
    guest: Guest,
    queue: SplitQueue,
}

pub(super) fn pop() -> Box<dyn Piece> {
    let (guest, queue) = Guest::new(BATCH, Layout::Direct);
    Box::new(Pop { guest, queue })
}

impl Piece for Pop {
    fn prepare(&mut self) {
        self.guest.offer();
    }

    fn run(&mut self) {
        let mut popped = 0;
        while let Ok(Some(head)) = self.queue.pop() {
            black_box(head);
            popped += 1;
        }
        assert_eq!(popped, BATCH, "all that is offered");
    }
}

/// One element, one store of the index, one decision about a call.
struct Publish(SplitQueue);

pub(super) fn publish() -> Box<dyn Piece> {
    Box::new(Publish(Guest::new(BATCH, Layout::Direct).1))
}

impl Piece for Publish {
    fn run(&mut self) {
        for head in 0..BATCH {
            self.0.push_used(head, 4097);
            black_box(self.0.publish());
        }
    }
}

/// Falling asleep and waking: kicks on, a look at the ring, kicks off.
struct Kicks(SplitQueue);

pub(super) fn kicks() -> Box<dyn Piece> {
    Box::new(Kicks(Guest::new(BATCH, Layout::Direct).1))
}

impl Piece for Kicks {
    fn run(&mut self) {
        for _ in 0..BATCH {
            let more = self.0.enable_kicks();
            assert_eq!(more, Ok(false), "nothing is offered");
            self.0.disable_kicks();
            black_box(self.0.has_available());
        }
    }
}

/// Chains walked, checked and translated, and their slots freed.
struct Chains {
    guest: Guest,
    queue: RequestQueue<u64>,
    heads: Vec<u16>,
}

fn chains(layout: Layout) -> Box<dyn Piece> {
    let (guest, queue) = Guest::with_requests(BATCH, layout);
    let heads = Vec::with_capacity(usize::from(BATCH));
    Box::new(Chains {
        guest,
        queue,
        heads,
    })
}

pub(super) fn direct() -> Box<dyn Piece> {
    chains(Layout::Direct)
}

pub(super) fn indirect() -> Box<dyn Piece> {
    chains(Layout::Indirect)
}

pub(super) fn scattered() -> Box<dyn Piece> {
    chains(Layout::Scattered)
}

impl Piece for Chains {
    fn prepare(&mut self) {
        self.guest.offer();
    }

    fn run(&mut self) {
        while let Ok(Some((head, loaded))) = self.queue.pop() {
            assert_eq!(loaded, Ok(()), "the driver's chains are sound");
            self.heads.push(head);
        }
        assert_eq!(self.heads.len(), usize::from(BATCH));
        for head in self.heads.drain(..) {
            self.queue.finish(head, 4097);
        }
        black_box(self.queue.publish());
    }
}
