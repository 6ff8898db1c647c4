//! How a ring is made: the best one this kernel has, disabled, and restricted
//! to the operations below on registered files. Code that takes over the
//! process cannot use it to open, connect or execute anything. Called by
//! `ring` alone.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};

use crate::{EngineError, EngineOptions};

/// Register operations a started ring may still use: registering its own
/// descriptor, updating the file table when front ends come and go, and saying
/// where the kernel's threads run.
const REGISTER_OPS: [u8; 4] = [
    6,  // IORING_REGISTER_FILES_UPDATE
    17, // IORING_REGISTER_IOWQ_AFF
    20, // IORING_REGISTER_RING_FDS
    21, // IORING_UNREGISTER_RING_FDS
];

/// The limit of the kernel's threads, where a file may come that needs more.
const REGISTER_IOWQ_MAX_WORKERS: u8 = 19;

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

/// Those a ring for polled I/O may submit.
const TRANSFERS: [u8; 4] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Write::CODE,
];

/// With registered memory: IORING_REGISTER_BUFFERS_UPDATE, and transfers.
const UPDATE_BUFFERS: u8 = 16;
const FIXED: [u8; 2] = [opcode::ReadFixed::CODE, opcode::WriteFixed::CODE];

/// Leaves a disabled ring nothing but what an engine of these options does;
/// `buffers` where it has a table of registered memory.
pub(crate) fn restrict(ring: &IoUring, options: &EngineOptions, buffers: bool) -> io::Result<()> {
    let commands = options.commands.then_some(opcode::UringCmd16::CODE);
    let late = options.threads.map(|_| REGISTER_IOWQ_MAX_WORKERS);
    let flags = squeue::Flags::SKIP_SUCCESS | squeue::Flags::ASYNC;
    let operations = OPERATIONS.into_iter().chain(commands);
    allow(ring, operations, late, flags, buffers, !options.descriptors)
}

/// Leaves a disabled ring for polled I/O nothing but transfers.
pub(crate) fn restrict_polled(ring: &IoUring, buffers: bool) -> io::Result<()> {
    allow(ring, TRANSFERS, None, squeue::Flags::empty(), buffers, true)
}

/// Leaves a disabled ring these operations, on registered files alone where
/// `registered`, and what it takes to register those, and memory if it has a
/// table of it.
fn allow(
    ring: &IoUring,
    operations: impl IntoIterator<Item = u8>,
    late: Option<u8>,
    flags: squeue::Flags,
    buffers: bool,
    registered: bool,
) -> io::Result<()> {
    let fixed_memory = buffers.then_some(FIXED).into_iter().flatten();
    let updates = buffers.then_some(UPDATE_BUFFERS);
    let operations = operations.into_iter().chain(fixed_memory);
    let registers = REGISTER_OPS.into_iter().chain(updates).chain(late);
    let fixed = squeue::Flags::FIXED_FILE;
    let mut restrictions: Vec<Restriction> = operations
        .map(Restriction::sqe_op)
        .chain(registers.map(Restriction::register_op))
        .collect();
    restrictions.push(Restriction::sqe_flags_allowed((fixed | flags).bits()));
    if registered {
        restrictions.push(Restriction::sqe_flags_required(fixed.bits()));
    }
    ring.submitter().register_restrictions(&mut restrictions)
}

/// Builds the best ring this kernel has: each attempt asks for less.
pub(crate) fn build(depth: u32) -> Result<(IoUring, &'static str), EngineError> {
    build_with(depth, |_| {})
}

/// The same for polled I/O.
pub(crate) fn build_polled(depth: u32) -> Result<IoUring, EngineError> {
    let (ring, _) = build_with(depth, |builder| {
        builder.setup_iopoll();
    })?;
    Ok(ring)
}

fn build_with(
    depth: u32,
    also: impl Fn(&mut io_uring::Builder),
) -> Result<(IoUring, &'static str), EngineError> {
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
        also(&mut builder);
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

#[cfg(test)]
#[expect(unsafe_code)]
mod tests {
    // UNSAFETY: entries are pushed by hand; they name statics only.
    use io_uring::types;
    use libc::iovec;

    use super::*;
    use crate::EngineKind;

    /// What a ring that is restricted says to a read of registered memory, and
    /// to a change of its table.
    fn fixed(buffers: bool) -> (i32, io::Result<()>) {
        let (mut ring, _) = build(4).unwrap();
        let submitter = ring.submitter();
        submitter.register_files_sparse(1).unwrap();
        submitter.register_buffers_sparse(1).unwrap();
        let options = EngineOptions {
            kind: EngineKind::Uring,
            depth: 4,
            files: 1,
            commands: false,
            buffers: 1,
            threads: None,
            polled: false,
            descriptors: false,
        };
        restrict(&ring, &options, buffers).unwrap();
        ring.submitter().register_enable_rings().unwrap();
        let entry = opcode::ReadFixed::new(types::Fixed(0), std::ptr::null_mut(), 0, 0)
            .build()
            .flags(squeue::Flags::FIXED_FILE);
        // SAFETY: nothing is read: there is no file in that place.
        unsafe { ring.submission().push(&entry).unwrap() };
        ring.submit_and_wait(1).unwrap();
        let result = ring.completion().next().unwrap().result();
        let nothing = iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        // SAFETY: an empty slot refers to no memory.
        let update = unsafe {
            let submitter = ring.submitter();
            submitter.register_buffers_update(0, &[nothing], None)
        };
        (result, update)
    }

    #[test]
    fn registered_memory_is_out_of_reach_where_nobody_asked_for_it() {
        let (read, update) = fixed(false);
        assert_eq!(read, -libc::EACCES);
        assert_eq!(update.unwrap_err().raw_os_error(), Some(libc::EACCES));
        let (read, update) = fixed(true);
        assert!(![-libc::EACCES, -libc::EINVAL].contains(&read), "{read}");
        update.unwrap();
    }

    #[test]
    fn a_ring_for_polled_transfers_does_nothing_else() {
        let mut ring = build_polled(4).unwrap();
        ring.submitter().register_files_sparse(1).unwrap();
        restrict_polled(&ring, false).unwrap();
        ring.submitter().register_enable_rings().unwrap();
        let file = types::Fixed(0);
        let mut result = |entry: squeue::Entry| {
            let entry = entry.flags(squeue::Flags::FIXED_FILE);
            // SAFETY: nothing is read: there is no file in that place.
            unsafe { ring.submission().push(&entry).unwrap() };
            while ring.completion().is_empty() {
                ring.submit().unwrap();
            }
            ring.completion().next().unwrap().result()
        };
        let read = opcode::Read::new(file, std::ptr::null_mut(), 0).build();
        assert_eq!(result(read), -libc::EBADF);
        let poll = opcode::PollAdd::new(file, 1).build();
        let fixed = opcode::ReadFixed::new(file, std::ptr::null_mut(), 0, 0).build();
        for other in [opcode::Fsync::new(file).build(), poll, fixed] {
            assert_eq!(result(other), -libc::EACCES);
        }
    }
}
