//! Plays a script: the acts of a driver, its front end and the host. What came of them
//! is looked at in `judge`. `frames::play` makes one for each script.

mod acts;

pub(super) use acts::UNANSWERED;

use std::collections::{BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;

use pericarp_vhost::{Device, Given, features as common};

use super::judge::Counts;
use super::lane::Lane;
use super::rig::{Bench, rung, shared};
use super::rules::{Choice, Kind, Rules};
use crate::chain::Table;
use crate::memory::Memory;
use crate::script::Script;

/// Acts, as the first byte of each.
pub(super) const SEND: u8 = 0;
pub(super) const OFFER: u8 = 1;
pub(super) const FRAME: u8 = 2;
pub(super) const COMMAND: u8 = 3;
pub(super) const WORK: u8 = 4;
pub(super) const SWITCH: u8 = 5;
pub(super) const RESTART: u8 = 6;
pub(super) const REFUSE: u8 = 7;
pub(super) const HOLD: u8 = 8;
pub(super) const POKE: u8 = 9;
pub(super) const DESCRIPTOR: u8 = 10;
pub(super) const HEAD: u8 = 11;
pub(super) const JUMP: u8 = 12;
const ACTS: u8 = 16;

/// Acts in a script.
const MOST_ACTS: usize = 60;
/// Turns in which a worker comes to rest.
const TURNS: usize = 3000;
/// Entries of a queue.
pub(super) const SIZES: RangeInclusive<u16> = 2..=32;

/// One script being played.
pub(super) struct Player<'r, 's> {
    pub(super) memory: &'r mut Memory,
    pub(super) bench: &'r mut Bench,
    bells: &'r [[OwnedFd; 3]],
    pub(super) script: Script<'s>,
    /// The driver keeps to what a driver may do, but for single chains.
    polite: bool,
    event_idx: bool,
    /// Features that are left out.
    wanted: u8,
    pub(super) rules: Rules,
    pub(super) choice: Choice,
    pub(super) table: Table,
    pub(super) lanes: Vec<Lane>,
    /// Packets of the host's that nobody has seen arrive, by pair.
    pub(super) sent: Vec<VecDeque<Vec<u8>>>,
    /// Packets of the guest's that the host has not read.
    pub(super) out: Vec<Vec<Vec<u8>>>,
    /// The host reads nothing for now.
    pub(super) hold: bool,
    /// What was counted before, and what should have been since.
    pub(super) before: Counts,
    pub(super) due: Counts,
    /// Bounds of chains that could not be filled: how many may count twice, and whether
    /// some may not count.
    pub(super) recounted: u64,
    pub(super) uncounted: bool,
    /// The guest broke a rule, and what it gets is its own affair; what it must not
    /// reach is not.
    pub(super) tainted: bool,
    /// It had the device write to rings and tables.
    pub(super) blind: bool,
    /// All that was ever named for writing, once that is so.
    pub(super) once: BTreeSet<(u64, u64)>,
    /// Numbers packets.
    serial: u32,
    /// Where the next packet of the guest's goes.
    out_at: u64,
}

impl<'r, 's> Player<'r, 's> {
    pub(super) fn new(
        memory: &'r mut Memory,
        bench: &'r mut Bench,
        bells: &'r [[OwnedFd; 3]],
        mut script: Script<'s>,
    ) -> Self {
        let (mode, wanted) = (script.u8(), script.u8());
        let sizes = [4, 16, 32, 2, 8];
        let size = sizes[usize::from(mode >> 4) % sizes.len()];
        let pairs = bench.peers.len() as u16;
        let rules = Rules { features: 0, pairs };
        let event_idx = mode & 2 != 0;
        let choice = Choice::new(rules, &bench.said());
        let lanes = (0..bench.device.queue_count()).map(|n| Lane::new(n, size, event_idx));
        let lanes: Vec<Lane> = lanes.collect();
        bells.iter().flatten().for_each(|bell| {
            rung(bell);
        });
        let before = Counts::of(bench);
        let mut player = Self {
            memory,
            bench,
            bells,
            script,
            polite: mode & 1 == 0,
            event_idx,
            wanted,
            rules,
            choice,
            table: 0,
            lanes,
            sent: vec![VecDeque::new(); usize::from(pairs)],
            out: vec![Vec::new(); usize::from(pairs)],
            hold: false,
            before,
            due: Counts::default(),
            recounted: 0,
            uncounted: false,
            tainted: false,
            blind: false,
            once: BTreeSet::new(),
            serial: 0,
            out_at: acts::OUT,
        };
        player.negotiate();
        for number in 0..player.lanes.len() {
            player.start(number);
        }
        player
    }

    pub(super) fn run(&mut self) {
        for _ in 0..MOST_ACTS {
            if self.script.is_over() {
                break;
            }
            self.act();
        }
        self.finish();
    }

    fn act(&mut self) {
        match self.script.u8() % ACTS {
            SEND => self.send(),
            OFFER => self.offer(),
            FRAME => self.frame(),
            COMMAND => self.command(),
            SWITCH => {
                let number = usize::from(self.script.u8()) % self.lanes.len();
                self.work();
                if self.lanes[number].running {
                    self.stop(number);
                } else {
                    self.start(number);
                }
            }
            RESTART => self.restart(),
            REFUSE => {
                let what = self.script.u8();
                let mut said = self.bench.said();
                said.refuses_offloads = what & 1 != 0;
                said.refuses_attaching = what & 2 != 0;
            }
            HOLD => self.hold ^= true,
            POKE if !self.polite => {
                let (at, len) = (self.script.address(), self.script.u8() % 64);
                let bytes = self.script.take(usize::from(len));
                self.poke(at, bytes);
            }
            DESCRIPTOR if !self.polite => self.descriptor(),
            HEAD if !self.polite => self.head(),
            JUMP if !self.polite => {
                let number = usize::from(self.script.u8()) % self.lanes.len();
                let by = self.script.u8().cast_signed() / 3;
                self.lanes[number].jump(self.memory, by);
                self.tainted = true;
                self.kick(number);
            }
            _ => self.work(),
        }
    }

    /// Has the worker do what there is to do, and judges that.
    pub(super) fn work(&mut self) {
        self.look();
        let rested = self.bench.hand.work(TURNS).expect("the engine works");
        assert!(rested, "the worker does not come to rest");
        self.judge();
        self.choice.vague |= self.tainted;
        self.choice.judge(&self.bench.said());
    }

    /// Agrees on features. No queue runs.
    fn negotiate(&mut self) {
        let wanted = self.wanted;
        use pericarp_net::features as net;
        let offered = self.bench.device.features();
        let mut features = offered;
        for (bit, bits) in [
            (1, net::MRG_RXBUF),
            (2, net::CTRL_VQ),
            (4, net::MQ),
            (8, common::VERSION_1),
            (16, net::GUEST_CSUM),
            (32, net::CTRL_GUEST_OFFLOADS),
            (64, net::GUEST_TSO4 | net::GUEST_TSO6),
        ] {
            if wanted & bit != 0 {
                features &= !bits;
            }
        }
        if wanted & 8 == 0 {
            features |= common::VERSION_1;
        }
        self.rules.features = features;
        self.bench.device.negotiated(features);
        self.choice.negotiated(self.rules, &self.bench.said());
        self.choice.judge(&self.bench.said());
    }

    /// Has a queue served, from where it was left.
    fn start(&mut self, number: usize) {
        let device = self.bench.device.clone();
        let lane = &mut self.lanes[number];
        if lane.broken {
            return;
        }
        let queue = lane.open(self.memory, self.table);
        device.serves(lane.number, true);
        lane.running = true;
        let given = Given {
            device,
            device_id: 0,
            number: lane.number,
            queue,
            bells: shared(&self.bells[number]),
        };
        self.bench.hand.give(given).expect("there is room");
        let said = self.bench.said();
        self.choice.serves(number as u16, true, &said);
    }

    /// Takes a queue back, when there is nothing to do for it.
    fn stop(&mut self, number: usize) {
        let queue = number as u16;
        let taken = self.bench.hand.take(0, queue, TURNS);
        let taken = taken.expect("the engine works").expect("it drains");
        self.bench.device.serves(queue, false);
        self.given_back(number, taken);
        let said = self.bench.said();
        self.choice.serves(queue, false, &said);
        self.choice.judge(&said);
    }

    /// The front end takes all queues back, and starts them anew: with other features
    /// or memory, and perhaps for another driver.
    fn restart(&mut self) {
        let (what, wanted) = (self.script.u8(), self.script.u8());
        if what & 1 != 0 {
            self.yield_to_driver();
        }
        self.work();
        let running: Vec<usize> = (0..self.lanes.len())
            .filter(|n| self.lanes[*n].running)
            .collect();
        for number in &running {
            self.stop(*number);
        }
        self.table = usize::from(what >> 2) % 3;
        if what & 1 != 0 {
            self.forget();
        }
        if what & 2 != 0 {
            self.wanted = wanted;
        }
        if what & 3 != 0 {
            self.negotiate();
        }
        for number in running {
            self.start(number);
        }
    }

    /// The tap does as it is told from now on.
    fn yield_to_driver(&mut self) {
        let mut said = self.bench.said();
        (said.refuses_offloads, said.refuses_attaching) = (false, false);
    }

    /// Another driver: rings are empty, and nothing is on its way.
    fn forget(&mut self) {
        self.memory.clear();
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            *lane = Lane::new(number as u16, lane.size, self.event_idx);
        }
        self.drain();
        self.before = Counts::of(self.bench);
        self.due = Counts::default();
        (self.recounted, self.uncounted) = (0, false);
        (self.tainted, self.blind) = (false, false);
        self.once.clear();
        self.choice.begin_anew(&self.bench.said());
    }

    /// Empties the tap, both ways.
    fn drain(&mut self) {
        self.bench.drain();
        self.sent.iter_mut().for_each(VecDeque::clear);
        self.out.iter_mut().for_each(Vec::clear);
    }

    /// A driver kicks if it is asked to.
    pub(super) fn kick(&mut self, number: usize) {
        let lane = &self.lanes[number];
        if self.tainted || lane.wants_kick(self.memory) {
            let _ = rustix::io::write(&self.bells[number][0], &1u64.to_ne_bytes());
        }
    }

    /// Whether the driver was called since this was asked last.
    pub(super) fn was_called(&self, number: usize) -> bool {
        rung(&self.bells[number][1])
    }

    /// Whether the driver was told that its ring is broken.
    pub(super) fn was_told(&self, number: usize) -> bool {
        rung(&self.bells[number][2])
    }

    /// All that is on its way arrives, as far as the driver lets it; then all ends.
    fn finish(&mut self) {
        self.yield_to_driver();
        self.hold = false;
        for number in 0..self.lanes.len() {
            if !self.lanes[number].running {
                self.start(number);
            }
        }
        self.work();
        for number in 0..self.lanes.len() {
            let Kind::In(pair) = self.rules.kind(number as u16) else {
                continue;
            };
            // More is offered until it is taken or there is no more to offer.
            for _ in 0..64 {
                let waits = !self.sent[pair].is_empty() && !self.lanes[number].broken;
                if !waits || self.tainted || !self.offer_one(number, 2048, 0) {
                    break;
                }
                self.work();
            }
        }
        for number in 0..self.lanes.len() {
            if self.lanes[number].running {
                self.stop(number);
            }
        }
        self.drain();
        self.rules.features = 0;
        self.bench.device.negotiated(0);
    }
}
