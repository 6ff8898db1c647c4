//! The oracle's own reading of a chain, from the guest's side of memory.
//!
//! Written from virtio 1.3, 2.7.5, and from nothing in `pericarp-ring`.

use crate::memory::{FAR, Memory, SEAM, SMALL};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// What the implementation promises to take.
const MOST: usize = 1024;

/// What a chain names.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) readable: Vec<(u64, u64)>,
    pub(crate) writable: Vec<(u64, u64)>,
    /// It breaks no rule.
    pub(crate) sound: bool,
    /// So long that the limit on segments may refuse it.
    pub(crate) long: bool,
}

/// Which regions are in the table of the moment.
pub(crate) type Table = usize;

/// True when guest address `at` is in memory under `table`.
fn mapped(memory: &Memory, table: Table, at: u64) -> bool {
    memory.places.iter().enumerate().any(|(n, (start, size))| {
        let absent = (table == 1 && n == 1) || (table == 2 && n == 2);
        !absent && at >= *start && at - start < *size
    })
}

impl Named {
    /// Walks the chain at `head` of a ring at guest address 0.
    pub(crate) fn walk(memory: &Memory, table: Table, size: u16, head: u16) -> Self {
        Self::walk_at(memory, table, (0, size), head)
    }

    /// The same of a ring whose descriptors are elsewhere.
    pub(crate) fn walk_at(
        memory: &Memory,
        table: Table,
        (ring, size): (u64, u16),
        head: u16,
    ) -> Self {
        let mut named = Self {
            sound: true,
            ..Self::default()
        };
        let (mut base, mut count, mut nested) = (ring, u64::from(size), false);
        let (mut index, mut seen, mut total) = (u64::from(head), 0, 0u64);
        loop {
            let raw = (index < count)
                .then(|| memory.get(base + 16 * index, 16))
                .flatten();
            let Some(raw) = raw else {
                named.sound = false;
                return named;
            };
            let number = |at: usize, len: usize| {
                raw[at..at + len]
                    .iter()
                    .rev()
                    .fold(0u64, |n, &b| n << 8 | u64::from(b))
            };
            let (at, len) = (number(0, 8), number(8, 4));
            let (flags, next) = (number(12, 2) as u16, number(14, 2));
            if flags & INDIRECT != 0 {
                let whole = len > 0 && len.is_multiple_of(16) && len / 16 < 0x1_0000;
                let here = memory.get(at, len as usize).is_some() && mapped(memory, table, at);
                if nested || flags & NEXT != 0 || !whole || !here {
                    named.sound = false;
                    return named;
                }
                (base, count, nested, index) = (at, len / 16, true, 0);
                continue;
            }
            seen += 1;
            if seen > MOST {
                named.sound = false;
                return named;
            }
            named.long |= seen > MOST / 2;
            total += len;
            let inside = in_memory(memory, table, at, len);
            named.sound &= len > 0 && inside && total <= u64::from(u32::MAX);
            if flags & WRITE != 0 {
                named.writable.push((at, len));
            } else {
                named.sound &= named.writable.is_empty();
                named.readable.push((at, len));
            }
            if flags & NEXT == 0 {
                return named;
            }
            index = next;
        }
    }

    pub(crate) fn names(&self, at: u64) -> bool {
        self.writable
            .iter()
            .any(|&(start, len)| at >= start && at - start < len)
    }

    /// The chain's last byte, if the device may write it.
    pub(crate) fn status(&self) -> Option<u64> {
        let (at, len) = self.writable.last()?;
        at.checked_add(len.checked_sub(1)?)
    }

    pub(crate) fn bytes(list: &[(u64, u64)]) -> u64 {
        list.iter().map(|(_, len)| len).sum()
    }

    /// The first `count` readable bytes.
    pub(crate) fn read(&self, memory: &Memory, count: usize) -> Option<Vec<u8>> {
        collect(memory, &self.readable, count)
    }

    /// The first `count` bytes of the writable part as they are now.
    pub(crate) fn written(&self, memory: &Memory, count: usize) -> Option<Vec<u8>> {
        collect(memory, &self.writable, count)
    }

    /// No byte is named twice for writing.
    pub(crate) fn is_disjoint(&self) -> bool {
        let mut list = self.writable.clone();
        list.sort_unstable();
        list.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0)
    }
}

fn in_memory(memory: &Memory, table: Table, at: u64, len: u64) -> bool {
    let Some(end) = at.checked_add(len) else {
        return false;
    };
    // Regions begin and end at these, so looking at both ends of each is enough.
    len > 0
        && mapped(memory, table, at)
        && mapped(memory, table, end - 1)
        && [SEAM, SEAM + SMALL, FAR].iter().all(|&edge| {
            at >= edge
                || end <= edge
                || (mapped(memory, table, edge) && mapped(memory, table, edge - 1))
        })
}

fn collect(memory: &Memory, list: &[(u64, u64)], count: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(count);
    for &(at, len) in list {
        let len = len.min((count - out.len()) as u64);
        if let Some(bytes) = memory.get(at, len as usize) {
            out.extend_from_slice(bytes);
            continue;
        }
        // Over the seam of two regions.
        for n in 0..len {
            out.push(memory.get(at + n, 1)?[0]);
        }
    }
    (out.len() == count).then_some(out)
}
