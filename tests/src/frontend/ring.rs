//! A split ring seen from the driver's side, built by hand (virtio 1.3, 2.7).
//! Every field can be set to anything; nothing is checked.

use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DriverError, Guest};
use crate::bounded::{Deadline, poll};

/// The chain goes on at `next`.
pub const NEXT: u16 = 1;
/// The device writes here.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// In the available ring's flags: do not signal.
const NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: do not kick.
const NO_NOTIFY: u16 = 1;

/// Guest memory set aside for each ring.
const STRIDE: u64 = 0x1_0000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xa000;

/// One descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next one.
    pub next: u16,
}

impl Desc {
    /// As it lies in memory.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// One ring and its two notifications.
pub struct Ring {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    seen_used: u16,
    /// Written by us: there is work.
    pub kick: EventFd,
    /// Written by the backend: there are results.
    pub call: EventFd,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an eventfd")
}

impl Ring {
    /// An empty ring number `queue`.
    pub(super) fn new(guest: &Guest, queue: u16, size: u16, event_idx: bool) -> Self {
        Ring {
            memory: guest.memory.clone(),
            base: u64::from(queue) * STRIDE,
            size,
            event_idx,
            next_avail: 0,
            seen_used: 0,
            kick: eventfd(),
            call: eventfd(),
        }
    }

    /// Starts over with `size` entries; the backend must be told.
    pub fn reset(&mut self, size: u16) {
        self.size = size;
        self.next_avail = 0;
        self.seen_used = 0;
        self.store(self.base + AVAIL, 0);
        self.store(self.avail_at() + 2, 0);
        self.store(self.used_at(), 0);
        self.store(self.used_at() + 2, 0);
        self.set_used_event(0);
        let _ = self.call.read();
    }

    /// Takes a new kick eventfd; the backend must be told.
    pub fn renew_kick(&mut self) {
        self.kick = eventfd();
    }

    /// Takes a new call eventfd; the backend must be told.
    pub fn renew_call(&mut self) {
        self.call = eventfd();
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Address of descriptor `index`.
    pub fn desc_at(&self, index: u16) -> u64 {
        self.base + u64::from(index) * 16
    }

    /// Address of the available ring.
    pub fn avail_at(&self) -> u64 {
        self.base + AVAIL
    }

    /// Address of the used ring.
    pub fn used_at(&self) -> u64 {
        self.base + USED
    }

    /// Where the next chain goes in the available ring.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    fn store(&self, at: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(at), Ordering::Release)
            .expect("rings are in memory");
    }

    fn load(&self, at: u64) -> u16 {
        let value: u16 = self
            .memory
            .load(GuestAddress(at), Ordering::Acquire)
            .expect("rings are in memory");
        u16::from_le(value)
    }

    /// Writes one descriptor.
    pub fn set_desc(&self, index: u16, desc: Desc) {
        self.memory
            .write_slice(&desc.bytes(), GuestAddress(self.desc_at(index)))
            .expect("rings are in memory");
    }

    /// Puts `head` into the next place of the available ring, not yet visible.
    pub fn queue(&mut self, head: u16) {
        let place = u64::from(self.next_avail % self.size);
        self.store(self.avail_at() + 4 + place * 2, head);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Makes everything queued visible.
    pub fn publish(&self) {
        self.publish_at(self.next_avail);
    }

    /// Makes everything queued visible, with a used event of the test's choice.
    pub fn publish_quiet(&self, used_event: u16) {
        self.set_used_event(used_event);
        self.store(self.avail_at() + 2, self.next_avail);
    }

    /// Sets the available index to anything.
    pub fn publish_at(&self, index: u16) {
        if self.event_idx {
            self.set_used_event(self.seen_used);
        }
        self.store(self.avail_at() + 2, index);
    }

    /// Wakes the backend, whether or not it wants to be.
    pub fn notify(&self) {
        // Full means that the backend has a wake-up pending already.
        let _ = self.kick.write(1);
    }

    /// Whether the backend wants to be woken for what was queued since `before`
    /// (virtio 1.3, 2.7.10).
    pub fn wants_kick(&self, before: u16) -> bool {
        // What was published is visible before the wish is read.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.load(self.used_at()) & NO_NOTIFY == 0;
        }
        let event = self.load(self.used_at() + 4 + u64::from(self.size) * 8);
        let (now, past) = (self.next_avail, self.next_avail.wrapping_sub(before));
        now.wrapping_sub(event).wrapping_sub(1) < past
    }

    /// Asks for a signal once the used index has passed `index`.
    pub fn set_used_event(&self, index: u16) {
        self.store(self.avail_at() + 4 + u64::from(self.size) * 2, index);
        // The index must be visible before the used ring is looked at again.
        fence(Ordering::SeqCst);
    }

    /// Without EVENT_IDX: asks for no signals, or for all.
    pub fn set_no_interrupt(&self, on: bool) {
        self.store(self.avail_at(), if on { NO_INTERRUPT } else { 0 });
        fence(Ordering::SeqCst);
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        self.load(self.used_at() + 2)
    }

    /// How many results were taken so far.
    pub fn seen(&self) -> u16 {
        self.seen_used
    }

    /// Takes the results that are there.
    pub fn take(&mut self) -> Vec<Used> {
        std::iter::from_fn(|| self.take_one()).collect()
    }

    /// Takes the next result, if there is one.
    pub fn take_one(&mut self) -> Option<Used> {
        if self.seen_used == self.used_idx() {
            return None;
        }
        let at = self.used_at() + 4 + u64::from(self.seen_used % self.size) * 8;
        let mut element = [0; 8];
        self.memory
            .read_slice(&mut element, GuestAddress(at))
            .expect("rings are in memory");
        let word = |at: usize| {
            u32::from_le_bytes([
                element[at],
                element[at + 1],
                element[at + 2],
                element[at + 3],
            ])
        };
        self.seen_used = self.seen_used.wrapping_add(1);
        Some(Used {
            head: word(0),
            len: word(4),
        })
    }

    /// True if a call came since this was asked last.
    pub fn called(&self) -> bool {
        self.call.read().is_ok()
    }

    /// Waits for `count` results, looking only when called: what a driver in a
    /// guest does.
    ///
    /// # Errors
    /// When they do not come, or come without a call.
    pub fn wait(&mut self, count: usize, limit: Duration) -> Result<Vec<Used>, DriverError> {
        let deadline = Deadline::after(limit);
        let mut all = Vec::new();
        loop {
            if poll(deadline.left(), || self.called().then_some(())).is_none() {
                return Err(if self.seen_used == self.used_idx() {
                    DriverError::NotCompleted(limit)
                } else {
                    DriverError::NotSignalled(limit)
                });
            }
            // Ask for the next call before looking, as every driver must.
            loop {
                all.extend(self.take());
                if !self.event_idx {
                    break;
                }
                self.set_used_event(self.seen_used);
                if self.used_idx() == self.seen_used {
                    break;
                }
            }
            if all.len() >= count {
                return Ok(all);
            }
        }
    }

    /// Waits for `count` results by looking at memory, calls or not.
    ///
    /// # Errors
    /// When they do not come.
    pub fn watch(&mut self, count: usize, limit: Duration) -> Result<Vec<Used>, DriverError> {
        let mut all = Vec::new();
        poll(limit, || {
            all.extend(self.take());
            (all.len() >= count).then_some(())
        })
        .ok_or(DriverError::NotCompleted(limit))?;
        Ok(all)
    }
}
