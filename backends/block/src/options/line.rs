//! A device as a line on the control socket describes it: the keys of
//! `--device`, as members. `add-device` calls it.

use pericarp_control::Arguments;
use pericarp_vhost::program::Keys;
use serde_json::{Map, Value, json};

use super::draft::Draft;
use super::request::NOT_LATER;
use super::{BadOption, DeviceOptions, SocketOption, bad};
use crate::disk::CacheMode;

impl DeviceOptions {
    /// Reads them. File and socket are names here: descriptors come with the
    /// line.
    ///
    /// # Errors
    /// The first [`BadOption`].
    pub fn from_members(members: &Arguments) -> Result<Self, BadOption> {
        let mut draft = Draft::new(Keys::Members);
        for (key, value) in members {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Bool(true) => "on".to_owned(),
                Value::Bool(false) => "off".to_owned(),
                Value::Number(number) => number.to_string(),
                other => return Err(bad(key, other, "not a string, number, true or false")),
            };
            draft.set_key(key, &text)?;
        }
        let device = draft.finish()?;
        if device.disk.iopoll {
            return Err(bad("iopoll", "on", NOT_LATER));
        }
        Ok(device)
    }

    /// The other way round.
    pub fn to_members(&self) -> Arguments {
        let limits = &self.limits;
        let cache = match self.disk.cache {
            CacheMode::Direct => "direct",
            CacheMode::Buffered => "buffered",
            CacheMode::DontCache => "dontcache",
        };
        let mut members = Map::new();
        let mut put = |key: &str, value| members.insert(key.to_owned(), value);
        put("id", json!(self.id));
        put("file", json!(self.disk.file.to_string_lossy()));
        if let SocketOption::Path(path) = &self.socket {
            put("socket", json!(path.to_string_lossy()));
        }
        put("read-only", json!(self.disk.read_only));
        put("cache", json!(cache));
        put("num-queues", json!(self.queues));
        put("queue-size", json!(self.queue_size));
        put("serial", json!(self.serial));
        put("iops", json!(limits.iops));
        put("iops-burst", json!(limits.iops_burst));
        put("bandwidth", json!(limits.bandwidth));
        put("bandwidth-burst", json!(limits.bandwidth_burst));
        members
    }
}
