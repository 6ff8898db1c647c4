//! The `pericarp-block` program: serves disks to virtual machines.
//!
//! Order matters. Everything an operator may have got wrong is checked before
//! anything changes; then files are opened, engines made and sockets bound;
//! then the process gives up every right it does not need; only then does it
//! start threads and read the first byte from a front end. A process that takes
//! over from a running one gets its sockets where others bind theirs, and the
//! sessions once it is ready to serve them.

mod ask;
mod prepare;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use pericarp_block::{
    BlockDevice, Command, Disk, HELP, Hotplug, MEASURING, Options, Sockets, identity, operations,
    parse, start_logging,
};
use pericarp_confine::{Measure, Namespaces, Profile, SocketFile};
use pericarp_control::{Failure, Server as Control, exit_code, print};
use pericarp_vhost::program::{
    self, Ready, check_cpus, check_sockets, check_take_over, claim, log_confinement, oversee,
    raise_descriptor_limit,
};
use pericarp_vhost::{
    CrashSafety, Fleet, InflightFile, Meeting, Pool, PoolOptions, Reopener, Server, Stop, causes,
};
use prepare::{make_devices, open_disks, open_records, table_size};

const PROGRAM: &str = "pericarp-block";

/// Operations a worker submits at once; more wait for the next turn.
const RING_DEPTH: u32 = 256;

/// Threads the kernel may use for one worker where a disk's file system makes
/// it wait for every read: so many reads go on at a time.
const MAX_THREADS: u32 = 64;

/// `BLKDISCARD`, for the synchronous engine.
const BLKDISCARD: u32 = 0x1277;

/// Operations of the control socket that change what a new process takes over.
const CHANGING: [&str; 2] = ["limits", "resize"];

/// `IORING_REGISTER_BUFFERS_UPDATE`, for guest memory that is registered.
const REGISTER_BUFFERS_UPDATE: u32 = 16;

fn main() -> ExitCode {
    let done = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print(HELP),
        Ok(Command::Version) => print(&format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Capabilities) => print(concat!(
            "{\n  \"type\": \"block\",\n",
            "  \"features\": [\n    \"read-only\",\n    \"blk-file\"\n  ]\n}\n"
        )),
        Ok(Command::Serve(options)) => serve(&options),
        Ok(Command::Ask { control, change }) => ask::ask(&control, &change),
        Err(mistake) => Err(Failure::input(mistake)),
    };
    exit_code(PROGRAM, done)
}

fn serve(options: &Options) -> Result<(), Failure> {
    start_logging(PROGRAM, options.log_level);
    // All that can be wrong with the input, before anything is changed.
    match &options.take_over {
        Some(running) => check_take_over(running, options.control.as_deref())?,
        None => {
            let sockets = options.devices.iter().map(|device| &device.socket);
            check_sockets(sockets, options.control.as_deref())?;
        }
    }
    check_cpus(&options.cpus)?;
    let disks = open_disks(options)?;
    let commands = disks.iter().any(Disk::discards_by_command);
    let polled = disks.iter().any(Disk::is_polled);
    let waits = disks.iter().any(Disk::needs_threads) || options.control.is_some();
    let threads = waits.then_some(MAX_THREADS);
    let devices = make_devices(options, disks);
    let records = match &options.take_over {
        None => open_records(options, None)?,
        // It comes from the running program.
        Some(_) => None,
    };

    let stop = Stop::new().map_err(|e| Failure::run_time(format_args!("signals: {e}")))?;
    raise_descriptor_limit(u64::MAX);
    let pool = Pool::new(&PoolOptions {
        workers: options.workers,
        engine: options.engine,
        depth: RING_DEPTH,
        files: table_size(options),
        poll_limit: options.poll_limit,
        commands,
        register_memory: options.register_memory,
        threads,
        polled,
        descriptors: false,
        cpus: options.cpus.clone(),
    })
    .map_err(|e| Failure::run_time(causes(&e)))?;

    let sockets = Arc::new(Mutex::new(Sockets::default()));
    let mut ours = options.take_over.is_none();
    let result = bind_and_run(
        options,
        &devices,
        records,
        (pool, commands),
        &stop,
        (&sockets, &mut ours),
    );
    if !ours {
        // Another process listens there.
        return result;
    }
    lock(&sockets).remove();
    result
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Binds the control socket, if there is to be one.
fn bind_control(
    options: &Options,
    inherited: Option<OwnedFd>,
    sockets: &mut Sockets,
) -> Result<Option<UnixListener>, Failure> {
    let Some(path) = &options.control else {
        return Ok(None);
    };
    let own = inherited.is_none();
    let listener = program::bind_control(path, inherited)?;
    let failed = |e| Failure::run_time(format_args!("{}: {e}", path.display()));
    let file = match own {
        true => SocketFile::of_own(path),
        false => SocketFile::open(path),
    };
    sockets.push(None, file.map_err(failed)?);
    Ok(Some(listener))
}

/// What can be asked on the control socket.
fn make_control(
    listener: UnixListener,
    pool: &Pool<BlockDevice>,
    hotplug: Hotplug,
) -> Result<Control, Failure> {
    let giver = hotplug.giver.clone();
    let operations = operations(PROGRAM, &hotplug.fleet, pool.waker());
    let operations = hotplug.with_operations(operations);
    Control::new(listener, giver.with_operation(operations, &CHANGING))
        .map_err(|e| Failure::run_time(format_args!("control socket: {e}")))
}

fn bind_and_run(
    options: &Options,
    devices: &[Arc<BlockDevice>],
    mut records: Option<InflightFile>,
    (pool, commands): (Pool<BlockDevice>, bool),
    stop: &Stop,
    (sockets, ours): (&Arc<Mutex<Sockets>>, &mut bool),
) -> Result<(), Failure> {
    let mut servers = Vec::new();
    let control = options.control.as_deref();
    let served = || identity(options, devices.iter().map(|d| &**d));
    let (predecessor, mut inherited, inherited_control) = match &options.take_over {
        None => (None, Vec::new().into_iter(), None),
        Some(running) => {
            let (predecessor, inheritance) = program::ask(running, served(), stop)?;
            records = open_records(options, inheritance.records)?;
            let endpoints = inheritance.endpoints.into_iter();
            (Some(predecessor), endpoints, Some(inheritance.control))
        }
    };
    let mut endpoints = Vec::new();
    for (index, (device, block)) in options.devices.iter().zip(devices).enumerate() {
        let endpoint = claim(&device.socket, inherited.next())?;
        if let Some(path) = endpoint.path() {
            let file = match predecessor {
                None => SocketFile::of_own(path),
                // It listens there, too.
                Some(_) => SocketFile::open(path),
            };
            let file =
                file.map_err(|e| Failure::run_time(format_args!("{}: {e}", path.display())))?;
            lock(sockets).push(Some(&device.id), file);
        }
        if options.control.is_some() {
            endpoints.push(endpoint.descriptor().map_err(descriptors_failed)?);
        }
        let server = Server::new(endpoint, Arc::clone(block), index as u16, &pool);
        servers.push(server.overseen(oversee(&[device.limits], &**block, control)));
    }
    let mut reopener = Reopener::new().map_err(|e| e.to_string());
    let meeting = Meeting::new(devices.len()).map_err(descriptors_failed)?;
    let fleet = Fleet::new(&pool, &meeting, stop);
    let listener = bind_control(options, inherited_control, &mut lock(sockets))?;
    let control = match listener {
        None => None,
        Some(listener) => {
            let passed = (endpoints, &listener);
            let giver = program::giver(served(), passed, (records.as_ref(), None), &meeting, stop)?;
            servers.iter_mut().for_each(|s| s.hand_over_at(&meeting));
            let hotplug = Hotplug {
                fleet: fleet.clone(),
                giver,
                sockets: Arc::clone(sockets),
                commands,
                records: records.is_some(),
            };
            Some(make_control(listener, &pool, hotplug)?)
        }
    };
    // From here on no path leads to what was made.
    if let Some(records) = &mut records {
        records.keep();
    }
    if options.confine {
        let mut ioctls = Vec::new();
        if commands {
            ioctls.push(BLKDISCARD);
        }
        if control.is_some() {
            // Of block devices that are added.
            ioctls.extend(MEASURING);
        }
        let profile = Profile {
            // Of the records of requests in flight: their memory and its lock.
            syscalls: &[libc::SYS_memfd_create, libc::SYS_ftruncate, libc::SYS_flock],
            ioctls: &ioctls,
            registrations: if options.register_memory {
                &[REGISTER_BUFFERS_UPDATE]
            } else {
                &[]
            },
            namespaces: Namespaces::ALL,
        };
        let confinement = pericarp_confine::enter_reopening(
            &profile,
            lock(sockets).files(),
            reopener.as_ref().ok().map(|r| r.as_fd()),
        )
        .map_err(|e| Failure::run_time(format_args!("cannot confine itself: {}", causes(&e))))?;
        if !confinement.has(Measure::Landlock) {
            reopener = Err("landlock does not hold".to_owned());
        }
        log_confinement(&confinement, confinement.is_complete());
    } else {
        warn!("not confined, as asked");
    }

    let reopener = match reopener {
        Ok(reopener) => Some(Arc::new(reopener)),
        Err(why) => {
            warn!("front ends cannot keep requests in flight (INFLIGHT_SHMFD): {why}");
            None
        }
    };
    fleet.keep_records(reopener.clone());
    for (index, server) in servers.iter_mut().enumerate() {
        server.keep_records(CrashSafety {
            reopener: reopener.clone(),
            file: records.as_ref().and_then(|file| file.device(index)),
        });
    }

    let ids = options.devices.iter().map(|device| device.id.as_str());
    let ready = Ready {
        pool,
        fleet,
        servers: ids.zip(servers).collect(),
        control,
        predecessor: predecessor.zip(options.take_over.as_deref()),
        meeting: &meeting,
    };
    ready.serve(stop, ours)
}

fn descriptors_failed(error: std::io::Error) -> Failure {
    Failure::run_time(format_args!("descriptors: {error}"))
}
