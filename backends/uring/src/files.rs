//! The table of registered descriptors, kept the same way by both engines.

#![expect(unsafe_code)]
// UNSAFETY: poll and write on descriptor numbers.

use std::os::fd::RawFd;

use crate::EngineError;

/// A registered descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSlot(pub(crate) u32);

/// Which slot holds which descriptor.
#[derive(Debug)]
pub(crate) struct Files {
    slots: Vec<Option<RawFd>>,
}

impl Files {
    pub(crate) fn new(count: u32) -> Self {
        Self {
            slots: vec![None; count as usize],
        }
    }

    pub(crate) fn add(&mut self, fd: RawFd) -> Result<FileSlot, EngineError> {
        let count = self.slots.len() as u32;
        let free = self.slots.iter_mut().enumerate().find(|(_, s)| s.is_none());
        let (index, slot) = free.ok_or(EngineError::TooManyFiles(count))?;
        *slot = Some(fd);
        Ok(FileSlot(index as u32))
    }

    pub(crate) fn remove(&mut self, slot: FileSlot) {
        if let Some(entry) = self.slots.get_mut(slot.0 as usize) {
            *entry = None;
        }
    }

    /// Signals with plain system calls: looks for room first, so that only a
    /// reader that fills the descriptor at that very moment can make us wait.
    pub(crate) fn signal(&self, slot: FileSlot) {
        let Some(fd) = self.get(slot) else {
            return;
        };
        let mut room = libc::pollfd {
            fd,
            events: libc::POLLOUT,
            revents: 0,
        };
        let one = 1u64.to_ne_bytes();
        // SAFETY: one pollfd and eight bytes, both of which outlive the calls.
        unsafe {
            if libc::poll(&raw mut room, 1, 0) == 1 && room.revents & libc::POLLOUT != 0 {
                libc::write(fd, one.as_ptr().cast(), one.len());
            }
        }
    }

    pub(crate) fn get(&self, slot: FileSlot) -> Option<RawFd> {
        self.slots.get(slot.0 as usize).copied().flatten()
    }
}
