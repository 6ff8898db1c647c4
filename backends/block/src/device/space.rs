//! DISCARD and WRITE_ZEROES (virtio 1.3, 5.2.6.2): lists of ranges that are
//! given back to the host or read as zeroes from then on. Part of the device's
//! state machine.
//!
//! The list is guest memory: it is copied once and checked whole, before the
//! first range is touched. Ranges are done one after the other, each by the
//! cheapest way the disk has; a way it turns out not to have is not tried
//! again.

use std::sync::atomic::{AtomicBool, Ordering};

use pericarp_ring::Chain;
use pericarp_vhost::Step;

use super::{BlockDevice, FILE, Operation, Request, S_IOERR, S_OK, S_UNSUPP, T_DISCARD, feature};
use crate::disk::{DiscardBy, SECTOR};

/// Limits of one DISCARD. Linux fills a page with ranges, which is 256.
pub(super) const MAX_DISCARD_RANGES: usize = 256;
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Limits of one WRITE_ZEROES: 2 GiB in all, since a disk may have to write
/// every byte of it, and whoever stops a queue waits for that.
pub(super) const MAX_ZEROES_RANGES: usize = 16;
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 18;

/// struct virtio_blk_discard_write_zeroes: le64 sector, le32 num_sectors, le32
/// flags.
const ENTRY: usize = 16;
/// The only flag: blocks may be given back instead of zeroed.
const F_UNMAP: u32 = 1;

const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// A part of the disk.
#[derive(Debug, Clone, Copy)]
struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

/// The ranges a request still has to do.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// The current one is the last.
    left: Vec<Range>,
    /// How the current one is being zeroed. Another request may find out
    /// meanwhile that the disk lacks this way.
    way: Option<Way>,
    /// All are done, and a sync makes them durable; its success is the end.
    syncing: bool,
}

/// Ways to zero that this disk turned out not to have.
#[derive(Debug, Default)]
pub(super) struct Zeroing {
    no_hole: AtomicBool,
    no_zero_range: AtomicBool,
}

/// A way to zero a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Hole,
    ZeroRange,
    Write,
}

impl BlockDevice {
    /// Copies and checks the ranges of a request; the error is its status.
    pub(super) fn ranges(&self, kind: u32, chain: &mut Chain<'_>) -> Result<Ranges, u8> {
        if self.disk.read_only {
            return Err(S_IOERR);
        }
        let (agreed, most, longest) = match kind {
            T_DISCARD => (feature::DISCARD, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS),
            _ => (feature::WRITE_ZEROES, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS),
        };
        if self.features.load(Ordering::Relaxed) & agreed == 0 {
            return Err(S_UNSUPP);
        }
        let bytes = usize::try_from(chain.readable_len()).map_err(|_| S_IOERR)?;
        if bytes == 0 || !bytes.is_multiple_of(ENTRY) || bytes / ENTRY > most {
            return Err(S_IOERR);
        }
        let mut list = vec![0; bytes];
        if !chain.read(&mut list) {
            return Err(S_IOERR);
        }
        let mut left = Vec::with_capacity(bytes / ENTRY);
        for entry in list.chunks_exact(ENTRY) {
            let (sector, rest) = entry.split_first_chunk::<8>().ok_or(S_IOERR)?;
            let (count, rest) = rest.split_first_chunk::<4>().ok_or(S_IOERR)?;
            let flags = rest.first_chunk::<4>().ok_or(S_IOERR)?;
            let (sector, count) = (u64::from_le_bytes(*sector), u32::from_le_bytes(*count));
            let flags = u32::from_le_bytes(*flags);
            let unmap = flags & F_UNMAP != 0;
            if flags & !F_UNMAP != 0 || (unmap && kind == T_DISCARD) {
                return Err(S_UNSUPP);
            }
            if count > longest {
                return Err(S_IOERR);
            }
            // In 64 bits: 32 would wrap around at 4 GiB.
            let len = u64::from(count) * SECTOR;
            let offset = self.offset(sector, len)?;
            left.push(Range { offset, len, unmap });
        }
        // Taken from the end.
        left.reverse();
        Ok(Ranges {
            left,
            ..Ranges::default()
        })
    }

    /// The way to zero a range, cheapest first. Blocks that are not to be given
    /// back stay allocated, so that later writes cannot run out of space.
    fn way(&self, range: Range) -> Way {
        let lacks = |way: &AtomicBool| way.load(Ordering::Relaxed);
        let hole = self.disk.topology.unmap_zeroes && !lacks(&self.zeroing.no_hole);
        if range.unmap && hole {
            Way::Hole
        } else if lacks(&self.zeroing.no_zero_range) {
            Way::Write
        } else {
            Way::ZeroRange
        }
    }

    /// What is to be done next for a DISCARD or WRITE_ZEROES.
    pub(super) fn next_range(&self, chain: &mut Chain<'_>, request: &mut Request) -> Step {
        let file = FILE;
        let Some(range) = request.ranges.left.last().copied() else {
            request.durable |= self.write_through();
            if !request.durable {
                return Self::finish(chain, request, S_OK);
            }
            // Again where the kernel asks for it: an interrupted sync is none.
            request.ranges.syncing = true;
            return Step::Sync {
                file,
                metadata: false,
            };
        };
        let Range { offset, len, .. } = range;
        let allocate = |mode| Step::Allocate {
            file,
            offset,
            len,
            mode,
        };
        match (request.operation, self.disk.topology.discard) {
            (Operation::Discard, DiscardBy::Command) => Step::Discard { file, offset, len },
            (Operation::Discard, _) => allocate(HOLE),
            _ => match *request.ranges.way.insert(self.way(range)) {
                Way::Hole => allocate(HOLE),
                Way::ZeroRange => allocate(ZERO),
                Way::Write => Step::WriteZeroes {
                    file,
                    offset,
                    len,
                    flags: self.uncached(),
                },
            },
        }
    }

    /// Takes note of what was done: `moved` bytes where zeroes were written, 0
    /// for a whole range.
    pub(super) fn range_done(
        &self,
        chain: &mut Chain<'_>,
        request: &mut Request,
        moved: u64,
    ) -> Step {
        if request.ranges.syncing {
            return Self::finish(chain, request, S_OK);
        }
        if let Some(range) = request.ranges.left.last_mut() {
            let written = request.ranges.way == Some(Way::Write);
            if written && (moved == 0 || moved > range.len) {
                return Self::finish(chain, request, S_IOERR);
            }
            range.offset += moved;
            range.len -= moved;
            if !written || range.len == 0 {
                request.ranges.left.pop();
            }
        }
        self.next_range(chain, request)
    }

    /// The disk lacks the way that was tried: there may be another.
    pub(super) fn otherwise(&self, chain: &mut Chain<'_>, request: &mut Request) -> Option<Step> {
        request.ranges.left.last()?;
        if request.operation == Operation::Discard {
            return Some(Self::finish(chain, request, S_UNSUPP));
        }
        match request.ranges.way? {
            Way::Hole => self.zeroing.no_hole.store(true, Ordering::Relaxed),
            Way::ZeroRange => self.zeroing.no_zero_range.store(true, Ordering::Relaxed),
            Way::Write => return None,
        }
        Some(self.next_range(chain, request))
    }
}

#[cfg(test)]
mod tests;
