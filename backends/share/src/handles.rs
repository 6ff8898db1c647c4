//! Open files and directories, by number. A number is a place and how often the
//! place has been used, so that one that was closed is recognised. Who does I/O
//! keeps the [`Arc`]: closing meanwhile takes the number away and leaves the
//! descriptor to the last that has it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::io::Errno;

use crate::NodeId;
use crate::mounts::Mount;
use crate::pieces::MALFORMED;
use crate::share::directories::OpenDirectory;
use crate::state::{MOST_OPEN, OpenRecord, State};
use crate::table::{Budget, Permit};

/// An open file or directory as the guest names it. One that comes in may be
/// anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

/// What opening a file answers.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Its number.
    pub handle: Handle,
    /// The same as [`Share::file`](crate::Share::file) gives for it.
    pub file: Arc<OpenFile>,
}

/// An open regular file: what reads and writes have to know.
#[derive(Debug)]
pub struct OpenFile {
    // Closed before the permit is given back.
    pub(crate) file: OwnedFd,
    pub(crate) _permit: Permit,
    pub(crate) node: NodeId,
    pub(crate) mount: Arc<Mount>,
    pub(crate) traits: Traits,
}

/// How a file is open, and what its file system can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traits {
    /// Open for reading.
    pub readable: bool,
    /// Open for writing.
    pub writable: bool,
    /// O_DIRECT: length, offset and memory must be aligned.
    pub direct: bool,
    /// Reads take RWF_NOWAIT.
    pub reads_without_waiting: bool,
    /// Writes do.
    pub writes_without_waiting: bool,
    /// Its file system is served by another process or machine: whatever cannot
    /// be told not to wait is not to be done on a thread that must not.
    pub waits: bool,
}

impl OpenFile {
    /// How it is open.
    pub fn traits(&self) -> &Traits {
        &self.traits
    }

    /// Whose.
    pub fn node(&self) -> NodeId {
        self.node
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Open {
    File(Arc<OpenFile>),
    Directory(Arc<OpenDirectory>),
}

impl Open {
    pub(crate) fn node(&self) -> NodeId {
        match self {
            Self::File(file) => file.node,
            Self::Directory(directory) => directory.node(),
        }
    }
}

#[derive(Debug, Default)]
struct Slots {
    slots: Vec<(u32, Option<Open>)>,
    free: Vec<u32>,
    /// How often a place that is new was used before this process.
    before: u32,
}

impl Slots {
    /// After all that was open before is back.
    fn free_the_unused(&mut self) {
        let slots = self.slots.iter().enumerate();
        let unused = slots.filter(|(_, slot)| slot.1.is_none());
        self.free.extend(unused.map(|(place, _)| place as u32));
    }
}

/// All that is open.
#[derive(Debug)]
pub(crate) struct Handles {
    slots: RwLock<Slots>,
    budget: Arc<Budget>,
    /// What a successor needs is written there.
    state: Option<Arc<State>>,
}

impl Handles {
    pub(crate) fn new(limit: u32) -> Self {
        Self {
            slots: RwLock::default(),
            budget: Budget::new(limit),
            state: None,
        }
    }

    /// Writes to this state from now on.
    pub(crate) fn remember(&mut self, state: Arc<State>) {
        self.state = Some(state);
    }

    /// The right to open one file more.
    pub(crate) fn permit(&self) -> Result<Permit, Errno> {
        self.budget.take().ok_or(Errno::NFILE)
    }

    /// How many are open or still in use.
    pub(crate) fn count(&self) -> u32 {
        self.budget.taken()
    }

    /// Gives what was opened with these flags a number.
    ///
    /// # Errors
    /// ENFILE where there is no room to write it down.
    pub(crate) fn add(&self, open: Open, flags: u32) -> Result<Handle, Errno> {
        let mut all = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let next = all.free.last().copied().unwrap_or(all.slots.len() as u32);
        if let Some(state) = &self.state {
            state.reserve_open(next)?;
        }
        let place = match all.free.pop() {
            Some(place) => place,
            None => {
                // Their number is bounded by that of permits.
                let first = all.before + 1;
                all.slots.push((first, None));
                (all.slots.len() - 1) as u32
            }
        };
        let slot = &mut all.slots[place as usize];
        let number = u64::from(slot.0) << 32 | u64::from(place);
        if let Some(state) = &self.state {
            state.raise_open_generation(slot.0);
            let record = OpenRecord {
                number,
                node: open.node(),
                flags,
                directory: matches!(open, Open::Directory(_)),
            };
            state.put_open(place, record);
        }
        slot.1 = Some(open);
        Ok(Handle(number))
    }

    /// Puts what a predecessor had open where it was, once for each place; `None`
    /// for what cannot be opened any more. Then nobody gets an earlier number.
    pub(crate) fn put_back(&self, opened: Vec<(OpenRecord, Option<Open>)>) {
        let Some(state) = &self.state else {
            return;
        };
        let mut all = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let Slots { slots, before, .. } = &mut *all;
        *before = state.open_generation();
        for (record, open) in opened {
            let (place, generation) = split(Handle(record.number));
            if slots.len() <= place {
                slots.resize_with(place + 1, || (*before + 1, None));
            }
            match open {
                Some(open) => slots[place] = (generation, Some(open)),
                None => state.clear_open(place as u32),
            }
        }
        all.free_the_unused();
    }

    /// How often places were used at most, and all that is open, by number.
    pub(crate) fn all(&self) -> (u32, Vec<(u64, Open)>) {
        let all = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let used = all.slots.iter().map(|(generation, _)| *generation).max();
        let used = used.unwrap_or(0).max(all.before);
        let slots = all.slots.iter().enumerate();
        let open = slots.filter_map(|(place, (generation, open))| {
            let number = u64::from(*generation) << 32 | place as u64;
            Some((number, open.clone()?))
        });
        (used, open.collect())
    }

    /// Puts what another process had open where it was, `None` for what is not to
    /// be had any more. Nobody gets a number from before.
    pub(crate) fn put_back_all(
        &self,
        used: u32,
        opened: Vec<(u64, Option<Open>)>,
    ) -> Result<(), &'static str> {
        let mut all = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let Slots { slots, before, .. } = &mut *all;
        *before = used;
        for (number, open) in opened {
            let (place, generation) = split(Handle(number));
            if place >= MOST_OPEN as usize {
                return Err(MALFORMED);
            }
            if slots.len() <= place {
                slots.resize_with(place + 1, || (used.saturating_add(1), None));
            }
            slots[place] = match open {
                Some(open) => (generation, Some(open)),
                None => (used.saturating_add(1), None),
            };
        }
        all.free_the_unused();
        Ok(())
    }

    pub(crate) fn file(&self, handle: Handle) -> Result<Arc<OpenFile>, Errno> {
        match self.get(handle)? {
            Open::File(file) => Ok(file),
            Open::Directory(_) => Err(Errno::BADF),
        }
    }

    pub(crate) fn directory(&self, handle: Handle) -> Result<Arc<OpenDirectory>, Errno> {
        match self.get(handle)? {
            Open::Directory(directory) => Ok(directory),
            Open::File(_) => Err(Errno::BADF),
        }
    }

    pub(crate) fn get(&self, handle: Handle) -> Result<Open, Errno> {
        let all = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let (place, generation) = split(handle);
        match all.slots.get(place) {
            Some((now, Some(open))) if *now == generation => Ok(open.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// Takes it out; it is closed when the caller lets go, and nobody else has
    /// it.
    pub(crate) fn remove(&self, handle: Handle) -> Result<Open, Errno> {
        let (place, generation) = split(handle);
        let mut all = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slot = all.slots.get_mut(place).ok_or(Errno::BADF)?;
        if slot.0 != generation {
            return Err(Errno::BADF);
        }
        let open = slot.1.take().ok_or(Errno::BADF)?;
        if let Some(state) = &self.state {
            state.clear_open(place as u32);
        }
        if let Some(next) = generation.checked_add(1) {
            slot.0 = next;
            all.free.push(place as u32);
        }
        Ok(open)
    }

    pub(crate) fn clear(&self) {
        let mut gone = Vec::new();
        let mut all = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let Slots { slots, free, .. } = &mut *all;
        for (place, slot) in slots.iter_mut().enumerate() {
            let Some(open) = slot.1.take() else { continue };
            gone.push(open);
            if let Some(state) = &self.state {
                state.clear_open(place as u32);
            }
            if let Some(next) = slot.0.checked_add(1) {
                slot.0 = next;
                free.push(place as u32);
            }
        }
        drop(all);
        // Closing may take long.
        drop(gone);
    }
}

fn split(handle: Handle) -> (usize, u32) {
    ((handle.0 & 0xffff_ffff) as usize, (handle.0 >> 32) as u32)
}
