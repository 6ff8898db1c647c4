//! What was done with one device of a machine, as its sidecar counts it.
//!
//! Made by `observe` of an answer to `stats`; shown by `metrics` and `top`.

use std::collections::BTreeMap;

use pericarp_pod::record::{DeviceKind, DeviceRecord};
use serde_json::Value;

use super::histogram::Histogram;

/// The parts of a request's time, as they are called here and by sidecars. The first is the whole.
pub(crate) const PARTS: [(&str, &str); 4] = [
    ("total", "total"),
    ("queue", "queue_wait"),
    ("backend", "backend"),
    ("disk", "device"),
];

/// Requests of one class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Class {
    /// That have ended; of a card, packets, lost ones included.
    pub(crate) requests: u64,
    /// Of those that succeeded.
    pub(crate) bytes: u64,
    /// That failed; packets that were lost.
    pub(crate) errors: u64,
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) id: String,
    pub(crate) kind: DeviceKind,
    pub(crate) volume: String,
    pub(crate) classes: BTreeMap<String, Class>,
    /// In the order of [`PARTS`].
    pub(crate) times: [Histogram; PARTS.len()],
    /// Requests that are neither finished nor waiting in the ring.
    pub(crate) in_flight: u64,
    /// Times that a limit kept requests waiting.
    pub(crate) throttled: u64,
}

impl Device {
    /// Reads it out of the answer of its sidecar; none if it is not in there.
    pub(super) fn read(record: &DeviceRecord, answer: &Value) -> Option<Self> {
        let all = answer["devices"].as_array()?;
        let said = all.iter().find(|one| one["id"] == *record.id)?;
        let mut device = Self {
            id: record.id.clone(),
            kind: record.kind,
            volume: record.volume.clone(),
            ..Self::default()
        };
        for queue in said["queues"].as_array()? {
            let number = |name: &str| queue[name].as_u64().unwrap_or(0);
            device.in_flight += number("in_flight");
            device.throttled += number("throttled");
            for (name, class) in queue["requests"].as_object().into_iter().flatten() {
                let number = |name: &str| class[name].as_u64().unwrap_or(0);
                let sum = device.classes.entry(name.clone()).or_default();
                sum.requests += number("count");
                sum.bytes += number("bytes");
                sum.errors += number("errors");
            }
            for ((_, name), time) in PARTS.iter().zip(&mut device.times) {
                time.add(&queue["latency_ns"][name]);
            }
        }
        Some(device)
    }

    /// What was done after `earlier`. All of it where the sidecar has begun anew.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let began_anew = earlier.classes.iter().any(|(name, before)| {
            let now = self.classes.get(name).copied().unwrap_or_default();
            now.requests < before.requests || now.bytes < before.bytes
        });
        let nothing = Self::default();
        let earlier = if began_anew { &nothing } else { earlier };
        let mut since = self.clone();
        for (name, class) in &mut since.classes {
            let before = earlier.classes.get(name).copied().unwrap_or_default();
            class.requests -= before.requests.min(class.requests);
            class.bytes -= before.bytes.min(class.bytes);
            class.errors -= before.errors.min(class.errors);
        }
        for (time, before) in since.times.iter_mut().zip(&earlier.times) {
            *time = time.since(before);
        }
        since.throttled -= earlier.throttled.min(since.throttled);
        since
    }

    /// All classes together.
    pub(crate) fn all(&self) -> Class {
        let mut all = Class::default();
        for class in self.classes.values() {
            all.requests += class.requests;
            all.bytes += class.bytes;
            all.errors += class.errors;
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(reads: u64, took: u64) -> Value {
        let queue = |reads: u64| {
            json!({
                "requests": {"read": {"count": reads, "bytes": reads * 4096, "errors": 1}},
                "in_flight": 1,
                "throttled": 2,
                "latency_ns": {
                    "total": {"sum": took, "buckets": [[took, reads]]},
                    "device": {"sum": 0, "buckets": [[0, reads]]},
                },
            })
        };
        json!({"ok": true, "devices": [
            {"id": "other", "queues": []},
            {"id": "disk1", "queues": [queue(reads), queue(2)]},
        ]})
    }

    fn device(reads: u64, took: u64) -> Device {
        let record = DeviceRecord {
            id: "disk1".into(),
            volume: "data".into(),
            ..DeviceRecord::default()
        };
        Device::read(&record, &answer(reads, took)).unwrap()
    }

    #[test]
    fn the_queues_of_a_device_are_summed() {
        let seen = device(3, 5000);
        let all = seen.all();
        assert_eq!((all.requests, all.bytes, all.errors), (5, 5 * 4096, 2));
        assert_eq!((seen.in_flight, seen.throttled), (2, 4));
        assert_eq!(seen.times[0].quantile_us(0.99), Some(5.0));
        assert_eq!(seen.times[1].count(), 0);
        assert_eq!((seen.times[3].count(), seen.volume.as_str()), (5, "data"));
        let other = DeviceRecord::default();
        assert_eq!(Device::read(&other, &answer(1, 1)), None);
    }

    #[test]
    fn what_was_done_between_two_looks_is_known() {
        let since = device(10, 5000).since(&device(3, 5000));
        assert_eq!((since.all().requests, since.all().errors), (7, 0));
        assert_eq!((since.times[0].count(), since.in_flight), (7, 2));
        // Another sidecar in its place.
        let since = device(1, 5000).since(&device(3, 5000));
        assert_eq!(since.all().requests, 3);
    }
}
