//! What an operator says of a machine: flags, or a file of JSON with the same
//! names, or both. `main` reads all of it before it touches anything; every
//! mistake is told, each in a line that names the option, the value, the rule and
//! the cure.
//!
//! The file is one object: `{"kernel": "/boot/vmlinuz", "cpus": 2, "disk":
//! [{"id": "root", "socket": "/run/disk.sock"}]}`. A flag that may be given more
//! than once is a list there.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use log::LevelFilter;
use pericarp_control::command_line::{
    BadOption, CommandLine, amount, bad, keys, log_level, number, on_or_off, path, unknown,
};
use serde_json::Value;

use crate::backend::kind::{Kind, TAG};
use crate::layout;
use crate::memory::{Backing, GRAIN};
use crate::pci::bus::PLACES;
use crate::virtio::function::QUEUES_MAX;

/// What `--help` prints.
pub const HELP: &str = "\
pericarp-vmm: a virtual machine whose devices are vhost-user backends

usage:
  pericarp-vmm --kernel FILE [options]
  pericarp-vmm --config FILE.json [options]

the machine:
  --config FILE         read options from a JSON object with the names below
  --kernel FILE         a bzImage or a plain ELF kernel with a PVH entry
  --initramfs FILE      its first file system
  --cmdline TEXT        its parameters
  --cpus N              virtual CPUs, 1 (default) to 254
  --memory SIZE         such as 512M (default 256M), in steps of 2M
  --huge-pages          take the memory from the host's reserve of 2 MiB pages
  --prefault N          touch all of it before the start, with N threads
  --no-reboot           end when the guest resets itself, with exit code 3
  --kaslr               let a bzImage unpack itself, at an address of its own choice:
                        slower, and harder to attack from within
  --kernel-cache DIR    keep unpacked kernels here; none is off
                        (default /var/cache/pericarp/kernels, or a user's
                        ~/.cache/pericarp/kernels)

its devices, in the order of their places on the bus:
  --disk id=ID,socket=PATH[,queues=N][,queue-size=N]
  --fs id=ID,socket=PATH[,tag=TAG][,queues=N][,queue-size=N]
  --net id=ID,socket=PATH[,mac=M][,queues=PAIRS][,queue-size=N]
  --vsock id=ID,socket=PATH[,cid=N][,queue-size=N]
  --device id=ID,socket=PATH,type=N[,config-size=N][,queues=N][,queue-size=N]
                        any other, by its virtio device id

the process:
  --serial stdio|null|FILE   where the console goes (default stdio, with input;
                        of a terminal all keys are the guest's)
  --control-path PATH   answer requests on this socket
  --log-level LEVEL     error, warn (default), info, debug or off
  --no-confine          keep all privileges; for debugging only
  --version, --help
";

/// Options that may be given more than once.
const REPEATABLE: &[&str] = &["--disk", "--fs", "--net", "--vsock", "--device"];

/// Memory when nothing is said.
const MEMORY: u64 = 256 << 20;
/// Less holds no kernel.
const MEMORY_MIN: u64 = 64 << 20;

/// Where the console goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialOut {
    /// To stdout, and stdin comes back.
    Stdio,
    /// Nowhere.
    Null,
    /// To the end of a file.
    File(PathBuf),
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Its name to the operator.
    pub id: String,
    /// Where its backend listens.
    pub socket: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Request queues, or pairs of queues; each CPU's own when nothing is said.
    pub queues: Option<usize>,
    /// Entries of each.
    pub queue_size: u16,
}

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its first file system.
    pub initramfs: Option<PathBuf>,
    /// Its parameters.
    pub cmdline: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// What it is made of.
    pub backing: Backing,
    /// A reset of the guest's ends the machine.
    pub no_reboot: bool,
    /// The kernel unpacks itself, where it likes.
    pub kaslr: bool,
    /// Where unpacked kernels are kept.
    pub kernel_cache: Option<PathBuf>,
    /// Devices, in order.
    pub devices: Vec<DeviceOptions>,
    /// Where the console goes.
    pub serial: SerialOut,
    /// The control socket.
    pub control_path: Option<PathBuf>,
    /// Log level.
    pub log_level: LevelFilter,
    /// Confine the process.
    pub confine: bool,
}

/// What the operator wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Run a machine.
    Run(Box<Options>),
    /// Print the version.
    Version,
    /// Print [`HELP`].
    Help,
}

/// Reads the arguments, without the program's name.
///
/// # Errors
/// All mistakes.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Vec<BadOption>> {
    let mut line = CommandLine::new(args, REPEATABLE);
    let mut draft = Draft::default();
    loop {
        let name = match line.next_option() {
            Ok(Some(name)) => name,
            Ok(None) => break,
            Err(mistake) => {
                draft.mistakes.push(mistake);
                // What follows can't be told apart from its value.
                return Err(draft.mistakes);
            }
        };
        match name.as_str() {
            "--help" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--huge-pages" | "--no-reboot" | "--kaslr" | "--no-confine" => draft.set(&name, "on"),
            "--config" => match line.value(&name) {
                Ok(file) => draft.read(&file),
                Err(mistake) => draft.mistakes.push(mistake),
            },
            _ => match line.value(&name) {
                Ok(value) => draft.set(&name, &value),
                Err(mistake) => draft.mistakes.push(mistake),
            },
        }
    }
    draft
        .finish()
        .map(|options| Command::Run(Box::new(options)))
}

#[derive(Debug, Default)]
struct Draft {
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    cmdline: String,
    cpus: Option<u8>,
    memory: Option<u64>,
    backing: Backing,
    no_reboot: bool,
    kaslr: bool,
    kernel_cache: Option<Option<PathBuf>>,
    devices: Vec<DeviceOptions>,
    serial: Option<SerialOut>,
    control_path: Option<PathBuf>,
    log_level: Option<LevelFilter>,
    unconfined: bool,
    mistakes: Vec<BadOption>,
}

impl Draft {
    fn set(&mut self, name: &str, value: &str) {
        if let Err(mistake) = self.try_set(name, value) {
            self.mistakes.push(mistake);
        }
    }

    fn try_set(&mut self, name: &str, value: &str) -> Result<(), BadOption> {
        let file = |what| path(name, value.to_owned(), what);
        match name {
            "--kernel" => self.kernel = Some(file("a kernel")?),
            "--initramfs" => self.initramfs = Some(file("an initramfs")?),
            "--cmdline" => self.cmdline = cmdline(value)?,
            "--cpus" => self.cpus = Some(number(name, value, 1, layout::CPUS_MAX)?),
            "--memory" => self.memory = Some(memory(name, value)?),
            "--huge-pages" => self.backing.huge_pages = on_or_off(name, value)?,
            "--prefault" => self.backing.populate = number(name, value, 0, 64)?,
            "--no-reboot" => self.no_reboot = on_or_off(name, value)?,
            "--kaslr" => self.kaslr = on_or_off(name, value)?,
            "--no-confine" => self.unconfined = on_or_off(name, value)?,
            "--kernel-cache" => {
                self.kernel_cache = Some(match value {
                    "none" => None,
                    _ => Some(file("a directory, or none")?),
                });
            }
            "--serial" => {
                self.serial = Some(match value {
                    "stdio" => SerialOut::Stdio,
                    "null" => SerialOut::Null,
                    _ => SerialOut::File(file("stdio, null or a file")?),
                });
            }
            "--control-path" => self.control_path = Some(file("the path of a socket")?),
            "--log-level" => self.log_level = Some(log_level(name, value)?),
            "--disk" | "--fs" | "--net" | "--vsock" | "--device" => {
                let kind = &name[2..];
                self.devices.push(device(name, kind, value)?);
            }
            _ => return Err(unknown(name)),
        }
        Ok(())
    }

    fn read(&mut self, file: &str) {
        let wrong = |rule: String| bad("--config", file, rule);
        let text = match fs::read(Path::new(file)) {
            Ok(text) => text,
            Err(e) => return self.mistakes.push(wrong(format!("cannot be read: {e}"))),
        };
        let members = match serde_json::from_slice(&text) {
            Ok(Value::Object(members)) => members,
            Ok(_) => {
                let rule = "is no JSON object: write {\"kernel\": \"...\", ...}";
                return self.mistakes.push(wrong(rule.to_owned()));
            }
            Err(e) => return self.mistakes.push(wrong(format!("is no JSON: {e}"))),
        };
        for (key, value) in members {
            let name = format!("--{key}");
            let values = match value {
                Value::Array(values) if REPEATABLE.contains(&name.as_str()) => values,
                value => vec![value],
            };
            for value in values {
                match text_of(&value) {
                    Some(text) => self.set(&name, &text),
                    None => {
                        let rule = "is neither text, number, true, false nor an object of these";
                        self.mistakes.push(bad(&name, value, rule));
                    }
                }
            }
        }
    }

    fn finish(mut self) -> Result<Options, Vec<BadOption>> {
        if self.kernel.is_none() {
            let rule = "is missing: give a kernel, such as /boot/vmlinuz";
            self.mistakes.push(bad("--kernel", "", rule));
        }
        if self.devices.len() >= PLACES {
            let rule = format!("are more than the bus has places: {}", PLACES - 1);
            self.mistakes.push(bad("devices", self.devices.len(), rule));
        }
        for (index, device) in self.devices.iter().enumerate() {
            let before = &self.devices[..index];
            if before.iter().any(|other| other.id == device.id) {
                let rule = "names two devices: give each its own";
                self.mistakes.push(bad("id", &device.id, rule));
            }
            if before.iter().any(|other| other.socket == device.socket) {
                let rule = "is the socket of two devices: a backend serves one front end";
                let mistake = bad("socket", device.socket.display(), rule);
                self.mistakes.push(mistake);
            }
        }
        match self.kernel {
            Some(kernel) if self.mistakes.is_empty() => Ok(Options {
                kernel,
                initramfs: self.initramfs,
                cmdline: self.cmdline,
                cpus: self.cpus.unwrap_or(1),
                memory: self.memory.unwrap_or(MEMORY),
                backing: self.backing,
                no_reboot: self.no_reboot,
                kaslr: self.kaslr,
                kernel_cache: self
                    .kernel_cache
                    .unwrap_or_else(pericarp_kernel::cache::directory),
                devices: self.devices,
                serial: self.serial.unwrap_or(SerialOut::Stdio),
                control_path: self.control_path,
                log_level: self.log_level.unwrap_or(LevelFilter::Warn),
                confine: !self.unconfined,
            }),
            _ => Err(self.mistakes),
        }
    }
}

/// A value as the command line would have it.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
        Value::Object(members) => {
            let part = |(key, value): (&String, &Value)| {
                let value = match value {
                    Value::Object(_) => None,
                    value => text_of(value),
                }?;
                Some(format!("{key}={}", value.replace(',', ",,")))
            };
            Some(
                members
                    .iter()
                    .map(part)
                    .collect::<Option<Vec<_>>>()?
                    .join(","),
            )
        }
        _ => None,
    }
}

fn cmdline(value: &str) -> Result<String, BadOption> {
    let rule = match value {
        _ if value.len() > layout::COMMAND_LINE_MAX => "is longer than a kernel takes, 2047 bytes",
        _ if value.contains('\0') => "has a zero byte in it",
        _ => return Ok(value.to_owned()),
    };
    Err(bad("--cmdline", format!("of {} bytes", value.len()), rule))
}

fn memory(name: &str, value: &str) -> Result<u64, BadOption> {
    let bytes = amount(name, value)?;
    let fits = (MEMORY_MIN..=layout::MEMORY_MAX).contains(&bytes) && bytes.is_multiple_of(GRAIN);
    fits.then_some(bytes).ok_or_else(|| {
        let most = layout::MEMORY_MAX >> 30;
        let rule = format!("is not between 64M and {most}G in steps of 2M");
        bad(name, value, rule)
    })
}

/// A device as one option has it: `kind` is the option without its dashes.
///
/// # Errors
/// The first mistake in it.
pub fn device(option: &str, kind: &str, text: &str) -> Result<DeviceOptions, BadOption> {
    let (mut id, mut socket) = (None, None);
    let (mut queues, mut queue_size) = (None, None);
    let (mut tag, mut mac, mut cid) = (None, None, None);
    let (mut type_id, mut config_size) = (None, 0);
    keys(option, text, |key, value| {
        let name = format!("{option} {key}");
        match (key, kind) {
            ("id", _) => id = Some(identifier(&name, value)?),
            ("socket", _) => {
                socket = Some(path(&name, value.to_owned(), "the path of a socket")?);
            }
            ("queues", "disk" | "fs" | "net" | "device") => {
                queues = Some(number(&name, value, 1, QUEUES_MAX - 1)?);
            }
            ("queue-size", _) => queue_size = Some(size(&name, value)?),
            ("tag", "fs") => tag = Some(self::tag(&name, value)?),
            ("mac", "net") => mac = Some(address(&name, value)?),
            ("cid", "vsock") => cid = Some(number(&name, value, 3, u64::from(u32::MAX) - 1)?),
            ("type", "device") => type_id = Some(number(&name, value, 1, 63)?),
            ("config-size", "device") => config_size = number(&name, value, 0, 256)?,
            _ => return Err(bad(&name, value, "unknown key; see --help")),
        }
        Ok(())
    })?;
    let missing = |key: &str| bad(&format!("{option} {key}"), "", "is missing");
    let kind = match kind {
        "disk" => Kind::Disk,
        "fs" => Kind::Fs { tag },
        "net" => Kind::Net { mac },
        "vsock" => Kind::Vsock { cid },
        _ => Kind::Other {
            id: type_id.ok_or_else(|| missing("type"))?,
            config_size,
        },
    };
    Ok(DeviceOptions {
        id: id.ok_or_else(|| missing("id"))?,
        socket: socket.ok_or_else(|| missing("socket"))?,
        queue_size: queue_size.unwrap_or_else(|| kind.queue_size()),
        kind,
        queues,
    })
}

/// A device as a request of the control socket has it.
///
/// # Errors
/// The first mistake in it.
pub fn device_of(members: &serde_json::Map<String, Value>) -> Result<DeviceOptions, String> {
    let mut members = members.clone();
    let kind = match members.remove("kind") {
        Some(Value::String(kind)) if REPEATABLE.contains(&format!("--{kind}").as_str()) => kind,
        _ => return Err("kind: say disk, fs, net, vsock or device".to_owned()),
    };
    let text = text_of(&Value::Object(members));
    let text = text.ok_or("the device's values must be texts or numbers")?;
    device(&kind, &kind, &text).map_err(|mistake| mistake.to_string())
}

fn identifier(name: &str, value: &str) -> Result<String, BadOption> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match (1..=64).contains(&value.len()) && value.chars().all(fits) {
        true => Ok(value.to_owned()),
        false => {
            let rule = "is not 1 to 64 letters, digits, '-', '_' and '.'";
            Err(bad(name, format!("{value:?}"), rule))
        }
    }
}

fn size(name: &str, value: &str) -> Result<u16, BadOption> {
    let size: u16 = number(name, value, 2, 32768)?;
    match size.is_power_of_two() {
        true => Ok(size),
        false => Err(bad(name, value, "is no power of two")),
    }
}

fn tag(name: &str, value: &str) -> Result<String, BadOption> {
    match (1..=TAG).contains(&value.len()) && !value.contains('\0') {
        true => Ok(value.to_owned()),
        false => Err(bad(name, format!("{value:?}"), "is not 1 to 36 bytes")),
    }
}

fn address(name: &str, value: &str) -> Result<[u8; 6], BadOption> {
    let wrong = |rule| bad(name, value, rule);
    let rule = "is not like 02:00:00:00:00:01";
    let bytes = value.split(':').map(|part| {
        let two = part.len() == 2;
        u8::from_str_radix(part, 16).ok().filter(|_| two)
    });
    let bytes: Option<Vec<u8>> = bytes.collect();
    let bytes: [u8; 6] = bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| wrong(rule))?;
    match bytes[0] & 1 == 0 && bytes != [0; 6] {
        true => Ok(bytes),
        false => Err(wrong("is no address of one card")),
    }
}

#[cfg(test)]
mod tests;
