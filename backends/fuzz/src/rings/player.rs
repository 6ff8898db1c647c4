//! Plays a script: the guest's acts, and the worker's between them.
//! `rings::play` makes one for each script.

mod completion;
mod guest;
mod rig;

use std::collections::BTreeMap;
use std::sync::Arc;

use pericarp_block::{BlockDevice, Request};
use pericarp_ring::{Buffer, QueueLayout, RequestQueue, SplitQueue};
use pericarp_vhost::{Device, Step};

use super::judge::{Expect, Flight, Rules};
use crate::chain::Named;
use crate::memory::{Memory, USER};
use crate::script::Script;
pub(super) use rig::Rig;

/// Acts, as the first byte of each.
pub(super) const REQUEST: u8 = 0;
pub(super) const TURN: u8 = 1;
pub(super) const COMPLETE: u8 = 2;
pub(super) const RESTART: u8 = 3;
pub(super) const SPACE: u8 = 12;
const ACTS: u8 = 13;

/// Where things are in the first region.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x500;
const USED_END: u64 = 0x800;
const TABLES: u64 = 0x800;
const HEADERS: u64 = 0x1000;
const DATA: u64 = 0x1400;

/// One script being played.
pub(super) struct Player<'r, 's> {
    rig: &'r mut Rig,
    script: Script<'s>,
    device: Arc<BlockDevice>,
    rules: Rules,
    size: u16,
    event_idx: bool,
    table: usize,
    queue: RequestQueue<Request>,
    avail: u16,
    /// The used index as published, and as it will be.
    published: u16,
    pushed: u16,
    fresh: bool,
    broken: bool,
    flights: BTreeMap<u16, Flight>,
    /// Heads whose I/O the store has.
    issued: Vec<u16>,
    /// Something but the device may have written to the used ring.
    tainted: bool,
    slot: u16,
}

impl<'r, 's> Player<'r, 's> {
    pub(super) fn new(rig: &'r mut Rig, mut script: Script<'s>) -> Self {
        let mode = script.u8();
        let size = 1 << (script.u8() % 7);
        let start = script.u16();
        let which = match (mode & 4 != 0, mode & 8 != 0) {
            (true, _) => 1,
            (false, true) => 2,
            (false, false) => 0,
        };
        let (device, mut rules) = rig.devices[which].clone();
        // FLUSH and CONFIG_WCE; DISCARD and WRITE_ZEROES.
        let cache = if mode & 2 != 0 { 1 << 9 | 1 << 11 } else { 0 };
        let space = if mode & 16 != 0 { 1 << 13 | 1 << 14 } else { 0 };
        let features = (cache | space) & device.features();
        device.negotiated(features);
        rules.features = features;
        rig.memory.put(AVAILABLE + 2, &start.to_le_bytes());
        rig.memory.put(USED + 2, &start.to_le_bytes());
        let event_idx = mode & 1 != 0;
        let queue = open(&rig.memory, 0, size, start, event_idx).expect("the rings are in memory");
        Self {
            rig,
            script,
            device,
            rules,
            size,
            event_idx,
            table: 0,
            queue,
            avail: start,
            published: start,
            pushed: start,
            fresh: true,
            broken: false,
            flights: BTreeMap::new(),
            issued: Vec::new(),
            tainted: false,
            slot: 0,
        }
    }

    pub(super) fn run(&mut self) {
        for _ in 0..200 {
            if self.script.is_over() {
                break;
            }
            self.act();
            self.settle();
        }
        self.turn();
        self.drain();
        self.publish();
        assert_eq!(self.queue.in_flight(), 0, "nothing is left in flight");
        assert!(self.flights.is_empty(), "every popped head was completed");
    }

    fn act(&mut self) {
        match self.script.u8() % ACTS {
            REQUEST => self.request(),
            TURN => self.turn(),
            COMPLETE => self.complete_some(),
            SPACE => self.space(),
            RESTART => self.restart(),
            4 => {
                let (at, len) = (self.script.address(), self.script.u8() % 64);
                let bytes = self.script.take(usize::from(len));
                self.poke(at, bytes);
            }
            5 => {
                let index = u64::from(self.script.u8()) % u64::from(self.size);
                self.descriptor(16 * index);
            }
            6 => {
                let index = u64::from(self.script.u8() % 128);
                self.descriptor(TABLES + 16 * index);
            }
            7 => {
                let head = self.script.u8();
                let head = if head < 250 {
                    u16::from(head) % self.size
                } else {
                    u16::from(head) << 8
                };
                self.offer(head);
            }
            8 => {
                self.avail = self
                    .avail
                    .wrapping_add_signed(i16::from(self.script.u8().cast_signed()) / 8);
                self.poke(AVAILABLE + 2, &self.avail.to_le_bytes());
            }
            9 => {
                let event = self
                    .pushed
                    .wrapping_add_signed(i16::from(self.script.u8().cast_signed()));
                self.poke(
                    AVAILABLE + 4 + 2 * u64::from(self.size),
                    &event.to_le_bytes(),
                );
                let flags = u16::from(self.script.u8() & 1);
                self.poke(AVAILABLE, &flags.to_le_bytes());
            }
            10 => {
                let (value, far) = (self.script.u8() & 3, self.script.u8());
                let offset = if far == 0 { 32 } else { usize::from(far) };
                let taken = self.device.write_config(offset, &[value]).is_ok();
                assert!(
                    !taken || (offset == 32 && value < 2),
                    "a read-only byte was set"
                );
            }
            _ => self.sleep(),
        }
    }

    /// Pops what is there, as a worker's turn does.
    fn turn(&mut self) {
        for _ in 0..self.size {
            if self.broken {
                break;
            }
            let before = self.queue.ring().next_avail();
            let (head, loaded) = match self.queue.pop() {
                Ok(Some(popped)) => popped,
                Ok(None) => break,
                Err(_) => {
                    self.broken = true;
                    break;
                }
            };
            assert_eq!(self.queue.ring().next_avail(), before.wrapping_add(1));
            let named = Named::walk(&self.rig.memory, self.table, self.size, head);
            if !named.long {
                assert_eq!(
                    loaded.is_ok(),
                    named.sound,
                    "head {head}: {loaded:?} {named:?}"
                );
            }
            let expect = if loaded.is_ok() {
                self.rules.expect(&named, &self.rig.memory)
            } else {
                Expect::Anything
            };
            let alone = self.flights.is_empty();
            for flight in self.flights.values_mut() {
                flight.alone = false;
            }
            self.tainted |= named
                .writable
                .iter()
                .any(|&(at, len)| at < USED_END && at.saturating_add(len) > USED);
            let (chain, request) = self.queue.request(head);
            let step = self.device.start(loaded, chain, request);
            let flight = Flight {
                named,
                expect,
                step,
                alone,
                failed: None,
                moved: Vec::new(),
                synced: false,
            };
            self.begun(step, &flight.expect);
            let had = self.flights.insert(head, flight);
            assert!(had.is_none(), "head {head} was in flight");
            self.take(head, step);
        }
        self.publish();
    }

    fn begun(&self, step: Step, expect: &Expect) {
        let right = match (step, expect) {
            (_, Expect::Anything) => true,
            (Step::Read { offset, .. }, Expect::Read { offset: want, .. }) => offset == *want,
            (Step::Write { offset, flags, .. }, Expect::Write { offset: want, .. }) => {
                // Who cannot flush gets writes that are durable.
                offset == *want && (self.rules.can_flush() || flags & libc::RWF_DSYNC != 0)
            }
            (Step::Sync { .. }, Expect::Sync) => true,
            // `take` looks at each range.
            (_, Expect::Ranges { .. }) => !matches!(step, Step::Done { .. }),
            (Step::Done { written }, Expect::Done { used, .. }) => written == *used,
            (Step::Done { written }, Expect::Refused) => written == 1,
            _ => false,
        };
        assert!(right, "{step:?} where {expect:?} is due");
    }

    /// What the worker does with a step.
    fn take(&mut self, head: u16, step: Step) {
        self.settle();
        let flight = self.flights.get_mut(&head).expect("in flight");
        flight.due(step);
        if !matches!(step, Step::Done { .. }) {
            flight.step = step;
        }
        match step {
            Step::Done { written } => {
                let flight = self.flights.remove(&head).expect("in flight");
                flight.judge(&self.rig.memory, self.rules, written, &self.rig.disk);
                let waiter = self.queue.finish(head, written);
                self.used(head, written);
                self.issued.extend(waiter);
            }
            Step::Read { buffer, .. } | Step::Write { buffer, .. } => {
                if buffer == Buffer::Chain || self.queue.take_bounce(head) {
                    self.issued.push(head);
                }
            }
            Step::Sync { .. }
            | Step::Allocate { .. }
            | Step::Discard { .. }
            | Step::WriteZeroes { .. }
            | Step::Errand => self.issued.push(head),
        }
    }

    /// The element the device just pushed is in the used ring.
    fn used(&mut self, head: u16, written: u32) {
        let at = USED + 4 + 8 * u64::from(self.pushed % self.size);
        self.pushed = self.pushed.wrapping_add(1);
        self.settle();
        if !self.tainted {
            let mut element = u32::from(head).to_le_bytes().to_vec();
            element.extend(written.to_le_bytes());
            assert_eq!(
                self.rig.memory.get(at, 8),
                Some(&element[..]),
                "the used element"
            );
        }
    }

    fn publish(&mut self) {
        let called = self.queue.ring().publish();
        let (old, new) = (self.published, self.pushed);
        self.published = new;
        self.settle();
        if self.tainted {
            self.fresh = false;
            return;
        }
        assert_eq!(self.rig.memory.get_u16(USED + 2), new, "used.idx");
        let wanted = if self.event_idx {
            let event = self
                .rig
                .memory
                .get_u16(AVAILABLE + 4 + 2 * u64::from(self.size));
            // vring_need_event of virtio_ring.h.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            old != new && self.rig.memory.get_u16(AVAILABLE) & 1 == 0
        };
        let first = std::mem::take(&mut self.fresh);
        assert_eq!(called, first || wanted, "the call for {old}..{new}");
    }

    /// Asks for kicks, as a worker that would sleep.
    fn sleep(&mut self) {
        if self.broken {
            return;
        }
        let next = self.queue.ring().next_avail();
        match self.queue.ring().enable_kicks() {
            Ok(more) => {
                assert_eq!(
                    more,
                    self.rig.memory.get_u16(AVAILABLE + 2) != next,
                    "a late chain"
                );
                self.settle();
                if self.event_idx && !self.tainted {
                    let at = USED + 4 + 8 * u64::from(self.size);
                    assert_eq!(self.rig.memory.get_u16(at), next, "avail_event");
                }
                if more {
                    self.queue.ring().disable_kicks();
                }
            }
            Err(_) => self.broken = true,
        }
    }

    /// The session takes the queue back and starts it again, on other memory
    /// and from another index perhaps.
    fn restart(&mut self) {
        let (what, table) = (self.script.u8(), usize::from(self.script.u8() % 3));
        self.drain();
        self.publish();
        assert_eq!(self.queue.in_flight(), 0, "drained");
        let next = self.queue.ring().next_avail();
        let base = if what & 1 != 0 {
            self.script.u16()
        } else {
            next
        };
        self.table = table;
        let opened = open(&self.rig.memory, table, self.size, base, self.event_idx);
        self.queue = opened.expect("the first region is in every table");
        self.published = self.rig.memory.get_u16(USED + 2);
        self.pushed = self.published;
        (self.fresh, self.broken, self.tainted) = (true, false, false);
        if what & 2 != 0 {
            self.avail = base;
            self.poke(AVAILABLE + 2, &base.to_le_bytes());
        }
    }

    /// Everything the device wrote meanwhile was the guest's to give.
    fn settle(&mut self) {
        let flights = &self.flights;
        self.rig.memory.changes(|at, _| {
            let ring = (USED..USED_END).contains(&at);
            assert!(
                ring || flights.values().any(|flight| flight.named.names(at)),
                "byte {at:#x} of guest memory was written and nobody named it"
            );
        });
    }
}

fn open(
    memory: &Memory,
    table: usize,
    size: u16,
    base: u16,
    event_idx: bool,
) -> Option<RequestQueue<Request>> {
    let layout = QueueLayout {
        size,
        descriptors: USER,
        available: USER + AVAILABLE,
        used: USER + USED,
    };
    let memory = Arc::clone(&memory.tables[table]);
    SplitQueue::new(memory, layout, base, event_idx)
        .ok()
        .map(RequestQueue::new)
}
