//! How `pericarp-fs` gives up what it does not need, once all is open and bound
//! and before there is a second thread. `main` calls it unless `--no-confine`
//! was given.

use std::os::fd::OwnedFd;

use pericarp_confine::{Namespaces, Profile, Sharing, SocketFile, Tree};
use pericarp_control::Failure;
use pericarp_vhost::causes;
use pericarp_vhost::program::log_confinement;

/// Confines the process to these directories, whose descriptors are others
/// afterwards. `sockets` are removed at the end, `descriptors` is an open
/// `/proc/self/fd`, `handles` says whether file handles are wanted, and `keeps` whether
/// requests in flight are kept for a successor.
pub(crate) fn confine(
    sockets: &mut [SocketFile],
    trees: &mut [Tree],
    descriptors: &mut OwnedFd,
    handles: bool,
    keeps: bool,
) -> Result<(), Failure> {
    let profile = Profile {
        // Of the records of requests in flight: their memory and its lock. Where
        // more of a state is written than has room, fallocate makes some, which
        // every sidecar may.
        syscalls: match keeps {
            true => &[libc::SYS_memfd_create, libc::SYS_ftruncate, libc::SYS_flock],
            false => &[],
        },
        ioctls: &[],
        registrations: &[],
        namespaces: Namespaces::ALL,
    };
    let sharing = Sharing {
        descriptors,
        capabilities: Sharing::CAPABILITIES,
        handles,
    };
    let confinement = pericarp_confine::enter_sharing(&profile, sockets, trees, sharing)
        .map_err(|e| Failure::run_time(format_args!("cannot confine itself: {}", causes(&e))))?;
    log_confinement(&confinement, confinement.is_complete());
    Ok(())
}
