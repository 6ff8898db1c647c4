//! The virtio-blk state machine (virtio 1.3, 5.2): requests in, steps out.
//!
//! Workers of `pericarp-vhost` call it; it does no I/O and knows no ring. All
//! checks of what the guest asks for are here: direction, range, alignment,
//! read-only.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pericarp_ring::{Buffer, Chain, ChainError};
use pericarp_vhost::{Account, ConfigRefused, Device, Step};

use crate::disk::{CacheMode, Disk, DiskError, Geometry, SECTOR};

/// Feature bits (virtio 1.3, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
}

/// Request types (virtio 1.3, 5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Status bytes (virtio 1.3, 5.2.6).
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Bytes of the answer to GET_ID.
const ID_BYTES: usize = 20;
/// Offset of the writeback byte in the configuration space.
const WRITEBACK_OFFSET: usize = 32;
/// Length of the configuration space up to and including num_queues and the
/// fields that are zero because their features are not offered.
const CONFIG_BYTES: usize = 60;

/// Linux rejects more than this in a vectored call, less header and status.
const SEG_MAX_LIMIT: u16 = 254;

/// preadv2 and pwritev2 flags.
const RWF_DSYNC: i32 = 2;
pub(crate) const RWF_DONTCACHE: i32 = 0x80;

/// Index of a request type's class in [`Device::CLASSES`].
fn class(kind: u32) -> usize {
    match kind {
        T_IN => 1,
        T_OUT => 2,
        T_FLUSH => 3,
        T_DISCARD => 4,
        T_WRITE_ZEROES => 5,
        T_GET_ID => 6,
        _ => 0,
    }
}

/// How often a request that the kernel asked to repeat is repeated.
const MAX_RETRIES: u8 = 16;

/// The only file of a disk.
const FILE: usize = 0;

/// What a request is doing.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Operation {
    #[default]
    None,
    Read,
    Write,
    Flush,
}

/// One request in flight.
#[derive(Debug, Default)]
pub struct Request {
    operation: Operation,
    /// Where in the file it goes on.
    offset: u64,
    /// Bytes still to move.
    left: u64,
    /// Data bytes put into the chain, for the used element.
    written: u32,
    retries: u8,
    account: Account,
}

/// A virtio block device over one disk.
#[derive(Debug)]
pub struct BlockDevice {
    disk: Geometry,
    /// Bytes; changes when an operator resizes the disk.
    size: AtomicU64,
    files: [OwnedFd; 1],
    serial: [u8; ID_BYTES],
    queues: u16,
    queue_size: u16,
    features: AtomicU64,
    /// The write cache is on: a write is durable only after a flush.
    writeback: AtomicBool,
}

impl BlockDevice {
    /// A device over `disk` that answers GET_ID with the first 20 bytes of
    /// `serial`, and has `queues` queues of at most `queue_size` descriptors.
    pub fn new(disk: Disk, serial: &str, queues: u16, queue_size: u16) -> Self {
        let mut id = [0; ID_BYTES];
        let length = serial.len().min(ID_BYTES);
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        Self {
            disk: disk.geometry,
            size: AtomicU64::new(disk.size),
            files: [disk.file],
            serial: id,
            queues,
            queue_size,
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
        }
    }

    /// Measures the file again and takes its size on, for requests from now on
    /// and for the configuration space. A disk may become smaller: requests
    /// beyond its end then fail. Returns the size in bytes.
    ///
    /// # Errors
    /// [`DiskError`] when the file cannot be a disk like that; the size stays.
    pub fn resize(&self) -> Result<u64, DiskError> {
        let size = self.disk.size_of(&self.files[FILE])?;
        self.size.store(size, Ordering::Relaxed);
        Ok(size)
    }

    /// Writes go to stable storage before they complete: the driver cannot
    /// flush, or turned the write cache off (virtio 1.3, 5.2.6.2).
    fn write_through(&self) -> bool {
        let features = self.features.load(Ordering::Relaxed);
        if features & feature::CONFIG_WCE != 0 {
            !self.writeback.load(Ordering::Relaxed)
        } else {
            features & feature::FLUSH == 0
        }
    }

    /// Ends a request with a status byte.
    fn finish(chain: &mut Chain<'_>, request: &mut Request, status: u8) -> Step {
        request.account.failed = status != S_OK;
        let status_bytes = u32::from(chain.write_status(status));
        Step::Done {
            written: request.written + status_bytes,
        }
    }

    /// Looks at a sound chain; the error is the status to end it with.
    fn parse(&self, chain: &mut Chain<'_>, request: &mut Request) -> Result<Step, u8> {
        // struct virtio_blk_req: le32 type, le32 reserved, le64 sector, data,
        // u8 status. The status byte is the last of the chain.
        let mut header = [0u8; 16];
        if !chain.take_status() || !chain.read(&mut header) {
            return Err(S_IOERR);
        }
        let (kind, rest) = header.split_first_chunk::<4>().ok_or(S_IOERR)?;
        let sector = rest.last_chunk::<8>().ok_or(S_IOERR)?;
        let (kind, sector) = (u32::from_le_bytes(*kind), u64::from_le_bytes(*sector));
        request.account.class = class(kind);
        match kind {
            T_IN => {
                self.place(sector, chain.writable_len(), request)?;
                request.operation = Operation::Read;
            }
            T_OUT => {
                if self.disk.read_only {
                    return Err(S_IOERR);
                }
                self.place(sector, chain.readable_len(), request)?;
                request.operation = Operation::Write;
            }
            T_FLUSH => request.operation = Operation::Flush,
            T_GET_ID => {
                let fits = chain.writable_len().min(ID_BYTES as u64) as usize;
                request.written = chain.write(&self.serial[..fits]) as u32;
                return Ok(Self::finish(chain, request, S_OK));
            }
            _ => return Err(S_UNSUPP),
        }
        Ok(self.next(chain, request))
    }

    /// Checks that a transfer consists of whole blocks inside the disk.
    fn place(&self, sector: u64, len: u64, request: &mut Request) -> Result<(), u8> {
        let offset = sector.checked_mul(SECTOR).ok_or(S_IOERR)?;
        let end = offset.checked_add(len).ok_or(S_IOERR)?;
        let block = u64::from(self.disk.logical_block);
        if len == 0 || end > self.size.load(Ordering::Relaxed) || (offset | len) & (block - 1) != 0
        {
            return Err(S_IOERR);
        }
        request.offset = offset;
        request.left = len;
        request.account.bytes = len;
        Ok(())
    }

    /// The I/O that is left to do for a request.
    fn next(&self, chain: &mut Chain<'_>, request: &mut Request) -> Step {
        let uncached = match self.disk.cache {
            CacheMode::DontCache => RWF_DONTCACHE,
            CacheMode::Direct | CacheMode::Buffered => 0,
        };
        let (file, offset) = (FILE, request.offset);
        match request.operation {
            Operation::Read => Step::Read {
                file,
                offset,
                flags: uncached,
                buffer: self
                    .buffer(chain.writable_aligned(self.address_align(), self.length_align())),
            },
            Operation::Write => Step::Write {
                file,
                offset,
                flags: uncached | if self.write_through() { RWF_DSYNC } else { 0 },
                buffer: self
                    .buffer(chain.readable_aligned(self.address_align(), self.length_align())),
            },
            Operation::Flush if !self.disk.read_only => Step::Sync { file },
            Operation::Flush | Operation::None => Self::finish(chain, request, S_OK),
        }
    }

    fn address_align(&self) -> usize {
        self.disk.memory_align as usize
    }

    fn length_align(&self) -> usize {
        self.disk.logical_block as usize
    }

    /// O_DIRECT takes aligned segments only; the others go through a buffer.
    fn buffer(&self, aligned: bool) -> Buffer {
        if aligned || self.disk.cache != CacheMode::Direct {
            Buffer::Chain
        } else {
            Buffer::Bounce
        }
    }
}

impl Device for BlockDevice {
    type Request = Request;

    const CLASSES: &'static [&'static str] = &[
        "other",
        "read",
        "write",
        "flush",
        "discard",
        "write_zeroes",
        "get_id",
    ];

    fn account(&self, request: &Request) -> Account {
        request.account
    }

    fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::MQ;
        if self.disk.read_only {
            features |= feature::RO;
        }
        features
    }

    fn queue_count(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn config(&self) -> Vec<u8> {
        let seg_max = (self.queue_size - 2).min(SEG_MAX_LIMIT);
        let logical = self.disk.logical_block;
        // min_io_size has 16 bits: no more than 2^15 blocks fit.
        let ratio = self.disk.physical_block / logical;
        let exponent = ratio.trailing_zeros().min(15) as u8;
        let mut space = vec![0; CONFIG_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(
            0,
            &(self.size.load(Ordering::Relaxed) / SECTOR).to_le_bytes(),
        );
        put(12, &u32::from(seg_max).to_le_bytes());
        put(20, &logical.to_le_bytes());
        put(24, &[exponent, 0]);
        // min_io_size and opt_io_size, in logical blocks.
        put(26, &(1u16 << exponent).to_le_bytes());
        put(28, &0u32.to_le_bytes());
        put(
            WRITEBACK_OFFSET,
            &[u8::from(self.writeback.load(Ordering::Relaxed))],
        );
        put(34, &self.queues.to_le_bytes());
        space
    }

    fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), ConfigRefused> {
        let negotiated = self.features.load(Ordering::Relaxed) & feature::CONFIG_WCE != 0;
        match (offset, bytes) {
            (WRITEBACK_OFFSET, &[value @ (0 | 1)]) if negotiated => {
                self.writeback.store(value == 1, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(ConfigRefused {
                offset,
                end: offset.saturating_add(bytes.len()),
            }),
        }
    }

    fn negotiated(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        // A driver that can flush starts with the cache on.
        self.writeback
            .store(features & feature::FLUSH != 0, Ordering::Relaxed);
    }

    fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    fn start(
        &self,
        loaded: Result<(), ChainError>,
        mut chain: Chain<'_>,
        request: &mut Request,
    ) -> Step {
        let step = match loaded {
            Ok(()) => self.parse(&mut chain, request),
            Err(_) => Err(S_IOERR),
        };
        step.unwrap_or_else(|status| Self::finish(&mut chain, request, status))
    }

    fn resume(&self, mut chain: Chain<'_>, request: &mut Request, result: i32) -> Step {
        let Ok(moved) = u64::try_from(result) else {
            let again = matches!(-result, libc::EINTR | libc::EAGAIN);
            if again && request.retries < MAX_RETRIES {
                request.retries += 1;
                return self.next(&mut chain, request);
            }
            return Self::finish(&mut chain, request, S_IOERR);
        };
        match request.operation {
            Operation::Read | Operation::Write => {
                // No progress: the file was cut short behind our back.
                if moved == 0 || moved > request.left {
                    return Self::finish(&mut chain, request, S_IOERR);
                }
                if request.operation == Operation::Read {
                    request.written += moved as u32;
                }
                request.offset += moved;
                request.left -= moved;
                if request.left > 0 {
                    return self.next(&mut chain, request);
                }
                Self::finish(&mut chain, request, S_OK)
            }
            Operation::Flush | Operation::None => Self::finish(&mut chain, request, S_OK),
        }
    }
}

#[cfg(test)]
mod tests;
