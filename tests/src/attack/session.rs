//! One hostile session: a front end and a driver that set a device up as they should, and then do
//! one thing after another that they should not. What the device makes of it is counted; whether
//! anybody suffered is found out by others.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use super::chance::Chance;
use super::messages;
use super::report::{Act, Tally};
use crate::bounded::poll;
use crate::frontend::{
    Chain, DATA, Desc, Driver, DriverError, FAR, INDIRECT, REGION, Setup, TABLE,
};

/// Requests whose bytes have a place of their own.
const SLOTS: u16 = 60;
/// Descriptors of each.
const STRIDE: u16 = 4;
/// Entries of every ring.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Where in a slot the device writes.
const REPLY: u64 = 0x8000;
/// How long is waited for what may never come.
const MOMENT: Duration = Duration::from_millis(4);

/// A request before it is in memory.
#[derive(Debug, Default)]
pub(super) struct Request {
    /// The ring it goes through.
    pub(super) queue: usize,
    /// What the device is to read.
    pub(super) readable: Vec<Vec<u8>>,
    /// What the device may write.
    pub(super) writable: Vec<u32>,
    /// What it is, for who reads the answer.
    pub(super) what: u32,
}

/// A device of one kind, as an attacker knows it.
pub(super) trait Victim {
    /// Rings that it has.
    fn queues(&self) -> u16;
    /// Features that are taken where they are offered, beside the usual ones.
    fn features(&self) -> u64;
    /// What a driver says first.
    fn first(&mut self) -> Option<Request> {
        None
    }
    /// A request that is right, or wrong in one or two of its fields.
    fn request(&mut self, chance: &mut Chance) -> Request;
    /// What came of one.
    fn answer(&mut self, _what: u32, _reply: &[u8]) {}
}

/// What may follow an act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Anything.
    More,
    /// Nothing: the session is over.
    Over,
    /// Nothing, and guest memory must not be touched: it is not there.
    Cut,
}

/// A connection, its memory and what is in flight.
pub(super) struct Session {
    driver: Driver,
    /// Where slots begin: in the first region, or in the second.
    base: u64,
    next: u16,
    /// By queue and head: what was asked, and in which slot.
    asked: HashMap<(usize, u32), (u32, u16)>,
    /// Others that came and say nothing.
    silent: Vec<UnixStream>,
}

impl Session {
    /// Connects and sets all rings up.
    ///
    /// # Errors
    /// The device is not there, or refuses a step.
    pub(super) fn begin(
        socket: &Path,
        victim: &mut dyn Victim,
        chance: &mut Chance,
    ) -> Result<Self, DriverError> {
        let setup = Setup {
            queues: victim.queues(),
            queue_size: QUEUE_SIZE,
            event_idx: chance.one_in(2),
            indirect: !chance.one_in(8),
            extra: victim.features(),
            inflight: chance.one_in(4),
            ..Setup::default()
        };
        let mut session = Self {
            driver: Driver::connect(socket, &setup)?,
            base: chance.pick(&[0, REGION]),
            next: 0,
            asked: HashMap::new(),
            silent: Vec::new(),
        };
        if let Some(first) = victim.first() {
            session.queue(&first)?;
            session.go();
            session.collect(victim, 1, Duration::from_secs(10));
        }
        Ok(session)
    }

    /// All that the guest has in memory.
    pub(super) fn memory(&self) -> Result<Vec<u8>, DriverError> {
        self.driver.peek(0, 2 * REGION as usize)
    }

    /// Whether the device has hung up.
    pub(super) fn is_over(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut byte = [0; 1];
        match recv(&self.driver.stream, &mut byte[..], flags) {
            Ok((count, _)) => count == 0,
            Err(errno) => errno != rustix::io::Errno::AGAIN,
        }
    }

    /// Does one of the acts, and counts it.
    pub(super) fn act(
        &mut self,
        act: Act,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        tally: &mut Tally,
    ) -> Result<Next, DriverError> {
        match act {
            Act::Requests => self.requests(victim, chance, tally, false),
            Act::Rings => self.requests(victim, chance, tally, true),
            Act::InFlight => self.in_flight(victim, chance, tally),
            Act::Notifications => self.notifications(victim, chance, tally),
            Act::Order => self.order(victim, chance, tally),
            Act::Messages => {
                self.load(victim, chance, 8)?;
                messages::play(&self.driver, chance, tally);
                Ok(Next::Over)
            }
            Act::Truncation => self.truncation(victim, chance, tally),
            Act::Connections => self.connections(victim, chance, tally),
        }
    }

    /// Puts a request's bytes into the next slot; the chain that a driver makes of it.
    fn place(&mut self, request: &Request) -> Result<(u16, Chain), DriverError> {
        let slot = self.next % SLOTS;
        self.next = self.next.wrapping_add(1);
        let at = self.base + DATA(u64::from(slot));
        let (mut chain, mut end) = (Chain::new(), at);
        for piece in &request.readable {
            self.driver.poke(end, piece)?;
            chain = chain.read(end, piece.len() as u32);
            end += piece.len() as u64;
        }
        let mut end = at + REPLY;
        for len in &request.writable {
            chain = chain.write(end, *len);
            end += u64::from(*len);
        }
        self.asked.insert(
            (request.queue, u32::from(slot * STRIDE)),
            (request.what, slot),
        );
        Ok((slot, chain))
    }

    /// Queues a request as a driver does.
    fn queue(&mut self, request: &Request) -> Result<(), DriverError> {
        let (slot, chain) = self.place(request)?;
        let head = slot * STRIDE;
        match chain.0.len() {
            0..=4 => self.driver.place(request.queue, head, &chain),
            _ => self
                .driver
                .place_indirect(request.queue, head, u64::from(slot), &chain)?,
        }
        self.driver.rings[request.queue].queue(head);
        Ok(())
    }

    /// Queues it with something wrong in its descriptors, or its place in the ring.
    fn queue_wrong(&mut self, request: &Request, chance: &mut Chance) -> Result<(), DriverError> {
        let (slot, chain) = self.place(request)?;
        let head = slot * STRIDE;
        let direct = chance.one_in(2);
        let mut descs = chain.descs(if direct { head } else { 0 });
        wrong(&mut descs, chance);
        let ring = &mut self.driver.rings[request.queue];
        if direct {
            for (at, desc) in descs.iter().take(usize::from(STRIDE)).enumerate() {
                ring.set_desc(head + at as u16, *desc);
            }
        } else {
            let table: Vec<u8> = descs.iter().flat_map(|desc| desc.bytes()).collect();
            let mut door = [Desc {
                addr: TABLE(u64::from(slot)),
                len: table.len() as u32,
                flags: INDIRECT,
                next: 0,
            }]
            .to_vec();
            if chance.one_in(3) {
                wrong(&mut door, chance);
            }
            ring.set_desc(head, door.first().copied().unwrap_or_default());
            self.driver.poke(TABLE(u64::from(slot)), &table)?;
        }
        let head = match chance.below(16) {
            0 => chance.half(),
            1 => head + 1,
            _ => head,
        };
        self.driver.rings[request.queue].queue(head);
        Ok(())
    }

    /// Makes all that is queued visible, and kicks.
    fn go(&self) {
        for ring in &self.driver.rings {
            ring.publish();
            ring.notify();
        }
    }

    /// Hears what comes of `count` requests, for at most so long. How many came.
    fn collect(&mut self, victim: &mut dyn Victim, count: u64, limit: Duration) -> u64 {
        let mut seen = 0;
        poll(limit, || {
            for queue in 0..self.driver.rings.len() {
                for used in self.driver.rings[queue].take() {
                    seen += 1;
                    let Some((what, slot)) = self.asked.remove(&(queue, used.head)) else {
                        continue;
                    };
                    let at = self.base + DATA(u64::from(slot)) + REPLY;
                    let len = used.len.min(4096) as usize;
                    if let Ok(reply) = self.driver.peek(at, len) {
                        victim.answer(what, &reply);
                    }
                }
            }
            (seen >= count).then_some(())
        });
        seen
    }

    /// Requests that are right, and stay in flight.
    fn load(
        &mut self,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        count: u64,
    ) -> Result<(), DriverError> {
        for _ in 0..count {
            let request = victim.request(chance);
            self.queue(&request)?;
        }
        self.go();
        Ok(())
    }

    fn requests(
        &mut self,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        tally: &mut Tally,
        crooked: bool,
    ) -> Result<Next, DriverError> {
        let count = 1 + chance.below(32);
        for _ in 0..count {
            let request = victim.request(chance);
            match crooked {
                true => self.queue_wrong(&request, chance)?,
                false => self.queue(&request)?,
            }
        }
        self.go();
        if crooked && chance.one_in(4) {
            // The index jumps, or goes back.
            let ring = &self.driver.rings[chance.below(self.driver.rings.len() as u64) as usize];
            ring.publish_at(ring.next_avail().wrapping_add(chance.half()));
            ring.notify();
        }
        tally.tries += count;
        tally.answered += self.collect(victim, count, MOMENT).min(count);
        if crooked {
            self.mend(chance)?;
        }
        Ok(Next::More)
    }

    /// Rings that were spoilt start anew, mostly.
    fn mend(&mut self, chance: &mut Chance) -> Result<(), DriverError> {
        if chance.one_in(4) {
            return Ok(());
        }
        for queue in 0..self.driver.rings.len() {
            self.driver.stop(queue)?;
            self.driver.rings[queue].reset(QUEUE_SIZE);
            self.driver.configure(queue)?;
            self.driver.enable(queue, true)?;
        }
        self.asked.clear();
        Ok(())
    }

    /// What is in flight changes: headers, descriptors, tables, rings, records.
    fn in_flight(
        &mut self,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        tally: &mut Tally,
    ) -> Result<Next, DriverError> {
        let count = 8 + chance.below(24);
        self.load(victim, chance, count)?;
        for _ in 0..256 {
            let value = chance.number().to_le_bytes();
            let len = chance.pick(&[1, 2, 4, 8]);
            let slot = chance.below(u64::from(SLOTS));
            let ring = &self.driver.rings[chance.below(self.driver.rings.len() as u64) as usize];
            let at = match chance.below(8) {
                0 => ring.desc_at(chance.below(u64::from(QUEUE_SIZE)) as u16) + chance.below(16),
                1 => ring.avail_at() + chance.below(520),
                2 => ring.used_at() + chance.below(2060),
                3 => TABLE(slot) + chance.below(128),
                4 => self.base + DATA(slot) + REPLY + chance.below(256),
                _ => self.base + DATA(slot) + chance.below(64),
            };
            self.driver.poke(at, &value[..len])?;
            if chance.one_in(16) {
                ring.notify();
            }
        }
        if let Some((_, record)) = &self.driver.inflight {
            let value = chance.number().to_le_bytes();
            let _ = record.write_at(&value, chance.below(4096));
        }
        tally.tries += count;
        tally.answered += self.collect(victim, count, MOMENT).min(count);
        self.mend(chance)?;
        Ok(Next::More)
    }

    /// Kicks without work, and descriptors that are full, replaced or left away.
    fn notifications(
        &mut self,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        tally: &mut Tally,
    ) -> Result<Next, DriverError> {
        let queue = chance.below(self.driver.rings.len() as u64) as usize;
        let count = chance.below(200);
        for _ in 0..count {
            self.driver.rings[queue].notify();
        }
        // Full: the device cannot call any more.
        let _ = self.driver.rings[queue].call.write(u64::MAX - 1);
        self.load(victim, chance, 4)?;
        if chance.one_in(2) {
            self.driver.rings[queue].renew_kick();
            let kick = &self.driver.rings[queue].kick;
            self.refused(|driver| driver.frontend.set_vring_kick(queue, kick));
        }
        if chance.one_in(2) {
            self.driver.rings[queue].renew_call();
            let call = &self.driver.rings[queue].call;
            self.refused(|driver| driver.frontend.set_vring_call(queue, call));
        }
        self.go();
        tally.tries += count + 1;
        tally.answered += self.collect(victim, 4, MOMENT).min(4);
        Ok(Next::More)
    }

    /// Makes a call that the device may refuse.
    fn refused<T>(&self, call: impl FnOnce(&Driver) -> vhost::Result<T>) -> u64 {
        u64::from(call(&self.driver).is_ok())
    }

    /// Messages that are right by themselves, at the wrong time, in the wrong order and with
    /// values that are not, while requests are in flight.
    fn order(
        &mut self,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        tally: &mut Tally,
    ) -> Result<Next, DriverError> {
        for _ in 0..1 + chance.below(12) {
            self.load(victim, chance, 4)?;
            let queue = chance.below(self.driver.rings.len() as u64) as usize;
            let table = self.driver.guest.table();
            tally.tries += 1;
            let (half, number) = (chance.half(), chance.number());
            tally.answered += match chance.below(13) {
                0 => self.refused(|d| d.frontend.set_mem_table(&table)),
                1 => self.refused(|d| d.frontend.set_mem_table(&table[..1])),
                2 => {
                    let turned: Vec<_> = table.iter().rev().copied().collect();
                    self.refused(|d| d.frontend.set_mem_table(&turned))
                }
                3 => {
                    let region = table[(number % 3) as usize];
                    let gone = self.driver.frontend.remove_mem_region(&region).is_ok();
                    self.load(victim, chance, 2)?;
                    u64::from(gone && self.driver.frontend.add_mem_region(&region).is_ok())
                }
                4 => u64::from(self.driver.stop(queue).is_ok()),
                5 => u64::from(self.driver.configure(queue).is_ok()),
                6 => u64::from(self.driver.enable(queue, half & 1 == 0).is_ok()),
                7 => self.refused(|d| d.frontend.set_vring_num(queue, half)),
                8 => self.refused(|d| d.frontend.set_vring_base(queue, half)),
                9 => u64::from(self.driver.frontend.reset_device().is_ok()),
                10 => self.refused(|d| d.frontend.set_features(number & d.features)),
                11 => self.refused(|d| d.frontend.reset_owner()),
                _ => u64::from(self.driver.config(8 + u32::from(half % 128)).is_ok()),
            };
            self.collect(victim, 1, Duration::from_micros(200));
            if self.is_over() {
                break;
            }
        }
        // As it is now nothing can be expected of it.
        Ok(Next::Over)
    }

    /// A file of guest memory is cut short under the device. From here on it is out of reach
    /// of ours, too.
    fn truncation(
        &mut self,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        tally: &mut Tally,
    ) -> Result<Next, DriverError> {
        let count = 8 + chance.below(24);
        for _ in 0..count {
            let request = victim.request(chance);
            self.queue(&request)?;
        }
        // Before or after the device has begun.
        if chance.one_in(2) {
            self.go();
        }
        for ring in &self.driver.rings {
            ring.publish();
        }
        let file = match chance.below(3) {
            // That of the rings; that of the data, which may be the same.
            0 => 0,
            1 => (self.base / REGION) as usize,
            _ => 1,
        };
        let len = chance.pick(&[0, 0, 4096, 0x9000, 0x40_0000]);
        let file = &self.driver.guest.files[file];
        // With a seal it cannot be.
        tally.answered += u64::from(file.set_len(len).is_err());
        tally.tries += 1;
        for _ in 0..4 {
            self.driver.rings.iter().for_each(|ring| ring.notify());
            std::thread::sleep(Duration::from_micros(500));
        }
        if chance.one_in(2) {
            // What reads rings as it answers.
            let queue = chance.below(self.driver.rings.len() as u64) as usize;
            let _ = self.driver.stop(queue);
            let _ = self.driver.configure(queue);
        }
        Ok(Next::Cut)
    }

    /// Front ends that come, say half of something, and go.
    fn connections(
        &mut self,
        victim: &mut dyn Victim,
        chance: &mut Chance,
        tally: &mut Tally,
    ) -> Result<Next, DriverError> {
        self.load(victim, chance, 16)?;
        tally.tries += 1;
        match chance.below(5) {
            // Gone with requests in flight.
            0 => {}
            1 => {
                let bytes = chance.bytes(11);
                let _ = (&self.driver.stream).write(&bytes);
            }
            2 => {
                let _ = self.driver.stream.shutdown(std::net::Shutdown::Write);
                self.go();
            }
            3 => {
                self.driver.leave();
                self.go();
            }
            _ => {
                let address = self.driver.stream.peer_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                for _ in 0..4 {
                    self.silent
                        .extend(path.and_then(|path| UnixStream::connect(path).ok()));
                    tally.tries += 1;
                }
                // One of them begins a message.
                let bytes = chance.bytes(7);
                let first = self.silent.first_mut();
                let _ = first.map(|first| first.write(&bytes));
            }
        }
        Ok(Next::Over)
    }
}

/// Makes one to three things wrong about a chain.
fn wrong(descs: &mut Vec<Desc>, chance: &mut Chance) {
    /// Where memory begins, ends, or holds what the device itself reads.
    const PLACES: [u64; 12] = [
        0,
        0x8000,
        0xa000,
        0x1_0000,
        0x1_a000,
        0x30_0000,
        REGION,
        2 * REGION,
        FAR,
        FAR + (1 << 20),
        1 << 52,
        u64::MAX,
    ];
    const LENGTHS: [u32; 12] = [
        0,
        1,
        11,
        15,
        16,
        17,
        511,
        513,
        4097,
        0x7fff_ffff,
        0xffff_f000,
        u32::MAX,
    ];
    for _ in 0..=chance.below(3) {
        let count = descs.len() as u64;
        if count == 0 {
            return;
        }
        let at = chance.below(count) as usize;
        let desc = &mut descs[at];
        match chance.below(13) {
            0 | 1 => {
                desc.addr = chance
                    .pick(&PLACES)
                    .wrapping_sub(chance.below(2) * u64::from(desc.len / 2));
            }
            2 => desc.addr = chance.number(),
            3 => desc.addr ^= 1 << chance.below(64),
            4 => desc.len = chance.pick(&LENGTHS),
            5 => desc.len = chance.word(),
            6 => desc.flags ^= 1 << chance.below(4),
            7 => desc.flags = chance.half(),
            8 => desc.next = chance.half(),
            // A loop.
            9 => desc.next = desc.next.wrapping_sub(1 + chance.below(2) as u16),
            10 => {
                descs.remove(at);
            }
            11 => {
                let again = descs[at];
                descs.insert(at, again);
            }
            _ => descs.swap(at, 0),
        }
    }
}
