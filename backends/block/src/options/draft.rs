//! One device while its options are still being read.

use std::collections::HashSet;
use std::path::PathBuf;

use pericarp_control::command_line::{self, number};
use pericarp_vhost::Limits;

use super::values::amount;
use super::{BadOption, DeviceOptions, MAX_QUEUES, QUEUE_SIZES, SocketOption, bad};
use crate::disk::{CacheMode, DiskOptions};

/// A device under construction: from single options or from `--device`.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// What its options are spelled with: nothing for options of their own,
    /// else the option whose keys they are, or that they are members of a line.
    pub(super) keys: Option<Keys>,
    pub(super) id: Option<String>,
    pub(super) socket: Option<SocketOption>,
    pub(super) file: Option<PathBuf>,
    pub(super) read_only: Option<bool>,
    pub(super) queues: Option<u16>,
    pub(super) queue_size: Option<u16>,
    pub(super) cache: Option<CacheMode>,
    pub(super) iopoll: Option<bool>,
    pub(super) serial: Option<String>,
    pub(super) limits: [Option<u64>; 4],
}

/// Where the keys of a device stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keys {
    /// In the value of this option.
    Of(&'static str),
    /// In a line on the control socket.
    Members,
}

impl Draft {
    /// What stands before the name of an option in messages.
    fn prefix(&self) -> String {
        match self.keys {
            None => "--".to_owned(),
            Some(Keys::Of(option)) => format!("{option} "),
            Some(Keys::Members) => String::new(),
        }
    }

    pub(super) fn touched(&self) -> bool {
        self.socket.is_some()
            || self.file.is_some()
            || self.read_only.is_some()
            || self.queues.is_some()
            || self.queue_size.is_some()
            || self.cache.is_some()
            || self.iopoll.is_some()
            || self.serial.is_some()
            || self.limits.iter().any(Option::is_some)
    }

    /// `key=value,key=value`, where a doubled comma stands for one.
    pub(super) fn from_keys(option: &'static str, text: &str) -> Result<Self, BadOption> {
        let mut draft = Self {
            keys: Some(Keys::Of(option)),
            ..Self::default()
        };
        let mut seen = HashSet::new();
        for part in text.replace(",,", "\0").split(',') {
            let part = part.replace('\0', ",");
            let (key, value) = part.split_once('=').ok_or_else(|| {
                let rule = "not key=value; a comma in a value is written twice";
                bad(option, format!("{part:?}"), rule)
            })?;
            if !seen.insert(key.to_owned()) {
                let name = format!("{option} {key}");
                return Err(bad(&name, value, "given twice: give it once"));
            }
            draft.set_key(key, value)?;
        }
        Ok(draft)
    }

    /// Sets what a key of `--device` names.
    pub(super) fn set_key(&mut self, key: &str, value: &str) -> Result<(), BadOption> {
        let name = format!("{}{key}", self.prefix());
        match key {
            "id" if value.is_empty() || value.len() > 64 => {
                let rule = "an id has 1 to 64 characters";
                return Err(bad(&name, format!("{value:?}"), rule));
            }
            "id" => self.id = Some(value.to_owned()),
            "socket" => self.set(&name, "socket-path", value)?,
            "file" => self.set(&name, "blk-file", value)?,
            "read-only" => self.read_only = Some(on_or_off(&name, value)?),
            "iopoll" => self.iopoll = Some(on_or_off(&name, value)?),
            "num-queues" | "queue-size" | "cache" | "serial" | "iops" | "iops-burst"
            | "bandwidth" | "bandwidth-burst" => {
                self.set(&name, key, value)?;
            }
            _ => {
                let rule = "unknown key: use id, socket, file, read-only, num-queues, queue-size, cache, iopoll, serial, iops, iops-burst, bandwidth or bandwidth-burst";
                let option = match self.keys {
                    Some(Keys::Of(option)) => option,
                    _ => "key",
                };
                return Err(bad(option, format!("{key:?}"), rule));
            }
        }
        Ok(())
    }

    /// Sets what `key` names; `name` is how the operator spelled it.
    pub(super) fn set(&mut self, name: &str, key: &str, value: &str) -> Result<(), BadOption> {
        match key {
            "socket-path" => self.socket = Some(command_line::socket_path(name, value)?),
            "fd" => self.socket = Some(command_line::descriptor(name, value)?),
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
            "iops" => self.limits[0] = Some(amount(name, value)?),
            "iops-burst" => self.limits[1] = Some(amount(name, value)?),
            "bandwidth" => self.limits[2] = Some(amount(name, value)?),
            "bandwidth-burst" => self.limits[3] = Some(amount(name, value)?),
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

    pub(super) fn finish(self) -> Result<DeviceOptions, BadOption> {
        let prefix = self.prefix();
        let (socket_name, file_name) = match self.keys {
            Some(_) => (format!("{prefix}socket"), format!("{prefix}file")),
            None => ("--socket-path".to_owned(), "--blk-file".to_owned()),
        };
        if self.keys.is_some() && self.id.is_none() {
            let name = format!("{prefix}id");
            return Err(bad(&name, "", "missing: give the device a name"));
        }
        let id = self.id.unwrap_or_else(|| "disk".to_owned());
        let [iops, iops_burst, bandwidth, bandwidth_burst] =
            self.limits.map(Option::unwrap_or_default);
        let limits = Limits {
            iops,
            iops_burst,
            bandwidth,
            bandwidth_burst,
        };
        limits.check().map_err(|(name, rule)| {
            let value = if name == "iops-burst" {
                iops_burst
            } else {
                bandwidth_burst
            };
            bad(&format!("{prefix}{name}"), value, rule)
        })?;
        let cache = self.cache.unwrap_or_default();
        let iopoll = self.iopoll.unwrap_or(false);
        if iopoll && cache != CacheMode::Direct {
            let rule = "only direct I/O can be polled: leave it out, or use cache mode direct";
            return Err(bad(&format!("{prefix}iopoll"), "", rule));
        }
        let missing = |name: &str, what| bad(name, "", format!("missing: say {what}"));
        Ok(DeviceOptions {
            socket: self
                .socket
                .ok_or_else(|| missing(&socket_name, "where to listen"))?,
            disk: DiskOptions {
                file: self
                    .file
                    .ok_or_else(|| missing(&file_name, "which disk to serve"))?,
                read_only: self.read_only.unwrap_or(false),
                cache,
                iopoll,
            },
            queues: self.queues.unwrap_or(1),
            queue_size: self.queue_size.unwrap_or(*QUEUE_SIZES.end()),
            serial: self
                .serial
                .unwrap_or_else(|| id.chars().filter(char::is_ascii_graphic).take(20).collect()),
            id,
            limits,
        })
    }
}

fn on_or_off(name: &str, value: &str) -> Result<bool, BadOption> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(bad(name, format!("{value:?}"), "say on or off")),
    }
}
