//! How `pericarp-fs` gives up what it does not need, once all is open and bound
//! and before there is a second thread. `main` calls it unless `--no-confine`
//! was given.

use std::os::fd::BorrowedFd;

use pericarp_confine::SocketFile;
use pericarp_control::Failure;

use crate::prepare::Tree;

/// Confines the process to these directories. `sockets` are removed at the end,
/// `descriptors` is an open `/proc/self/fd`.
pub(crate) fn confine(
    _sockets: &mut [SocketFile],
    _trees: &[Tree],
    _descriptors: BorrowedFd<'_>,
) -> Result<(), Failure> {
    Err(Failure::run_time(
        "confinement is not available in this build: give --no-confine to serve without",
    ))
}
