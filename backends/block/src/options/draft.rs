//! One device while its options are still being read.

use std::path::PathBuf;

use pericarp_control::command_line::{self, on_or_off};
use pericarp_vhost::program::{DeviceDraft, Keys};

use super::{BadOption, DeviceOptions, bad};
use crate::disk::{CacheMode, DiskOptions};

/// Keys of `--device`, as messages list them.
const KEYS: &str = "id, socket, file, read-only, num-queues, queue-size, cache, iopoll, serial, iops, iops-burst, bandwidth or bandwidth-burst";

/// A device under construction: from single options or from `--device`.
#[derive(Debug, Default)]
pub(super) struct Draft {
    served: DeviceDraft,
    file: Option<PathBuf>,
    pub(super) read_only: Option<bool>,
    cache: Option<CacheMode>,
    pub(super) iopoll: Option<bool>,
    serial: Option<String>,
}

impl Draft {
    /// One whose keys stand there.
    pub(super) fn new(keys: Keys) -> Self {
        Self {
            served: DeviceDraft::new(keys),
            ..Self::default()
        }
    }

    pub(super) fn touched(&self) -> bool {
        self.served.touched()
            || self.file.is_some()
            || self.read_only.is_some()
            || self.cache.is_some()
            || self.iopoll.is_some()
            || self.serial.is_some()
    }

    /// The value of `option`.
    pub(super) fn from_keys(option: &'static str, text: &str) -> Result<Self, BadOption> {
        let mut draft = Self::new(Keys::Of(option));
        command_line::keys(option, text, |key, value| draft.set_key(key, value))?;
        Ok(draft)
    }

    /// Sets what a key of `--device` names.
    pub(super) fn set_key(&mut self, key: &str, value: &str) -> Result<(), BadOption> {
        let keys = self.served.keys;
        let name = format!("{}{key}", keys.prefix());
        let known = match key {
            "file" => self.set(&name, "blk-file", value)?,
            "read-only" => {
                self.read_only = Some(on_or_off(&name, value)?);
                true
            }
            "iopoll" => {
                self.iopoll = Some(on_or_off(&name, value)?);
                true
            }
            "blk-file" => false,
            _ => self.set(&name, key, value)?,
        };
        if known {
            Ok(())
        } else {
            Err(keys.unknown(key, KEYS))
        }
    }

    /// Sets what `key` names, if it is anything; `name` is how the operator
    /// spelled it.
    pub(super) fn set(&mut self, name: &str, key: &str, value: &str) -> Result<bool, BadOption> {
        match key {
            "blk-file" => self.file = Some(value.into()),
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
            "serial" => {
                if value.len() > 20 || !value.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
                    let rule = "a serial is at most 20 printable ASCII characters: shorten it";
                    return Err(bad(name, format!("{value:?}"), rule));
                }
                self.serial = Some(value.to_owned());
            }
            _ => return self.served.set(name, key, value),
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Result<DeviceOptions, BadOption> {
        let keys = self.served.keys;
        let served = self.served.finish()?;
        let cache = self.cache.unwrap_or_default();
        let iopoll = self.iopoll.unwrap_or(false);
        if iopoll && cache != CacheMode::Direct {
            let rule = "only direct I/O can be polled: leave it out, or use cache mode direct";
            return Err(bad(&format!("{}iopoll", keys.prefix()), "", rule));
        }
        let file = match keys {
            Keys::Options => "blk-file",
            _ => "file",
        };
        let missing = || keys.missing(file, "which disk to serve");
        let id = served.id.unwrap_or_else(|| "disk".to_owned());
        Ok(DeviceOptions {
            socket: served.socket,
            disk: DiskOptions {
                file: self.file.ok_or_else(missing)?,
                read_only: self.read_only.unwrap_or(false),
                cache,
                iopoll,
            },
            queues: served.queues,
            queue_size: served.queue_size,
            serial: self
                .serial
                .unwrap_or_else(|| id.chars().filter(char::is_ascii_graphic).take(20).collect()),
            id,
            limits: served.limits[0],
        })
    }
}
