//! Keeps the memory of this program small.
//!
//! `main` calls [`settle`] before the first thread; whoever has handled something large calls
//! [`trim`]. The defaults of glibc suit programs that own their machine: an arena for each thread,
//! and freed memory kept.

// UNSAFETY: the two calls of glibc have no safe form.
#![expect(unsafe_code)]

/// Larger blocks come from the kernel and go back to it at once.
const DIRECT: libc::c_int = 32 * 1024;
/// Free memory at the end of the heap that is kept.
const SPARE: libc::c_int = 64 * 1024;

/// One arena, and little kept.
pub(crate) fn settle() {
    for (option, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, DIRECT),
        (libc::M_TRIM_THRESHOLD, SPARE),
    ] {
        // SAFETY: sets a number; glibc takes its lock. A refusal leaves the default.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Gives free memory back to the kernel.
pub(crate) fn trim() {
    // SAFETY: takes the allocator's lock and touches free memory only.
    unsafe { libc::malloc_trim(0) };
}
