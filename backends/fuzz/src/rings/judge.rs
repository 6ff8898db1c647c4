//! What a request must lead to, from virtio 1.3, 5.2.6, and what one in flight
//! may do.

use pericarp_vhost::Step;

use crate::chain::{Named, Table};
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

/// What the first step must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Over at once, with this status and these bytes in the used element.
    Done {
        status: u8,
        used: u32,
    },
    /// Not ours to say.
    Anything,
}

/// The device as the judge knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) size: u64,
    pub(super) block: u64,
    pub(super) read_only: bool,
}

impl Rules {
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
        let number = |at: usize, len: usize| {
            header[at..at + len]
                .iter()
                .rev()
                .fold(0u64, |n, &b| n << 8 | u64::from(b))
        };
        let (kind, sector) = (number(0, 4) as u32, number(8, 8));
        let place = |len: u64| {
            let offset = sector.checked_mul(512)?;
            let fits = offset.checked_add(len)? <= self.size;
            (len > 0 && fits && (offset | len).is_multiple_of(self.block)).then_some(offset)
        };
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
            DISCARD | WRITE_ZEROES => Expect::Anything,
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
    pub(super) failed: bool,
}

impl Flight {
    /// A request that is over: what it says and what it wrote.
    pub(super) fn judge(&self, memory: &Memory, table: Table, used: u32, disk: &[u8]) {
        let room = Named::bytes(&self.named.writable);
        assert!(u64::from(used) <= room, "used length {used} of {room}");
        let status = self.named.status().filter(|&at| {
            // A fault may hide it from the device; a sound chain cannot.
            self.named.sound && memory.get(at, 1).is_some()
        });
        let _ = table;
        let Some(at) = status else {
            return;
        };
        let status = memory.get(at, 1).map_or(0xff, |b| b[0]);
        assert!(status <= UNSUPP, "status {status:#x} in {self:?}");
        let want = match self.expect {
            Expect::Anything => return,
            Expect::Done { status, used } => (status, used),
            Expect::Read { .. } | Expect::Write { .. } | Expect::Sync if self.failed => {
                assert_eq!(status, IOERR, "a failure is told: {self:?}");
                return;
            }
            Expect::Read { len, .. } => (OK, len as u32 + 1),
            Expect::Write { .. } | Expect::Sync => (OK, 1),
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
