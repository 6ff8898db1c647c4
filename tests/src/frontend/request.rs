//! Requests of the hostile front end: chains of any shape, and the shapes a
//! correct driver sends.

use super::{Desc, Driver, DriverError, INDIRECT, NEXT, Used, WRITE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

/// What a status byte holds before the device writes it.
pub const UNTOUCHED: u8 = 0xee;

/// Guest memory of slot `slot`'s request header.
pub const HEADER: fn(u64) -> u64 = |slot| 0x20_0000 + slot * 64;
/// Of its status byte.
pub const STATUS: fn(u64) -> u64 = |slot| 0x20_0000 + slot * 64 + 32;
/// Of its indirect table, 256 entries.
pub const TABLE: fn(u64) -> u64 = |slot| 0x30_0000 + slot * 0x1000;
/// Of its data, 64 KiB.
pub const DATA: fn(u64) -> u64 = |slot| 0x40_0000 + slot * 0x1_0000;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes here.
    pub write: bool,
}

/// The buffers of one request, in order.
#[derive(Clone, Debug, Default)]
pub struct Chain(pub Vec<Place>);

impl Chain {
    /// No buffer yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer the device reads.
    pub fn read(mut self, addr: u64, len: u32) -> Self {
        self.0.push(Place {
            addr,
            len,
            write: false,
        });
        self
    }

    /// A buffer the device writes.
    pub fn write(mut self, addr: u64, len: u32) -> Self {
        self.0.push(Place {
            addr,
            len,
            write: true,
        });
        self
    }

    /// As linked descriptors whose first has index `first`.
    pub fn descs(&self, first: u16) -> Vec<Desc> {
        let count = self.0.len();
        self.0
            .iter()
            .enumerate()
            .map(|(i, place)| {
                let more = i + 1 < count;
                Desc {
                    addr: place.addr,
                    len: place.len,
                    flags: if place.write { WRITE } else { 0 } | if more { NEXT } else { 0 },
                    next: if more { first + i as u16 + 1 } else { 0 },
                }
            })
            .collect()
    }
}

/// A request as a driver means it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `len` bytes.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `data`.
    Write {
        /// First sector.
        sector: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Make completed writes durable.
    Flush,
    /// Ask for the serial number, `len` bytes of it.
    GetId {
        /// Bytes; drivers use 20.
        len: u32,
    },
    /// DISCARD or WRITE_ZEROES.
    Ranges {
        /// Which.
        kind: u32,
        /// The list, as it is sent.
        list: Vec<u8>,
    },
    /// Any other type.
    Other {
        /// The type.
        kind: u32,
        /// First sector.
        sector: u64,
        /// Bytes the device may write before the status.
        room: u32,
    },
}

impl Op {
    /// Type, sector, data to the device, room from the device.
    fn parts(&self) -> (u32, u64, &[u8], u32) {
        match self {
            Op::Read { sector, len } => (VIRTIO_BLK_T_IN, *sector, &[], *len),
            Op::Write { sector, data } => (VIRTIO_BLK_T_OUT, *sector, data, 0),
            Op::Flush => (VIRTIO_BLK_T_FLUSH, 0, &[], 0),
            Op::GetId { len } => (VIRTIO_BLK_T_GET_ID, 0, &[], *len),
            Op::Ranges { kind, list } => (*kind, 0, list, 0),
            Op::Other { kind, sector, room } => (*kind, *sector, &[], *room),
        }
    }
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status byte; [`UNTOUCHED`] if none was written.
    pub status: u8,
    /// Bytes the device says it wrote.
    pub used: u32,
    /// What is in the data buffer now.
    pub data: Vec<u8>,
}

/// The bytes of a request header.
pub(crate) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

impl Driver {
    /// Writes the header of a request into `slot` and spoils its status byte.
    ///
    /// # Errors
    /// Never for a slot below 64.
    pub fn head(&self, slot: u64, kind: u32, sector: u64) -> Result<(), DriverError> {
        self.poke(HEADER(slot), &header(kind, sector))?;
        self.poke(STATUS(slot), &[UNTOUCHED])
    }

    /// The chain a correct driver builds for `op`, its bytes already in place.
    ///
    /// # Errors
    /// Never for a slot below 64.
    pub fn prepare(&self, slot: u64, op: &Op) -> Result<Chain, DriverError> {
        let (kind, sector, out, room) = op.parts();
        self.head(slot, kind, sector)?;
        let mut chain = Chain::new().read(HEADER(slot), 16);
        if !out.is_empty() {
            self.poke(DATA(slot), out)?;
            chain = chain.read(DATA(slot), out.len() as u32);
        }
        if room > 0 {
            chain = chain.write(DATA(slot), room);
        }
        Ok(chain.write(STATUS(slot), 1))
    }

    /// Puts `chain` into the descriptor table from `first` on.
    pub fn place(&self, queue: usize, first: u16, chain: &Chain) {
        for (i, desc) in chain.descs(first).into_iter().enumerate() {
            self.rings[queue].set_desc(first + i as u16, desc);
        }
    }

    /// Puts `chain` into an indirect table of `slot`, and descriptor `head` in front.
    ///
    /// # Errors
    /// When the table does not fit guest memory.
    pub fn place_indirect(
        &self,
        queue: usize,
        head: u16,
        slot: u64,
        chain: &Chain,
    ) -> Result<(), DriverError> {
        let table: Vec<u8> = chain.descs(0).into_iter().flat_map(Desc::bytes).collect();
        self.poke(TABLE(slot), &table)?;
        let desc = Desc {
            addr: TABLE(slot),
            len: table.len() as u32,
            flags: INDIRECT,
            next: 0,
        };
        self.rings[queue].set_desc(head, desc);
        Ok(())
    }

    /// Offers the chain at `head` and kicks.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        ring.queue(head);
        ring.publish();
        ring.notify();
    }

    /// Waits for exactly this chain to be completed and signalled.
    ///
    /// # Errors
    /// When another comes, or none in time.
    pub fn settled(&mut self, queue: usize, head: u16) -> Result<Used, DriverError> {
        let limit = self.limit;
        let used = self.rings[queue].wait(1, limit)?;
        match used.as_slice() {
            [used] if used.head == u32::from(head) => Ok(*used),
            others => Err(DriverError::WrongHead {
                got: others.last().map_or(u32::MAX, |used| used.head),
                want: u32::from(head),
            }),
        }
    }

    /// Puts `chain` at descriptor 0, offers it, waits for it.
    ///
    /// # Errors
    /// When it is not completed and signalled in time.
    pub fn play(&mut self, queue: usize, chain: &Chain) -> Result<Used, DriverError> {
        self.place(queue, 0, chain);
        self.offer(queue, 0);
        self.settled(queue, 0)
    }

    /// The answer in `slot`, whose request had `op`.
    ///
    /// # Errors
    /// Never for a slot below 64.
    pub fn answer(&self, slot: u64, op: &Op, used: Used) -> Result<Answer, DriverError> {
        let status = self.peek(STATUS(slot), 1)?[0];
        let data = self.peek(DATA(slot), op.parts().3 as usize)?;
        Ok(Answer {
            status,
            used: used.len,
            data,
        })
    }

    /// Does one well-formed request, alone.
    ///
    /// # Errors
    /// When it is not completed, signalled and given a status in time.
    pub fn request(&mut self, queue: usize, op: &Op) -> Result<Answer, DriverError> {
        let chain = self.prepare(0, op)?;
        let used = self.play(queue, &chain)?;
        let answer = self.answer(0, op, used)?;
        if answer.status == UNTOUCHED {
            Err(DriverError::NoStatus)
        } else {
            Ok(answer)
        }
    }
}
