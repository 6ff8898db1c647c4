//! What a request must lead to, from virtio 1.3, 5.2.6, and what one in flight
//! may do.

use pericarp_vhost::Step;

use crate::chain::Named;
use crate::memory::Memory;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Feature bits (virtio 1.3, 5.2.3).
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// What a request must lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expect {
    Read {
        offset: u64,
        len: u64,
    },
    Write {
        offset: u64,
        len: u64,
    },
    Sync,
    /// DISCARD or WRITE_ZEROES of these, one after the other.
    Ranges {
        discard: bool,
        list: Vec<Span>,
    },
    /// A list of ranges with faults of both kinds: IOERR or UNSUPP.
    Refused,
    /// Over at once, with this status and these bytes in the used element.
    Done {
        status: u8,
        used: u32,
    },
    /// Not ours to say.
    Anything,
}

/// One range of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    offset: u64,
    len: u64,
    unmap: bool,
}

/// The device as it describes itself, and what was agreed on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) size: u64,
    pub(super) features: u64,
    pub(super) read_only: bool,
    block: u64,
    /// Ranges, and sectors of each, for DISCARD and for WRITE_ZEROES.
    discard: (u64, u64),
    zeroes: (u64, u64),
}

impl Rules {
    /// From the configuration space (virtio 1.3, 5.2.4).
    pub(super) fn told(config: &[u8], read_only: bool) -> Self {
        let field = |at: usize, len| little(&config[at..at + len]);
        Self {
            size: field(0, 8) * 512,
            features: 0,
            block: field(20, 4),
            read_only,
            discard: (field(40, 4), field(36, 4)),
            zeroes: (field(52, 4), field(48, 4)),
        }
    }

    pub(super) fn can_flush(&self) -> bool {
        self.features & F_FLUSH != 0
    }

    /// virtio 1.3, 5.2.6.2: a device fails ranges beyond its end, and does not
    /// know flags other than UNMAP, nor that one for DISCARD.
    fn ranges(&self, kind: u32, list: &[u8]) -> Expect {
        let refused = |status| Expect::Done { status, used: 1 };
        let (agreed, (most, longest)) = match kind {
            DISCARD => (F_DISCARD, self.discard),
            _ => (F_WRITE_ZEROES, self.zeroes),
        };
        if self.read_only {
            return refused(IOERR);
        }
        if self.features & agreed == 0 {
            return refused(UNSUPP);
        }
        let count = list.len() as u64 / 16;
        if count == 0 || !list.len().is_multiple_of(16) || count > most {
            return refused(IOERR);
        }
        let (mut spans, mut unknown, mut outside) = (Vec::new(), false, false);
        for entry in list.chunks_exact(16) {
            let (sector, sectors) = (little(&entry[..8]), little(&entry[8..12]));
            let flags = little(&entry[12..]);
            unknown |= flags > 1 || (flags == 1 && kind == DISCARD);
            let offset = self.place(sector, sectors * 512);
            outside |= offset.is_none() || sectors > longest;
            spans.extend(offset.map(|offset| Span {
                offset,
                len: sectors * 512,
                unmap: flags & 1 != 0,
            }));
        }
        match (unknown, outside) {
            (true, true) => Expect::Refused,
            (true, false) => refused(UNSUPP),
            (false, true) => refused(IOERR),
            (false, false) => Expect::Ranges {
                discard: kind == DISCARD,
                list: spans,
            },
        }
    }

    /// Where whole blocks inside the disk begin.
    fn place(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(512)?;
        let fits = offset.checked_add(len)? <= self.size;
        (len > 0 && fits && (offset | len).is_multiple_of(self.block)).then_some(offset)
    }

    pub(super) fn expect(&self, named: &Named, memory: &Memory) -> Expect {
        let failed = Expect::Done {
            status: IOERR,
            used: 1,
        };
        if !named.sound {
            return Expect::Anything;
        }
        let room = Named::bytes(&named.writable);
        let out = Named::bytes(&named.readable);
        if room == 0 {
            return Expect::Done {
                status: IOERR,
                used: 0,
            };
        }
        let Some(header) = (out >= 16).then(|| named.read(memory, 16)).flatten() else {
            return failed;
        };
        let kind = little(&header[..4]) as u32;
        let place = |len| self.place(little(&header[8..]), len);
        match kind {
            IN => place(room - 1).map_or(failed, |offset| Expect::Read {
                offset,
                len: room - 1,
            }),
            OUT if self.read_only => failed,
            OUT => place(out - 16).map_or(failed, |offset| Expect::Write {
                offset,
                len: out - 16,
            }),
            FLUSH if self.read_only => Expect::Done {
                status: OK,
                used: 1,
            },
            FLUSH => Expect::Sync,
            GET_ID => Expect::Done {
                status: OK,
                used: (room - 1).min(20) as u32 + 1,
            },
            DISCARD | WRITE_ZEROES => match named.read(memory, out as usize) {
                Some(all) => self.ranges(kind, &all[16..]),
                None => Expect::Anything,
            },
            _ => Expect::Done {
                status: UNSUPP,
                used: 1,
            },
        }
    }
}

/// One request in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) named: Named,
    pub(super) expect: Expect,
    pub(super) step: Step,
    /// Nobody else was in flight, and the guest left its memory alone.
    pub(super) alone: bool,
    /// The error its last operation ended with; 0 for no progress.
    pub(super) failed: Option<i32>,
    /// What was discarded or zeroed, in order.
    pub(super) moved: Vec<(u64, u64)>,
    pub(super) synced: bool,
}

impl Flight {
    /// A step of a list of ranges is the next of them, in a way it allows.
    pub(super) fn due(&self, step: Step) {
        let (discards, list) = match &self.expect {
            Expect::Ranges { discard, list } => (*discard, list),
            _ => return,
        };
        let mut done: u64 = self.moved.iter().map(|(_, len)| len).sum();
        let mut next = None;
        for span in list {
            if done < span.len {
                next = Some(Span {
                    offset: span.offset + done,
                    len: span.len - done,
                    ..*span
                });
                break;
            }
            done -= span.len;
        }
        let right = match step {
            Step::Done { .. } => true,
            Step::Sync { .. } => next.is_none(),
            Step::Discard { offset, len, .. } => {
                discards && next.is_some_and(|s| (s.offset, s.len) == (offset, len))
            }
            Step::WriteZeroes { offset, len, .. } => {
                !discards && next.is_some_and(|s| (s.offset, s.len) == (offset, len))
            }
            Step::Allocate {
                offset, len, mode, ..
            } => next.is_some_and(|s| {
                let hole = mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
                let zero = mode & libc::FALLOC_FL_ZERO_RANGE != 0;
                // Only UNMAP lets WRITE_ZEROES give blocks back.
                let way = if discards || s.unmap {
                    hole || zero
                } else {
                    zero && !hole
                };
                let stays = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
                way && stays && (s.offset, s.len) == (offset, len)
            }),
            // No disk has any.
            Step::Read { .. } | Step::Write { .. } | Step::Errand => false,
        };
        assert!(right, "{step:?} where {next:?} is due: {self:?}");
    }

    /// Takes note of what an operation came to.
    pub(super) fn completed(&mut self, step: Step, result: i32) {
        let moves = matches!(
            step,
            Step::Read { .. } | Step::Write { .. } | Step::WriteZeroes { .. }
        );
        if result < 0 || (moves && result == 0) {
            self.failed = Some(-result);
            return;
        }
        match step {
            Step::Allocate { offset, len, .. } | Step::Discard { offset, len, .. } => {
                self.moved.push((offset, len));
            }
            Step::WriteZeroes { offset, .. } => self.moved.push((offset, result as u64)),
            Step::Sync { .. } => self.synced = true,
            _ => {}
        }
    }

    /// A request that is over: what it says and what it wrote.
    pub(super) fn judge(&self, memory: &Memory, rules: Rules, used: u32, disk: &[u8]) {
        let room = Named::bytes(&self.named.writable);
        assert!(u64::from(used) <= room, "used length {used} of {room}");
        let status = self.named.status().filter(|&at| {
            // A fault may hide it from the device; a sound chain cannot.
            self.named.sound && memory.get(at, 1).is_some()
        });
        let Some(at) = status else {
            return;
        };
        let status = memory.get(at, 1).map_or(0xff, |b| b[0]);
        assert!(status <= UNSUPP, "status {status:#x} in {self:?}");
        let want = match (&self.expect, self.failed) {
            (Expect::Anything, _) => return,
            (Expect::Refused, _) => {
                assert!(used == 1 && status != OK, "refused: {self:?}");
                return;
            }
            (&Expect::Done { status, used }, _) => (status, used),
            // That the disk cannot discard is not an error of the disk.
            (Expect::Ranges { discard: true, .. }, Some(libc::EOPNOTSUPP))
                if !matches!(self.step, Step::Sync { .. }) =>
            {
                (UNSUPP, 1)
            }
            (_, Some(_)) => {
                assert_eq!(status, IOERR, "a failure is told: {self:?}");
                return;
            }
            (Expect::Read { len, .. }, None) => (OK, *len as u32 + 1),
            (Expect::Write { .. } | Expect::Sync, None) => (OK, 1),
            (Expect::Ranges { list, .. }, None) => {
                let asked = list.iter().map(|s| (s.offset, s.len));
                let done = self.moved.iter().copied();
                assert_eq!(joined(done), joined(asked), "all ranges: {self:?}");
                assert!(self.synced || rules.can_flush(), "durable: {self:?}");
                (OK, 1)
            }
        };
        assert_eq!((status, used), want, "status and used length: {self:?}");
        if let Expect::Read { offset, len } = self.expect
            && self.alone
            && self.named.is_disjoint()
        {
            let (from, len) = (offset as usize, len as usize);
            let got = self.named.written(memory, len);
            assert_eq!(
                got.as_deref(),
                Some(&disk[from..from + len]),
                "data: {self:?}"
            );
        }
    }
}

/// Parts that follow each other, as one.
fn joined(parts: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for (offset, len) in parts {
        match out.last_mut() {
            Some((start, whole)) if *start + *whole == offset => *whole += len,
            _ => out.push((offset, len)),
        }
    }
    out
}

fn little(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
}
