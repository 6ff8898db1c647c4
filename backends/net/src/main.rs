//! The `pericarp-net` program: serves network cards to virtual machines.
//!
//! Order matters. Everything an operator may have got wrong is checked before
//! anything changes; then engines are made and sockets bound; then the process
//! gives up every right it does not need; only then does it start threads and read
//! the first byte from a front end. A process that takes over from a running one gets
//! its sockets where others bind theirs, and taps and sessions once it is ready to serve
//! them.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use log::warn;
use pericarp_confine::{Namespaces, Profile, SocketFile};
use pericarp_control::{Failure, Server as Control, exit_code, print, start_logging};
use pericarp_net::{
    Command, DeviceOptions, HELP, IOCTLS, NetDevice, Options, Source, Tap, TapError, identity,
    parse,
};
use pericarp_vhost::program::{
    self, Ready, bind_control, check_cpus, check_sockets, check_take_over, claim, log_confinement,
    operations, oversee, table_size,
};
use pericarp_vhost::{Fleet, Meeting, Pool, PoolOptions, Server, Stop, causes};

const PROGRAM: &str = "pericarp-net";

/// Operations a worker submits at once: calls of drivers and watches.
const RING_DEPTH: u32 = 64;

fn main() -> ExitCode {
    let done = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print(HELP),
        Ok(Command::Version) => print(&format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Capabilities) => print("{\n  \"type\": \"net\",\n  \"features\": []\n}\n"),
        Ok(Command::Serve(options)) => serve(&options),
        Err(mistake) => Err(Failure::input(mistake)),
    };
    exit_code(PROGRAM, done)
}

fn serve(options: &Options) -> Result<(), Failure> {
    let process = &options.process;
    start_logging(PROGRAM, process.log_level);
    // All that can be wrong with the input, before anything is changed.
    match &options.take_over {
        Some(running) => check_take_over(running, process.control.as_deref())?,
        None => {
            let sockets = options.devices.iter().map(|device| &device.socket);
            check_sockets(sockets, process.control.as_deref())?;
        }
    }
    check_cpus(&process.cpus)?;
    let taken = options.take_over.is_some();
    let devices = options.devices.iter().map(|device| match taken {
        true => found(device),
        false => open(device),
    });
    let devices: Vec<_> = devices.collect::<Result<_, _>>()?;

    let stop = Stop::new().map_err(|e| Failure::run_time(format_args!("signals: {e}")))?;
    let pairs: usize = options.devices.iter().map(DeviceOptions::pairs).sum();
    let queues = 2 * pairs + options.devices.len();
    let pool = Pool::new(&PoolOptions {
        workers: process.workers,
        engine: process.engine,
        depth: RING_DEPTH,
        files: table_size(queues as u32, pairs as u32, 0),
        poll_limit: process.poll_limit,
        commands: false,
        register_memory: false,
        threads: None,
        polled: false,
        descriptors: false,
        cpus: process.cpus.clone(),
    })
    .map_err(|e| Failure::run_time(causes(&e)))?;
    let mut sockets = Vec::new();
    let mut ours = !taken;
    let result = bind_and_run(options, devices, pool, &stop, (&mut sockets, &mut ours));
    if !ours {
        // Another process listens there.
        return result;
    }
    for socket in sockets {
        if let Err(e) = socket.remove() {
            warn!("cannot remove a socket: {e}");
        }
    }
    result
}

fn mistaken(name: &str) -> impl Fn(TapError) -> Failure {
    move |error| Failure::mistake("--tap", name, causes(&error))
}

/// A device whose tap is open in the running program.
fn found(options: &DeviceOptions) -> Result<Arc<NetDevice>, Failure> {
    if let Source::Named(name, pairs) = &options.source {
        Tap::find(name, *pairs).map_err(mistaken(name))?;
    }
    let pairs = options.pairs() as u16;
    Ok(Arc::new(NetDevice::awaiting(pairs, options.card.clone())))
}

/// Opens the tap of a device.
fn open(options: &DeviceOptions) -> Result<Arc<NetDevice>, Failure> {
    let tap = match &options.source {
        Source::Named(name, pairs) => Tap::open(name, *pairs).map_err(mistaken(name)),
        Source::Open(numbers) => Tap::adopt(numbers).map_err(|e| {
            let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
            Failure::mistake("--tap-fds", numbers.join(","), causes(&e))
        }),
    };
    Ok(Arc::new(NetDevice::new(tap?, options.card.clone())))
}

/// Has this socket removed at the end; `own` where no predecessor listens on it, too.
fn remember(path: &Path, own: bool, sockets: &mut Vec<SocketFile>) -> Result<(), Failure> {
    let file = match own {
        true => SocketFile::of_own(path),
        false => SocketFile::open(path),
    };
    let file = file.map_err(|e| Failure::run_time(format_args!("{}: {e}", path.display())))?;
    sockets.push(file);
    Ok(())
}

fn bind_and_run(
    options: &Options,
    devices: Vec<Arc<NetDevice>>,
    pool: Pool<NetDevice>,
    stop: &Stop,
    (sockets, ours): (&mut Vec<SocketFile>, &mut bool),
) -> Result<(), Failure> {
    let process = &options.process;
    let (predecessor, mut inherited, inherited_control) = match &options.take_over {
        None => (None, Vec::new().into_iter(), None),
        Some(running) => {
            let (predecessor, inheritance) = program::ask(running, identity(options), stop)?;
            let endpoints = inheritance.endpoints.into_iter();
            (Some(predecessor), endpoints, Some(inheritance.control))
        }
    };
    let failed = |e| Failure::run_time(format_args!("descriptors: {e}"));
    let meeting = Meeting::new(options.devices.len()).map_err(failed)?;
    let (mut servers, mut endpoints) = (Vec::new(), Vec::new());
    for (index, (options, device)) in options.devices.iter().zip(devices).enumerate() {
        let endpoint = claim(&options.socket, inherited.next())?;
        if let Some(path) = endpoint.path() {
            remember(path, predecessor.is_none(), sockets)?;
        }
        endpoints.push(endpoint.descriptor().map_err(failed)?);
        let oversight = oversee(&options.limits, &*device, process.control.as_deref());
        let mut server = Server::new(endpoint, device, index as u16, &pool).overseen(oversight);
        server.hand_over_at(&meeting);
        servers.push((options.id.as_str(), server));
    }
    let fleet = Fleet::new(&pool, &meeting, stop);
    let mut control = None;
    if let Some(path) = &process.control {
        let listener = bind_control(path, inherited_control)?;
        remember(path, predecessor.is_none(), sockets)?;
        let table = operations(PROGRAM, env!("CARGO_PKG_VERSION"), &fleet, pool.waker());
        let passed = (endpoints, &listener);
        let giver = program::giver(identity(options), passed, (None, None), &meeting, stop)?;
        let table = giver.with_operation(table, &["limits"]);
        let server = Control::new(listener, table)
            .map_err(|e| Failure::run_time(format_args!("control socket: {e}")))?;
        control = Some(server);
    }
    if process.confine {
        let profile = Profile {
            syscalls: &[],
            ioctls: &IOCTLS,
            registrations: &[],
            namespaces: Namespaces::ALL,
        };
        let confinement = pericarp_confine::enter(&profile, sockets).map_err(|e| {
            Failure::run_time(format_args!("cannot confine itself: {}", causes(&e)))
        })?;
        log_confinement(&confinement, confinement.is_complete());
    } else {
        warn!("not confined, as asked");
    }
    let ready = Ready {
        pool,
        fleet,
        servers,
        control,
        predecessor: predecessor.zip(options.take_over.as_deref()),
        meeting: &meeting,
    };
    ready.serve(stop, ours)
}
