//! The command line of `pericarp-block`.
//!
//! `main` parses it whole before it touches anything. Every mistake becomes one
//! line that names the option, the value, the rule and the cure.

mod draft;
mod line;
mod request;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use log::LevelFilter;
use pericarp_control::command_line::{CommandLine, bad, path, unknown};
use pericarp_uring::EngineKind;
use pericarp_vhost::Limits;
use pericarp_vhost::program::{ProcessDraft, check_apart};

use crate::disk::DiskOptions;
use draft::Draft;
pub use pericarp_control::command_line::{BadOption, SocketOption};
pub use pericarp_vhost::program::MAX_QUEUES;
pub use request::Change;
use request::Request;

/// The most devices of one process, to begin with and later.
const MAX_DEVICES: usize = 256;

/// What `--help` prints.
pub const HELP: &str = "\
pericarp-block: vhost-user block devices on files and block devices

usage:
  pericarp-block --socket-path PATH --blk-file FILE [options]
  pericarp-block --device id=ID,socket=PATH,file=FILE[,key=value...]... [options]
  pericarp-block --control-path PATH --add-device id=ID,socket=PATH,file=FILE[,...]
  pericarp-block --control-path PATH --remove-device ID [--force]

one device:
  --socket-path PATH    listen here; a dead socket is replaced, a live one is an error
  --fd N                use this listening or connected socket instead
  --blk-file FILE       the disk: an image file or a block device
  --read-only           never write to it
  --num-queues N        virtqueues, 1 to 64 (default 1)
  --queue-size N        largest virtqueue, a power of two from 16 to 1024 (default 1024)
  --cache MODE          direct (default), buffered or dontcache
  --iopoll              look at the device for completions instead of taking interrupts: a
                        little faster on local NVMe, for a CPU of each busy worker. For
                        direct I/O on a device with poll queues (nvme.poll_queues); in
                        files, it depends on their file system whether writes are polled
  --serial ID           answer to GET_ID, at most 20 ASCII characters
  --iops N              requests per second, 0 for no limit (default); K, M and G are 1024^n
  --iops-burst N        requests that may come at once after an idle time
  --bandwidth BYTES     bytes read and written per second, 0 for no limit (default)
  --bandwidth-burst BYTES  bytes that may come at once after an idle time

many devices:
  --device KEYS         id=, socket=, file=, and optionally read-only=on|off,
                        num-queues=, queue-size=, cache=, iopoll=on|off, serial=,
                        iops=, iops-burst=, bandwidth=, bandwidth-burst=; may be repeated;
                        a comma in a value is written twice

a running process, which answers at --control-path; prints the line that it answers,
ends with 2 where it refuses and with 1 where it fails:
  --add-device KEYS     have it serve another disk; the keys of --device. File and socket
                        are opened here, with the rights of whoever asks
  --remove-device ID    have it let go of a disk that no front end is connected to
  --force               drop the front end, once its requests in flight have ended

the process:
  --workers N           I/O threads, 1 to 64 (default: one per queue, at most one per CPU)
  --cpus LIST           pin the workers to these CPUs in turn, such as 0,2-3
  --poll-us N           poll before sleeping, where that has been paying: 5 microseconds
                        and one for each request done, at most N, 0 to 1000 (default 20)
  --inflight-file PATH  keep requests in flight there, for the successor of a killed process;
                        made if missing, best on a memory file system such as /run
  --io-engine ENGINE    auto (default), uring or sync
  --register-memory     register guest memory with io_uring: less CPU for each request, but
                        all memory of every guest is pinned, once for each worker that
                        serves it. For guests whose memory stays as it is: no balloon, no
                        virtio-mem. Started without CAP_IPC_LOCK, RLIMIT_MEMLOCK must allow it
  --control-path PATH   answer here what one asks and changes while it runs: one JSON
                        object per line, {\"op\":\"stats\"}, and ops version, metrics,
                        limits, resize, add-device, remove-device, hand-over;
                        HTTP GET /metrics, too
  --take-over CONTROL   take the front ends of a running pericarp-block over, without a
                        disconnect: CONTROL is its control socket; give the options it
                        was started with, --control-path included; for a passed socket
                        --fd with any number
  --log-level LEVEL     error, warn (default), info, debug or off
  --no-confine          keep all privileges; for debugging only
  --print-capabilities  print what this program can do as JSON
  --version, --help
";

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Its name in messages.
    pub id: String,
    /// Its socket.
    pub socket: SocketOption,
    /// Its disk.
    pub disk: DiskOptions,
    /// Number of virtqueues.
    pub queues: u16,
    /// Largest virtqueue.
    pub queue_size: u16,
    /// The answer to GET_ID.
    pub serial: String,
    /// Limits to begin with.
    pub limits: Limits,
}

/// The whole command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// At least one.
    pub devices: Vec<DeviceOptions>,
    /// Threads.
    pub workers: usize,
    /// CPUs to pin them to, none if empty.
    pub cpus: Vec<usize>,
    /// Engine.
    pub engine: EngineKind,
    /// The longest time a worker polls before it sleeps.
    pub poll_limit: Duration,
    /// Register guest memory with the rings.
    pub register_memory: bool,
    /// Where requests in flight are kept for front ends that do not keep them.
    pub inflight_file: Option<PathBuf>,
    /// Where the control socket is bound.
    pub control: Option<PathBuf>,
    /// The control socket of a running program to take over from.
    pub take_over: Option<PathBuf>,
    /// Log level.
    pub log_level: LevelFilter,
    /// Confine the process.
    pub confine: bool,
}

/// What the operator wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Serve devices.
    Serve(Box<Options>),
    /// Print capabilities.
    Capabilities,
    /// Print the version.
    Version,
    /// Print [`HELP`].
    Help,
    /// Ask a running program for something.
    Ask {
        /// Where it answers.
        control: PathBuf,
        /// What it is to do.
        change: Change,
    },
}

/// Parses the arguments, without the program's name.
///
/// # Errors
/// The first [`BadOption`].
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, BadOption> {
    let mut line = CommandLine::new(args, &["--device"]);
    let mut single = Draft::default();
    let mut drafts: Vec<Draft> = Vec::new();
    let mut process = ProcessDraft::default();
    let mut register_memory = false;
    let mut take_over = None;
    let mut request = Request::default();
    while let Some(name) = line.next_option()? {
        let mut value = || line.value(&name);
        if process.set(&name, &mut value)? {
            continue;
        }
        match name.as_str() {
            "--help" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--print-capabilities" => return Ok(Command::Capabilities),
            "--register-memory" => register_memory = true,
            "--read-only" => single.read_only = Some(true),
            "--iopoll" => single.iopoll = Some(true),
            "--device" => drafts.push(Draft::from_keys("--device", &value()?)?),
            "--add-device" => request.add = Some(Draft::from_keys("--add-device", &value()?)?),
            "--remove-device" => request.remove = Some(value()?),
            "--force" => request.force = true,
            "--take-over" => {
                let what = "the control socket of a running program";
                take_over = Some(path(&name, value()?, what)?);
            }
            "--socket-path" | "--fd" | "--blk-file" | "--num-queues" | "--queue-size"
            | "--cache" | "--serial" | "--iops" | "--iops-burst" | "--bandwidth"
            | "--bandwidth-burst" => {
                single.set(&name, &name[2..], &value()?)?;
            }
            _ => return Err(unknown(&name)),
        }
    }
    if let Some(command) = request.finish(process.control(), line.seen(), drafts.len())? {
        return Ok(command);
    }
    if single.touched() {
        if !drafts.is_empty() {
            return Err(bad(
                "--device",
                "",
                "give either --device or the options of a single device, not both",
            ));
        }
        drafts.push(single);
    }
    let mut options = finish(drafts, process)?;
    if register_memory && options.engine == EngineKind::Sync {
        let rule = "there is nothing to register with in the sync engine: use auto or uring";
        return Err(bad("--register-memory", "", rule));
    }
    options.register_memory = register_memory;
    if options.engine == EngineKind::Sync && options.devices.iter().any(|d| d.disk.iopoll) {
        let rule = "the sync engine waits for each request instead: use auto or uring";
        return Err(bad("--iopoll", "", rule));
    }
    if let (Some(path), None) = (&take_over, &options.control) {
        let rule = "the running program has a control socket: give --control-path, too";
        return Err(bad("--take-over", path.display(), rule));
    }
    options.take_over = take_over;
    Ok(Command::Serve(Box::new(options)))
}

fn finish(drafts: Vec<Draft>, process: ProcessDraft) -> Result<Options, BadOption> {
    if drafts.is_empty() {
        let rule = "missing: say which disk to serve; see --help";
        return Err(bad("--blk-file", "", rule));
    }
    let devices: Vec<_> = drafts
        .into_iter()
        .map(Draft::finish)
        .collect::<Result<_, _>>()?;
    check_apart(
        devices.iter().map(|d| (d.id.as_str(), &d.socket)),
        MAX_DEVICES,
    )?;
    let queues = devices.iter().map(|d| usize::from(d.queues)).sum();
    let process = process.finish(queues, devices.iter().map(|d| &d.socket))?;
    Ok(Options {
        devices,
        workers: process.workers,
        cpus: process.cpus,
        engine: process.engine,
        poll_limit: process.poll_limit,
        register_memory: false,
        inflight_file: process.inflight_file,
        control: process.control,
        take_over: None,
        log_level: process.log_level,
        confine: process.confine,
    })
}

#[cfg(test)]
mod tests;
