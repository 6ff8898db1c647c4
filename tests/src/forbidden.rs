//! Machines that forbid a system call, as containers and whole distributions do
//! with io_uring (`io_uring_disabled=2`, a seccomp profile). For the suites
//! `hostile` and `faults`.

use std::thread;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// `io_uring_setup`, which has the same number on every architecture.
pub const IO_URING_SETUP: i64 = 425;

/// Runs `act` on a thread for which, as for what it starts, this call fails with this
/// error number.
///
/// # Panics
/// When `act` does, or the kernel knows no filters.
pub fn without(call: i64, errno: i32, act: impl FnOnce() + Send) {
    let filtered = || {
        let arch: TargetArch = std::env::consts::ARCH.try_into().expect("it is known");
        let filter = SeccompFilter::new(
            [(call, Vec::new())].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(errno.cast_unsigned()),
            arch,
        );
        let program: BpfProgram = filter
            .and_then(TryInto::try_into)
            .expect("a filter of one call");
        apply_filter(&program).expect("a filter of the thread's");
        act();
    };
    thread::scope(|scope| {
        if let Err(panic) = scope.spawn(filtered).join() {
            std::panic::resume_unwind(panic);
        }
    });
}
