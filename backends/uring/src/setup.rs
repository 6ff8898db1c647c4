//! How a ring is made: the best one this kernel has, disabled, and restricted
//! to the operations below on registered files. Code that takes over the
//! process cannot use it to open, connect or execute anything. Called by
//! `ring` alone.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};

use crate::{EngineError, EngineOptions};

/// Register operations a started ring may still use: registering its own
/// descriptor, and updating the file table when front ends come and go.
const REGISTER_OPS: [u8; 3] = [
    6,  // IORING_REGISTER_FILES_UPDATE
    20, // IORING_REGISTER_RING_FDS
    21, // IORING_UNREGISTER_RING_FDS
];

/// Operations a ring may submit.
const OPERATIONS: [u8; 9] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Timeout::CODE,
];

/// Leaves a disabled ring nothing but what an engine of these options does.
pub(crate) fn restrict(ring: &IoUring, options: &EngineOptions) -> io::Result<()> {
    let commands = options.commands.then_some(opcode::UringCmd16::CODE);
    let mut restrictions: Vec<Restriction> = OPERATIONS
        .into_iter()
        .chain(commands)
        .map(Restriction::sqe_op)
        .chain(REGISTER_OPS.into_iter().map(Restriction::register_op))
        .collect();
    let fixed = squeue::Flags::FIXED_FILE.bits();
    let skip = squeue::Flags::SKIP_SUCCESS.bits();
    let threads = squeue::Flags::ASYNC.bits();
    restrictions.push(Restriction::sqe_flags_allowed(fixed | skip | threads));
    restrictions.push(Restriction::sqe_flags_required(fixed));
    ring.submitter().register_restrictions(&mut restrictions)
}

/// Builds the best ring this kernel has: each attempt asks for less.
pub(crate) fn build(depth: u32) -> Result<(IoUring, &'static str), EngineError> {
    type Configure = fn(&mut io_uring::Builder);
    let attempts: [(&'static str, Configure); 3] = [
        ("single issuer, deferred task work", |b| {
            b.setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        }),
        ("cooperative task work", |b| {
            b.setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        }),
        ("plain", |_| {}),
    ];
    let mut refusal = io::Error::from_raw_os_error(libc::ENOSYS);
    for (mode, configure) in attempts {
        let mut builder = IoUring::builder();
        builder
            .setup_r_disabled()
            .setup_clamp()
            .setup_cqsize(depth.saturating_mul(4));
        configure(&mut builder);
        match builder.build(depth) {
            Ok(ring) => return Ok((ring, mode)),
            Err(error) => refusal = error,
        }
    }
    // Forbidden or unknown, as opposed to short of memory or descriptors.
    match refusal.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL) => {
            Err(EngineError::Unavailable(refusal))
        }
        _ => Err(EngineError::Setup {
            step: "create",
            source: refusal,
        }),
    }
}
