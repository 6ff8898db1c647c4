//! The table of registered descriptors, kept the same way by both engines.

#![expect(unsafe_code)]
// UNSAFETY: poll and write on descriptor numbers.

use std::os::fd::RawFd;

use crate::EngineError;

/// What an operation acts on: a registered descriptor, or a plain one on an
/// engine with [`EngineOptions::descriptors`](crate::EngineOptions::descriptors).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSlot(pub(crate) u32);

/// Set for a plain descriptor. Its number is far below this and the next two.
const PLAIN: u32 = 1 << 31;
const THREADS: u32 = 1 << 30;
const HERE: u32 = 1 << 29;
const NUMBER: u32 = HERE - 1;

/// Where an operation on a plain descriptor is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Place {
    /// In the ring, which goes on when what it needs is there.
    #[default]
    Ring,
    /// On the kernel's threads from the start, as of files that
    /// [`crate::Engine::expect_waiting`] was told of: their file system makes
    /// whoever starts an operation wait.
    Threads,
    /// Writes on the calling thread, since the page cache takes them at once and
    /// the ring would wake a thread for each; on the kernel's threads for a while
    /// after one that took long. All else in the ring.
    Here,
}

impl FileSlot {
    /// A descriptor that is not registered. The caller keeps it open until what
    /// it started has completed; one that is not open is answered with EBADF.
    pub fn descriptor(fd: RawFd, place: Place) -> Self {
        let place = match place {
            Place::Ring => 0,
            Place::Threads => THREADS,
            Place::Here => HERE,
        };
        Self(fd as u32 & NUMBER | PLAIN | place)
    }

    /// The number of a plain descriptor.
    pub(crate) fn plain(self) -> Option<RawFd> {
        (self.0 & PLAIN != 0).then_some((self.0 & NUMBER) as RawFd)
    }

    /// Where a plain descriptor's operations are done.
    pub(crate) fn place(self) -> Place {
        match self.0 & (PLAIN | THREADS | HERE) {
            threads if threads == PLAIN | THREADS => Place::Threads,
            here if here == PLAIN | HERE => Place::Here,
            _ => Place::Ring,
        }
    }
}

/// An entry for either kind: `types::Fd` and `types::Fixed` have no type in
/// common that the builders take.
macro_rules! on {
    ($file:expr, |$target:ident| $entry:expr) => {
        match $file.plain() {
            Some(number) => {
                let $target = io_uring::types::Fd(number);
                $entry
            }
            None => {
                let $target = io_uring::types::Fixed($file.0);
                $entry
            }
        }
    };
}
pub(crate) use on;

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
        let registered = || self.slots.get(slot.0 as usize).copied().flatten();
        slot.plain().or_else(registered)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn plain_descriptors_are_told_from_registered_ones() {
        let file = File::open("/dev/null").unwrap();
        let mut files = Files::new(2);
        let registered = files.add(file.as_raw_fd()).unwrap();
        assert_eq!(registered.plain(), None);
        assert_eq!(registered.place(), Place::Ring);
        for place in [Place::Ring, Place::Threads, Place::Here] {
            let slot = FileSlot::descriptor(file.as_raw_fd(), place);
            assert_eq!(slot.plain(), Some(file.as_raw_fd()));
            assert_eq!(files.get(slot), slot.plain());
            assert_eq!(slot.place(), place);
        }
    }
}
