//! What the programs around our devices have in common: the options they share
//! ([`ProcessDraft`], [`DeviceDraft`]), the checks before anything is changed,
//! sockets, and the end.
//!
//! Called by the `main` and the `options` of each sidecar. It knows sessions,
//! pools and limits, and nothing of a device or of confinement.

mod draft;
mod life;
mod process;
mod take_over;

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{Level, log, warn};
use pericarp_control::command_line::SocketOption;
use pericarp_control::{Failure, Operations};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::device::Device;
use crate::limiter::Limits;
use crate::oversight::{Oversight, metrics_of, with_operations};
use crate::server::{Endpoint, Fleet};
pub use draft::{DeviceDraft, Keys, MAX_QUEUES, Served, check_apart};
pub use life::Ready;
use pericarp_control::Ending;
pub use process::{MAX_WORKERS, Process, ProcessDraft};
use take_over::take_over_failure;
pub use take_over::{ask, check_take_over, giver, named, named_at, named_socket, same_file};

/// How long requests in flight may take to end after SIGTERM.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// Descriptors of each queue in a worker's table: kick, call, error, fence.
const PER_QUEUE: u32 = 4;

/// Whether all sockets that are to be bound can be, without a change.
///
/// # Errors
/// The first that cannot.
pub fn check_sockets<'a>(
    sockets: impl IntoIterator<Item = &'a SocketOption>,
    control: Option<&Path>,
) -> Result<(), Failure> {
    for socket in sockets {
        if let SocketOption::Path(path) = socket {
            Endpoint::check(path).map_err(|e| socket_mistake(socket, e))?;
        }
    }
    if let Some(path) = control {
        Endpoint::check(path).map_err(|e| control_mistake(path, e))?;
    }
    Ok(())
}

/// What is wrong with a front end's socket.
pub fn socket_mistake(socket: &SocketOption, rule: impl Display) -> Failure {
    match socket {
        SocketOption::Path(path) => Failure::mistake("--socket-path", path.display(), rule),
        SocketOption::Descriptor(number) => Failure::mistake("--fd", number, rule),
    }
}

fn control_mistake(path: &Path, rule: impl Display) -> Failure {
    Failure::mistake("--control-path", path.display(), rule)
}

/// Every CPU a worker is to be pinned to must be one this process may use.
///
/// # Errors
/// The first that is not.
pub fn check_cpus(cpus: &[usize]) -> Result<(), Failure> {
    let mine = rustix::thread::sched_getaffinity(None)
        .map_err(|e| Failure::run_time(format_args!("CPU affinity: {e}")))?;
    match cpus.iter().find(|&&cpu| !mine.is_set(cpu)) {
        None => Ok(()),
        Some(cpu) => {
            let rule = "not a CPU this process may use: leave it out";
            Err(Failure::mistake("--cpus", cpu, rule))
        }
    }
}

/// Takes as many descriptors as the system allows and the program can use; gives
/// how many it may have now. The default limit is 1024.
pub fn raise_descriptor_limit(wanted: u64) -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    let allowed = limit.maximum.unwrap_or(u64::MAX).min(wanted);
    if limit.current.is_some_and(|current| current < allowed) {
        limit.current = Some(allowed);
        if let Err(errno) = setrlimit(Resource::Nofile, limit) {
            warn!("the limit of open descriptors stays as it is: {errno}");
        }
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Sets the limit of descriptors to `wanted`, past the one there is where this
/// user may; gives how many the program may have now.
pub fn set_descriptor_limit(wanted: u64) -> u64 {
    let limit = Rlimit {
        current: Some(wanted),
        maximum: Some(wanted),
    };
    match setrlimit(Resource::Nofile, limit) {
        Ok(()) => wanted,
        Err(_) => raise_descriptor_limit(wanted),
    }
}

/// Descriptors that a worker registers: four for each queue, and the files of
/// all devices. `more` is room for devices that are added, as far as the limit
/// of open files goes, which is that of the table, too.
pub fn table_size(queues: u32, files: u32, more: u32) -> u32 {
    let needed = PER_QUEUE * queues + files;
    let limit = getrlimit(Resource::Nofile).current;
    let limit = u32::try_from(limit.unwrap_or(u64::MAX)).unwrap_or(u32::MAX);
    needed + more.min(limit.saturating_sub(needed) / 2)
}

/// Where front ends of a device come from; `inherited` is the socket of a
/// program that is taken over from.
///
/// # Errors
/// The operator's mistake.
pub fn claim(socket: &SocketOption, inherited: Option<OwnedFd>) -> Result<Endpoint, Failure> {
    match (socket, inherited) {
        (SocketOption::Path(path), None) => Endpoint::bind(path),
        (SocketOption::Descriptor(number), None) => Endpoint::from_number(*number),
        (SocketOption::Path(path), Some(socket)) => Endpoint::inherited(socket, Some(path)),
        (SocketOption::Descriptor(_), Some(socket)) => Endpoint::inherited(socket, None),
    }
    .map_err(|e| socket_mistake(socket, e))
}

/// Binds the control socket, or takes it from a program that is taken over from.
///
/// # Errors
/// The operator's mistake.
pub fn bind_control(path: &Path, inherited: Option<OwnedFd>) -> Result<UnixListener, Failure> {
    let endpoint = match inherited {
        None => Endpoint::bind_private(path),
        Some(socket) => Endpoint::inherited(socket, Some(path)),
    };
    listener(endpoint.map_err(|e| control_mistake(path, e))?)
}

/// The socket that was bound.
///
/// # Errors
/// When it is one that was passed connected.
pub fn listener(endpoint: Endpoint) -> Result<UnixListener, Failure> {
    match endpoint {
        Endpoint::Bound(listener, _) | Endpoint::Listening(listener) => Ok(listener),
        Endpoint::Connected(_) => Err(Failure::run_time("a bound socket is connected")),
    }
}

/// What is counted and limited, in each direction; `None` where nobody asks for
/// either.
pub fn oversee<D: Device>(
    limits: &[Limits],
    device: &D,
    control: Option<&Path>,
) -> Option<Arc<Oversight>> {
    let oversight = Oversight::with_lanes(D::LIMITS, limits);
    if control.is_some() {
        Some(Arc::new(oversight.counting(device)))
    } else {
        let limited = limits.iter().any(|limits| *limits != Limits::default());
        limited.then(|| Arc::new(oversight))
    }
}

/// What every program's control socket offers: `version`, `metrics`, `stats` and
/// `limits`. `wake` makes the workers look at changed limits.
pub fn operations<D: Device>(
    program: &str,
    version: &str,
    devices: &Fleet<D>,
    wake: impl Fn() + Send + 'static,
) -> Operations {
    let (measured, overseen) = (devices.clone(), devices.clone());
    let metrics = move || metrics_of(&measured.overseen());
    let table = Operations::new(program, version, metrics);
    with_operations(table, move || overseen.overseen(), wake)
}

/// Logs what confinement is in force. What the kernel or the system's policy
/// withholds must be seen.
pub fn log_confinement(confinement: impl Display, is_complete: bool) {
    let level = if is_complete {
        Level::Info
    } else {
        Level::Warn
    };
    log!(level, "{confinement}");
}

/// Waits for sessions and control to end, once they are told to.
///
/// # Errors
/// When they do not, or a worker failed.
fn drain(ending: Ending, threads: &[JoinHandle<()>]) -> Result<(), Failure> {
    if ending == Ending::Failed {
        // The sessions may wait for a worker that is gone: nothing to drain.
        return Err(Failure::run_time("a worker failed; see above"));
    }
    // A front end can hold up its session for ever, with memory on a file
    // system of its own for one: what is not drained by now will not be.
    let end = Instant::now() + DRAIN_LIMIT;
    while !threads.iter().all(JoinHandle::is_finished) {
        if Instant::now() > end {
            let line = format!("requests were still in flight after {DRAIN_LIMIT:?}");
            return Err(Failure::run_time(line));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
