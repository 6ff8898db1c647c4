//! One device while its options are still being read.

use std::path::PathBuf;

use pericarp_control::command_line::{self, bad, on_or_off};
use pericarp_share::{IdMap, XattrMap};
use pericarp_vhost::program::{DeviceDraft, Keys};

use super::values::{cache, id_map, locks, tag, xattr_map};
use super::{BadOption, DeviceOptions};
use crate::{Cache, Settings};

/// Keys of `--device`, as messages list them.
const KEYS: &str = "id, socket, dir, tag, read-only, cache, writeback, dont-cache, allow-direct-io, num-queues, queue-size, xattr, posix-acl, xattrmap, file-handles, submounts, later-mounts, uid-map, gid-map, locks, iops, iops-burst, bandwidth or bandwidth-burst";

/// A device under construction: from single options or from `--device`.
#[derive(Debug, Default)]
pub(super) struct Draft {
    served: DeviceDraft,
    dir: Option<PathBuf>,
    tag: Option<String>,
    cache: Option<Cache>,
    uid_map: Option<IdMap>,
    gid_map: Option<IdMap>,
    xattr_map: Option<XattrMap>,
    locks: Option<bool>,
    read_only: Option<bool>,
    writeback: Option<bool>,
    dont_cache: Option<bool>,
    direct_io: Option<bool>,
    xattr: Option<bool>,
    posix_acl: Option<bool>,
    file_handles: Option<bool>,
    submounts: Option<bool>,
    later_mounts: Option<bool>,
    touched: bool,
}

impl Draft {
    /// Something was said of it.
    pub(super) fn touched(&self) -> bool {
        self.touched
    }

    /// The value of `option`.
    pub(super) fn from_keys(option: &'static str, text: &str) -> Result<Self, BadOption> {
        let mut draft = Self {
            served: DeviceDraft::new(Keys::Of(option)),
            ..Self::default()
        };
        command_line::keys(option, text, |key, value| draft.set_key(key, value))?;
        Ok(draft)
    }

    fn set_key(&mut self, key: &str, value: &str) -> Result<(), BadOption> {
        let keys = self.served.keys;
        let name = format!("{}{key}", keys.prefix());
        if let Some(flag) = self.flag(key) {
            *flag = Some(on_or_off(&name, value)?);
            return Ok(());
        }
        if self.set(&name, key, value)? {
            return Ok(());
        }
        Err(keys.unknown(key, KEYS))
    }

    /// What a key turns on or off.
    fn flag(&mut self, key: &str) -> Option<&mut Option<bool>> {
        Some(match key {
            "read-only" => &mut self.read_only,
            "writeback" => &mut self.writeback,
            "dont-cache" => &mut self.dont_cache,
            "allow-direct-io" => &mut self.direct_io,
            "xattr" => &mut self.xattr,
            "posix-acl" => &mut self.posix_acl,
            "file-handles" => &mut self.file_handles,
            "submounts" => &mut self.submounts,
            "later-mounts" => &mut self.later_mounts,
            _ => return None,
        })
    }

    /// Does what the option `name` says by being there. False if it is none of
    /// these.
    pub(super) fn turn_on(&mut self, name: &str) -> bool {
        let (flag, on) = match name {
            "--no-file-handles" => (Some(&mut self.file_handles), false),
            "--no-submounts" => (Some(&mut self.submounts), false),
            "--file-handles" | "--submounts" => (None, true),
            _ => (self.flag(name.trim_start_matches('-')), true),
        };
        let Some(flag) = flag else {
            return false;
        };
        *flag = Some(on);
        self.touched = true;
        true
    }

    /// Sets what the option `name` means, with the value that `value` reads.
    /// False if it is none of these.
    pub(super) fn set_option(
        &mut self,
        name: &str,
        mut value: impl FnMut() -> Result<String, BadOption>,
    ) -> Result<bool, BadOption> {
        let key = match name {
            "--shared-dir" => "dir",
            "--socket-path" | "--fd" | "--tag" | "--cache" | "--num-queues" | "--queue-size"
            | "--xattrmap" | "--uid-map" | "--gid-map" | "--locks" | "--iops" | "--iops-burst"
            | "--bandwidth" | "--bandwidth-burst" => &name[2..],
            _ => return Ok(false),
        };
        self.touched = true;
        self.set(name, key, &value()?)
    }

    /// Sets what `key` names, if it is anything; `name` is how the operator
    /// spelled it.
    fn set(&mut self, name: &str, key: &str, value: &str) -> Result<bool, BadOption> {
        match key {
            "dir" => {
                let what = "the path of a directory";
                self.dir = Some(command_line::path(name, value.to_owned(), what)?);
            }
            "tag" => self.tag = Some(tag(name, value)?),
            "cache" => self.cache = Some(cache(name, value)?),
            "locks" => self.locks = Some(locks(name, value)?),
            "xattrmap" => self.xattr_map = Some(xattr_map(name, value)?),
            "uid-map" => self.uid_map = Some(id_map(name, value)?),
            "gid-map" => self.gid_map = Some(id_map(name, value)?),
            _ => return self.served.set(name, key, value),
        }
        Ok(true)
    }

    pub(super) fn finish(self) -> Result<DeviceOptions, BadOption> {
        let keys = self.served.keys;
        let served = self.served.finish()?;
        let cache = self.cache.unwrap_or_default();
        let on = |flag: Option<bool>| flag.unwrap_or(false);
        let name = |key: &str| format!("{}{key}", keys.prefix());
        if on(self.writeback) && cache == Cache::Never {
            let rule = "with cache mode never nothing is kept: leave it out, or use auto or always";
            return Err(bad(&name("writeback"), "", rule));
        }
        if on(self.posix_acl) && !on(self.xattr) {
            let rule = "access control lists are extended attributes: turn on xattr, too";
            return Err(bad(&name("posix-acl"), "", rule));
        }
        if on(self.later_mounts) && self.submounts == Some(false) {
            let rule = "what is mounted below the directory is left out: leave one of them out";
            return Err(bad(&name("later-mounts"), "", rule));
        }
        if on(self.later_mounts) && on(self.read_only) {
            let rule = "what is mounted later is as writable as the host makes it: leave one of \
                        them out";
            return Err(bad(&name("later-mounts"), "", rule));
        }
        if self.xattr_map.is_some() && !on(self.xattr) {
            let rule = "it maps extended attributes: turn on xattr, too";
            return Err(bad(&name("xattrmap"), "", rule));
        }
        let dir = match keys {
            Keys::Options => "shared-dir",
            _ => "dir",
        };
        Ok(DeviceOptions {
            keys,
            id: served.id.unwrap_or_else(|| "fs".to_owned()),
            socket: served.socket,
            dir: self
                .dir
                .ok_or_else(|| keys.missing(dir, "which directory to serve"))?,
            tag: self
                .tag
                .ok_or_else(|| keys.missing("tag", "what the guest mounts it by"))?,
            settings: Settings {
                cache,
                writeback: on(self.writeback),
                dont_cache: on(self.dont_cache),
                alone: self.submounts == Some(false),
                later_mounts: on(self.later_mounts),
            },
            read_only: on(self.read_only),
            direct_io: on(self.direct_io),
            xattr: on(self.xattr),
            posix_acl: on(self.posix_acl),
            file_handles: self.file_handles.unwrap_or(true),
            xattr_map: self.xattr_map,
            locks: on(self.locks),
            uid_map: self.uid_map.unwrap_or_default(),
            gid_map: self.gid_map.unwrap_or_default(),
            queues: served.queues,
            queue_size: served.queue_size,
            limits: served.limits[0],
        })
    }
}
