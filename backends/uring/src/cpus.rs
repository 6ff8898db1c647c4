//! Where the kernel's threads for a ring run: on the CPUs of the process.
//!
//! They do not by themselves. The kernel gives them all CPUs of the process's cpuset, and none of its
//! affinity (`io_wq_create`), so that a process which is held to some CPUs by that has threads on others. `ring`
//! asks when it is made, by the thread that makes it: its owner may be pinned to one of them.
#![expect(unsafe_code)]
// UNSAFETY: sched_getaffinity(2), which fills a mask.

use std::mem;

use libc::cpu_set_t;

/// The CPUs that this thread may use, where those are not all.
pub(crate) fn narrowed() -> Option<cpu_set_t> {
    // SAFETY: all zeros is a mask, that of no CPU.
    let mut mask: cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes as many bytes of the mask as there are, of this thread's.
    let result = unsafe { libc::sched_getaffinity(0, size_of::<cpu_set_t>(), &raw mut mask) };
    // SAFETY: it takes a number and gives one.
    let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    // SAFETY: it counts bits of a mask that is there.
    let count = i64::from(unsafe { libc::CPU_COUNT(&mask) });
    // More CPUs than a mask has are an error.
    (result == 0 && count < online).then_some(mask)
}
