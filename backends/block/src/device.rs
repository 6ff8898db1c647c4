//! The virtio-blk state machine (virtio 1.3, 5.2): requests in, steps out.
//!
//! Workers of `pericarp-vhost` call it; it does no I/O and knows no ring. All
//! checks of what the guest asks for are here: direction, range, alignment,
//! read-only. DISCARD and WRITE_ZEROES are in `space`, the configuration space
//! in `config`.

mod config;
mod space;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use log::warn;
use pericarp_ring::{Buffer, Chain, ChainError};
use pericarp_vhost::{Account, ConfigRefused, Device, FileRef, Step};

use crate::disk::{CacheMode, DiscardBy, Disk, DiskError, Geometry, SECTOR};
use config::WRITEBACK_OFFSET;
use space::{Ranges, Zeroing};

/// Feature bits (virtio 1.3, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
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
const FILE: FileRef = FileRef::Listed(0);

/// What a request is doing.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Operation {
    #[default]
    None,
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
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
    /// It was to be durable at some time: the driver may turn the write cache on
    /// before all steps of it are done.
    durable: bool,
    /// What DISCARD and WRITE_ZEROES still have to do.
    ranges: Ranges,
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
    zeroing: Zeroing,
    /// The file's reads cannot be told not to wait.
    waits: bool,
    /// Its device is looked at for completions.
    polled: bool,
}

impl BlockDevice {
    /// A device over `disk` that answers GET_ID with the first 20 bytes of
    /// `serial`, and has `queues` queues of at most `queue_size` descriptors.
    pub fn new(disk: Disk, serial: &str, queues: u16, queue_size: u16) -> Self {
        let mut id = [0; ID_BYTES];
        let length = serial.len().min(ID_BYTES);
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        Self {
            waits: disk.needs_threads(),
            polled: disk.is_polled(),
            disk: disk.geometry,
            size: AtomicU64::new(disk.size),
            files: [disk.file],
            serial: id,
            queues,
            queue_size,
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            zeroing: Zeroing::default(),
        }
    }

    /// Bytes on the disk, as requests may use them now.
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Measures the file again and takes its size on, for requests from now on
    /// and for the configuration space. A disk may become smaller: requests
    /// beyond its end then fail. Returns the size in bytes.
    ///
    /// # Errors
    /// [`DiskError`] when the file cannot be a disk like that; the size stays.
    pub fn resize(&self) -> Result<u64, DiskError> {
        let size = self.disk.size_of(&self.files[0])?;
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
        request.ranges = Ranges::default();
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
            T_DISCARD | T_WRITE_ZEROES => {
                request.ranges = self.ranges(kind, chain)?;
                request.operation = match kind {
                    T_DISCARD => Operation::Discard,
                    _ => Operation::WriteZeroes,
                };
            }
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
        request.offset = self.offset(sector, len)?;
        request.left = len;
        request.account.bytes = len;
        Ok(())
    }

    /// The byte offset of a sector from which `len` bytes are whole blocks
    /// inside the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, u8> {
        let offset = sector.checked_mul(SECTOR).ok_or(S_IOERR)?;
        let end = offset.checked_add(len).ok_or(S_IOERR)?;
        let block = u64::from(self.disk.logical_block);
        if len == 0 || end > self.size() || (offset | len) & (block - 1) != 0 {
            return Err(S_IOERR);
        }
        Ok(offset)
    }

    /// RWF_* flags of every transfer.
    fn uncached(&self) -> i32 {
        match self.disk.cache {
            CacheMode::DontCache => RWF_DONTCACHE,
            CacheMode::Direct | CacheMode::Buffered => 0,
        }
    }

    /// The I/O that is left to do for a request.
    fn next(&self, chain: &mut Chain<'_>, request: &mut Request) -> Step {
        let uncached = self.uncached();
        let (file, offset) = (FILE, request.offset);
        let sync = || Step::Sync {
            file,
            metadata: false,
        };
        request.durable |= self.write_through();
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
                flags: uncached | if request.durable { RWF_DSYNC } else { 0 },
                buffer: self
                    .buffer(chain.readable_aligned(self.address_align(), self.length_align())),
            },
            Operation::Discard | Operation::WriteZeroes => self.next_range(chain, request),
            Operation::Flush if !self.disk.read_only => sync(),
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
        } else {
            features |= feature::WRITE_ZEROES;
            if self.disk.topology.discard != DiscardBy::Nothing {
                features |= feature::DISCARD;
            }
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
        self.config_space()
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

    fn refresh(&self) {
        // What cannot be measured stays, as it does where an operator asks.
        if let Err(error) = self.resize() {
            warn!("a disk's size stays what it was at the start: {error}");
        }
    }

    fn resumed(&self, features: u64, config: &[u8]) {
        self.negotiated(features);
        // Without CONFIG_WCE this is refused, and nothing else was ever set.
        if let Some(byte) = config.get(WRITEBACK_OFFSET) {
            let _ = self.write_config(WRITEBACK_OFFSET, &[*byte]);
        }
    }

    fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    fn files_wait(&self) -> bool {
        self.waits
    }

    fn files_poll(&self) -> bool {
        self.polled
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
        if result == -libc::EOPNOTSUPP
            && let Some(step) = self.otherwise(&mut chain, request)
        {
            return step;
        }
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
            Operation::Discard | Operation::WriteZeroes => {
                self.range_done(&mut chain, request, moved)
            }
            Operation::Flush | Operation::None => Self::finish(&mut chain, request, S_OK),
        }
    }
}

#[cfg(test)]
mod tests;
