//! What was done with one device of a machine, as its sidecar counts it.
//!
//! Made by `observe` of an answer to `stats`; shown by `metrics` and `top`.

use std::collections::BTreeMap;

use pericarp_pod::record::{DeviceKind, DeviceRecord};
use serde::Deserialize;

use super::histogram::{self, Histogram};

/// Classes of requests that a device may have, and letters of each.
const MOST_CLASSES: usize = 32;
const LONGEST_CLASS: usize = 24;

/// The parts of a request's time, as they are called here and by sidecars. The first is the whole.
pub(crate) const PARTS: [(&str, &str); 4] = [
    ("total", "total"),
    ("queue", "queue_wait"),
    ("backend", "backend"),
    ("disk", "device"),
];

/// The answer of a sidecar to `stats`, as far as it is looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Answer {
    ok: bool,
    devices: Vec<Said>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Said {
    id: String,
    queues: Vec<Queue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Queue {
    requests: BTreeMap<String, Class>,
    in_flight: u64,
    throttled: u64,
    latency_ns: BTreeMap<String, histogram::Said>,
}

impl Answer {
    /// Reads a line; none if it is no such answer, or a refusal.
    pub(super) fn read(line: &[u8]) -> Option<Self> {
        let answer: Self = serde_json::from_slice(line).ok()?;
        answer.ok.then_some(answer)
    }
}

/// Requests of one class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Class {
    /// That have ended; of a card, packets, lost ones included.
    #[serde(rename = "count")]
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
    pub(super) fn read(record: &DeviceRecord, answer: &Answer) -> Option<Self> {
        let said = answer.devices.iter().find(|one| one.id == record.id)?;
        let mut device = Self {
            id: record.id.clone(),
            kind: record.kind,
            volume: record.volume.clone(),
            ..Self::default()
        };
        for queue in &said.queues {
            device.in_flight = device.in_flight.saturating_add(queue.in_flight);
            device.throttled = device.throttled.saturating_add(queue.throttled);
            let named = queue.requests.iter().filter(|(name, _)| is_class(name));
            for (name, class) in named {
                if device.classes.len() < MOST_CLASSES || device.classes.contains_key(name) {
                    device.classes.entry(name.clone()).or_default().add(class);
                }
            }
            for ((_, name), time) in PARTS.iter().zip(&mut device.times) {
                if let Some(said) = queue.latency_ns.get(*name) {
                    time.add(said);
                }
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
            all.add(class);
        }
        all
    }
}

impl Class {
    fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.errors = self.errors.saturating_add(other.errors);
    }
}

/// Whether a class can be called so: names become labels and are kept.
fn is_class(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    (1..=LONGEST_CLASS).contains(&name.len()) && name.bytes().all(inner)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn answer(reads: u64, took: u64) -> Answer {
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
        read(&json!({"ok": true, "devices": [
            {"id": "other", "queues": []},
            {"id": "disk1", "queues": [queue(reads), queue(2)]},
        ]}))
        .unwrap()
    }

    fn read(said: &Value) -> Option<Answer> {
        Answer::read(said.to_string().as_bytes())
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
    fn what_makes_no_sense_is_no_answer() {
        for odd in [
            json!({"ok": false}),
            json!({"devices": []}),
            json!({"ok": true, "devices": [{"queues": [{"in_flight": -1}]}]}),
            json!({"ok": true, "devices": [
                {"queues": [{"latency_ns": {"total": {"buckets": [[1]]}}}]},
            ]}),
        ] {
            assert!(read(&odd).is_none(), "{odd}");
        }
        assert!(Answer::read(b"noise\n").is_none());
    }

    #[test]
    fn names_and_numbers_are_bounded() {
        let letters = 'a'..='z';
        let pairs = letters.flat_map(|one| ['a', 'b'].map(|two| format!("{one}{two}")));
        let odd = ["", "A", "x\u{1b}", "a b", &"x".repeat(25)].map(str::to_owned);
        let class = json!({"count": u64::MAX, "bytes": u64::MAX, "errors": 1});
        let classes: serde_json::Map<String, Value> = odd
            .into_iter()
            .chain(pairs)
            .map(|name| (name, class.clone()))
            .collect();
        let queue = json!({"requests": classes, "in_flight": u64::MAX, "throttled": u64::MAX});
        let said = json!({"ok": true, "devices": [{"id": "x", "queues": [queue, queue]}]});
        let record = DeviceRecord {
            id: "x".into(),
            ..DeviceRecord::default()
        };
        let seen = Device::read(&record, &read(&said).unwrap()).unwrap();
        assert_eq!(seen.classes.len(), MOST_CLASSES);
        assert!(seen.classes.keys().all(|name| name.len() == 2), "{seen:?}");
        assert_eq!((seen.in_flight, seen.throttled), (u64::MAX, u64::MAX));
        assert_eq!((seen.all().bytes, seen.all().errors), (u64::MAX, 64));
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
