//! The system call filter: last step of [`crate::enter`]. It lists what a
//! threaded Rust program on glibc needs to serve descriptors it already has.
//! A call that is not listed kills the process; a few that libraries try with
//! a plan for failure get an error instead.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::*;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter,
    apply_filter_all_threads,
};

use crate::report::{Confinement, Measure};
use crate::{ConfineError, Profile};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Allowed with any arguments.
#[rustfmt::skip] // a line for each call would hide the groups
const COMMON: &[i64] = &[
    // I/O on descriptors.
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv,
    SYS_pwritev, SYS_preadv2, SYS_pwritev2, SYS_lseek, SYS_fsync, SYS_fdatasync, SYS_fallocate,
    SYS_close, SYS_eventfd2, SYS_io_uring_enter, SYS_timerfd_create, SYS_timerfd_settime,
    // Paths mean nothing any more: for descriptors, and for the own socket.
    SYS_fstat, SYS_newfstatat, SYS_statx, SYS_unlinkat,
    // Sockets that exist, and those they bring forth.
    SYS_accept4, SYS_recvmsg, SYS_sendmsg, SYS_recvfrom, SYS_shutdown, SYS_getsockname,
    SYS_getpeername,
    // Waiting.
    SYS_ppoll, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_futex, SYS_nanosleep,
    SYS_clock_nanosleep, SYS_clock_gettime, SYS_clock_getres, SYS_gettimeofday,
    SYS_restart_syscall,
    // Memory; what makes memory executable is below.
    SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk, SYS_getrandom,
    // Threads and signals.
    SYS_gettid, SYS_getpid, SYS_set_robust_list, SYS_rseq, SYS_sched_yield, SYS_sched_getaffinity,
    SYS_getcpu, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_rt_sigtimedwait, SYS_sigaltstack, SYS_getrusage, SYS_exit, SYS_exit_group,
];

/// The older calls that arm64 never had.
#[cfg(target_arch = "x86_64")]
const LEGACY: &[i64] = &[SYS_poll, SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const LEGACY: &[i64] = &[];

/// Refused with ENOSYS. glibc then starts threads with `clone`, whose flags a
/// filter can see; those of `clone3` lie in memory.
const ABSENT: &[i64] = &[SYS_clone3, SYS_openat2, SYS_faccessat2];

/// Refused with EPERM: what the standard library, glibc and a sidecar's choice
/// of I/O engine try and can do without.
#[rustfmt::skip]
const REFUSED: &[i64] = &[
    SYS_openat, SYS_getcwd, SYS_faccessat, SYS_readlinkat, SYS_getdents64, SYS_statfs, SYS_socket,
    SYS_io_uring_setup,
];
#[cfg(target_arch = "x86_64")]
const REFUSED_LEGACY: &[i64] = &[SYS_open, SYS_access, SYS_readlink];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_LEGACY: &[i64] = &[];

/// Linux 6.13, the same number on all architectures.
const SETXATTRAT: i64 = 463;
const GETXATTRAT: i64 = 464;
const LISTXATTRAT: i64 = 465;
const REMOVEXATTRAT: i64 = 466;

/// Allowed with any arguments to who shares directories: what `pericarp-share`
/// asks to look, to open and to read. Which files, Landlock and the mounts say.
#[rustfmt::skip]
const READING: &[i64] = &[
    SYS_openat, SYS_openat2, SYS_readlinkat, SYS_getdents64, SYS_fstatfs, SYS_faccessat2,
    SYS_name_to_handle_at, SYS_fgetxattr, SYS_flistxattr, GETXATTRAT, LISTXATTRAT, SYS_flock,
    SYS_syncfs, SYS_geteuid, SYS_getegid, SYS_getgroups, SYS_capget,
];

/// Allowed besides where a directory may be changed, refused with EROFS where
/// none may.
#[rustfmt::skip]
const CHANGING: &[i64] = &[
    SYS_mkdirat, SYS_mknodat, SYS_symlinkat, SYS_linkat, SYS_renameat2, SYS_fchownat, SYS_fchown,
    SYS_fchmodat, SYS_fchmodat2, SYS_fchmod, SYS_utimensat, SYS_ftruncate, SYS_copy_file_range,
    SYS_fsetxattr, SYS_fremovexattr, SETXATTRAT, REMOVEXATTRAT,
];

/// The same of what a thread does to act as somebody else, refused with EPERM;
/// and `unshare` of what the umask is part of.
#[rustfmt::skip]
const ACTING: &[i64] = &[
    SYS_setresuid, SYS_setresgid, SYS_setgroups, SYS_capset, SYS_umask,
];

/// What [`Opening::Trees`] adds to each of the lists.
#[derive(Debug, Default)]
struct Shared {
    allowed: Vec<i64>,
    refused: Vec<i64>,
    read_only: Vec<i64>,
    own_umask: bool,
}

fn shared(opening: Opening<'_>) -> Shared {
    let Opening::Trees { writable, handles } = opening else {
        return Shared::default();
    };
    let mut shared = match writable {
        true => Shared {
            allowed: [READING, CHANGING, ACTING].concat(),
            own_umask: true,
            ..Shared::default()
        },
        false => Shared {
            allowed: READING.to_vec(),
            refused: ACTING.to_vec(),
            read_only: CHANGING.to_vec(),
            own_umask: false,
        },
    };
    match handles {
        true => shared.allowed.push(SYS_open_by_handle_at),
        // What the kernel says without CAP_DAC_READ_SEARCH.
        false => shared.refused.push(SYS_open_by_handle_at),
    }
    shared
}

/// What `pthread_create` asks for; anything else makes a process or namespace.
const THREAD: c_int = CLONE_VM
    | CLONE_FS
    | CLONE_FILES
    | CLONE_SIGHAND
    | CLONE_THREAD
    | CLONE_SYSVSEM
    | CLONE_SETTLS
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_CLEARTID;

#[rustfmt::skip]
const FCNTL: &[c_int] = &[
    F_GETFL, F_SETFL, F_GETFD, F_SETFD, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS, F_OFD_GETLK,
    F_OFD_SETLK, F_OFD_SETLKW,
];

/// `io_uring_register` without what makes rings reach further: credentials
/// (9, 10), zero-copy network queues, buffers of other rings, new memory
/// regions; and without what pins memory (0, 1, 15, 16), which a profile adds. The numbers are those of `enum io_uring_register_op`.
const RING_REGISTER: &[u64] = &[
    2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
];
/// Set in the opcode when the ring itself is named by its registered index.
const REGISTERED_RING: u64 = 1 << 31;

const SOCKET_OPTIONS: &[c_int] = &[SO_RCVTIMEO, SO_SNDTIMEO, SO_RCVBUF, SO_SNDBUF];

/// The one way to open a descriptor anew: rustix adds O_LARGEFILE.
const REOPEN: c_int = O_RDWR | O_CLOEXEC | 0o100_000;

/// What may be opened.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Opening<'a> {
    Nothing,
    /// Descriptors of the process itself, through this `/proc/self/fd`.
    Descriptors(BorrowedFd<'a>),
    /// Anything that Landlock and the empty root leave.
    Trees {
        writable: bool,
        handles: bool,
    },
}

/// The process has its filter.
static INSTALLED: AtomicBool = AtomicBool::new(false);

pub(crate) fn install(
    profile: &Profile<'_>,
    opening: Opening<'_>,
    report: &mut Confinement,
) -> Result<(), ConfineError> {
    if rustix::thread::secure_computing_mode().is_err() {
        report.lacks(Measure::Seccomp, "seccomp (not in this kernel)");
        return Ok(());
    }
    let shared = shared(opening);
    let syscalls = [profile.syscalls, &shared.allowed].concat();
    let profile = &Profile {
        syscalls: &syscalls,
        ..*profile
    };
    let (allowed, count) = allow_list(profile, &shared).map_err(ConfineError::Build)?;
    let wanted = |list: &[i64]| -> Vec<i64> {
        list.iter()
            .copied()
            .filter(|call| !profile.syscalls.contains(call))
            .collect()
    };
    let absent = refuse(&wanted(ABSENT), ENOSYS).map_err(ConfineError::Build)?;
    let mut refused = wanted(&[REFUSED, REFUSED_LEGACY, &shared.refused].concat());
    let reopening = match opening {
        Opening::Descriptors(directory) => {
            refused.retain(|call| *call != SYS_openat);
            refuse_other_opens(directory)
        }
        _ => Ok(BpfProgram::new()),
    };
    let reopening = reopening.map_err(ConfineError::Build)?;
    let unchanging = refuse(&wanted(&shared.read_only), EROFS).map_err(ConfineError::Build)?;
    let refused = refuse(&refused, EPERM).map_err(ConfineError::Build)?;
    // The strictest answer of all filters counts, and an error is stricter than
    // permission but milder than death: what the two refuse, the list allows.
    // Each filter must let `seccomp` itself pass, so the list comes last.
    for program in [&absent, &refused, &unchanging, &reopening] {
        if !program.is_empty() {
            apply_filter(program).map_err(ConfineError::Filter)?;
        }
    }
    apply_filter_all_threads(&allowed).map_err(ConfineError::Filter)?;
    INSTALLED.store(true, Ordering::Relaxed);
    report.holds(Measure::Seccomp, format!("seccomp ({count} system calls)"));
    Ok(())
}

/// Installs a filter for the calling thread that allows these calls, and `ioctl` with
/// these requests alone.
pub(crate) fn narrow(calls: &[i64], requests: &[u32]) -> Result<(), ConfineError> {
    if !INSTALLED.load(Ordering::Relaxed) {
        return Ok(());
    }
    let program = || {
        let mut rules: Rules = calls.iter().map(|call| (*call, Vec::new())).collect();
        let requests: Vec<u64> = requests.iter().map(|request| u64::from(*request)).collect();
        rules.insert(SYS_ioctl, any_of(1, &requests)?);
        compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)
    };
    let program = program().map_err(ConfineError::Build)?;
    apply_filter(&program).map_err(ConfineError::Filter)
}

/// Refuses `openat` unless it is through this descriptor, with these flags.
fn refuse_other_opens(directory: BorrowedFd<'_>) -> Result<BpfProgram, BackendError> {
    let other = |argument, value| {
        let condition = SeccompCondition::new(argument, Len::Dword, Op::Ne, number(value))?;
        rule(&[condition])
    };
    let others = vec![other(0, directory.as_raw_fd())?, other(2, REOPEN)?];
    compile(
        BTreeMap::from([(SYS_openat, others)]),
        SeccompAction::Allow,
        SeccompAction::Errno(EPERM.unsigned_abs()),
    )
}

/// The filter that kills on all but the listed calls, and how many these are.
fn allow_list(profile: &Profile<'_>, shared: &Shared) -> Result<(BpfProgram, usize), BackendError> {
    let mut rules = conditional(profile)?;
    if profile.syscalls.contains(&SYS_socket) {
        // Who does not ask for it gets an error from the other filter.
        rules.insert(SYS_socket, vec![unix_stream()?]);
    }
    if shared.own_umask {
        let flags = u64::from(CLONE_FS.cast_unsigned());
        rules.insert(SYS_unshare, vec![rule(&[masked(0, u64::MAX, flags)?])?]);
    }
    for call in [COMMON, LEGACY, profile.syscalls].concat() {
        // An empty list of rules means any arguments.
        rules.entry(call).or_default();
    }
    let count = rules.len();
    let lists = [
        ABSENT,
        REFUSED,
        REFUSED_LEGACY,
        &shared.refused,
        &shared.read_only,
    ];
    for call in lists.concat() {
        rules.entry(call).or_default();
    }
    Ok((
        compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)?,
        count,
    ))
}

fn refuse(calls: &[i64], errno: c_int) -> Result<BpfProgram, BackendError> {
    if calls.is_empty() {
        return Ok(BpfProgram::new());
    }
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    compile(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno.unsigned_abs()),
    )
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()
}

/// The calls whose arguments decide.
fn conditional(profile: &Profile<'_>) -> Result<Rules, BackendError> {
    let not_executable = vec![rule(&[masked(2, number(PROT_EXEC), 0)?])?];
    // musl adds a flag that no kernel looks at.
    let thread = masked(0, !number(CLONE_DETACHED), number(THREAD))?;
    let own_limits = [masked(0, u64::MAX, 0)?, masked(2, u64::MAX, 0)?];
    let commands: Vec<u64> = FCNTL.iter().copied().map(number).collect();
    let mut requests = vec![FIONBIO, FIOCLEX];
    requests.extend(profile.ioctls.iter().map(|request| u64::from(*request)));
    let mut options = Vec::new();
    for option in SOCKET_OPTIONS {
        options.push(rule(&[
            is(1, number(SOL_SOCKET))?,
            is(2, number(*option))?,
        ])?);
    }
    let mut ring_operations = Vec::new();
    let more = profile.registrations.iter().copied().map(u64::from);
    for operation in RING_REGISTER.iter().copied().chain(more) {
        let registered = operation | REGISTERED_RING;
        ring_operations.extend(any_of(1, &[operation, registered])?);
    }
    Ok(BTreeMap::from([
        (SYS_mmap, not_executable.clone()),
        (SYS_mprotect, not_executable),
        (SYS_clone, vec![rule(&[thread])?]),
        // The second, for a thread that narrows itself, takes away what is gone already.
        (
            SYS_prctl,
            any_of(0, &[number(PR_SET_NAME), number(PR_SET_NO_NEW_PRIVS)])?,
        ),
        (SYS_ioctl, any_of(1, &requests)?),
        (SYS_fcntl, any_of(1, &commands)?),
        (SYS_getsockopt, any_of(1, &[number(SOL_SOCKET)])?),
        (SYS_setsockopt, options),
        // No address: data goes to the peer that is there.
        (SYS_sendto, vec![rule(&[masked(4, u64::MAX, 0)?])?]),
        // `abort` signals its own thread.
        (SYS_tgkill, any_of(0, &[std::process::id().into()])?),
        // Of the calling thread: by number it could be any process of the user.
        (SYS_sched_setaffinity, any_of(0, &[0])?),
        (SYS_prlimit64, vec![rule(&own_limits)?]),
        (SYS_io_uring_register, ring_operations),
    ]))
}

/// `socket` for unix streams; the kernel ignores no bit of the type.
fn unix_stream() -> Result<SeccompRule, BackendError> {
    let flags = number(SOCK_NONBLOCK | SOCK_CLOEXEC);
    rule(&[
        is(0, number(AF_UNIX))?,
        SeccompCondition::new(1, Len::Dword, Op::MaskedEq(!flags), number(SOCK_STREAM))?,
    ])
}

/// A C `int` as the 32 bits that the kernel compares.
fn number(value: c_int) -> u64 {
    value.cast_unsigned().into()
}

fn is(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Len::Dword, Op::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Len::Qword, Op::MaskedEq(mask), value)
}

fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.to_vec())
}

fn any_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    values
        .iter()
        .map(|value| rule(&[is(argument, *value)?]))
        .collect()
}

#[cfg(test)]
mod tests;
