//! What features and commands mean, from virtio 1.3, 5.1, and `linux/if_tun.h`, and what
//! the tap is therefore to be told.

use pericarp_net::features::{
    CTRL_GUEST_OFFLOADS, CTRL_VQ, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4,
    GUEST_USO6, MQ, MRG_RXBUF,
};
use pericarp_vhost::features::VERSION_1;

use super::rig::Said;

/// Bytes of a frame's own header, and the most that follow it and a VLAN tag.
const ETHERNET: usize = 14;
const LARGEST: usize = 18 + 65535;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Packets to the driver, of this pair.
    In(usize),
    /// Packets from it.
    Out(usize),
    Control,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) features: u64,
    pub(super) pairs: u16,
}

impl Rules {
    fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    pub(super) fn kind(&self, queue: u16) -> Kind {
        let used = if self.has(MQ) { self.pairs } else { 1 };
        let pair = queue / 2;
        if self.has(CTRL_VQ) && queue == 2 * used || pair >= self.pairs {
            return Kind::Control;
        }
        match queue % 2 {
            0 => Kind::In(usize::from(pair)),
            _ => Kind::Out(usize::from(pair)),
        }
    }

    pub(super) fn merges(&self) -> bool {
        self.has(MRG_RXBUF)
    }

    /// Bytes of virtio's header: `num_buffers` is there since virtio 1.0, and where
    /// buffers may be merged.
    pub(super) fn header(&self) -> usize {
        match self.features & (VERSION_1 | MRG_RXBUF) {
            0 if self.features != 0 => 10,
            _ => 12,
        }
    }

    pub(super) fn least(&self) -> usize {
        self.header() + ETHERNET
    }

    pub(super) fn most(&self) -> usize {
        self.header() + LARGEST
    }
}

/// TUN_F_CSUM and so on, for what the driver takes.
fn words(features: u64) -> u32 {
    let has = |bits: u64| features & bits == bits;
    if !has(GUEST_CSUM) {
        return 0;
    }
    let tso4 = 2 * u32::from(has(GUEST_TSO4));
    let tso6 = 4 * u32::from(has(GUEST_TSO6));
    let ecn = 8 * u32::from(has(GUEST_ECN) && tso4 + tso6 > 0);
    let uso = 0x60 * u32::from(has(GUEST_USO4 | GUEST_USO6));
    1 + tso4 + tso6 + ecn + uso
}

/// What the driver has chosen, and what the tap should know of that.
#[derive(Debug)]
pub(super) struct Choice {
    rules: Rules,
    active: u16,
    offloads: u64,
    served: u64,
    attached: Vec<bool>,
    /// Commands have been obeyed that nobody followed: several at a time, or of a driver
    /// that breaks rules.
    pub(super) vague: bool,
}

/// A command of the driver's.
#[derive(Debug, Clone, Copy)]
enum Wish {
    Pairs(u16),
    Offloads(u64),
}

impl Choice {
    /// Of a card whose tap is told that all of it ended.
    pub(super) fn new(rules: Rules, said: &Said) -> Self {
        Self {
            rules,
            active: 0,
            offloads: 0,
            served: 0,
            attached: said.attached.clone(),
            vague: false,
        }
    }

    /// The driver is one that agreed to this, and has chosen nothing.
    pub(super) fn negotiated(&mut self, rules: Rules, said: &Said) {
        self.rules = rules;
        self.begin(said);
        self.steer(said);
    }

    fn begin(&mut self, said: &Said) {
        self.offload(self.rules.features, said);
        self.active = match self.rules.has(MQ | CTRL_VQ) {
            true => 1,
            false => self.rules.pairs,
        };
    }

    /// No queue is served, the tap does as it is told, and features are to be agreed on.
    pub(super) fn begin_anew(&mut self, said: &Said) {
        assert_eq!(self.served, 0, "a queue is served");
        self.vague = false;
        self.attached.clone_from(&said.attached);
    }

    /// The front end has a queue served, or no more.
    pub(super) fn serves(&mut self, queue: u16, on: bool, said: &Said) {
        // A queue's place in the rest of this; that of commands has none.
        let counts = queue % 2 == 1 || self.rules.kind(queue) != Kind::Control;
        let bit = u64::from(counts) << queue;
        self.served = if on {
            self.served | bit
        } else {
            self.served & !bit
        };
        if !on && self.served == 0 {
            self.begin(said);
        }
        self.steer(said);
    }

    /// Packets are to look like this from now on; false where the tap refuses.
    fn offload(&mut self, offloads: u64, said: &Said) -> bool {
        let same = words(offloads) == words(self.offloads);
        let taken = same || !said.refuses_offloads;
        if taken {
            self.offloads = offloads;
        }
        taken
    }

    /// A command, without its last byte; what that is to be.
    pub(super) fn command(&mut self, bytes: &[u8], said: &Said) -> u8 {
        let wish = match bytes {
            [4, 0, low, high, ..] => Some(Wish::Pairs(u16::from_le_bytes([*low, *high]))),
            [5, 0, rest @ ..] => rest
                .first_chunk()
                .map(|bits| Wish::Offloads(u64::from_le_bytes(*bits))),
            _ => None,
        };
        let agreed = [
            GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_USO4, GUEST_USO6,
        ];
        let agreed = agreed.iter().sum::<u64>() & self.rules.features;
        let taken = match wish {
            Some(Wish::Pairs(pairs))
                if self.rules.has(MQ) && (1..=self.rules.pairs).contains(&pairs) =>
            {
                self.active = pairs;
                true
            }
            Some(Wish::Offloads(offloads))
                if self.rules.has(CTRL_GUEST_OFFLOADS) && offloads & !agreed == 0 =>
            {
                self.offload(offloads, said)
            }
            _ => return 1,
        };
        u8::from(!(self.steer(said) && taken))
    }

    /// Has the queues attached that are to be; false where the tap refuses.
    fn steer(&mut self, said: &Said) -> bool {
        let mut follows = true;
        for (pair, attached) in self.attached.iter_mut().enumerate() {
            let wanted = pair < usize::from(self.active) && self.served & 1 << (2 * pair) != 0;
            if wanted != *attached {
                follows &= !said.refuses_attaching;
                *attached ^= !said.refuses_attaching;
            }
        }
        follows
    }

    /// The tap was told just that.
    pub(super) fn judge(&self, said: &Said) {
        assert_eq!(said.header, self.rules.header(), "the tap's header");
        if !self.vague {
            assert_eq!(said.offloads, words(self.offloads), "offloads: {self:?}");
            assert_eq!(said.attached, self.attached, "attached: {self:?}");
        }
    }
}
