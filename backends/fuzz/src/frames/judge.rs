//! What a worker's turns may have come to. The chains are read before, by the oracle's
//! own eyes, and the used rings, the tap and guest memory after.

mod arrivals;

use std::collections::VecDeque;

use pericarp_vhost::{Device, Taken};

use super::lane::{Entry, Lane};
use super::player::{Player, UNANSWERED};
use super::rig::Bench;
use super::rules::{Kind, Rules};
use crate::chain::Named;
use arrivals::Arrived;

/// Where rings and tables end.
const DATA: u64 = 0x1c00;
/// Reasons to drop a packet, and their places in [`Counts`].
const REASONS: [&str; 8] = [
    "rx-dropped-chain",
    "rx-dropped-length",
    "rx-dropped-no-room",
    "rx-dropped-refused",
    "tx-dropped-chain",
    "tx-dropped-length",
    "tx-dropped-no-room",
    "tx-dropped-refused",
];
const CHAIN: usize = 0;
const LENGTH: usize = 1;
const NO_ROOM: usize = 2;
const REFUSED: usize = 3;
/// So many bytes fit the tap, with what the kernel adds to each packet.
const FITS: usize = 100_000;
const EACH: usize = 1000;

/// Packets that were dropped: to the guest and from it, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts(pub(super) [[u64; 4]; 2]);

impl Counts {
    pub(super) fn of(bench: &Bench) -> Self {
        let all = bench.device.held();
        let count = |reason| {
            let found = all.iter().find(|(name, _)| *name == reason);
            found.expect("a count").1
        };
        let counts = REASONS.map(count);
        Self([0, 4].map(|first| std::array::from_fn(|n| counts[first + n])))
    }
}

/// A chain that packets can be written into.
fn is_room(named: &Named, rules: &Rules) -> bool {
    let room = Named::bytes(&named.writable);
    named.sound && named.readable.is_empty() && room >= rules.header() as u64
}

/// What the device may write of a chain.
fn may(kind: Kind, named: &Named, rules: &Rules) -> Vec<(u64, u64)> {
    match kind {
        Kind::In(_) if is_room(named, rules) => named.writable.clone(),
        Kind::Control if named.sound => named.status().map(|at| (at, 1)).into_iter().collect(),
        _ => Vec::new(),
    }
}

impl Player<'_, '_> {
    /// Reads the chains that the worker is about to read.
    pub(super) fn look(&mut self) {
        let mut reads = Vec::new();
        let mut writes = Vec::new();
        for number in 0..self.lanes.len() {
            let kind = self.rules.kind(number as u16);
            if !self.lanes[number].running {
                continue;
            }
            let mut entries = std::mem::take(&mut self.lanes[number].entries);
            let lane = &self.lanes[number];
            for entry in &mut entries {
                let named = lane.walk(self.memory, self.table, entry.head);
                writes.extend(may(kind, &named, &self.rules));
                match (kind, &entry.named) {
                    (Kind::In(_), Some(before)) if *before != named => {
                        // The worker may know either.
                        self.tainted = true;
                        self.once.extend(may(kind, before, &self.rules));
                    }
                    (Kind::In(_), _) => {}
                    _ => reads.extend(named.readable.iter().copied()),
                }
                entry.named = Some(named);
            }
            if lane.poisoned {
                for head in 0..lane.size {
                    let named = lane.walk(self.memory, self.table, head);
                    writes.extend(may(kind, &named, &self.rules));
                }
            }
            self.lanes[number].entries = entries;
        }
        writes.sort_unstable();
        let end = |&(at, len): &(u64, u64)| at.saturating_add(len);
        let overlap = writes.windows(2).any(|two| end(&two[0]) > two[1].0);
        let meet = |one: &(u64, u64), other: &(u64, u64)| one.0 < end(other) && other.0 < end(one);
        let read = || reads.iter().any(|r| writes.iter().any(|w| meet(r, w)));
        // Rings change under whoever reads them.
        self.tainted |= reads.iter().any(|first| first.0 < DATA);
        if writes.first().is_some_and(|first| first.0 < DATA) {
            (self.tainted, self.blind) = (true, true);
            self.lanes.iter_mut().for_each(|lane| lane.poisoned = true);
        }
        self.tainted |= overlap || read();
        if !self.tainted {
            self.once.clear();
        }
        self.once.extend(writes);
    }

    /// Looks at all that the worker did.
    pub(super) fn judge(&mut self) {
        // Where receive buffers are is looked at when something was written, or a queue
        // stops.
        let came = self.lanes.iter().any(|lane| {
            let writes = !matches!(self.rules.kind(lane.number), Kind::Out(_));
            writes && lane.running && lane.used_now(self.memory) != lane.used
        });
        self.settle(came);
        let mut refused = 0;
        for number in 0..self.lanes.len() {
            let (told, called) = (self.was_told(number), self.was_called(number));
            let lane = &mut self.lanes[number];
            if told {
                assert!(lane.poisoned, "a good ring is said to be broken: {lane:?}");
                lane.broken = true;
            }
            if !lane.running {
                continue;
            }
            let used = lane.used_index(self.memory);
            let count = usize::from(used.wrapping_sub(lane.used));
            assert!(
                self.tainted || count == 0 || called,
                "the driver was not called for {count}: {lane:?}"
            );
            let known = count.min(lane.entries.len());
            assert!(self.tainted || known == count, "used more than offered");
            let done: Vec<Entry> = lane.entries.drain(..known).collect();
            let first = lane.used;
            let elements: Vec<(u16, u32)> = (0..known as u16)
                .map(|n| lane.element(self.memory, first.wrapping_add(n)))
                .collect();
            if !self.tainted {
                match self.rules.kind(number as u16) {
                    Kind::In(pair) => self.arrived(number, pair, &done, elements),
                    Kind::Out(pair) => self.departed(number, pair, &done, &elements),
                    Kind::Control => self.answered(number, &done, elements),
                }
            }
            let lane = &mut self.lanes[number];
            done.iter().for_each(|entry| lane.reclaim(entry));
            lane.saw(self.memory, used);
        }
        if !self.hold {
            for pair in 0..self.out.len() {
                refused += self.read_out(pair);
            }
        }
        self.count(refused);
    }

    /// Everything the device wrote was the guest's to give.
    fn settle(&mut self, all: bool) {
        let regions = if all { 3 } else { 2 };
        let (lanes, once, blind) = (&self.lanes, &self.once, self.blind);
        let mut last = (0, 0);
        self.memory.changes_in(regions, |at, _| {
            let within = |(start, len): (u64, u64)| at >= start && at - start < len;
            if within(last) {
                return;
            }
            let ring = |lane: &Lane| lane.running && lane.is_used_ring(at);
            let named = once.iter().find(|span| within(**span));
            last = named.copied().unwrap_or(last);
            assert!(
                blind || named.is_some() || lanes.iter().any(ring),
                "byte {at:#x} of guest memory was written and nobody named it"
            );
        });
    }

    /// A queue of packets of the guest's: all are gone, in order, and nothing was written.
    fn departed(&mut self, number: usize, pair: usize, done: &[Entry], elements: &[(u16, u32)]) {
        let lane = &self.lanes[number];
        assert!(lane.entries.is_empty(), "left behind: {lane:?}");
        for (entry, element) in done.iter().zip(elements) {
            assert_eq!(*element, (entry.head, 0), "in order and empty: {lane:?}");
            let named = entry.named.as_ref().expect("it was looked at");
            let len = Named::bytes(&named.readable) as usize;
            if !named.sound || !named.writable.is_empty() {
                self.due.0[1][CHAIN] += 1;
            } else if !(self.rules.least()..=self.rules.most()).contains(&len) {
                self.due.0[1][LENGTH] += 1;
            } else {
                let bytes = named.read(self.memory, len).expect("sound");
                self.out[pair].push(bytes);
            }
        }
    }

    /// What the guest sent is what the host reads; gives how many the tap had no room for.
    fn read_out(&mut self, pair: usize) -> u64 {
        let mut bytes = vec![0; 70_000];
        let mut expected = VecDeque::from(std::mem::take(&mut self.out[pair]));
        let sum: usize = expected.iter().map(|packet| packet.len() + EACH).sum();
        let mut missing = 0;
        while let Ok(len) = self.bench.peers[pair].recv(&mut bytes) {
            if self.tainted {
                continue;
            }
            loop {
                let next = expected.pop_front();
                let next = next.expect("the host reads what the guest did not send, or not then");
                if next == bytes[..len] {
                    break;
                }
                missing += 1;
            }
        }
        if self.tainted {
            return 0;
        }
        missing += expected.len() as u64;
        assert!(missing == 0 || sum > FITS, "{missing} packets were lost");
        missing
    }

    /// Commands: all are answered.
    fn answered(&mut self, number: usize, done: &[Entry], mut elements: Vec<(u16, u32)>) {
        assert!(self.lanes[number].entries.is_empty(), "left behind");
        let many = done.len() > 1;
        self.choice.vague |= many;
        for entry in done {
            let place = elements.iter().position(|(head, _)| *head == entry.head);
            let (_, len) = elements.swap_remove(place.expect("each once"));
            let named = entry.named.as_ref().expect("it was looked at");
            let Some(at) = named.status().filter(|_| named.sound) else {
                assert_eq!(len, 0, "nowhere to answer: {entry:?}");
                continue;
            };
            assert_eq!(len, 1, "an answer is a byte: {entry:?}");
            let answer = self.memory.get(at, 1).expect("in memory")[0];
            let all = Named::bytes(&named.readable) as usize;
            let command = named.read(self.memory, all.min(64)).expect("sound");
            let want = self.choice.command(&command, &self.bench.said());
            if many || self.choice.vague {
                assert!(answer < 2, "{answer:#x}, {UNANSWERED:#x} before");
            } else {
                assert_eq!(answer, want, "{command:?} {:?}", self.choice);
            }
        }
    }

    /// Drops add up.
    fn count(&mut self, refused: u64) {
        if self.tainted {
            return;
        }
        self.due.0[1][REFUSED] += refused;
        let now = Counts::of(self.bench);
        let mut due = self.due;
        for (way, reasons) in due.0.iter_mut().enumerate() {
            for (reason, count) in reasons.iter_mut().enumerate() {
                *count += self.before.0[way][reason];
            }
        }
        let [unsound, most] = [&now, &due].map(|counts| counts.0[0][CHAIN]);
        due.0[0][CHAIN] = unsound;
        if self.hold {
            due.0[1][REFUSED] = now.0[1][REFUSED];
        }
        assert_eq!(now, due, "drops");
        // Those that were used, and no more than were there.
        let waiting = self.lanes.iter().filter(|lane| lane.running);
        let waiting = waiting.flat_map(|lane| &lane.entries).count() as u64;
        assert!(unsound <= most + waiting + self.recounted, "unsound chains");
        let complete = !self.uncounted && !self.waits();
        assert!(
            !complete || unsound >= most,
            "{most} unsound, {unsound} counted"
        );
    }

    /// A packet was read for the guest that does not fit what it offers yet.
    fn waits(&self) -> bool {
        let mut lanes = self.lanes.iter().enumerate();
        lanes.any(|(number, _)| self.waits_in(number))
    }

    fn waits_in(&self, number: usize) -> bool {
        let lane = &self.lanes[number];
        let Kind::In(pair) = self.rules.kind(number as u16) else {
            return false;
        };
        let some = self.room(lane).next().is_some();
        lane.running && self.rules.merges() && some && !self.sent[pair].is_empty()
    }

    /// Bytes of each chain that can be filled.
    fn room<'a>(&'a self, lane: &'a Lane) -> impl Iterator<Item = u64> + 'a {
        let named = lane.entries.iter().filter_map(|entry| entry.named.as_ref());
        let rooms = named.filter(|named| is_room(named, &self.rules));
        rooms.map(|named| Named::bytes(&named.writable))
    }

    /// A queue was taken back: it says where it is, and a packet that waited is gone.
    pub(super) fn given_back(&mut self, number: usize, taken: Taken) {
        self.settle(true);
        if !self.tainted && self.waits_in(number) {
            let Kind::In(pair) = self.rules.kind(number as u16) else {
                unreachable!("only packets that come wait");
            };
            self.sent[pair].pop_front();
            self.due.0[0][NO_ROOM] += 1;
            self.uncounted = true;
        }
        let told = self.was_told(number);
        let lane = &mut self.lanes[number];
        lane.broken |= told;
        if !self.tainted {
            let want = lane.avail.wrapping_sub(lane.entries.len() as u16);
            assert_eq!(taken.next_avail, want, "where it stands: {lane:?}");
            assert!(!taken.broken, "a good ring is broken: {lane:?}");
            assert_eq!(lane.used, want, "used and available");
        }
        lane.base = taken.next_avail;
        lane.broken |= taken.broken;
        lane.running = false;
        let rules = self.rules;
        for entry in &mut lane.entries {
            let named = entry.named.take();
            self.recounted += u64::from(named.is_some_and(|named| !is_room(&named, &rules)));
        }
        self.count(0);
    }

    fn arrived(&mut self, number: usize, pair: usize, done: &[Entry], elements: Vec<(u16, u32)>) {
        let lane = &self.lanes[number];
        let mut arrived = Arrived {
            memory: self.memory,
            rules: self.rules,
            size: usize::from(lane.size),
            sent: &mut self.sent[pair],
            chains: done.iter().chain(&lane.entries).collect(),
            due: &mut self.due.0[0],
        };
        arrived.judge(done.len(), elements);
        if !lane.broken {
            arrived.rest();
        }
    }
}
