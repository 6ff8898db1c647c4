//! The `pericarp-fs` program: passes host directories to virtual machines.
//!
//! Order matters. Everything an operator may have got wrong is checked before
//! anything changes; then directories are opened, engines made and sockets
//! bound; then the process gives up every right it does not need; only then does
//! it look into the directories, start threads and read the first byte from a
//! front end.

mod confine;
mod elsewhere;
mod prepare;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use log::warn;
use pericarp_confine::{SocketFile, Tree};
use pericarp_control::{Failure, Server as Control, exit_code, print, start_logging};
use pericarp_fs::{Command, FsDevice, HELP, Options, identity, parse};
use pericarp_share::{Share, ShareOptions};
use pericarp_vhost::program::{
    self, Ready, bind_control, check_cpus, check_sockets, check_take_over, claim, operations,
    oversee, table_size,
};
use pericarp_vhost::{
    CrashSafety, Endpoint, Fleet, Meeting, Pool, PoolOptions, Reopener, Server, Stop, causes,
};
use prepare::{Kept, descriptor_limit, make_device, open_kept, open_trees};

const PROGRAM: &str = "pericarp-fs";

/// Operations a worker submits at once; more wait for the next turn.
const RING_DEPTH: u32 = 256;

/// Threads the kernel may use for one worker where a file system makes it wait
/// for every read: so many reads go on at a time. Another file system may be
/// mounted in the directory at any time, so they may always be used.
const MAX_THREADS: u32 = 64;

fn main() -> ExitCode {
    let done = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print(HELP),
        Ok(Command::Version) => print(&format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION"))),
        // QEMU's vhost-user.json has no feature for file systems.
        Ok(Command::Capabilities) => print("{\n  \"type\": \"fs\",\n  \"features\": []\n}\n"),
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
    let trees = open_trees(options, descriptor_limit(options.descriptors)?)?;
    let kept = match &options.take_over {
        None => open_kept(options, None)?,
        // It comes from the running program.
        Some(_) => Kept::default(),
    };

    let stop = Stop::new().map_err(|e| Failure::run_time(format_args!("signals: {e}")))?;
    // The high priority queue of each device comes before its request queues.
    let queues = options.devices.iter().map(|d| u32::from(d.queues) + 1);
    let pool = Pool::new(&PoolOptions {
        workers: process.workers,
        engine: process.engine,
        depth: RING_DEPTH,
        files: table_size(queues.sum(), 0, 0),
        poll_limit: process.poll_limit,
        commands: false,
        register_memory: false,
        threads: Some(MAX_THREADS),
        polled: false,
        descriptors: true,
        cpus: process.cpus.clone(),
    })
    .map_err(|e| Failure::run_time(causes(&e)))?;

    let mut sockets = Vec::new();
    let mut ours = options.take_over.is_none();
    let result = bind_and_run(options, trees, kept, pool, &stop, (&mut sockets, &mut ours));
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
    (mut trees, shares): (Vec<Tree>, Vec<ShareOptions>),
    mut kept: Kept,
    pool: Pool<FsDevice>,
    stop: &Stop,
    (sockets, ours): (&mut Vec<SocketFile>, &mut bool),
) -> Result<(), Failure> {
    let process = &options.process;
    let (predecessor, mut inherited, inherited_control) = match &options.take_over {
        None => (None, Vec::new().into_iter(), None),
        Some(running) => {
            let (predecessor, inheritance) = program::ask(running, identity(options), stop)?;
            let files = (inheritance.records, inheritance.state);
            kept = open_kept(options, Some(files))?;
            let endpoints = inheritance.endpoints.into_iter();
            (Some(predecessor), endpoints, Some(inheritance.control))
        }
    };
    let mut endpoints = Vec::new();
    for device in &options.devices {
        let endpoint = claim(&device.socket, inherited.next())?;
        if let Some(path) = endpoint.path() {
            remember(path, predecessor.is_none(), sockets)?;
        }
        endpoints.push(endpoint);
    }
    let failed = |e| Failure::run_time(format_args!("descriptors: {e}"));
    let meeting = Meeting::new(options.devices.len()).map_err(failed)?;
    let fleet = Fleet::new(&pool, &meeting, stop);
    let mut control = None;
    if let Some(path) = &process.control {
        let listener = bind_control(path, inherited_control)?;
        remember(path, predecessor.is_none(), sockets)?;
        let mut table = operations(PROGRAM, env!("CARGO_PKG_VERSION"), &fleet, pool.waker());
        let passed = endpoints.iter().map(Endpoint::descriptor);
        let passed = passed.collect::<Result<_, _>>().map_err(failed)?;
        let passed = (passed, &listener);
        let files = (kept.records.as_ref(), kept.file.as_ref());
        let giver = program::giver(identity(options), passed, files, &meeting, stop)?;
        table = giver.with_operation(table, &["limits"]);
        let server = Control::new(listener, table)
            .map_err(|e| Failure::run_time(format_args!("control socket: {e}")))?;
        control = Some(server);
    }
    let descriptors = Share::own_descriptors();
    let mut descriptors = descriptors.map_err(|e| Failure::run_time(causes(&e)))?;
    // From here on no path leads to what was made.
    kept.keep();
    if process.confine {
        let handles = shares.iter().any(|share| share.file_handles);
        let keeps = options.state_file.is_some();
        confine::confine(sockets, &mut trees, &mut descriptors, handles, keeps)?;
    } else {
        warn!("not confined, as asked");
    }

    let mut reopener = None;
    if options.state_file.is_some() {
        // Front ends may keep requests in flight where there is what these mean.
        let failed = |e| Failure::run_time(format_args!("descriptors: {e}"));
        let through = descriptors.try_clone().map_err(failed)?;
        reopener = Some(Arc::new(Reopener::through(through)));
    }
    let mut states = kept.states.into_iter();
    let mut servers = Vec::new();
    let parts = endpoints.into_iter().zip(&trees).zip(shares);
    for (index, (device, ((endpoint, tree), share))) in
        options.devices.iter().zip(parts).enumerate()
    {
        let fs = Arc::new(make_device(
            device,
            tree,
            &descriptors,
            share,
            states.next(),
            predecessor.is_some(),
        )?);
        let oversight = oversee(&[device.limits], &*fs, process.control.as_deref());
        let mut server = Server::new(endpoint, fs, index as u16, &pool).overseen(oversight);
        server.keep_records(CrashSafety {
            reopener: reopener.clone(),
            file: kept.records.as_ref().and_then(|file| file.device(index)),
        });
        server.hand_over_at(&meeting);
        servers.push((device.id.as_str(), server));
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
