//! Descriptor chains: from a head index to segments the kernel can be given.
//!
//! [`Segments`] is the reusable storage of one in-flight request; the request
//! slab owns it. [`Chain`] is what a device sees of it while it looks at one
//! request. A chain is walked exactly once; each descriptor is copied out of
//! guest memory before it is judged.
#![expect(unsafe_code)]
// UNSAFETY: chain contents are guest memory, copied through raw pointers.

mod front;

use std::ptr;

use libc::iovec;
use thiserror::Error;

use front::Front;

use crate::memory::GuestMemory;
use crate::queue::{Descriptor, SplitQueue};

/// The most segments one chain may have: the kernel's limit for one vectored
/// call (UIO_MAXIOV).
pub const MAX_SEGMENTS: usize = 1024;

/// Segments a slot keeps room for between requests.
const KEPT_SEGMENTS: usize = 64;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// What is wrong with a chain. The chain is still completed and signalled.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum ChainError {
    /// `next` leads beyond the table.
    #[error("descriptor index {0} is beyond its table")]
    BadIndex(u16),
    /// More descriptors than [`MAX_SEGMENTS`], which is also how a loop ends.
    #[error("chain loops or has more than {MAX_SEGMENTS} descriptors")]
    TooLong,
    /// More than 4 GiB in one chain (virtio 1.3, 2.7.4.2).
    #[error("chain describes more than 4 GiB")]
    TooManyBytes,
    /// A descriptor of no bytes.
    #[error("descriptor of length zero")]
    Empty,
    /// Memory the front end does not share.
    #[error("descriptor at guest address {0:#x} is not in shared memory")]
    BadAddress(u64),
    /// Device-readable after device-writable (virtio 1.3, 2.7.4.2).
    #[error("readable descriptor after a writable one")]
    Order,
    /// An indirect descriptor with NEXT, inside an indirect table, or whose
    /// table is not a whole number of descriptors (virtio 1.3, 2.7.5.3).
    #[error("malformed indirect descriptor")]
    Indirect,
}

/// The translated segments of one chain. Capacity is kept between requests.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    /// Readable segments, then writable ones.
    iov: Vec<iovec>,
    /// Unconsumed readable segments are `iov[readable.0..readable.1]`.
    readable: (usize, usize),
    /// Unconsumed writable segments are `iov[writable.0..writable.1]`.
    writable: (usize, usize),
    readable_len: u64,
    writable_len: u64,
    /// The last writable byte of the chain once a device claimed it, or the
    /// last byte of a faulty chain's last descriptor.
    status: Option<*mut u8>,
    /// What a device set aside of the writable part.
    front: Front,
}

// SAFETY: the pointers lead into guest memory that the owning queue keeps
// mapped; the storage moves between threads only with its queue.
unsafe impl Send for Segments {}

/// Where descriptors are read from.
enum Table {
    Ring,
    Indirect { base: *const u8, count: u16 },
}

impl Segments {
    /// Walks the chain at `head` and translates every descriptor.
    ///
    /// On error nothing of the chain may be used but [`Chain::write_status`],
    /// which reaches the chain's last byte if the walk found one.
    pub(crate) fn load(&mut self, queue: &SplitQueue, head: u16) -> Result<(), ChainError> {
        self.iov.clear();
        self.status = None;
        self.front.clear();
        self.readable = (0, 0);
        self.writable = (0, 0);
        self.readable_len = 0;
        self.writable_len = 0;
        match self.walk(queue, head) {
            Ok(()) => {
                self.readable = (0, self.readable.1);
                self.writable = (self.readable.1, self.iov.len());
                Ok(())
            }
            Err(error) => {
                self.iov.clear();
                self.readable = (0, 0);
                self.writable = (0, 0);
                self.readable_len = 0;
                self.writable_len = 0;
                Err(error)
            }
        }
    }

    fn walk(&mut self, queue: &SplitQueue, head: u16) -> Result<(), ChainError> {
        let memory = queue.memory();
        let mut table = Table::Ring;
        let mut index = head;
        let mut seen = 0;
        // A bad segment does not end the walk: the status byte may follow it.
        let mut fault = None;
        loop {
            let descriptor = match table {
                Table::Ring => queue.descriptor(index),
                Table::Indirect { base, count } => indirect_descriptor(base, count, index),
            }
            .ok_or(ChainError::BadIndex(index))?;
            let flags = u16::from_le(descriptor.flags);
            if flags & F_INDIRECT != 0 {
                let nested = matches!(table, Table::Indirect { .. });
                table = indirect_table(memory, &descriptor, nested)?;
                index = 0;
                continue;
            }
            seen += 1;
            if seen > MAX_SEGMENTS {
                return Err(ChainError::TooLong);
            }
            let last = flags & F_NEXT == 0;
            if let Err(error) = self.segment(memory, &descriptor, last) {
                fault.get_or_insert(error);
            }
            if last {
                return fault.map_or(Ok(()), Err);
            }
            index = u16::from_le(descriptor.next);
        }
    }

    /// Adds one descriptor's memory.
    fn segment(
        &mut self,
        memory: &GuestMemory,
        descriptor: &Descriptor,
        last: bool,
    ) -> Result<(), ChainError> {
        let mut address = u64::from_le(descriptor.address);
        let mut left = u64::from(u32::from_le(descriptor.len));
        let write = u16::from_le(descriptor.flags) & F_WRITE != 0;
        if left == 0 {
            return Err(ChainError::Empty);
        }
        if !write && self.writable_len > 0 {
            return Err(ChainError::Order);
        }
        if self.readable_len + self.writable_len + left > u64::from(u32::MAX) {
            return Err(ChainError::TooManyBytes);
        }
        if last && write {
            self.status = address
                .checked_add(left - 1)
                .and_then(|end| memory.contiguous(end, 1));
        }
        if write {
            self.writable_len += left;
        } else {
            self.readable_len += left;
        }
        while left > 0 {
            let (pointer, len) = memory
                .piece(address, left)
                .ok_or(ChainError::BadAddress(address))?;
            self.append(pointer, len as usize, write)?;
            address += len;
            left -= len;
        }
        Ok(())
    }

    /// Appends a piece, joined to the previous one where they touch.
    fn append(&mut self, pointer: *mut u8, len: usize, write: bool) -> Result<(), ChainError> {
        let first_of_kind = write && self.iov.len() == self.readable.1;
        if !first_of_kind
            && let Some(previous) = self.iov.last_mut()
            && previous.iov_base as usize + previous.iov_len == pointer as usize
        {
            previous.iov_len += len;
            return Ok(());
        }
        if self.iov.len() == MAX_SEGMENTS {
            return Err(ChainError::TooLong);
        }
        self.iov.push(iovec {
            iov_base: pointer.cast(),
            iov_len: len,
        });
        if !write {
            self.readable.1 = self.iov.len();
        }
        Ok(())
    }

    /// Gives back what an unusually long chain needed: a guest must not be
    /// able to keep [`MAX_SEGMENTS`] of storage in every slot.
    pub(crate) fn trim(&mut self) {
        if self.iov.capacity() > KEPT_SEGMENTS {
            self.iov = Vec::new();
        }
        self.front.trim();
    }

    pub(crate) fn readable(&self) -> &[iovec] {
        &self.iov[self.readable.0..self.readable.1]
    }

    pub(crate) fn writable(&self) -> &[iovec] {
        &self.iov[self.writable.0..self.writable.1]
    }

    pub(crate) fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Copies `bytes` into the writable part, from `offset` on, and consumes nothing.
    /// Returns how many bytes fitted.
    pub(crate) fn put(&self, mut offset: u64, bytes: &[u8]) -> usize {
        let mut done = 0;
        for segment in self.writable() {
            let len = segment.iov_len as u64;
            if offset >= len {
                offset -= len;
                continue;
            }
            let n = ((len - offset) as usize).min(bytes.len() - done);
            // SAFETY: the segment was found in shared memory that the queue keeps
            // mapped, and has `n` bytes from `offset` on, as `bytes` has from `done` on.
            unsafe {
                ptr::copy_nonoverlapping(
                    bytes.as_ptr().add(done),
                    segment.iov_base.cast::<u8>().add(offset as usize),
                    n,
                );
            }
            offset = 0;
            done += n;
            if done == bytes.len() {
                break;
            }
        }
        done
    }
}

fn indirect_table(
    memory: &GuestMemory,
    descriptor: &Descriptor,
    nested: bool,
) -> Result<Table, ChainError> {
    let address = u64::from_le(descriptor.address);
    let len = u32::from_le(descriptor.len);
    let next = u16::from_le(descriptor.flags) & F_NEXT != 0;
    if nested || next || len == 0 || !len.is_multiple_of(16) || len / 16 > u32::from(u16::MAX) {
        return Err(ChainError::Indirect);
    }
    let base = memory
        .contiguous(address, u64::from(len))
        .ok_or(ChainError::BadAddress(address))?;
    Ok(Table::Indirect {
        base,
        count: (len / 16) as u16,
    })
}

/// Copies entry `index` out of an indirect table, which the driver may have
/// put at any address.
fn indirect_descriptor(base: *const u8, count: u16, index: u16) -> Option<Descriptor> {
    if index >= count {
        return None;
    }
    // SAFETY: index < count, and the whole table was found in shared memory.
    let entry = unsafe { base.add(16 * usize::from(index)) };
    if (entry as usize).is_multiple_of(align_of::<Descriptor>()) {
        // SAFETY: as above, and aligned.
        return Some(unsafe { ptr::read_volatile(entry.cast()) });
    }
    let mut bytes = [0u8; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: the 16 bytes of the entry, one by one.
        *byte = unsafe { ptr::read_volatile(entry.add(i)) };
    }
    let (address, rest) = bytes.split_first_chunk::<8>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    Some(Descriptor {
        address: u64::from_ne_bytes(*address),
        len: u32::from_ne_bytes(*len),
        flags: u16::from_ne_bytes([rest[0], rest[1]]),
        next: u16::from_ne_bytes([rest[2], rest[3]]),
    })
}

/// A device's view of one request's chain.
///
/// Readable bytes are consumed from the front by [`read`](Self::read) and
/// [`advance_readable`](Self::advance_readable), writable ones by
/// [`write`](Self::write) and [`advance_writable`](Self::advance_writable).
#[derive(Debug)]
pub struct Chain<'q> {
    segments: &'q mut Segments,
}

impl<'q> Chain<'q> {
    pub(crate) fn new(segments: &'q mut Segments) -> Self {
        Self { segments }
    }

    /// Bytes the device may still read.
    pub fn readable_len(&self) -> u64 {
        self.segments.readable_len
    }

    /// Bytes the device may still write, the status byte excluded once taken.
    pub fn writable_len(&self) -> u64 {
        self.segments.writable_len
    }

    /// Copies and consumes exactly `out.len()` readable bytes; false, with
    /// nothing consumed, when there are fewer.
    #[must_use]
    pub fn read(&mut self, out: &mut [u8]) -> bool {
        if !self.peek(out) {
            return false;
        }
        self.advance_readable(out.len() as u64);
        true
    }

    /// Copies the next `out.len()` readable bytes without consuming them.
    #[must_use]
    pub fn peek(&self, out: &mut [u8]) -> bool {
        if (out.len() as u64) > self.segments.readable_len {
            return false;
        }
        let mut done = 0;
        for segment in self.segments.readable() {
            let n = segment.iov_len.min(out.len() - done);
            // SAFETY: the segment was found in shared memory that the queue
            // keeps mapped; `out` has at least `n` bytes left. The guest may
            // write meanwhile: whatever bytes arrive are treated as hostile.
            unsafe {
                ptr::copy_nonoverlapping(
                    segment.iov_base.cast::<u8>(),
                    out.as_mut_ptr().add(done),
                    n,
                );
            }
            done += n;
            if done == out.len() {
                break;
            }
        }
        true
    }

    /// Copies `bytes` into the writable part and consumes it. Returns how many
    /// bytes fitted.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for segment in self.segments.writable() {
            let n = segment.iov_len.min(bytes.len() - done);
            // SAFETY: as for `peek`, in the other direction.
            unsafe {
                ptr::copy_nonoverlapping(
                    bytes.as_ptr().add(done),
                    segment.iov_base.cast::<u8>(),
                    n,
                );
            }
            done += n;
            if done == bytes.len() {
                break;
            }
        }
        self.advance_writable(done as u64);
        done
    }

    /// Sets the last writable byte of the chain aside as its status byte
    /// (virtio 1.3, 5.2.6). False when the chain has no writable byte.
    #[must_use]
    pub fn take_status(&mut self) -> bool {
        let s = &mut *self.segments;
        let Some(last) = s.iov[s.writable.0..s.writable.1].last_mut() else {
            return false;
        };
        last.iov_len -= 1;
        // SAFETY: iov_len was at least 1, so this is the segment's last byte.
        s.status = Some(unsafe { last.iov_base.cast::<u8>().add(last.iov_len) });
        if last.iov_len == 0 {
            s.writable.1 -= 1;
        }
        s.writable_len -= 1;
        true
    }

    /// Writes the status byte; false when the chain has none that can be
    /// reached.
    pub fn write_status(&mut self, status: u8) -> bool {
        let Some(pointer) = self.segments.status else {
            return false;
        };
        // SAFETY: the byte was found in shared memory that the queue keeps
        // mapped, in a device-writable descriptor.
        unsafe { ptr::write_volatile(pointer, status) };
        true
    }

    /// Consumes `n` readable bytes.
    pub fn advance_readable(&mut self, n: u64) {
        let s = &mut *self.segments;
        s.readable.0 = consume(&mut s.iov, s.readable, n);
        s.readable_len = s.readable_len.saturating_sub(n);
    }

    /// Consumes `n` writable bytes.
    pub fn advance_writable(&mut self, n: u64) {
        let s = &mut *self.segments;
        s.writable.0 = consume(&mut s.iov, s.writable, n);
        s.writable_len = s.writable_len.saturating_sub(n);
    }

    /// True when every unconsumed readable segment starts at a multiple of
    /// `address` and is a multiple of `length` long (both powers of two).
    pub fn readable_aligned(&self, address: usize, length: usize) -> bool {
        aligned(self.segments.readable(), address, length)
    }

    /// As [`readable_aligned`](Self::readable_aligned), for writable segments.
    pub fn writable_aligned(&self, address: usize, length: usize) -> bool {
        aligned(self.segments.writable(), address, length)
    }
}

fn aligned(segments: &[iovec], address: usize, length: usize) -> bool {
    let (mut bases, mut lengths) = (0, 0);
    for segment in segments {
        bases |= segment.iov_base as usize;
        lengths |= segment.iov_len;
    }
    bases & (address - 1) == 0 && lengths & (length - 1) == 0
}

/// Drops `n` bytes from the front of `iov[start..end]`; returns the new start.
fn consume(iov: &mut [iovec], (mut start, end): (usize, usize), mut n: u64) -> usize {
    while n > 0 && start < end {
        let segment = &mut iov[start];
        if (segment.iov_len as u64) > n {
            segment.iov_base = segment.iov_base.wrapping_byte_add(n as usize);
            segment.iov_len -= n as usize;
            break;
        }
        n -= segment.iov_len as u64;
        start += 1;
    }
    start
}
