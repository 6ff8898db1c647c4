//! The `pericarp-vmm` program: runs one virtual machine to its end.
//!
//! Order matters. Everything an operator may have got wrong is checked before
//! anything changes; then files are opened, sockets bound and backends reached;
//! then the process gives up every right it does not need; only then does it start
//! threads, hear a backend and run the guest.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use pericarp_confine::SocketFile;
use pericarp_control::{Failure, Server, Stop, exit_code, listen, print, start_logging};
use pericarp_kernel::cache;
use pericarp_vmm::backend::Dial;
use pericarp_vmm::backend::actor::chain;
use pericarp_vmm::confinement::PROFILE;
use pericarp_vmm::control::operations;
use pericarp_vmm::cpu::thread::prepare;
use pericarp_vmm::machine::{Ending, Machine, MachineError, Neighbours};
use pericarp_vmm::options::{Command, HELP, Options, SerialOut, parse};
use pericarp_vmm::ports::Ports;
use pericarp_vmm::terminal::Raw;

const PROGRAM: &str = "pericarp-vmm";
/// The exit code of a machine that ended because its guest reset it.
const RESET: u8 = 3;
/// How long typed bytes wait for the guest to read those before.
const TYPING: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    let begun = Instant::now();
    let done = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print(HELP),
        Ok(Command::Version) => print(&format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Run(options)) => match run(&options, begun) {
            Ok(Ending::Reset) => return ExitCode::from(RESET),
            Ok(Ending::Failed(why)) => Err(Failure::run_time(why)),
            Ok(Ending::PoweredOff | Ending::Stopped) => Ok(()),
            Err(failure) => Err(failure),
        },
        Err(mistakes) => {
            let (last, others) = mistakes
                .split_last()
                .map_or((None, &[][..]), |(l, o)| (Some(l), o));
            for mistake in others {
                let _ = writeln!(std::io::stderr(), "{PROGRAM}: {mistake}");
            }
            last.map_or(Ok(()), |mistake| Err(Failure::input(mistake)))
        }
    };
    exit_code(PROGRAM, done)
}

/// What is open before the process is confined.
struct Opened {
    machine: Machine,
    control: Option<UnixListener>,
    /// Of the devices, in their order, with their connections.
    backends: Vec<(SocketFile, UnixStream)>,
    /// The socket that is ours, removed at the end.
    own: Option<SocketFile>,
}

fn run(options: &Options, begun: Instant) -> Result<Ending, Failure> {
    start_logging(PROGRAM, options.log_level);
    let stop = Stop::new().map_err(|e| Failure::run_time(format_args!("signals: {e}")))?;
    let opened = open(options, begun)?;
    let mut sockets: Vec<SocketFile> = Vec::new();
    let mut streams = Vec::new();
    for (socket, stream) in opened.backends {
        sockets.push(socket);
        streams.push(stream);
    }
    let count = sockets.len();
    // The operator has it back unless this process is killed.
    let _terminal = match options.serial {
        SerialOut::Stdio => {
            Raw::enter().map_err(|e| Failure::run_time(format_args!("the terminal: {e}")))?
        }
        _ => None,
    };
    sockets.extend(opened.own);
    let ending = confine(options, &mut sockets)
        .and_then(|()| prepare().map_err(|e| Failure::run_time(format_args!("signals: {e}"))))
        .and_then(|()| {
            let machine = Arc::new(opened.machine);
            live(options, &machine, opened.control, &sockets, streams, &stop)
        });
    if let Some(own) = sockets.get(count)
        && let Err(e) = own.remove()
    {
        warn!("cannot remove the control socket: {e}");
    }
    ending
}

/// Opens all there is to open. What this makes comes last: an unpacked kernel in its cache,
/// the file of the console, the control socket.
fn open(options: &Options, begun: Instant) -> Result<Opened, Failure> {
    let initramfs = match &options.initramfs {
        None => None,
        Some(path) => Some(regular("--initramfs", path)?),
    };
    let mut backends = Vec::new();
    for device in &options.devices {
        let path = &device.socket;
        let wrong = |e: std::io::Error| {
            let rule = format!("the socket of {}: {e}: start its backend first", device.id);
            Failure::mistake("socket", path.display(), rule)
        };
        let socket = SocketFile::open(path).map_err(wrong)?.with_neighbours();
        let stream = UnixStream::connect(path).map_err(wrong)?;
        backends.push((socket, stream));
    }
    let kernel = &options.kernel;
    let image = cache::open(kernel, options.kernel_cache.as_deref(), options.kaslr)
        .map_err(|e| Failure::mistake("--kernel", kernel.display(), chain(&e)))?;
    let machine = Machine::new(options, image, initramfs, begun).map_err(|e| match e {
        MachineError::Memory(e) => Failure::mistake("--memory", options.memory, chain(&e)),
        e => Failure::run_time(chain(&e)),
    })?;
    let console = match &options.serial {
        SerialOut::Null => None,
        SerialOut::Stdio => {
            let stdout = std::io::stdout().as_fd().try_clone_to_owned();
            Some(File::from(stdout.map_err(|e| {
                Failure::run_time(format_args!("stdout: {e}"))
            })?))
        }
        SerialOut::File(path) => {
            let file = File::options().append(true).create(true).open(path);
            let wrong = |e| Failure::mistake("--serial", path.display(), e);
            Some(file.map_err(wrong)?)
        }
    };
    if let Some(console) = console {
        machine.ports().attach(console);
    }
    let (control, own) = match &options.control_path {
        None => (None, None),
        Some(path) => {
            let (listener, socket) = bind(path)?;
            (Some(listener), Some(socket))
        }
    };
    Ok(Opened {
        machine,
        control,
        backends,
        own,
    })
}

fn regular(option: &str, path: &Path) -> Result<File, Failure> {
    let opened = File::open(path).and_then(|file| match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::other("is no regular file")),
    });
    opened.map_err(|e| Failure::mistake(option, path.display(), e))
}

/// Listens on the control socket; a dead one is replaced.
fn bind(path: &Path) -> Result<(UnixListener, SocketFile), Failure> {
    let wrong = |e: &dyn std::fmt::Display| Failure::mistake("--control-path", path.display(), e);
    if UnixStream::connect(path).is_ok() {
        let rule = "somebody listens there: choose another path";
        return Err(wrong(&rule));
    }
    if SocketFile::open(path).is_ok() {
        std::fs::remove_file(path).map_err(|e| wrong(&e))?;
    }
    // Nobody else may connect, not even for a moment.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = listen(path);
    rustix::process::umask(mask);
    let listener = bound.map_err(|e| wrong(&e))?;
    let socket = SocketFile::of_own(path).map_err(|e| wrong(&e))?;
    Ok((listener, socket.with_neighbours()))
}

fn confine(options: &Options, sockets: &mut [SocketFile]) -> Result<(), Failure> {
    if !options.confine {
        warn!("not confined, as asked");
        return Ok(());
    }
    let confinement = pericarp_confine::enter(&PROFILE, sockets)
        .map_err(|e| Failure::run_time(format_args!("cannot confine itself: {}", chain(&e))))?;
    info!("{confinement}");
    Ok(())
}

/// Adds the devices, starts the threads and runs the guest.
fn live(
    options: &Options,
    machine: &Arc<Machine>,
    control: Option<UnixListener>,
    sockets: &[SocketFile],
    streams: Vec<UnixStream>,
    stop: &Stop,
) -> Result<Ending, Failure> {
    for ((device, stream), socket) in options.devices.iter().zip(streams).zip(sockets) {
        let again = socket
            .again()
            .map_err(|e| Failure::run_time(format_args!("{}: {e}", device.id)))?;
        let dialer: Box<dyn Dial> = Box::new(again);
        machine
            .devices()
            .add(device, stream, dialer)
            .map_err(Failure::run_time)?;
    }
    if let Some(listener) = control {
        let again: std::io::Result<Vec<_>> = sockets.iter().map(SocketFile::again).collect();
        let served = again.and_then(|known| {
            let operations = operations(machine, Neighbours::new(known));
            let end = stop.event().try_clone_to_owned()?;
            Server::new(listener, operations)?.start(end)
        });
        served.map_err(|e| Failure::run_time(format_args!("the control socket: {e}")))?;
    }
    if options.serial == SerialOut::Stdio {
        let ports = Arc::clone(machine.ports());
        thread("stdin", move || type_in(&ports))?;
    }
    let (remote, signals) = (machine.remote(), stop.clone());
    thread("signals", move || {
        signals.wait();
        remote.stop();
    })?;
    let ending = machine.run_to_end();
    stop.request();
    Ok(ending)
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(128 * 1024)
        .spawn(run)
        .map(drop)
        .map_err(|e| Failure::run_time(format_args!("threads: {e}")))
}

/// Gives the guest what comes on stdin, as fast as it reads.
fn type_in(ports: &Ports) {
    let mut buffer = [0; 64];
    let mut stdin = std::io::stdin();
    while let Ok(count @ 1..) = stdin.read(&mut buffer) {
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match ports.type_in(rest) {
                0 => std::thread::sleep(TYPING),
                taken => rest = &rest[taken..],
            }
        }
    }
}
