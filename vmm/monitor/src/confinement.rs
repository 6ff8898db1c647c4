//! What this program keeps when it gives up the rest: KVM's commands for a machine
//! it has begun, and the sockets of its backends. Used by `main`, before the guest
//! runs and before a backend is listened to.

use pericarp_confine::{Namespaces, Profile};

/// KVM's commands and one more, as `ioctl` numbers (linux/kvm.h). Not among them: anything of
/// devices, nested state, encryption or migration.
#[rustfmt::skip] // in groups
const KVM: &[u32] = &[
    // The system's: CREATE_VM, CHECK_EXTENSION, GET_VCPU_MMAP_SIZE, GET_SUPPORTED_CPUID.
    0xae01, 0xae03, 0xae04, 0xc008_ae05,
    // A machine's: CREATE_VCPU, SET_USER_MEMORY_REGION, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR,
    // CREATE_IRQCHIP, SET_GSI_ROUTING, IRQFD, IOEVENTFD.
    0xae41, 0x4020_ae46, 0xae47, 0x4008_ae48, 0xae60, 0x4008_ae6a, 0x4020_ae76, 0x4040_ae79,
    // Of the operator's terminal, which gets back its settings.
    crate::terminal::RESTORE,
    // A CPU's: RUN, SET_REGS, GET_SREGS, SET_SREGS, SET_MSRS, SET_CPUID2.
    0xae80, 0x4090_ae82, 0x8138_ae83, 0x4138_ae84, 0x4008_ae89, 0x4008_ae90,
];

/// To reach a backend again, for the channel it speaks back on, and for the threads of CPUs
/// to give up more.
const CALLS: &[i64] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_fchdir,
    libc::SYS_socketpair,
    libc::SYS_seccomp,
];

/// Of the thread of a virtual CPU: it is where a guest's accesses are answered, and makes
/// nothing, connects to nobody and opens nothing.
#[rustfmt::skip] // in groups
const CPU_CALLS: &[i64] = &[
    // The end of a connection whose backend is not to be waited for (`Lifeline`).
    libc::SYS_shutdown,
    // Eventfds, the console, locks; unoptimised programs look whether what they close is open.
    libc::SYS_read, libc::SYS_write, libc::SYS_ppoll, libc::SYS_poll, libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_futex, libc::SYS_clock_gettime, libc::SYS_sched_yield, libc::SYS_restart_syscall,
    // The allocator; nothing becomes executable, as the process's own filter says.
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_mprotect, libc::SYS_madvise,
    libc::SYS_brk,
    // What the process answers with an error: to be killed for it would be worse. The allocator
    // opens a file of /proc before it first gives memory back; a panic looks for its frames.
    libc::SYS_openat, libc::SYS_readlink, libc::SYS_getcwd, libc::SYS_writev,
    // Signals, a panic's way out, the end of the thread.
    libc::SYS_rt_sigreturn, libc::SYS_rt_sigprocmask, libc::SYS_sigaltstack, libc::SYS_gettid,
    libc::SYS_getpid, libc::SYS_tgkill, libc::SYS_rt_sigaction, libc::SYS_rseq, libc::SYS_exit,
    libc::SYS_exit_group,
];

/// RUN, and what a driver's accesses wire: SET_GSI_ROUTING, IRQFD, IOEVENTFD.
const CPU_KVM: &[u32] = &[0xae80, 0x4008_ae6a, 0x4020_ae76, 0x4040_ae79];

/// Confines the calling thread, that of a virtual CPU, further than its process is.
///
/// # Errors
/// The kernel's refusal.
pub fn narrow_cpu() -> Result<(), pericarp_confine::ConfineError> {
    pericarp_confine::narrow(CPU_CALLS, CPU_KVM)
}

/// The profile.
pub const PROFILE: Profile<'static> = Profile {
    syscalls: CALLS,
    ioctls: KVM,
    registrations: &[],
    namespaces: Namespaces::ALL,
};
