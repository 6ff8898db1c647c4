//! Both halves of a hand-over as a program's `main` sees them: taking over from a
//! running program, and being taken over from. What is said is in `handover`.
//!
//! What a program serves is named by what the kernel names it by, before the
//! program confines itself, in the old process and in the new one; the two are
//! compared.

use std::fmt::Display;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use pericarp_control::Failure;
use pericarp_control::command_line::SocketOption;

use crate::causes;
use crate::handover::{Estate, Giver, HandOverError, Identity, Inheritance, Meeting, Predecessor};
use crate::records::InflightFile;
use pericarp_control::Stop;

/// A file as the kernel names it: device, inode, and the device that it is.
pub fn named(found: &Metadata) -> String {
    format!("{:x}:{:x}:{:x}", found.dev(), found.ino(), found.rdev())
}

/// The same of a path.
///
/// # Errors
/// The path, and the kernel's answer where it is not there.
pub fn named_at(path: &Path) -> Result<String, (String, io::Error)> {
    let found = std::fs::metadata(path).map_err(|e| (path.display().to_string(), e))?;
    Ok(named(&found))
}

/// The same of a front end's socket.
///
/// # Errors
/// As [`named_at`].
pub fn named_socket(socket: &SocketOption) -> Result<String, (String, io::Error)> {
    match socket {
        SocketOption::Path(path) => named_at(path),
        SocketOption::Descriptor(_) => Ok("passed".to_owned()),
    }
}

/// True when both paths name one file.
///
/// # Errors
/// The kernel's answer where one of them is not there.
pub fn same_file(one: &Path, other: &Path) -> io::Result<bool> {
    Ok(named(&std::fs::metadata(one)?) == named(&std::fs::metadata(other)?))
}

/// The control socket to take over from is the one to take over.
///
/// # Errors
/// The operator's mistake.
pub fn check_take_over(running: &Path, control: Option<&Path>) -> Result<(), Failure> {
    match same_file(running, control.unwrap_or(running)) {
        Ok(true) => Ok(()),
        Ok(false) => Err(mistake(
            running,
            "it is not the socket of --control-path: give the same, which is taken over, too",
        )),
        Err(e) => Err(mistake(
            running,
            format_args!("{e}: give the control socket of a running program to both"),
        )),
    }
}

fn mistake(running: &Path, rule: impl Display) -> Failure {
    Failure::mistake("--take-over", running.display(), rule)
}

/// Why a program could not be taken over from.
pub(super) fn take_over_failure(running: &Path, error: &HandOverError) -> Failure {
    match error {
        HandOverError::Connect(_) | HandOverError::Differs(_) => mistake(running, error),
        other => Failure::run_time(format_args!(
            "--take-over {}: {}",
            running.display(),
            causes(other)
        )),
    }
}

/// Asks the running program, which serves on meanwhile. `offer` is what this one
/// is to serve.
///
/// # Errors
/// The operator's mistake, or the other program's answer.
pub fn ask(
    running: &Path,
    offer: Result<Identity, (String, io::Error)>,
    stop: &Stop,
) -> Result<(Predecessor, Inheritance), Failure> {
    let offer = offer.map_err(|(what, e)| {
        let rule = format!("{what}: {e}: give the options of the running program");
        mistake(running, rule)
    })?;
    Predecessor::ask(running, offer, stop).map_err(|e| take_over_failure(running, &e))
}

/// Hands this program over to one that asks on its control socket, together with
/// its files for requests in flight and for what guests know.
///
/// # Errors
/// The kernel's refusals.
pub fn giver(
    identity: Result<Identity, (String, io::Error)>,
    (endpoints, control): (Vec<OwnedFd>, &UnixListener),
    (records, state): (Option<&InflightFile>, Option<&File>),
    meeting: &Meeting,
    stop: &Stop,
) -> Result<Giver, Failure> {
    let failed = |e: io::Error| Failure::run_time(format_args!("descriptors: {e}"));
    let identity = identity.map_err(|(what, e)| Failure::run_time(format_args!("{what}: {e}")))?;
    let estate = Estate {
        identity,
        endpoints,
        control: control.as_fd().try_clone_to_owned().map_err(failed)?,
        records: records
            .map(InflightFile::estate)
            .transpose()
            .map_err(failed)?,
        state: state
            .map(|file| file.as_fd().try_clone_to_owned())
            .transpose()
            .map_err(failed)?,
    };
    Ok(Giver::new(estate, meeting, stop))
}
