//! What is handed over, as it is sent: who the devices are, and how the session
//! of one stands. Any change of a meaning here changes [`VERSION`].
//!
//! Descriptors travel beside the JSON, in the order in which the fields that
//! say they are there stand here.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::HandOverError;
use super::bag::Bag;
use crate::limiter::Limits;

/// Counts changes of the messages and of what they mean.
pub(super) const VERSION: u64 = 2;

/// What both processes must agree on, the device numbers of files included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// All devices, in their order.
    pub devices: Vec<DeviceIdentity>,
    /// The file for requests in flight, where there is one.
    pub records: Option<String>,
    /// The file for what guests know, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

/// What tells a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceIdentity {
    /// Its name.
    pub id: String,
    /// The file or tap it serves.
    pub store: String,
    /// Where its socket is.
    pub socket: String,
    /// Number of queues.
    pub queues: u16,
    /// Their largest size.
    pub queue_size: u16,
    /// Never written to.
    pub read_only: bool,
    /// What the driver was told that its requests must keep to, such as the
    /// block size.
    pub geometry: String,
}

impl Identity {
    /// What the other process has otherwise, in words for its operator.
    pub(super) fn difference(&self, other: &Self) -> Option<String> {
        let (have, want) = (other.devices.len(), self.devices.len());
        if have != want {
            return Some(format!("{have} devices instead of {want}"));
        }
        let named = |id: &str, what| Some(format!("device {id:?}: {what}"));
        for (ours, theirs) in self.devices.iter().zip(&other.devices) {
            let id = &theirs.id;
            let same = [
                (ours.id == *id, "another id or place"),
                (ours.store == theirs.store, "another disk, directory or tap"),
                (ours.socket == theirs.socket, "another socket"),
                (ours.queues == theirs.queues, "another number of queues"),
                (
                    ours.queue_size == theirs.queue_size,
                    "another size of queues",
                ),
                (
                    ours.read_only == theirs.read_only,
                    "read-only in one and not in the other",
                ),
                (
                    ours.geometry == theirs.geometry,
                    "another block size, other limits of a request or other options that guests were \
                     told of, such as --cache or --mac",
                ),
            ];
            if let Some((_, what)) = same.into_iter().find(|(same, _)| !same) {
                return named(id, what);
            }
        }
        let files = [
            (self.records == other.records, "another --inflight-file"),
            (self.state == other.state, "another --state-file"),
        ];
        let other = files.into_iter().find(|(same, _)| !same);
        other.map(|(_, what)| what.to_owned())
    }
}

/// A descriptor that more than one may hold.
pub(crate) type Descriptor = Arc<OwnedFd>;

/// How a device stands when all its queues are.
#[derive(Debug)]
pub(crate) struct Parcel {
    pub(crate) state: DeviceState,
    pub(crate) fds: Vec<Descriptor>,
    pub(crate) bags: Vec<Bag>,
}

impl Parcel {
    /// Of a device without a front end.
    pub(crate) fn idle(limits: &[Limits]) -> Self {
        let mut limits = limits.iter().map(Limits::numbers);
        let state = DeviceState {
            limits: limits.next(),
            more_limits: limits.collect(),
            session: None,
            bags: 0,
        };
        Self {
            state,
            fds: Vec::new(),
            bags: Vec::new(),
        }
    }

    /// With what the device knows.
    pub(crate) fn with(mut self, bags: Vec<Bag>) -> Self {
        self.state.bags = bags.len() as u32;
        self.bags = bags;
        self
    }

    pub(super) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(|fd| fd.as_fd()).collect()
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DeviceState {
    /// As they are by now: requests and bytes, each with its burst.
    pub(crate) limits: Option<[u64; 4]>,
    /// Those of further directions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) more_limits: Vec<[u64; 4]>,
    pub(crate) session: Option<SessionState>,
    /// How many [`Saying::Bag`]s follow.
    #[serde(default)]
    pub(crate) bags: u32,
}

impl DeviceState {
    pub(crate) fn limits(&self) -> Vec<Limits> {
        let all = self.limits.iter().chain(&self.more_limits);
        all.map(|numbers| Limits::of(*numbers)).collect()
    }
}

/// A session. The first descriptor is the connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SessionState {
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    /// The configuration space as the driver may have read it.
    pub(crate) config: Vec<u8>,
    /// When the last request was served, on the system's monotonic clock.
    pub(crate) stood_since: u64,
    pub(crate) regions: Vec<RegionState>,
    pub(crate) vrings: Vec<VringState>,
    /// Whether there is a back-end channel.
    pub(crate) channel: bool,
    /// The front end's record of requests in flight and its lock: two
    /// descriptors.
    pub(crate) records: Option<RecordsState>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RegionState {
    pub(crate) guest_address: u64,
    pub(crate) size: u64,
    pub(crate) user_address: u64,
    pub(crate) file_offset: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VringState {
    pub(crate) size: u16,
    /// Descriptors, available and used ring.
    pub(crate) addresses: Option<[u64; 3]>,
    pub(crate) base: u16,
    pub(crate) enabled: bool,
    pub(crate) broken: bool,
    pub(crate) kick: bool,
    pub(crate) call: bool,
    pub(crate) error: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RecordsState {
    pub(crate) offset: u64,
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
}

/// What the two processes say, in this order, after the line that asks and the
/// line that agrees.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum Saying {
    /// New: this is what I serve.
    Offer(Identity),
    /// Old: the sockets of all devices, the control socket, the two descriptors of
    /// the file for requests in flight and the one of the file for what guests
    /// know, where there are such.
    Estate,
    /// New: I am ready but for this.
    Drain,
    /// Old: one for each device. Nothing is in flight any more.
    Device(DeviceState),
    /// Old: a piece of what the device before it knows, and its descriptors.
    Bag {
        /// The device's own.
        text: String,
    },
    /// New: I have understood all of it.
    Ready,
    /// Old: from here on it is yours. There is no way back.
    Yours,
    /// Old, in the place of any of its sayings: it stays mine.
    Refused {
        error: String,
        /// The operator's to mend.
        mistake: bool,
    },
}

/// The descriptors of a message, taken one by one.
pub(crate) struct Fds(std::vec::IntoIter<OwnedFd>);

impl Fds {
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter())
    }

    pub(crate) fn take(&mut self) -> Result<OwnedFd, HandOverError> {
        self.0.next().ok_or(HandOverError::Malformed)
    }

    pub(crate) fn take_if(&mut self, there: bool) -> Result<Option<OwnedFd>, HandOverError> {
        there.then(|| self.take()).transpose()
    }

    /// None may be left.
    pub(crate) fn end(mut self) -> Result<(), HandOverError> {
        match self.0.next() {
            None => Ok(()),
            Some(_) => Err(HandOverError::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let device = |id: &str| DeviceIdentity {
            id: id.to_owned(),
            store: "1:2".to_owned(),
            socket: "3:4".to_owned(),
            queues: 1,
            queue_size: 128,
            read_only: false,
            geometry: "512".to_owned(),
        };
        Identity {
            devices: vec![device("a"), device("b")],
            records: None,
            state: None,
        }
    }

    #[test]
    fn a_difference_names_the_device_and_what_it_is() {
        let ours = identity();
        assert_eq!(ours.difference(&identity()), None);
        type Change = fn(&mut Identity);
        let changes: [(Change, &str); 8] = [
            (|i| i.devices.truncate(1), "1 devices instead of 2"),
            (|i| i.devices.swap(0, 1), "device \"b\": another id"),
            (
                |i| i.devices[1].store.push('0'),
                "device \"b\": another disk",
            ),
            (|i| i.devices[0].read_only = true, "device \"a\": read-only"),
            (
                |i| i.devices[1].geometry.push('0'),
                "device \"b\": another block size",
            ),
            (|i| i.devices[0].queues = 2, "device \"a\": another number"),
            (|i| i.records = Some("5:6".into()), "--inflight-file"),
            (|i| i.state = Some("5:7".into()), "--state-file"),
        ];
        for (change, want) in changes {
            let mut theirs = identity();
            change(&mut theirs);
            let found = ours.difference(&theirs).unwrap();
            assert!(found.contains(want), "{found}");
        }
    }

    #[test]
    fn sayings_come_back() {
        let text = serde_json::to_string(&Saying::Offer(identity())).unwrap();
        assert!(text.starts_with(r#"{"step":"offer","devices":[{"id":"a""#));
        let back = serde_json::from_str(&text).unwrap();
        let Saying::Offer(back) = back else {
            panic!("{back:?}");
        };
        assert_eq!(back, identity());
        let yours: Saying = serde_json::from_str(r#"{"step":"yours"}"#).unwrap();
        assert!(matches!(yours, Saying::Yours));
    }
}
