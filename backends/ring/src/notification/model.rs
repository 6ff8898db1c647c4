//! Ring memory as `loom` sees it: one tracked atomic for each field.
//!
//! `shared` asks here first while a model runs on this thread. `loom` runs all
//! threads of a model as coroutines of one, so a thread-local holds the memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use loom::sync::atomic::AtomicU32;

use crate::shared::Fence;

/// What is taken out of the protocol, to see that it is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Without {
    Nothing,
    FenceBeforeCall,
    FenceBeforeSleep,
    DriverFence,
    /// Index accesses of the device are no longer acquire and release.
    IndexOrder,
}

struct Memory {
    cells: BTreeMap<usize, AtomicU32>,
    without: Without,
}

thread_local! {
    static MEMORY: RefCell<Option<Rc<Memory>>> = const { RefCell::new(None) };
}

/// Takes the memory away again: `loom` wants its objects back after each run.
pub(super) struct Installed;

impl Drop for Installed {
    fn drop(&mut self) {
        MEMORY.set(None);
    }
}

pub(super) fn install(initial: Vec<(usize, u32)>, without: Without) -> Installed {
    let cells = initial
        .into_iter()
        .map(|(at, value)| (at, AtomicU32::new(value)))
        .collect();
    MEMORY.set(Some(Rc::new(Memory { cells, without })));
    Installed
}

/// The model's memory. Nothing of the thread-local stays borrowed: every access
/// to a cell may switch to another coroutine.
fn memory() -> Option<Rc<Memory>> {
    MEMORY.with_borrow(Clone::clone)
}

impl Memory {
    fn cell(&self, at: usize) -> &AtomicU32 {
        self.cells.get(&at).expect("a field of the ring")
    }

    fn order(&self, order: Ordering) -> Ordering {
        match self.without {
            Without::IndexOrder => Ordering::Relaxed,
            _ => order,
        }
    }
}

/// The device's load; `None` while no model runs.
pub(crate) fn load(at: *const u8, order: Ordering) -> Option<u16> {
    let memory = memory()?;
    let value = memory.cell(at as usize).load(memory.order(order));
    Some(value as u16)
}

/// The device's store; false while no model runs.
pub(crate) fn store(at: *mut u8, value: u16, order: Ordering) -> bool {
    let Some(memory) = memory() else {
        return false;
    };
    let order = memory.order(order);
    memory.cell(at as usize).store(u32::from(value), order);
    true
}

/// The device's store of half a used element.
pub(crate) fn store_wide(at: *mut u8, value: u32) -> bool {
    let Some(memory) = memory() else {
        return false;
    };
    memory.cell(at as usize).store(value, Ordering::Relaxed);
    true
}

/// The device's fence.
pub(crate) fn fence(which: Fence) -> bool {
    let Some(memory) = memory() else {
        return false;
    };
    let removed = match which {
        Fence::BeforeCall => Without::FenceBeforeCall,
        Fence::BeforeSleep => Without::FenceBeforeSleep,
    };
    if memory.without != removed {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
    true
}

/// The driver's fence.
pub(super) fn driver_fence() {
    let memory = memory().expect("a model runs");
    if memory.without != Without::DriverFence {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// The driver's load.
pub(super) fn get(at: usize, order: Ordering) -> u16 {
    memory().expect("a model runs").cell(at).load(order) as u16
}

/// The driver's store.
pub(super) fn put(at: usize, value: u16, order: Ordering) {
    memory()
        .expect("a model runs")
        .cell(at)
        .store(u32::from(value), order);
}
