//! The command line of `pericarp-net`.
//!
//! `main` parses it whole before it touches anything. Every mistake becomes one
//! line that names the option, the value, the rule and the cure.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

pub use pericarp_control::command_line::BadOption;
use pericarp_control::command_line::SocketOption;
use pericarp_control::command_line::{self, CommandLine, bad, number, path, unknown};
use pericarp_vhost::program::{DeviceDraft, Keys, MAX_QUEUES, Process, ProcessDraft, check_apart};
use pericarp_vhost::{LimitNames, Limits, MAX_LANES};

use crate::device::Card;

/// Limits by direction, seen from the guest.
pub(crate) static LIMITS: [LimitNames; 2] = [
    [
        "rx-packets",
        "rx-packets-burst",
        "rx-bandwidth",
        "rx-bandwidth-burst",
    ],
    [
        "tx-packets",
        "tx-packets-burst",
        "tx-bandwidth",
        "tx-bandwidth-burst",
    ],
];

/// The most devices of one process.
const MAX_DEVICES: usize = 64;
/// The most pairs of queues of a device: with the control queue they are its queues.
const MAX_PAIRS: u16 = (MAX_QUEUES - 1) / 2;
/// Keys of `--device`, as messages list them.
const KEYS: &str =
    "id, socket, tap, tap-fds, queue-pairs, queue-size, mac, mtu, or a limit (see --help)";

/// What `--help` prints.
pub const HELP: &str = "\
pericarp-net: vhost-user network devices on taps

usage:
  pericarp-net --socket-path PATH (--tap NAME | --tap-fds N[,N...]) [options]
  pericarp-net --device id=ID,socket=PATH,tap=NAME[,key=value...]... [options]

one device:
  --socket-path PATH    listen here; a dead socket is replaced, a live one is an error
  --fd N                use this listening or connected socket instead
  --tap NAME            a tap that is there: ip tuntap add NAME mode tap vnet_hdr
                        (and multi_queue for more than one pair of queues)
  --tap-fds N[,N...]    its queues, opened with IFF_VNET_HDR by whoever starts us, one for
                        each pair; then neither its namespace nor a privilege is needed
  --queue-pairs N       pairs of virtqueues, 1 to 31 (default 1, or as many as --tap-fds)
  --queue-size N        largest virtqueue, a power of two from 16 to 1024 (default 1024)
  --mac ADDRESS         the card's address, such as 02:00:00:00:00:01, for front ends that
                        have none of their own
  --mtu N               the MTU that the driver is told, 68 to 65535
  --rx-packets N        packets to the guest per second, 0 for no limit (default); K, M and G
                        are 1024^n
  --rx-bandwidth BYTES  bytes to the guest per second
  --tx-packets N, --tx-bandwidth BYTES  the same from the guest
  --rx-packets-burst N, --rx-bandwidth-burst BYTES, --tx-packets-burst N,
  --tx-bandwidth-burst BYTES  what may come at once after an idle time

many devices:
  --device KEYS         id=, socket=, tap= or tap-fds= (as 5:6), and optionally
                        queue-pairs=, queue-size=, mac=, mtu= and the limits; may be
                        repeated; a comma in a value is written twice

the process:
  --workers N           I/O threads, 1 to 64 (default: one per pair of queues, at most one
                        per CPU)
  --cpus LIST           pin the workers to these CPUs in turn, such as 0,2-3
  --poll-us N           poll before sleeping, where that has been paying, at most so long,
                        0 to 1000 microseconds (default 20)
  --io-engine ENGINE    auto (default), uring or sync
  --control-path PATH   answer here what one asks and changes while it runs: one JSON
                        object per line, {\"op\":\"stats\"}, and ops version, metrics,
                        limits; HTTP GET /metrics, too
  --take-over PATH      take the sockets, taps and guests of the program that answers at
                        this control socket, without a disconnect, and go on in its place:
                        for a new version. Give the options it was started with;
                        descriptors of --tap-fds and --fd come from it
  --log-level LEVEL     error, warn (default), info, debug or off
  --no-confine          keep all privileges; for debugging only
  --print-capabilities  print what this program can do as JSON
  --version, --help
";

/// Where packets come from and go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// So many queues of the tap with this name.
    Named(String, u16),
    /// These open queues.
    Open(Vec<RawFd>),
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Its name in messages.
    pub id: String,
    /// Its socket.
    pub socket: SocketOption,
    /// Its tap.
    pub source: Source,
    /// What the guest sees of it.
    pub card: Card,
    /// Limits to begin with: to the guest, and from it.
    pub limits: [Limits; MAX_LANES],
}

impl DeviceOptions {
    /// Pairs of queues.
    pub fn pairs(&self) -> usize {
        match &self.source {
            Source::Named(_, pairs) => usize::from(*pairs),
            Source::Open(numbers) => numbers.len(),
        }
    }
}

/// The whole command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// At least one.
    pub devices: Vec<DeviceOptions>,
    /// How they are served.
    pub process: Process,
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
    let mut single = Draft::new(Keys::Options);
    let mut drafts: Vec<Draft> = Vec::new();
    let mut process = ProcessDraft::default();
    let mut take_over = None;
    while let Some(name) = line.next_option()? {
        match name.as_str() {
            "--help" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--print-capabilities" => return Ok(Command::Capabilities),
            "--inflight-file" => {
                let rule = "packets are never in flight, so there is nothing to keep: leave it out";
                return Err(bad(&name, "", rule));
            }
            "--take-over" => {
                let what = "the control socket of a running program";
                take_over = Some(path(&name, line.value(&name)?, what)?);
            }
            "--device" => {
                let mut draft = Draft::new(Keys::Of("--device"));
                let text = line.value(&name)?;
                command_line::keys(&name, &text, |key, value| {
                    let name = format!("--device {key}");
                    match draft.set(&name, key, value)? {
                        true => Ok(()),
                        false => Err(Keys::Of("--device").unknown(key, KEYS)),
                    }
                })?;
                drafts.push(draft);
            }
            _ => {
                if process.set(&name, || line.value(&name))? {
                    continue;
                }
                let key = &name[2..];
                if !Draft::knows(key) {
                    return Err(unknown(&name));
                }
                let value = line.value(&name)?;
                single.set(&name, key, &value)?;
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
        let rule = "missing: say which tap to serve; see --help";
        return Err(bad("--tap", "", rule));
    }
    let devices: Vec<_> = drafts
        .into_iter()
        .map(Draft::finish)
        .collect::<Result<_, _>>()?;
    check_apart(
        devices.iter().map(|d| (d.id.as_str(), &d.socket)),
        MAX_DEVICES,
    )?;
    check_numbers(&devices)?;
    let pairs = devices.iter().map(DeviceOptions::pairs).sum();
    let process = process.finish(pairs, devices.iter().map(|d| &d.socket))?;
    if let (Some(path), None) = (&take_over, &process.control) {
        let rule = "the running program has a control socket: give --control-path, too";
        return Err(bad("--take-over", path.display(), rule));
    }
    Ok(Command::Serve(Box::new(Options {
        devices,
        process,
        take_over,
    })))
}

/// Each descriptor that was passed is named once.
fn check_numbers(devices: &[DeviceOptions]) -> Result<(), BadOption> {
    let mut seen = HashSet::new();
    for device in devices {
        let passed = match &device.source {
            Source::Open(numbers) => numbers.as_slice(),
            Source::Named(..) => &[],
        };
        let socket = match &device.socket {
            SocketOption::Descriptor(number) => Some(number),
            SocketOption::Path(_) => None,
        };
        for number in passed.iter().chain(socket) {
            if !seen.insert(*number) {
                let rule = "named twice: pass each descriptor once";
                return Err(bad("--tap-fds", number, rule));
            }
        }
    }
    Ok(())
}

/// One device while its options are still being read.
#[derive(Debug)]
struct Draft {
    served: DeviceDraft,
    tap: Option<String>,
    numbers: Option<Vec<RawFd>>,
    pairs: Option<u16>,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
}

impl Draft {
    fn new(keys: Keys) -> Self {
        Self {
            served: DeviceDraft::new(keys).limited_by(&LIMITS),
            tap: None,
            numbers: None,
            pairs: None,
            mac: None,
            mtu: None,
        }
    }

    fn touched(&self) -> bool {
        self.served.touched()
            || self.tap.is_some()
            || self.numbers.is_some()
            || self.pairs.is_some()
            || self.mac.is_some()
            || self.mtu.is_some()
    }

    /// Whether an option has this name, dashes left out.
    fn knows(key: &str) -> bool {
        let own = [
            "socket-path",
            "fd",
            "tap",
            "tap-fds",
            "queue-pairs",
            "queue-size",
            "mac",
            "mtu",
        ];
        own.contains(&key) || LIMITS.iter().flatten().any(|name| *name == key)
    }

    fn set(&mut self, name: &str, key: &str, value: &str) -> Result<bool, BadOption> {
        match key {
            "tap" if value.is_empty() => return Err(bad(name, "\"\"", "empty: give a name")),
            "tap" => self.tap = Some(value.to_owned()),
            "tap-fds" => self.numbers = Some(descriptors(name, value)?),
            "queue-pairs" => self.pairs = Some(number(name, value, 1, MAX_PAIRS)?),
            "mac" => self.mac = Some(address(name, value)?),
            "mtu" => self.mtu = Some(number(name, value, 68, u16::MAX)?),
            "num-queues" => return Ok(false),
            _ => return self.served.set(name, key, value),
        }
        Ok(true)
    }

    fn finish(self) -> Result<DeviceOptions, BadOption> {
        let keys = self.served.keys;
        let prefix = keys.prefix();
        let source = match (self.tap, self.numbers) {
            (Some(_), Some(_)) => {
                let rule = "give either a name or descriptors, not both";
                return Err(bad(&format!("{prefix}tap-fds"), "", rule));
            }
            (None, None) => return Err(keys.missing("tap", "which tap to serve")),
            (Some(name), None) => Source::Named(name, self.pairs.unwrap_or(1)),
            (None, Some(numbers)) => {
                let given = numbers.len();
                if let Some(pairs) = self.pairs
                    && usize::from(pairs) != given
                {
                    let rule = format!("{given} descriptors are given: pass one for each pair");
                    return Err(bad(&format!("{prefix}queue-pairs"), pairs, rule));
                }
                Source::Open(numbers)
            }
        };
        let served = self.served.finish()?;
        let named = match &source {
            Source::Named(name, _) => name.clone(),
            Source::Open(_) => "net".to_owned(),
        };
        Ok(DeviceOptions {
            id: served.id.unwrap_or(named),
            socket: served.socket,
            source,
            card: Card {
                mac: self.mac,
                mtu: self.mtu,
                queue_size: served.queue_size,
            },
            limits: served.limits,
        })
    }
}

fn descriptors(name: &str, value: &str) -> Result<Vec<RawFd>, BadOption> {
    let numbers: Vec<RawFd> = value
        .split([',', ':'])
        .map(|text| number(name, text, 3, RawFd::MAX))
        .collect::<Result<_, _>>()?;
    if numbers.len() > usize::from(MAX_PAIRS) {
        let rule = format!("at most {MAX_PAIRS} pairs of queues: pass fewer");
        return Err(bad(name, numbers.len(), rule));
    }
    Ok(numbers)
}

fn address(name: &str, value: &str) -> Result<[u8; 6], BadOption> {
    let wrong = |rule: &str| bad(name, format!("{value:?}"), rule);
    let mut bytes = [0; 6];
    let parts: Vec<&str> = value.split(':').collect();
    if parts.len() != 6 || parts.iter().any(|part| part.len() != 2) {
        return Err(wrong("an address looks like 02:00:00:00:00:01"));
    }
    for (byte, part) in bytes.iter_mut().zip(parts) {
        let parsed = u8::from_str_radix(part, 16);
        *byte = parsed.map_err(|_| wrong("an address looks like 02:00:00:00:00:01"))?;
    }
    if bytes[0] & 1 != 0 {
        return Err(wrong("the address of a group: make its first byte even"));
    }
    if bytes == [0; 6] {
        return Err(wrong("no address: use one such as 02:00:00:00:00:01"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Options, String> {
        match parse(line.split_whitespace().map(OsString::from)) {
            Ok(Command::Serve(options)) => Ok(*options),
            Ok(other) => panic!("{other:?}"),
            Err(mistake) => Err(mistake.to_string()),
        }
    }

    #[test]
    fn one_device_and_many_mean_the_same() {
        let single = of(
            "--socket-path /s --tap t0 --queue-pairs 2 --mac 02:00:00:00:00:0a \
                         --mtu 1400 --rx-packets 1K --tx-bandwidth 5M --tx-bandwidth-burst 7",
        );
        let many = of(
            "--device id=t0,socket=/s,tap=t0,queue-pairs=2,mac=02:00:00:00:00:0a,\
                       mtu=1400,rx-packets=1K,tx-bandwidth=5M,tx-bandwidth-burst=7",
        );
        let single = single.unwrap();
        assert_eq!(single, many.unwrap());
        let device = &single.devices[0];
        assert_eq!(device.source, Source::Named("t0".to_owned(), 2));
        assert_eq!(device.card.mac, Some([2, 0, 0, 0, 0, 10]));
        assert_eq!(device.limits[0], Limits::of([1024, 0, 0, 0]));
        assert_eq!(device.limits[1], Limits::of([0, 0, 5 << 20, 7]));
        let passed = of("--fd 9 --tap-fds 5,6").unwrap();
        assert_eq!(passed.devices[0].source, Source::Open(vec![5, 6]));
        assert_eq!(passed.devices[0].pairs(), 2);
        let passed = of("--device id=a,socket=/s,tap-fds=5:6").unwrap();
        assert_eq!(passed.devices[0].source, Source::Open(vec![5, 6]));
    }

    #[test]
    fn mistakes_name_option_value_rule_and_cure() {
        for (line, want) in [
            ("", "--tap: missing: say which tap to serve; see --help"),
            ("--tap t0", "--socket-path: missing: say where to listen"),
            ("--socket-path /s", "--tap: missing: say which tap to serve"),
            (
                "--socket-path /s --tap t0 --tap-fds 5",
                "--tap-fds: give either a name or descriptors, not both",
            ),
            (
                "--socket-path /s --tap-fds 5,6 --queue-pairs 3",
                "--queue-pairs 3: 2 descriptors are given: pass one for each pair",
            ),
            (
                "--socket-path /s --tap t0 --queue-pairs 32",
                "--queue-pairs \"32\": not a number from 1 to 31",
            ),
            (
                "--socket-path /s --tap t0 --num-queues 2",
                "--num-queues: unknown option; see --help",
            ),
            (
                "--socket-path /s --tap t0 --iops 2",
                "--iops: unknown option; see --help",
            ),
            (
                "--socket-path /s --tap t0 --mac 01:00:00:00:00:01",
                "--mac \"01:00:00:00:00:01\": the address of a group: make its first byte even",
            ),
            (
                "--socket-path /s --tap t0 --mac 2:0:0:0:0:1",
                "--mac \"2:0:0:0:0:1\": an address looks like 02:00:00:00:00:01",
            ),
            (
                "--socket-path /s --tap t0 --rx-packets-burst 5",
                "--rx-packets-burst 5: there is no limit that a burst could exceed: set rx-packets, too",
            ),
            (
                "--fd 5 --tap-fds 6,5",
                "--tap-fds 5: named twice: pass each descriptor once",
            ),
            (
                "--device id=a,socket=/a,tap-fds=5 --device id=b,socket=/b,tap-fds=5",
                "--tap-fds 5: named twice: pass each descriptor once",
            ),
            (
                "--socket-path /s --tap t0 --take-over /c",
                "--take-over /c: the running program has a control socket: give --control-path, too",
            ),
            (
                "--socket-path /s --tap t0 --inflight-file /f",
                "--inflight-file: packets are never in flight, so there is nothing to keep: leave it out",
            ),
        ] {
            assert_eq!(of(line).unwrap_err(), want, "{line}");
        }
        let keys = of("--device id=a,socket=/s,tap=t0,speed=9").unwrap_err();
        assert!(
            keys.starts_with("--device \"speed\": unknown key"),
            "{keys}"
        );
    }
}
