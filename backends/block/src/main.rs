//! The `pericarp-block` program: serves disks to virtual machines.
//!
//! Order matters. Everything an operator may have got wrong is checked before
//! anything changes; then files are opened, engines made and sockets bound;
//! then the process gives up every right it does not need; only then does it
//! start threads and read the first byte from a front end. A process that takes
//! over from a running one gets its sockets where others bind theirs, and the
//! sessions once it is ready to serve them.

mod ask;
mod take_over;

use std::fmt::Display;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{Level, info, log, warn};
use pericarp_block::{
    BadOption, BlockDevice, Command, DeviceOptions, Disk, HELP, Hotplug, MEASURING, Options,
    SocketOption, Sockets, operations, parse, start_logging,
};
use pericarp_confine::{Measure, Namespaces, Profile, SocketFile};
use pericarp_control::Server as Control;
use pericarp_vhost::{
    CrashSafety, Ending, Endpoint, Fleet, FleetError, InflightFile, Limits, Meeting, Oversight,
    Pool, PoolOptions, RecordOf, Reopener, Server, Stop, causes,
};

const PROGRAM: &str = "pericarp-block";

/// Operations a worker submits at once; more wait for the next turn.
const RING_DEPTH: u32 = 256;

/// Threads the kernel may use for one worker where a disk's file system makes
/// it wait for every read: so many reads go on at a time.
const MAX_THREADS: u32 = 64;

/// Room in the workers' tables for disks that are added: 255 of one queue.
const MORE_DISKS: u32 = 255 * 5;

/// `BLKDISCARD`, for the synchronous engine.
const BLKDISCARD: u32 = 0x1277;

/// How long requests in flight may take to end after SIGTERM.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// What goes wrong before or while serving, and the exit code for it.
struct Failure {
    code: u8,
    line: String,
}

impl Failure {
    /// The operator's to mend.
    fn input(line: impl Display) -> Self {
        Self {
            code: 2,
            line: line.to_string(),
        }
    }

    /// Ours or the system's.
    fn run_time(line: impl Display) -> Self {
        Self {
            code: 1,
            line: line.to_string(),
        }
    }
}

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
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Not through the logger: it may be off, and this must be seen.
            let _ = writeln!(std::io::stderr(), "{PROGRAM}: {}", failure.line);
            ExitCode::from(failure.code)
        }
    }
}

fn print(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|e| Failure::run_time(format_args!("cannot write to stdout: {e}")))
}

fn serve(options: &Options) -> Result<(), Failure> {
    start_logging(PROGRAM, options.log_level);
    // All that can be wrong with the input, before anything is changed.
    match &options.take_over {
        Some(running) => take_over::check(running, options.control.as_deref())?,
        None => check_sockets(options)?,
    }
    check_cpus(&options.cpus)?;
    let disks = open_disks(options)?;
    let commands = disks.iter().any(Disk::discards_by_command);
    let waits = disks.iter().any(Disk::needs_threads) || options.control.is_some();
    let threads = waits.then_some(MAX_THREADS);
    let devices = make_devices(options, disks);
    let records = match &options.take_over {
        None => open_records(options, None)?,
        // It comes from the running program.
        Some(_) => None,
    };

    let stop = Stop::new().map_err(|e| Failure::run_time(format_args!("signals: {e}")))?;
    raise_descriptor_limit();
    let pool = Pool::new(&PoolOptions {
        workers: options.workers,
        engine: options.engine,
        depth: RING_DEPTH,
        files: table_size(options),
        poll_limit: options.poll_limit,
        commands,
        threads,
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

/// Descriptors that a worker registers: four for each queue and one for each
/// disk. Where disks may be added there is room for some, as far as the limit
/// of open files goes, which is that of the table, too.
fn table_size(options: &Options) -> u32 {
    let queues: u32 = options.devices.iter().map(|d| u32::from(d.queues)).sum();
    let needed = 4 * queues + options.devices.len() as u32;
    if options.control.is_none() {
        return needed;
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = u32::try_from(limit.unwrap_or(u64::MAX)).unwrap_or(u32::MAX);
    needed + MORE_DISKS.min(limit.saturating_sub(needed) / 2)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_sockets(options: &Options) -> Result<(), Failure> {
    for device in &options.devices {
        if let SocketOption::Path(path) = &device.socket {
            Endpoint::check(path).map_err(|e| Failure::input(socket_mistake(device, &e)))?;
        }
    }
    if let Some(path) = &options.control {
        Endpoint::check(path).map_err(|e| Failure::input(control_mistake(path, &e)))?;
    }
    Ok(())
}

/// A queue takes four descriptors, and the default limit is 1024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        warn!("the limit of open descriptors stays as it is: {errno}");
    }
}

/// Every CPU a worker is to be pinned to must be one this process may use.
fn check_cpus(cpus: &[usize]) -> Result<(), Failure> {
    let mine = rustix::thread::sched_getaffinity(None)
        .map_err(|e| Failure::run_time(format_args!("CPU affinity: {e}")))?;
    match cpus.iter().find(|&&cpu| !mine.is_set(cpu)) {
        None => Ok(()),
        Some(cpu) => Err(Failure::input(BadOption {
            option: "--cpus".to_owned(),
            value: cpu.to_string(),
            rule: "not a CPU this process may use: leave it out".to_owned(),
        })),
    }
}

fn open_disks(options: &Options) -> Result<Vec<Disk>, Failure> {
    let open = |device: &DeviceOptions| {
        let disk = Disk::open(&device.disk).map_err(|rule| {
            Failure::input(BadOption {
                option: spelled(options, "--blk-file", "--device file").to_owned(),
                value: device.disk.file.display().to_string(),
                rule: rule.to_string(),
            })
        })?;
        if disk.needs_threads() {
            info!(
                "{}: its file system knows no I/O without waiting; \
                 the kernel may use {MAX_THREADS} threads for each worker",
                device.disk.file.display()
            );
        }
        Ok(disk)
    };
    options.devices.iter().map(open).collect()
}

fn make_devices(options: &Options, disks: Vec<Disk>) -> Vec<Arc<BlockDevice>> {
    let make = |(device, disk): (&DeviceOptions, Disk)| {
        let (queues, size) = (device.queues, device.queue_size);
        Arc::new(BlockDevice::new(disk, &device.serial, queues, size))
    };
    options.devices.iter().zip(disks).map(make).collect()
}

/// The file for requests in flight, if one was asked for.
fn open_records(
    options: &Options,
    inherited: Option<(OwnedFd, OwnedFd)>,
) -> Result<Option<InflightFile>, Failure> {
    let Some(path) = &options.inflight_file else {
        return Ok(None);
    };
    let devices: Vec<RecordOf<'_>> = options
        .devices
        .iter()
        .map(|device| RecordOf {
            id: &device.id,
            store: &device.disk.file,
            queues: device.queues,
            queue_size: device.queue_size,
        })
        .collect();
    let opened = match inherited {
        None => InflightFile::open(path, &devices),
        Some(descriptors) => InflightFile::inherit(path, descriptors, &devices),
    };
    opened.map(Some).map_err(|rule| {
        Failure::input(BadOption {
            option: "--inflight-file".to_owned(),
            value: path.display().to_string(),
            rule: rule.to_string(),
        })
    })
}

/// The name of an option as this command line has it.
fn spelled<'a>(options: &Options, single: &'a str, key: &'a str) -> &'a str {
    let only = options.devices.len() == 1 && options.devices[0].id == "disk";
    if only { single } else { key }
}

fn socket_mistake(device: &DeviceOptions, rule: &dyn Display) -> BadOption {
    let (option, value) = match &device.socket {
        SocketOption::Path(path) => ("--socket-path", path.display().to_string()),
        SocketOption::Descriptor(n) => ("--fd", n.to_string()),
    };
    BadOption {
        option: option.to_owned(),
        value,
        rule: rule.to_string(),
    }
}

fn control_mistake(path: &Path, rule: &dyn Display) -> BadOption {
    BadOption {
        option: "--control-path".to_owned(),
        value: path.display().to_string(),
        rule: rule.to_string(),
    }
}

/// What is counted and limited; `None` where nobody asks for either.
fn oversee(options: &Options, devices: &[Arc<BlockDevice>]) -> Vec<Option<Arc<Oversight>>> {
    let both = options.devices.iter().zip(devices);
    both.map(|(device, block)| {
        let oversight = Oversight::new(&device.limits);
        if options.control.is_some() {
            Some(Arc::new(oversight.counting(&**block)))
        } else {
            (device.limits != Limits::default()).then(|| Arc::new(oversight))
        }
    })
    .collect()
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
    let endpoint = match inherited {
        None => Endpoint::bind_private(path),
        Some(socket) => Endpoint::inherited(socket, Some(path)),
    };
    let endpoint = endpoint.map_err(|e| Failure::input(control_mistake(path, &e)))?;
    let failed = |e| Failure::run_time(format_args!("{}: {e}", path.display()));
    sockets.push(None, SocketFile::open(path).map_err(failed)?);
    match endpoint {
        Endpoint::Bound(listener, _) => Ok(Some(listener)),
        _ => Ok(None),
    }
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
    Control::new(listener, giver.with_operation(operations))
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
    let oversights = oversee(options, devices);
    let (predecessor, mut inherited, inherited_control) = match take_over::ask(options, devices)? {
        None => (None, Vec::new().into_iter(), None),
        Some((predecessor, inheritance)) => {
            records = open_records(options, inheritance.records)?;
            let endpoints = inheritance.endpoints.into_iter();
            (Some(predecessor), endpoints, Some(inheritance.control))
        }
    };
    let mut endpoints = Vec::new();
    for (index, (device, block)) in options.devices.iter().zip(devices).enumerate() {
        let endpoint = match (&device.socket, inherited.next()) {
            (SocketOption::Path(path), None) => Endpoint::bind(path),
            (SocketOption::Descriptor(number), None) => Endpoint::from_number(*number),
            (SocketOption::Path(path), Some(socket)) => Endpoint::inherited(socket, Some(path)),
            (SocketOption::Descriptor(_), Some(socket)) => Endpoint::inherited(socket, None),
        }
        .map_err(|e| Failure::input(socket_mistake(device, &e)))?;
        if let Some(path) = endpoint.path() {
            let file = SocketFile::open(path)
                .map_err(|e| Failure::run_time(format_args!("{}: {e}", path.display())))?;
            lock(sockets).push(Some(&device.id), file);
        }
        if options.control.is_some() {
            endpoints.push(endpoint.descriptor().map_err(descriptors_failed)?);
        }
        let server = Server::new(endpoint, Arc::clone(block), index as u16, &pool);
        servers.push(server.overseen(oversights[index].clone()));
    }
    let mut reopener = Reopener::new().map_err(|e| e.to_string());
    let meeting = Meeting::new(devices.len()).map_err(descriptors_failed)?;
    let fleet = Fleet::new(&pool, &meeting, stop);
    let listener = bind_control(options, inherited_control, &mut lock(sockets))?;
    let control = match listener {
        None => None,
        Some(listener) => {
            let passed = (endpoints, &listener);
            let giver =
                take_over::giver(options, devices, passed, records.as_ref(), &meeting, stop)?;
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
        // What the kernel or the system's policy withholds must be seen.
        let level = if confinement.is_complete() {
            Level::Info
        } else {
            Level::Warn
        };
        log!(level, "{confinement}");
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

    let running = pool
        .start(stop)
        .map_err(|e| Failure::run_time(causes(&e)))?;
    if let (Some(predecessor), Some(path)) = (predecessor, &options.take_over) {
        // All that takes time is done: from here on its queues stand still.
        predecessor
            .take(&mut servers)
            .map_err(|e| take_over::failure(path, &e))?;
        *ours = true;
    }
    for (device, server) in options.devices.iter().zip(servers) {
        let started = fleet.start(&device.id, server);
        started.map_err(|e: FleetError| Failure::run_time(format_args!("threads: {e}")))?;
    }
    let mut control_thread = None;
    if let Some(control) = control {
        let thread = stop
            .event()
            .try_clone_to_owned()
            .and_then(|s| control.start(s));
        let thread = thread.map_err(|e| Failure::run_time(format_args!("threads: {e}")))?;
        control_thread = Some(thread);
    }
    let ending = stop.wait();
    let mut sessions = fleet.end();
    sessions.extend(control_thread);
    let drained = drain(ending, &sessions);
    // Another process listens on them now: not ours to remove.
    *ours = !meeting.is_over();
    drained?;
    running.end();
    Ok(())
}

/// Waits for the sessions to end, once they are told to.
fn drain(ending: Ending, sessions: &[JoinHandle<()>]) -> Result<(), Failure> {
    if ending == Ending::Failed {
        // The sessions may wait for a worker that is gone: nothing to drain.
        return Err(Failure::run_time("a worker failed; see above"));
    }
    // A front end can hold up its session for ever, with memory on a file
    // system of its own for one: what is not drained by now will not be.
    let end = Instant::now() + DRAIN_LIMIT;
    while !sessions.iter().all(JoinHandle::is_finished) {
        if Instant::now() > end {
            let line = format!("requests were still in flight after {DRAIN_LIMIT:?}");
            return Err(Failure::run_time(line));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn descriptors_failed(error: std::io::Error) -> Failure {
    Failure::run_time(format_args!("descriptors: {error}"))
}
