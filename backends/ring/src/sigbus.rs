//! Survival of memory that a front end takes away again.
//!
//! A mapped file that is cut short turns the next access into SIGBUS. Files that
//! can be sealed are; for the others every mapping is registered here, and the
//! signal's handler puts anonymous memory in the place of the whole region. The
//! access then goes on, into zeros; the region is marked lost, and the workers
//! stop every queue that lives in it. The process and its other devices stay.
//!
//! [`Region::map`](crate::Region::map) and [`Watched`](crate::Watched) are the only callers.
#![expect(unsafe_code)]
// UNSAFETY: a signal handler, and a mapping over a mapping.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Mappings of the whole process that can be watched at a time.
const SLOTS: usize = 1024;

/// One watched mapping. Free while `end` is 0.
struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// Watches one mapping until it is dropped, which must be before the mapping is.
#[derive(Debug)]
pub(crate) struct Watch(usize);

impl Watch {
    /// Watches `[start, start + len)`. `None` when the table is full.
    pub(crate) fn new(start: *mut u8, len: usize) -> Option<Self> {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let free = |slot: &Slot| {
            slot.taken
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        let index = TABLE.iter().position(free)?;
        let slot = &TABLE[index];
        slot.lost.store(false, Ordering::Relaxed);
        slot.start.store(start as usize, Ordering::Release);
        // The mapping is complete once its end is there.
        slot.end.store(start as usize + len, Ordering::Release);
        Some(Self(index))
    }

    /// True once the memory behind the mapping went away.
    pub(crate) fn lost(&self) -> bool {
        TABLE[self.0].lost.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let slot = &TABLE[self.0];
        slot.end.store(0, Ordering::Relaxed);
        slot.taken.store(false, Ordering::Release);
    }
}

fn install() {
    // SAFETY: the struct is plain data, all zero is valid; the handler below
    // does only what a signal handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

/// Async-signal-safe: atomics, mmap and sigaction, and errno put back.
extern "C" fn handle(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler, and
    // for SIGBUS it carries an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let mut survived = false;
    for slot in &TABLE {
        // Read twice: the slot may be changing hands on another thread, and
        // start and end must be those of one mapping.
        let end = slot.end.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Acquire);
        if address < start || address >= end || slot.end.load(Ordering::Acquire) != end {
            continue;
        }
        if survived {
            // Watched twice, by who had it and who has it now.
            slot.lost.store(true, Ordering::Relaxed);
            continue;
        }
        // SAFETY: errno of this thread, read and put back below.
        let errno = unsafe { *libc::__errno_location() };
        // SAFETY: the range is exactly one mapping of ours, which is alive: a
        // thread is using it this moment. Replacing it keeps every pointer
        // into it valid; raw accesses are the only ones made to it.
        let replaced = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        if replaced == libc::MAP_FAILED {
            break;
        }
        slot.lost.store(true, Ordering::Relaxed);
        survived = true;
    }
    if survived {
        return;
    }
    // Not ours: die of it, as without a handler.
    // SAFETY: as in `install`; all zero is the default action.
    unsafe {
        let action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}
