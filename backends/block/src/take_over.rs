//! Both halves of a hand-over as `main` sees them: taking over from a running
//! program, and being taken over from. What is said is in `pericarp-vhost`.

use std::fmt::Display;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use pericarp_block::{BlockDevice, Options, identity, same_file};
use pericarp_control::Failure;
use pericarp_vhost::{
    Estate, Giver, HandOverError, InflightFile, Inheritance, Meeting, Predecessor, Stop, causes,
};

/// The control socket to take over from is the one to take over.
pub(crate) fn check(running: &Path, control: Option<&Path>) -> Result<(), Failure> {
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

pub(crate) fn failure(running: &Path, error: &HandOverError) -> Failure {
    match error {
        HandOverError::Connect(_) | HandOverError::Differs(_) => mistake(running, error),
        other => Failure::run_time(format_args!(
            "--take-over {}: {}",
            running.display(),
            causes(other)
        )),
    }
}

/// Asks the running program, which serves on meanwhile.
pub(crate) fn ask(
    options: &Options,
    devices: &[Arc<BlockDevice>],
    stop: &Stop,
) -> Result<Option<(Predecessor, Inheritance)>, Failure> {
    let Some(running) = &options.take_over else {
        return Ok(None);
    };
    let offer = identity(options, devices.iter().map(|d| &**d)).map_err(|(what, e)| {
        let rule = format!("{what}: {e}: give the options of the running program");
        mistake(running, rule)
    })?;
    Predecessor::ask(running, offer, stop)
        .map(Some)
        .map_err(|e| failure(running, &e))
}

/// What a process that takes over from this one gets.
pub(crate) fn giver(
    options: &Options,
    devices: &[Arc<BlockDevice>],
    (endpoints, control): (Vec<OwnedFd>, &UnixListener),
    records: Option<&InflightFile>,
    meeting: &Meeting,
    stop: &Stop,
) -> Result<Giver, Failure> {
    let failed = |e: std::io::Error| Failure::run_time(format_args!("descriptors: {e}"));
    let identity = identity(options, devices.iter().map(|d| &**d))
        .map_err(|(what, e)| Failure::run_time(format_args!("{what}: {e}")))?;
    let estate = Estate {
        identity,
        endpoints,
        control: control.as_fd().try_clone_to_owned().map_err(failed)?,
        records: records
            .map(InflightFile::estate)
            .transpose()
            .map_err(failed)?,
    };
    Ok(Giver::new(estate, meeting, stop))
}
