//! The old process's half of a hand-over, on a thread of its own for each new
//! process that asks. The control socket's op `hand-over` starts it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{info, warn};
use pericarp_control::{Arguments, Operations, only};
use rustix::process::Uid;
use serde_json::json;

use super::HandOverError;
use super::meeting::Meeting;
use super::state::{DeviceIdentity, Identity, Saying, VERSION};
use super::wire::Wire;
use crate::causes;
use pericarp_control::Stop;

/// How long the new process may take to say what it serves.
const OFFER_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to confine itself. Nothing waits for that.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// How long requests in flight may take to end.
const REST_LIMIT: Duration = Duration::from_secs(5);
/// How long the new process may take with the queues standing still.
const READY_LIMIT: Duration = Duration::from_secs(2);

/// What a process leaves to the one that takes over, beside its sessions. Both
/// lists are in the order in which the devices came.
#[derive(Debug)]
pub struct Estate {
    /// What it serves.
    pub identity: Identity,
    /// The socket of each device.
    pub endpoints: Vec<OwnedFd>,
    /// The control socket.
    pub control: OwnedFd,
    /// Those of [`InflightFile::estate`](crate::InflightFile::estate).
    pub records: Option<(OwnedFd, OwnedFd)>,
    /// The file for what guests know, which is locked.
    pub state: Option<OwnedFd>,
}

/// Hands a process over to whoever may ask.
#[derive(Debug, Clone)]
pub struct Giver {
    /// Changed only while nobody takes over.
    estate: Arc<Mutex<Estate>>,
    meeting: Meeting,
    stop: Stop,
    /// Found before confinement, which leaves no way to ask.
    user: Uid,
}

impl Giver {
    /// The sessions of `meeting` are asked to stop, and `stop` is requested once
    /// they have been handed over.
    pub fn new(estate: Estate, meeting: &Meeting, stop: &Stop) -> Self {
        Self {
            estate: Arc::new(Mutex::new(estate)),
            meeting: meeting.clone(),
            stop: stop.clone(),
            user: rustix::process::geteuid(),
        }
    }

    /// A device has come, as part of a [`Change`](crate::Change).
    pub fn add(&self, device: DeviceIdentity, endpoint: OwnedFd) {
        let mut estate = self.estate();
        estate.identity.devices.push(device);
        estate.endpoints.push(endpoint);
    }

    /// A device has gone, as part of a [`Change`](crate::Change).
    pub fn remove(&self, id: &str) {
        let mut estate = self.estate();
        let mut devices = estate.identity.devices.iter();
        if let Some(index) = devices.position(|device| device.id == id) {
            estate.identity.devices.remove(index);
            estate.endpoints.remove(index);
        }
    }

    /// Whether a device listens on this socket.
    pub fn listens_on(&self, socket: &str) -> bool {
        let estate = self.estate();
        estate.identity.devices.iter().any(|d| d.socket == socket)
    }

    fn estate(&self) -> MutexGuard<'_, Estate> {
        self.estate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `hand-over`. The operations with these names change what is handed
    /// over: they are refused while that is on its way.
    #[must_use]
    pub fn with_operation(self, operations: Operations, changing: &[&str]) -> Operations {
        let meeting = self.meeting.clone();
        operations
            .around(changing, move |operation| {
                let refused = || Err("a new process is taking over: ask again".to_owned());
                meeting.quietly(operation).unwrap_or_else(refused)
            })
            .with_adoption("hand-over", move |arguments, stream| {
                self.asked(arguments, stream)
            })
    }

    fn asked(&self, arguments: &Arguments, stream: UnixStream) -> Result<(), String> {
        only(arguments, &["version"])?;
        let version = arguments.get("version");
        let version = version.ok_or("version: missing: the new program sends it")?;
        if version.as_u64() != Some(VERSION) {
            return Err(format!(
                "version {version}: this program hands over by version {VERSION}: \
                 stop it and start the new one"
            ));
        }
        let giver = self.clone();
        std::thread::Builder::new()
            .name("hand-over".to_owned())
            .spawn(move || giver.run(stream))
            .map(drop)
            .map_err(|e| e.to_string())
    }

    fn run(&self, stream: UnixStream) {
        match self.give(stream) {
            Ok(()) => {
                info!("handed over");
                self.stop.request();
            }
            Err(error) => warn!("not handed over, serving on: {}", causes(&error)),
        }
    }

    fn give(&self, stream: UnixStream) -> Result<(), HandOverError> {
        let stop = self.stop.event().try_clone_to_owned()?;
        // Only we have any to give.
        let wire = Wire::new(stream, Some(stop), 0)?;
        let opened = wire
            .check_peer(self.user)
            .and_then(|()| self.meeting.open());
        let round = match opened {
            Ok(round) => round,
            Err(error) => {
                let text = match &error {
                    HandOverError::Refused(text) => text.clone(),
                    other => other.to_string(),
                };
                wire.send_line(&json!({"ok": false, "error": text}).to_string())?;
                return Err(error);
            }
        };
        wire.send_line(&json!({"ok": true, "version": VERSION}).to_string())?;
        let talked = self.talk(&wire, |limit| round.gather(limit, || wire.look()));
        // Everybody goes on first, whatever it was that failed.
        let left = match talked {
            Ok(()) => round.leave(|| wire.send(&Saying::Yours, &[])),
            Err(error) => {
                drop(round);
                Err(error)
            }
        };
        match left {
            Ok(()) => Ok(()),
            Err(error) => {
                let saying = Saying::Refused {
                    error: match &error {
                        HandOverError::Differs(what) => what.clone(),
                        other => causes(other),
                    },
                    mistake: matches!(error, HandOverError::Differs(_)),
                };
                let _ = wire.send(&saying, &[]);
                Err(error)
            }
        }
    }

    /// All but the last message.
    fn talk(
        &self,
        wire: &Wire,
        gather: impl FnOnce(Duration) -> Result<Vec<super::Parcel>, HandOverError>,
    ) -> Result<(), HandOverError> {
        let (Saying::Offer(offered), _) = wire.receive(OFFER_LIMIT)? else {
            return Err(HandOverError::Malformed);
        };
        if let Some(what) = self.estate().identity.difference(&offered) {
            return Err(HandOverError::Differs(what));
        }
        self.send_estate(wire)?;
        let (Saying::Drain, _) = wire.receive(DRAIN_LIMIT)? else {
            return Err(HandOverError::Malformed);
        };
        for parcel in gather(REST_LIMIT)? {
            let saying = Saying::Device(parcel.state.clone());
            wire.send(&saying, &parcel.borrowed())?;
            for bag in &parcel.bags {
                let text = bag.text.clone();
                wire.send(&Saying::Bag { text }, &bag.borrowed())?;
            }
        }
        let (Saying::Ready, _) = wire.receive(READY_LIMIT)? else {
            return Err(HandOverError::Malformed);
        };
        // Whoever was told to end does not pass on what is to end.
        wire.look()
    }

    fn send_estate(&self, wire: &Wire) -> Result<(), HandOverError> {
        let estate = self.estate();
        // One message takes 253, and there can be 256 devices.
        for chunk in estate.endpoints.chunks(128) {
            let fds: Vec<_> = chunk.iter().map(|fd| fd.as_fd()).collect();
            wire.send(&Saying::Estate, &fds)?;
        }
        let mut fds = vec![estate.control.as_fd()];
        if let Some((owner, fence)) = &estate.records {
            fds.extend([owner.as_fd(), fence.as_fd()]);
        }
        fds.extend(estate.state.as_ref().map(AsFd::as_fd));
        wire.send(&Saying::Estate, &fds)
    }
}
