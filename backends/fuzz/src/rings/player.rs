//! Plays a script: the guest's acts, and the worker's between them.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use pericarp_block::{BlockDevice, CacheMode, Disk, DiskOptions, Request};
use pericarp_ring::{Buffer, QueueLayout, RequestQueue, SplitQueue};
use pericarp_vhost::{Device, Step};

use super::judge::{Expect, Flight, Rules};
use super::store::{self, DISK};
use crate::chain::Named;
use crate::memory::{FAR, Memory, SEAM, USER, memfd};
use crate::script::Script;

/// Acts, as the first byte of each.
pub(super) const REQUEST: u8 = 0;
pub(super) const TURN: u8 = 1;
pub(super) const COMPLETE: u8 = 2;
pub(super) const RESTART: u8 = 3;
const ACTS: u8 = 12;

/// Where things are in the first region.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x500;
const USED_END: u64 = 0x800;
const TABLES: u64 = 0x800;
const HEADERS: u64 = 0x1000;
const DATA: u64 = 0x1400;

/// What is kept from script to script: mappings, devices, a disk.
#[derive(Debug)]
pub(crate) struct Rig {
    memory: Memory,
    devices: Vec<(Arc<BlockDevice>, Rules)>,
    disk: Vec<u8>,
    dirty: bool,
}

impl Rig {
    pub(super) fn new() -> Self {
        let mut devices = Vec::new();
        for (cache, read_only) in [
            (CacheMode::Buffered, false),
            (CacheMode::Buffered, true),
            (CacheMode::Direct, false),
        ] {
            let file = memfd(DISK as u64);
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let options = DiskOptions {
                file: path,
                read_only,
                cache,
            };
            // Old kernels have no direct I/O on memory files.
            let Ok(disk) = Disk::open(&options) else {
                devices.push(devices.first().cloned().expect("a buffered disk"));
                continue;
            };
            let device = BlockDevice::new(disk, "a serial of the fuzzer", 1, 64);
            let block = device.config()[20..24]
                .iter()
                .rev()
                .fold(0, |n, &b| n << 8 | u64::from(b));
            let rules = Rules {
                size: DISK as u64,
                block,
                read_only,
            };
            devices.push((Arc::new(device), rules));
        }
        Self {
            memory: Memory::new(),
            devices,
            disk: store::content(),
            dirty: false,
        }
    }

    pub(super) fn clear(&mut self) {
        self.memory.clear();
        if std::mem::take(&mut self.dirty) {
            self.disk = store::content();
        }
    }
}

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
        let (device, rules) = rig.devices[which].clone();
        // FLUSH and CONFIG_WCE; DISCARD and WRITE_ZEROES.
        let cache = if mode & 2 != 0 { 1 << 9 | 1 << 11 } else { 0 };
        let space = if mode & 16 != 0 { 1 << 13 | 1 << 14 } else { 0 };
        device.negotiated((cache | space) & device.features());
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

    /// The guest writes.
    fn poke(&mut self, at: u64, bytes: &[u8]) {
        self.rig.memory.put(at, bytes);
        let end = at.saturating_add(bytes.len() as u64);
        self.tainted |= at < USED_END && end > USED;
        for flight in self.flights.values_mut() {
            flight.alone = false;
        }
    }

    fn descriptor(&mut self, at: u64) {
        let address = self.script.address();
        let wide = self.script.u8();
        let len = match wide & 3 {
            0 => 512 * u32::from(wide >> 5),
            1 => u32::from(self.script.u8()),
            2 => 16 * u32::from(self.script.u8() % 16),
            _ => self.script.u32() >> (wide >> 3),
        };
        let flags = u16::from(self.script.u8() & 7);
        let next = u16::from(self.script.u8() % 72);
        self.raw_descriptor(at, (address, len, flags, next));
    }

    fn raw_descriptor(&mut self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.poke(at, &raw);
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.poke(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.poke(AVAILABLE + 2, &self.avail.to_le_bytes());
    }

    /// A request as a driver makes it: kind, sector, blocks, pieces, table.
    fn request(&mut self) {
        let kind = u32::from(self.script.u8() % 16);
        let sector = u64::from(self.script.u8());
        let len = u32::from(self.script.u8() % 16) * 512;
        let pieces = u32::from(self.script.u8() % 4) + 1;
        let how = self.script.u8();
        let slot = u64::from(self.slot % 16);
        self.slot = self.slot.wrapping_add(1);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let (header_at, status_at) = (HEADERS + 32 * slot, HEADERS + 0x300 + slot);
        self.poke(header_at, &header);
        self.poke(status_at, &[0xee]);
        let write = if kind == 1 { 0 } else { 2 };
        // Whole, or off the alignment that direct I/O needs; in one region or another.
        let mut at = match how >> 1 & 3 {
            0 => DATA,
            1 => SEAM + 16 * slot,
            2 => FAR,
            _ => SEAM - 512,
        };
        let mut chain = vec![(header_at, 16, 0)];
        for n in 0..pieces {
            let part = if n + 1 == pieces {
                len - len / pieces * n
            } else {
                len / pieces
            };
            if part > 0 {
                chain.push((at, part, write));
            }
            at += u64::from(part);
        }
        chain.push((status_at, 1, 2));
        let indirect = how & 1 != 0 || chain.len() > usize::from(self.size);
        let first = if indirect {
            0
        } else {
            slot * 6 % u64::from(self.size)
        };
        let base = if indirect { TABLES + 128 * slot } else { 0 };
        let limit = if indirect { 8 } else { u64::from(self.size) };
        let count = chain.len() as u64;
        for (n, (at, len, flags)) in (0..).zip(chain) {
            let more = u16::from(n + 1 < count);
            let next = (first + n + 1) % limit;
            let to = base + 16 * ((first + n) % limit);
            self.raw_descriptor(to, (at, len, flags | more, next as u16));
        }
        let head = if indirect {
            slot % u64::from(self.size)
        } else {
            first
        };
        if indirect {
            self.raw_descriptor(16 * head, (base, 16 * count as u32, 4, 0));
        }
        self.offer(head as u16);
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
                failed: false,
            };
            let had = self.flights.insert(head, flight);
            assert!(had.is_none(), "head {head} was in flight");
            self.begun(step, expect);
            self.take(head, step);
        }
        self.publish();
    }

    fn begun(&self, step: Step, expect: Expect) {
        let right = match (step, expect) {
            (_, Expect::Anything) => true,
            (Step::Read { offset, .. }, Expect::Read { offset: want, .. })
            | (Step::Write { offset, .. }, Expect::Write { offset: want, .. }) => offset == want,
            (Step::Sync { .. }, Expect::Sync) => true,
            (Step::Done { written }, Expect::Done { used, .. }) => written == used,
            _ => false,
        };
        assert!(right, "{step:?} where {expect:?} is due");
    }

    /// What the worker does with a step.
    fn take(&mut self, head: u16, step: Step) {
        self.settle();
        self.flights.get_mut(&head).expect("in flight").step = step;
        match step {
            Step::Done { written } => {
                let flight = self.flights.remove(&head).expect("in flight");
                flight.judge(&self.rig.memory, self.table, written, &self.rig.disk);
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
            | Step::WriteZeroes { .. } => self.issued.push(head),
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

    /// The store completes one operation.
    fn complete_some(&mut self) {
        if self.issued.is_empty() {
            return;
        }
        let which = usize::from(self.script.u8()) % self.issued.len();
        let outcome = self.script.u8();
        let head = self.issued.remove(which);
        self.complete(head, outcome);
        self.publish();
    }

    fn complete(&mut self, head: u16, outcome: u8) {
        let step = self.flights[&head].step;
        let errno = match outcome {
            0xff => Some(libc::EIO),
            0xfe => Some(libc::ENOSPC),
            0xfd => Some(libc::EINTR),
            0xfc => Some(libc::EAGAIN),
            0xfb => Some(libc::EOPNOTSUPP),
            _ => None,
        };
        let limit = if outcome < 0x80 {
            usize::MAX
        } else {
            usize::from(outcome - 0x80) * 100
        };
        let result = errno.map_or_else(|| self.transfer(head, step, limit), |errno| -errno);
        if let Ok(bytes) = u64::try_from(result) {
            match step {
                Step::Read { buffer, .. } => self.queue.read_done(head, buffer, bytes),
                Step::Write { .. } => self.queue.write_done(head, bytes),
                _ => {}
            }
        }
        let moves = matches!(step, Step::Read { .. } | Step::Write { .. });
        let flight = self.flights.get_mut(&head).expect("in flight");
        flight.failed |= result < 0 || (moves && result == 0);
        let (chain, request) = self.queue.request(head);
        let next = self.device.resume(chain, request, result);
        // A retry is no failure, until it is the last.
        if !matches!(next, Step::Done { .. }) {
            flight.failed = false;
        }
        self.take(head, next);
    }

    fn transfer(&mut self, head: u16, step: Step, limit: usize) -> i32 {
        let place = |offset: u64, len: usize| {
            let end = offset.checked_add(len as u64);
            assert!(
                end.is_some_and(|end| end <= DISK as u64),
                "I/O at {offset}+{len}"
            );
            offset as usize
        };
        let total = |segments: &[libc::iovec]| segments.iter().map(|s| s.iov_len).sum::<usize>();
        match step {
            Step::Read { offset, buffer, .. } => {
                let segments = self.queue.read_target(head, buffer);
                let at = place(offset, total(segments));
                store::read(&self.rig.disk, at, segments, limit) as i32
            }
            Step::Write { offset, buffer, .. } => {
                assert!(!self.rules.read_only, "a write to a read-only disk");
                let segments = self.queue.write_source(head, buffer);
                let at = place(offset, total(segments));
                self.rig.dirty = true;
                for flight in self.flights.values_mut() {
                    flight.alone = false;
                }
                store::write(&mut self.rig.disk, at, segments, limit) as i32
            }
            Step::Allocate { offset, len, .. } | Step::Discard { offset, len, .. } => {
                self.zero(place(offset, len as usize), len as usize);
                0
            }
            Step::WriteZeroes { offset, len, .. } => {
                let at = place(offset, len as usize);
                let len = (len as usize).min(limit);
                self.zero(at, len);
                len as i32
            }
            Step::Sync { .. } | Step::Done { .. } => 0,
        }
    }

    /// Discards and zeroes read as zeroes from then on.
    fn zero(&mut self, at: usize, len: usize) {
        assert!(!self.rules.read_only, "a change to a read-only disk");
        self.rig.dirty = true;
        for flight in self.flights.values_mut() {
            flight.alone = false;
        }
        self.rig.disk[at..at + len].fill(0);
    }

    fn drain(&mut self) {
        while let Some(head) = self.issued.pop() {
            self.complete(head, 0);
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
