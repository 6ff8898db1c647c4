//! The command line of `pericarp-fs`.
//!
//! `main` parses it whole before it touches anything. Every mistake becomes one
//! line that names the option, the value, the rule and the cure.

mod draft;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;

pub use pericarp_control::command_line::{BadOption, SocketOption};
use pericarp_control::command_line::{CommandLine, bad, number, path, unknown};
use pericarp_share::{IdMap, XattrMap};
use pericarp_vhost::Limits;
use pericarp_vhost::program::{Keys, Process, ProcessDraft, check_apart};

use crate::Settings;
use draft::Draft;

/// The most devices of one process: they divide its descriptors.
const MAX_DEVICES: usize = 64;

/// Fewer descriptors are too few for one directory.
const FEWEST_DESCRIPTORS: u64 = 512;
/// More than so many descriptors Linux lets nobody have unless it was told to
/// (`fs.nr_open`).
pub const MOST_DESCRIPTORS: u64 = 1 << 20;

/// What `--help` prints.
pub const HELP: &str = "\
pericarp-fs: vhost-user file system devices (virtio-fs) on host directories

usage:
  pericarp-fs --socket-path PATH --shared-dir DIR --tag TAG [options]
  pericarp-fs --device id=ID,socket=PATH,dir=DIR,tag=TAG[,key=value...]... [options]

one device:
  --socket-path PATH    listen here; a dead socket is replaced, a live one is an error
  --fd N                use this listening or connected socket instead
  --shared-dir DIR      the directory to pass on, with all that is mounted below it by now
  --tag TAG             what the guest mounts it by, 1 to 36 bytes
  --read-only           never change anything in it
  --cache MODE          what the guest may keep: never (nothing), auto (names and attributes
                        for a second, data until a file is opened again; default), or
                        always (all of it: nobody else changes the directory); read-only
                        and always, the guest opens files without asking
  --writeback           let the guest keep what it writes, too, and write it later
  --dont-cache          keep nothing of what the guest reads and writes in the host's own
                        page cache, where the file system can do without
  --allow-direct-io     pass O_DIRECT on; without, the guest's own flag is dropped
  --num-queues N        request queues, 1 to 64 (default 1)
  --queue-size N        largest virtqueue, a power of two from 16 to 1024 (default 1024)
  --xattr               pass extended attributes on
  --xattrmap RULES      what their names are on the host, as virtiofsd has it: rules such as
                        :prefix:all:trusted.:user.vm.: (:type:scope:key:prepend:), of type
                        prefix, ok, bad or unsupported for client, server or all, or
                        :map::user.vm.: (:map:key:prepend:); the first that matches holds
  --posix-acl           access control lists, too; goes with --xattr
  --no-file-handles     keep a descriptor of each file the guest knows, never a file handle
  --locks WHERE         guest (default): a lock on a file is seen in this guest only; host:
                        other guests and the host see it, too, and it sees theirs. A wait
                        for a lock ends with the lock, the session or the server: Linux
                        guests pass no signal on
  --no-submounts        leave out what is mounted below the directory; a user who may not
                        has it passed on as if it were part of it
  --later-mounts        pass on what is mounted below the directory later, too, and let go of
                        what is unmounted there: the directory is a shared mount. Such mounts
                        keep the attributes they have (devices, too, which nobody opens here);
                        while a guest uses one it is busy for umount, but not for umount -l.
                        Not with --read-only, which such mounts would not keep to
  --uid-map RANGES      user ids of the guest's that are others on the host, such as
                        :0:100000:65536: (first in the guest, first on the host, how many;
                        more ranges follow: :0:100000:1000:1000:5:1:); others have no access
  --gid-map RANGES      the same for groups
  --iops N              requests per second, 0 for no limit (default); K, M and G are 1024^n
  --iops-burst N        requests that may come at once after an idle time
  --bandwidth BYTES     bytes read and written per second, 0 for no limit (default)
  --bandwidth-burst BYTES  bytes that may come at once after an idle time

many devices, at most 64:
  --device KEYS         id=, socket=, dir=, tag=, and optionally num-queues=, queue-size=,
                        cache=, locks=, xattrmap=, uid-map=, gid-map=, iops=, iops-burst=, bandwidth=,
                        bandwidth-burst=, and on|off for read-only=, writeback=, dont-cache=,
                        allow-direct-io=, xattr=, posix-acl=, file-handles=, submounts=,
                        later-mounts=; may be repeated; a comma in a value is written twice

the process:
  --workers N           I/O threads, 1 to 64 (default: one per request queue, at most one
                        per CPU)
  --cpus LIST           pin the workers to these CPUs in turn, such as 0,2-3
  --poll-us N           poll before sleeping, where that has been paying: 5 microseconds
                        and one for each request done, at most N, 0 to 1000 (default 20)
  --state-file PATH     keep there what guests know and have open, for the successor of a
                        killed process, to whom front ends reconnect; made if missing,
                        best on a memory file system such as /run, or memory that is passed
                        (/proc/self/fd/N): up to 400 bytes for each file that a guest knows
  --inflight-file PATH  keep requests in flight there, for front ends that keep none
                        themselves; goes with --state-file
  --io-engine ENGINE    auto (default), uring or sync
  --rlimit-nofile N     most open files, 512 to 1048576 (default: as many as the system lets
                        this user have): half of them are for files that guests know, half
                        for those they have open
  --control-path PATH   answer here what one asks and changes while it runs: one JSON
                        object per line, {\"op\":\"stats\"}, and ops version, metrics,
                        limits; HTTP GET /metrics, too
  --take-over PATH      take the sockets and guests of the program that answers at this
                        control socket, with all that they know, have open and have locked,
                        and go on in its place: for a new version. Give the options it was
                        started with
  --log-level LEVEL     error, warn (default), info, debug or off
  --no-confine          keep all privileges; for debugging only
  --print-capabilities  print what this program can do as JSON
  --version, --help
";

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// How its options are spelled, for messages.
    pub keys: Keys,
    /// Its name in messages.
    pub id: String,
    /// Its socket.
    pub socket: SocketOption,
    /// The directory.
    pub dir: PathBuf,
    /// What guests mount it by.
    pub tag: String,
    /// What guests may keep of it, and the host.
    pub settings: Settings,
    /// Nothing may change.
    pub read_only: bool,
    /// O_DIRECT is passed on.
    pub direct_io: bool,
    /// Extended attributes.
    pub xattr: bool,
    /// What extended attributes are called on the host.
    pub xattr_map: Option<XattrMap>,
    /// POSIX access control lists.
    pub posix_acl: bool,
    /// File handles in place of descriptors.
    pub file_handles: bool,
    /// Locks are the host's, too.
    pub locks: bool,
    /// User ids.
    pub uid_map: IdMap,
    /// Group ids.
    pub gid_map: IdMap,
    /// Number of request queues.
    pub queues: u16,
    /// Largest virtqueue.
    pub queue_size: u16,
    /// Limits to begin with.
    pub limits: Limits,
}

/// The whole command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// At least one.
    pub devices: Vec<DeviceOptions>,
    /// Descriptors that the process may have.
    pub descriptors: Option<u64>,
    /// How they are served.
    pub process: Process,
    /// Where it is kept what guests know and have open, for the successor of a
    /// killed process.
    pub state_file: Option<PathBuf>,
    /// The control socket of a running program to take over from.
    pub take_over: Option<PathBuf>,
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
    let mut descriptors = None;
    let mut state_file = None;
    let mut take_over = None;
    while let Some(name) = line.next_option()? {
        let mut value = || line.value(&name);
        match name.as_str() {
            "--help" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--print-capabilities" => return Ok(Command::Capabilities),
            "--state-file" => {
                state_file = Some(path(&name, value()?, "the path of a file")?);
            }
            "--take-over" => {
                let what = "the control socket of a running program";
                take_over = Some(path(&name, value()?, what)?);
            }
            "--rlimit-nofile" => {
                let most = number(&name, &value()?, FEWEST_DESCRIPTORS, MOST_DESCRIPTORS)?;
                descriptors = Some(most);
            }
            "--device" => drafts.push(Draft::from_keys("--device", &value()?)?),
            _ => {
                let known = process.set(&name, &mut value)?
                    || single.turn_on(&name)
                    || single.set_option(&name, &mut value)?;
                if !known {
                    return Err(unknown(&name));
                }
            }
        }
    }
    if single.touched() {
        if !drafts.is_empty() {
            let rule = "give either --device or the options of a single device, not both";
            return Err(bad("--device", "", rule));
        }
        drafts.push(single);
    }
    if drafts.is_empty() {
        let rule = "missing: say which directory to serve; see --help";
        return Err(bad("--shared-dir", "", rule));
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
    if let (Some(path), None) = (&process.inflight_file, &state_file) {
        let rule = "requests are done again on files that --state-file keeps: give that, too";
        return Err(bad("--inflight-file", path.display(), rule));
    }
    if let Some(path) = &state_file
        && process.inflight_file.as_ref() == Some(path)
    {
        let rule = "used twice: give --inflight-file another";
        return Err(bad("--state-file", path.display(), rule));
    }
    if let (Some(path), None) = (&take_over, &process.control) {
        let rule = "the running program has a control socket: give --control-path, too";
        return Err(bad("--take-over", path.display(), rule));
    }
    Ok(Command::Serve(Box::new(Options {
        devices,
        descriptors,
        process,
        state_file,
        take_over,
    })))
}

#[cfg(test)]
mod tests;
