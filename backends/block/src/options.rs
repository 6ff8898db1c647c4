//! The command line of `pericarp-block`.
//!
//! `main` parses it whole before it touches anything. Every mistake becomes one
//! line that names the option, the value, the rule and the cure.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use lexopt::prelude::*;
use log::LevelFilter;
use pericarp_uring::EngineKind;
use thiserror::Error;

use crate::disk::{CacheMode, DiskOptions};

/// The most queues one device may have.
pub const MAX_QUEUES: u16 = 64;
/// The range of queue sizes.
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 16..=pericarp_ring::MAX_QUEUE_SIZE;
/// The most worker threads.
const MAX_WORKERS: usize = 64;
/// The most devices of one process: the device number is part of tokens.
const MAX_DEVICES: usize = 256;

/// What `--help` prints.
pub const HELP: &str = "\
pericarp-block: vhost-user block devices on files and block devices

usage:
  pericarp-block --socket-path PATH --blk-file FILE [options]
  pericarp-block --device id=ID,socket=PATH,file=FILE[,key=value...]... [options]

one device:
  --socket-path PATH    listen here; a dead socket is replaced, a live one is an error
  --fd N                use this listening or connected socket instead
  --blk-file FILE       the disk: an image file or a block device
  --read-only           never write to it
  --num-queues N        virtqueues, 1 to 64 (default 1)
  --queue-size N        largest virtqueue, a power of two from 16 to 1024 (default 1024)
  --cache MODE          direct (default), buffered or dontcache
  --serial ID           answer to GET_ID, at most 20 ASCII characters

many devices:
  --device KEYS         id=, socket=, file=, and optionally read-only=on|off,
                        num-queues=, queue-size=, cache=, serial=; may be repeated;
                        a comma in a value is written twice

the process:
  --workers N           I/O threads, 1 to 64 (default: one per queue, at most one per CPU)
  --cpus LIST           pin the workers to these CPUs in turn, such as 0,2-3
  --io-engine ENGINE    auto (default), uring or sync
  --log-level LEVEL     error, warn (default), info, debug or off
  --no-confine          keep all privileges; for debugging only
  --print-capabilities  print what this program can do as JSON
  --version, --help
";

/// A mistake on the command line.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{option}{}{value}: {rule}", if value.is_empty() { "" } else { " " })]
pub struct BadOption {
    /// The option as it is written.
    pub option: String,
    /// Its value, quoted where that helps.
    pub value: String,
    /// Which rule it breaks, and the cure.
    pub rule: String,
}

/// Where a device's socket comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketOption {
    /// Bind it here.
    Path(PathBuf),
    /// It was passed as this descriptor.
    Descriptor(i32),
}

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
}

fn bad(option: &str, value: impl Display, rule: impl Into<String>) -> BadOption {
    BadOption {
        option: option.to_owned(),
        value: value.to_string(),
        rule: rule.into(),
    }
}

/// A device under construction: from single options or from `--device`.
#[derive(Debug, Default)]
struct Draft {
    /// How its options are spelled: with dashes, or as keys.
    keys: bool,
    id: Option<String>,
    socket: Option<SocketOption>,
    file: Option<PathBuf>,
    read_only: Option<bool>,
    queues: Option<u16>,
    queue_size: Option<u16>,
    cache: Option<CacheMode>,
    serial: Option<String>,
}

/// Parses the arguments, without the program's name.
///
/// # Errors
/// The first [`BadOption`].
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, BadOption> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut single = Draft::default();
    let mut drafts: Vec<Draft> = Vec::new();
    let mut seen = HashSet::new();
    let (mut workers, mut cpus, mut engine, mut level) = (None, None, None, None);
    let mut confine = true;
    while let Some(argument) = parser
        .next()
        .map_err(|e| bad("command line", "", format!("{e}; see --help")))?
    {
        let name = match argument {
            Long(name) => format!("--{name}"),
            Short('h') => "--help".to_owned(),
            Short('V') => "--version".to_owned(),
            Short(c) => return Err(unknown(&format!("-{c}"))),
            Value(v) => {
                let text = v.to_string_lossy();
                return Err(bad(
                    &text,
                    "",
                    "not an option: every value belongs to one; see --help",
                ));
            }
        };
        if name != "--device" && !seen.insert(name.clone()) {
            return Err(bad(&name, "", "given twice: give it once"));
        }
        let mut value = || -> Result<String, BadOption> {
            let value = parser
                .value()
                .map_err(|_| bad(&name, "", "its value is missing; see --help"))?;
            value
                .into_string()
                .map_err(|v| bad(&name, v.display(), "not valid UTF-8: choose another name"))
        };
        match name.as_str() {
            "--help" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--print-capabilities" => return Ok(Command::Capabilities),
            "--no-confine" => confine = false,
            "--read-only" => single.read_only = Some(true),
            "--device" => drafts.push(Draft::from_keys(&value()?)?),
            "--workers" => workers = Some(number(&name, &value()?, 1, MAX_WORKERS)?),
            "--cpus" => cpus = Some(cpu_list(&name, &value()?)?),
            "--io-engine" => engine = Some(io_engine(&name, &value()?)?),
            "--log-level" => level = Some(log_level(&name, &value()?)?),
            "--socket-path" | "--fd" if single.socket.is_some() => {
                return Err(bad(
                    &name,
                    value()?,
                    "give either --socket-path or --fd, not both",
                ));
            }
            "--socket-path" | "--fd" | "--blk-file" | "--num-queues" | "--queue-size"
            | "--cache" | "--serial" => {
                let value = value()?;
                single.set(&name, &name[2..], &value)?;
            }
            _ => return Err(unknown(&name)),
        }
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
    finish(drafts, workers, cpus, engine, level, confine).map(|o| Command::Serve(Box::new(o)))
}

fn finish(
    drafts: Vec<Draft>,
    workers: Option<usize>,
    cpus: Option<Vec<usize>>,
    engine: Option<EngineKind>,
    level: Option<LevelFilter>,
    confine: bool,
) -> Result<Options, BadOption> {
    if drafts.is_empty() {
        return Err(bad(
            "--blk-file",
            "",
            "missing: say which disk to serve; see --help",
        ));
    }
    if drafts.len() > MAX_DEVICES {
        let rule = format!("at most {MAX_DEVICES} devices fit one process: start another");
        return Err(bad("--device", drafts.len(), rule));
    }
    let mut devices = Vec::with_capacity(drafts.len());
    let (mut ids, mut sockets) = (HashSet::new(), HashSet::new());
    for draft in drafts {
        let device = draft.finish()?;
        if !ids.insert(device.id.clone()) {
            return Err(bad(
                "--device id",
                &device.id,
                "used twice: give each device its own",
            ));
        }
        if let SocketOption::Path(path) = &device.socket
            && !sockets.insert(path.clone())
        {
            let rule = "used twice: give each device its own";
            return Err(bad("--device socket", path.display(), rule));
        }
        devices.push(device);
    }
    let queues: usize = devices.iter().map(|d| usize::from(d.queues)).sum();
    let default = std::thread::available_parallelism().map_or(1, |n| n.get().min(queues));
    Ok(Options {
        devices,
        workers: workers.unwrap_or(default).min(MAX_WORKERS),
        cpus: cpus.unwrap_or_default(),
        engine: engine.unwrap_or_default(),
        log_level: level.unwrap_or(LevelFilter::Warn),
        confine,
    })
}

impl Draft {
    fn touched(&self) -> bool {
        self.socket.is_some()
            || self.file.is_some()
            || self.read_only.is_some()
            || self.queues.is_some()
            || self.queue_size.is_some()
            || self.cache.is_some()
            || self.serial.is_some()
    }

    /// `key=value,key=value`, where a doubled comma stands for one.
    fn from_keys(text: &str) -> Result<Self, BadOption> {
        let mut draft = Self {
            keys: true,
            ..Self::default()
        };
        let mut seen = HashSet::new();
        for part in text.replace(",,", "\0").split(',') {
            let part = part.replace('\0', ",");
            let (key, value) = part.split_once('=').ok_or_else(|| {
                bad(
                    "--device",
                    format!("{part:?}"),
                    "not key=value; a comma in a value is written twice",
                )
            })?;
            let name = format!("--device {key}");
            if !seen.insert(key.to_owned()) {
                return Err(bad(&name, value, "given twice: give it once"));
            }
            match key {
                "id" if value.is_empty() || value.len() > 64 => {
                    return Err(bad(
                        &name,
                        format!("{value:?}"),
                        "an id has 1 to 64 characters",
                    ));
                }
                "id" => draft.id = Some(value.to_owned()),
                "socket" => draft.set(&name, "socket-path", value)?,
                "file" => draft.set(&name, "blk-file", value)?,
                "read-only" => {
                    draft.read_only = Some(match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad(&name, format!("{value:?}"), "say on or off")),
                    });
                }
                "num-queues" | "queue-size" | "cache" | "serial" => {
                    draft.set(&name, key, value)?;
                }
                _ => {
                    return Err(bad(
                        "--device",
                        format!("{key:?}"),
                        "unknown key: use id, socket, file, read-only, num-queues, queue-size, cache or serial",
                    ));
                }
            }
        }
        Ok(draft)
    }

    /// Sets what `key` names; `name` is how the operator spelled it.
    fn set(&mut self, name: &str, key: &str, value: &str) -> Result<(), BadOption> {
        match key {
            "socket-path" if value.is_empty() => {
                return Err(bad(name, "\"\"", "empty: give the path of a socket"));
            }
            "socket-path" => self.socket = Some(SocketOption::Path(value.into())),
            "fd" => self.socket = Some(SocketOption::Descriptor(number(name, value, 3, i32::MAX)?)),
            "blk-file" => self.file = Some(value.into()),
            "num-queues" => self.queues = Some(number(name, value, 1, MAX_QUEUES)?),
            "queue-size" => {
                let size = number(name, value, *QUEUE_SIZES.start(), *QUEUE_SIZES.end())?;
                if !size.is_power_of_two() {
                    let rule = format!(
                        "a queue size is a power of two: use {}",
                        size.next_power_of_two()
                    );
                    return Err(bad(name, value, rule));
                }
                self.queue_size = Some(size);
            }
            "cache" => {
                self.cache = Some(match value {
                    "direct" => CacheMode::Direct,
                    "buffered" => CacheMode::Buffered,
                    "dontcache" => CacheMode::DontCache,
                    _ => {
                        let rule = "unknown cache mode: use direct, buffered or dontcache";
                        return Err(bad(name, format!("{value:?}"), rule));
                    }
                });
            }
            _ => {
                if value.len() > 20 || !value.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
                    let rule = "a serial is at most 20 printable ASCII characters: shorten it";
                    return Err(bad(name, format!("{value:?}"), rule));
                }
                self.serial = Some(value.to_owned());
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<DeviceOptions, BadOption> {
        let (socket_name, file_name) = if self.keys {
            ("--device socket", "--device file")
        } else {
            ("--socket-path", "--blk-file")
        };
        if self.keys && self.id.is_none() {
            return Err(bad("--device id", "", "missing: give the device a name"));
        }
        let id = self.id.unwrap_or_else(|| "disk".to_owned());
        let missing = |name, what| bad(name, "", format!("missing: say {what}"));
        Ok(DeviceOptions {
            socket: self
                .socket
                .ok_or_else(|| missing(socket_name, "where to listen"))?,
            disk: DiskOptions {
                file: self
                    .file
                    .ok_or_else(|| missing(file_name, "which disk to serve"))?,
                read_only: self.read_only.unwrap_or(false),
                cache: self.cache.unwrap_or_default(),
            },
            queues: self.queues.unwrap_or(1),
            queue_size: self.queue_size.unwrap_or(*QUEUE_SIZES.end()),
            serial: self
                .serial
                .unwrap_or_else(|| id.chars().filter(char::is_ascii_graphic).take(20).collect()),
            id,
        })
    }
}

fn unknown(name: &str) -> BadOption {
    bad(name, "", "unknown option; see --help")
}

fn number<T>(name: &str, value: &str, low: T, high: T) -> Result<T, BadOption>
where
    T: FromStr + PartialOrd + Display + Copy,
{
    value
        .parse()
        .ok()
        .filter(|n| (low..=high).contains(n))
        .ok_or_else(|| {
            bad(
                name,
                format!("{value:?}"),
                format!("not a number from {low} to {high}"),
            )
        })
}

fn cpu_list(name: &str, value: &str) -> Result<Vec<usize>, BadOption> {
    let rule = "a CPU list looks like 0,2-3, with CPUs below 1024";
    let cpu = |text: &str| number::<usize>(name, text, 0, 1023);
    let mut cpus = Vec::new();
    for part in value.split(',') {
        let range = match part.split_once('-') {
            Some((low, high)) => (cpu(low), cpu(high)),
            None => (cpu(part), cpu(part)),
        };
        match range {
            (Ok(low), Ok(high)) if low <= high => cpus.extend(low..=high),
            _ => return Err(bad(name, format!("{value:?}"), rule)),
        }
    }
    Ok(cpus)
}

fn io_engine(name: &str, value: &str) -> Result<EngineKind, BadOption> {
    match value {
        "auto" => Ok(EngineKind::Auto),
        "uring" => Ok(EngineKind::Uring),
        "sync" => Ok(EngineKind::Sync),
        _ => Err(bad(
            name,
            format!("{value:?}"),
            "unknown engine: use auto, uring or sync",
        )),
    }
}

fn log_level(name: &str, value: &str) -> Result<LevelFilter, BadOption> {
    let known = value.parse().ok().filter(|l| *l != LevelFilter::Trace);
    let rule = "unknown level: use error, warn, info, debug or off";
    known.ok_or_else(|| bad(name, format!("{value:?}"), rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(args: &str) -> Result<Command, String> {
        parse(args.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())
    }

    fn options(args: &str) -> Options {
        match line(args).unwrap() {
            Command::Serve(options) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_device_with_defaults() {
        let options = options("--socket-path /s --blk-file /d");
        let device = &options.devices[0];
        assert_eq!(device.socket, SocketOption::Path("/s".into()));
        assert_eq!(device.disk.file, PathBuf::from("/d"));
        assert_eq!(device.disk.cache, CacheMode::Direct);
        assert!(!device.disk.read_only);
        assert_eq!((device.queues, device.queue_size), (1, 1024));
        assert_eq!((options.workers, options.confine), (1, true));
        assert_eq!(options.log_level, LevelFilter::Warn);
    }

    #[test]
    fn many_devices_share_a_process() {
        let options = options(
            "--device id=a,socket=/a,file=/x,,y,read-only=on,num-queues=3,cache=buffered \
             --device id=b,socket=/b,file=/z,queue-size=64,serial=S --cpus 0,2-3 --workers 2",
        );
        assert_eq!(options.devices.len(), 2);
        let a = &options.devices[0];
        assert_eq!(a.disk.file, PathBuf::from("/x,y"));
        assert!(a.disk.read_only);
        assert_eq!((a.queues, a.serial.as_str()), (3, "a"));
        assert_eq!(options.devices[1].queue_size, 64);
        assert_eq!(options.cpus, [0, 2, 3]);
        assert_eq!(options.workers, 2);
    }

    #[test]
    fn equals_signs_and_information_requests() {
        assert_eq!(
            options("--socket-path=/s --blk-file=/d").devices[0].id,
            "disk"
        );
        for (args, command) in [
            ("--help", Command::Help),
            ("-h", Command::Help),
            ("--version", Command::Version),
            ("--print-capabilities", Command::Capabilities),
        ] {
            assert_eq!(line(args), Ok(command));
        }
    }

    #[test]
    fn every_mistake_names_option_value_rule_and_cure() {
        let one = "--socket-path /s --blk-file /d";
        for (args, want) in [
            (
                "",
                "--blk-file: missing: say which disk to serve; see --help",
            ),
            (
                "--blk-file /d",
                "--socket-path: missing: say where to listen",
            ),
            (
                "--socket-path /s",
                "--blk-file: missing: say which disk to serve",
            ),
            (
                "--socket-path",
                "--socket-path: its value is missing; see --help",
            ),
            ("--bogus", "--bogus: unknown option; see --help"),
            ("-x", "-x: unknown option; see --help"),
            (
                "extra",
                "extra: not an option: every value belongs to one; see --help",
            ),
            (
                "--read-only --read-only",
                "--read-only: given twice: give it once",
            ),
            (
                "--num-queues 0",
                "--num-queues \"0\": not a number from 1 to 64",
            ),
            (
                "--num-queues 65",
                "--num-queues \"65\": not a number from 1 to 64",
            ),
            (
                "--num-queues -1",
                "--num-queues \"-1\": not a number from 1 to 64",
            ),
            (
                "--queue-size 100",
                "--queue-size 100: a queue size is a power of two: use 128",
            ),
            (
                "--queue-size 8",
                "--queue-size \"8\": not a number from 16 to 1024",
            ),
            (
                "--cache none",
                "--cache \"none\": unknown cache mode: use direct, buffered or dontcache",
            ),
            (
                "--serial 123456789012345678901",
                "--serial \"123456789012345678901\": a serial is at most 20 printable ASCII characters: shorten it",
            ),
            ("--fd 2", "--fd \"2\": not a number from 3 to 2147483647"),
            (
                "--socket-path /a --fd 5",
                "--fd 5: give either --socket-path or --fd, not both",
            ),
            ("--workers 0", "--workers \"0\": not a number from 1 to 64"),
            (
                "--cpus 3-1",
                "--cpus \"3-1\": a CPU list looks like 0,2-3, with CPUs below 1024",
            ),
            (
                "--io-engine aio",
                "--io-engine \"aio\": unknown engine: use auto, uring or sync",
            ),
            (
                "--log-level loud",
                "--log-level \"loud\": unknown level: use error, warn, info, debug or off",
            ),
            (
                "--device id",
                "--device \"id\": not key=value; a comma in a value is written twice",
            ),
            (
                "--device size=1",
                "--device \"size\": unknown key: use id, socket, file, read-only, num-queues, queue-size, cache or serial",
            ),
            (
                "--device id=a,id=b",
                "--device id b: given twice: give it once",
            ),
            (
                "--device socket=/s,file=/d",
                "--device id: missing: give the device a name",
            ),
            (
                "--device id=a,file=/d",
                "--device socket: missing: say where to listen",
            ),
            (
                "--device id=a,read-only=yes",
                "--device read-only \"yes\": say on or off",
            ),
            (
                "--device id=a,socket=/a,file=/d --device id=a,socket=/b,file=/d",
                "--device id a: used twice: give each device its own",
            ),
            (
                "--device id=a,socket=/a,file=/d --device id=b,socket=/a,file=/d",
                "--device socket /a: used twice: give each device its own",
            ),
        ] {
            assert_eq!(line(args).unwrap_err(), want, "{args}");
        }
        let both = format!("{one} --device id=a,socket=/a,file=/d");
        assert_eq!(
            line(&both).unwrap_err(),
            "--device: give either --device or the options of a single device, not both"
        );
    }
}
