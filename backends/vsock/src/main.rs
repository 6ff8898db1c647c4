//! The `pericarp-vsock` program: streams between a guest and host programs.
//!
//! Order matters. Everything an operator may have got wrong is checked before
//! anything changes; then sockets are bound; then the process gives up every
//! right it does not need; only then does it start threads and read the first
//! byte from a front end, a guest or a host program.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use log::{info, warn};
use pericarp_confine::{Namespaces, Profile, SocketFile};
use pericarp_control::{Failure, exit_code, print};
use pericarp_vhost::program::{check_sockets, listener, raise_descriptor_limit, socket_mistake};
use pericarp_vhost::{Ending, Endpoint, EndpointError, Stop, causes};
use pericarp_vsock::{
    Command, Engine, HELP, MAX_CONNECTIONS, Options, SocketOption, parse, start_logging,
};

const PROGRAM: &str = "pericarp-vsock";

/// Descriptors for everything but connections.
const OTHER_DESCRIPTORS: usize = 64;

fn main() -> ExitCode {
    let done = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print(HELP),
        Ok(Command::Version) => print(&format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Capabilities) => print("{\n  \"type\": \"vsock\",\n  \"features\": []\n}\n"),
        Ok(Command::Serve(options)) => serve(&options),
        Err(mistake) => Err(Failure::input(mistake)),
    };
    exit_code(PROGRAM, done)
}

fn serve(options: &Options) -> Result<(), Failure> {
    start_logging(PROGRAM, options.log_level);
    // All that can be wrong with the input, before anything is changed.
    options.check_apart().map_err(Failure::input)?;
    let uds = options.uds_path.as_path();
    let wrong_uds = |e: EndpointError| Failure::mistake("--uds-path", uds.display(), e);
    Endpoint::check(uds).map_err(wrong_uds)?;
    check_sockets([&options.socket], None)?;
    let front = match &options.socket {
        SocketOption::Path(_) => None,
        SocketOption::Descriptor(number) => Some(passed(*number)?),
    };

    let stop = Stop::new().map_err(|e| Failure::run_time(format_args!("signals: {e}")))?;
    let mut sockets = Vec::new();
    let result = bind_and_run(options, front, &stop, &mut sockets);
    for socket in sockets {
        if let Err(e) = socket.remove() {
            warn!("cannot remove a socket: {e}");
        }
    }
    result
}

/// The listening socket with this number.
fn passed(number: i32) -> Result<UnixListener, Failure> {
    match Endpoint::from_number(number) {
        Ok(Endpoint::Listening(listener) | Endpoint::Bound(listener, _)) => Ok(listener),
        Ok(Endpoint::Connected(_)) | Err(EndpointError::BadDescriptor) => {
            let rule = "it is not a listening unix stream socket: pass a listening socket";
            Err(Failure::mistake("--fd", number, rule))
        }
        Err(other) => Err(socket_mistake(&SocketOption::Descriptor(number), other)),
    }
}

/// Listens at `path`, to be removed at the end.
fn bind(
    option: &str,
    path: &Path,
    neighbours: bool,
    sockets: &mut Vec<SocketFile>,
) -> Result<UnixListener, Failure> {
    let bound = Endpoint::bind(path).map_err(|e| Failure::mistake(option, path.display(), e))?;
    let file = SocketFile::of_own(path)
        .map_err(|e| Failure::run_time(format_args!("{}: {e}", path.display())))?;
    sockets.push(if neighbours {
        file.with_neighbours()
    } else {
        file
    });
    listener(bound)
}

/// The connections that fit the limit of open files, which is raised for them.
fn connections() -> usize {
    let wanted = (MAX_CONNECTIONS + OTHER_DESCRIPTORS) as u64;
    let current = raise_descriptor_limit(wanted);
    (current.min(wanted) as usize).saturating_sub(OTHER_DESCRIPTORS)
}

fn bind_and_run(
    options: &Options,
    front: Option<UnixListener>,
    stop: &Stop,
    sockets: &mut Vec<SocketFile>,
) -> Result<(), Failure> {
    let host = bind("--uds-path", &options.uds_path, true, sockets)?;
    let front = match (front, &options.socket) {
        (Some(listener), _) => listener,
        (None, SocketOption::Path(path)) => bind("--socket-path", path, false, sockets)?,
        (None, SocketOption::Descriptor(number)) => passed(*number)?,
    };
    let prefix = format!("{}_", options.uds_name);
    let engine = Engine::new(options.guest_cid, host, prefix, connections())
        .map_err(|e| Failure::run_time(format_args!("cannot watch sockets: {e}")))?;
    let engine = Arc::new(Mutex::new(engine));
    if options.confine {
        let profile = Profile {
            // The host programs' sockets are connected to as the guest dials.
            syscalls: &[libc::SYS_socket, libc::SYS_connect],
            ioctls: &[],
            registrations: &[],
            namespaces: Namespaces::ALL,
        };
        let confinement = pericarp_confine::enter(&profile, sockets).map_err(|e| {
            Failure::run_time(format_args!("cannot confine itself: {}", causes(&e)))
        })?;
        info!("{confinement}");
    } else {
        warn!("not confined, as asked");
        // Confinement does this, too: ports are dialled by bare name.
        let parent = options
            .uds_path
            .parent()
            .filter(|p| !p.as_os_str().is_empty());
        std::env::set_current_dir(parent.unwrap_or(Path::new(".")))
            .map_err(|e| Failure::run_time(format_args!("the directory of --uds-path: {e}")))?;
    }

    let failed = stop.clone();
    std::thread::Builder::new()
        .name("front-ends".to_owned())
        .spawn(move || {
            if let Err(e) = pericarp_vsock::serve(front, &engine) {
                log::error!("{}", causes(&e));
            }
            failed.fail();
        })
        .map_err(|e| Failure::run_time(format_args!("threads: {e}")))?;
    // At the end nothing is drained: a stream has no state beyond its sockets,
    // which both sides see closed.
    match stop.wait() {
        Ending::Asked => Ok(()),
        Ending::Failed => Err(Failure::run_time("no session can be served; see above")),
    }
}
