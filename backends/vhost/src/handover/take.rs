//! The new process's half of a hand-over: `main` asks before it confines itself,
//! and has the queues drained after that.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::HandOverError;
use super::bag::{MOST_BAGS, Unpacked};
use super::state::{DeviceState, Fds, Identity, Saying, VERSION};
use super::wire::{MAX_FDS, Wire};
use crate::device::Device;
use crate::server::{Fleet, FleetError, Server};
use pericarp_control::Stop;

/// How long the old process may take for each answer; it waits 5 s for requests
/// in flight.
const LIMIT: Duration = Duration::from_secs(15);
/// How long it may take for the last one. Whoever gives up here while the answer
/// is on its way leaves the front ends alone, so it is long.
const LAST_LIMIT: Duration = Duration::from_secs(60);

/// What a process gets from the one it takes over from, beside its sessions.
#[derive(Debug)]
pub struct Inheritance {
    /// The socket of each device.
    pub endpoints: Vec<OwnedFd>,
    /// The control socket.
    pub control: OwnedFd,
    /// For [`InflightFile::inherit`](crate::InflightFile::inherit).
    pub records: Option<(OwnedFd, OwnedFd)>,
    /// For [`inherit_file`](crate::inherit_file).
    pub state: Option<OwnedFd>,
}

/// The running process that is taken over from. It goes on serving if this is
/// dropped.
#[derive(Debug)]
pub struct Predecessor {
    wire: Wire,
}

impl Predecessor {
    /// Asks the process behind this control socket, which goes on meanwhile. A
    /// signal to end ends the talk, too, for as long as there is a way back.
    ///
    /// # Errors
    /// [`HandOverError`].
    pub fn ask(
        control: &Path,
        offer: Identity,
        stop: &Stop,
    ) -> Result<(Self, Inheritance), HandOverError> {
        let stream = UnixStream::connect(control).map_err(HandOverError::Connect)?;
        let signals = stop.signals().try_clone_to_owned()?;
        let wire = Wire::new(stream, Some(signals), MAX_FDS)?;
        wire.check_peer(rustix::process::geteuid())?;
        wire.send_line(&json!({"op": "hand-over", "version": VERSION}).to_string())?;
        let answer = wire.receive_line(LIMIT)?;
        let answer: Value =
            serde_json::from_slice(&answer).map_err(|_| HandOverError::Malformed)?;
        if answer["ok"] != json!(true) {
            let error = answer["error"].as_str().ok_or(HandOverError::Malformed)?;
            return Err(HandOverError::Refused(error.to_owned()));
        }
        let devices = offer.devices.len();
        let (with_records, with_state) = (offer.records.is_some(), offer.state.is_some());
        wire.send(&Saying::Offer(offer), &[])?;
        let this = Self { wire };
        let mut endpoints = Vec::with_capacity(devices);
        while endpoints.len() < devices {
            let fds = this.estate()?;
            if fds.is_empty() {
                return Err(HandOverError::Malformed);
            }
            endpoints.extend(fds);
        }
        let mut rest = Fds::new(this.estate()?);
        let control = rest.take()?;
        let records = if with_records {
            Some((rest.take()?, rest.take()?))
        } else {
            None
        };
        let state = rest.take_if(with_state)?;
        rest.end()?;
        if endpoints.len() != devices {
            return Err(HandOverError::Malformed);
        }
        let inheritance = Inheritance {
            endpoints,
            control,
            records,
            state,
        };
        Ok((this, inheritance))
    }

    fn estate(&self) -> Result<Vec<OwnedFd>, HandOverError> {
        match self.hear(LIMIT)? {
            (Saying::Estate, fds) => Ok(fds),
            _ => Err(HandOverError::Malformed),
        }
    }

    /// Takes the sessions of all devices over, each with its id, and has `fleet`
    /// serve them.
    ///
    /// # Errors
    /// [`HandOverError`]; the old process has its sessions then.
    pub fn take<D: Device>(
        mut self,
        mut servers: Vec<(&str, Server<D>)>,
        fleet: &Fleet<D>,
    ) -> Result<(), HandOverError> {
        self.wire.send(&Saying::Drain, &[])?;
        for (_, server) in &mut servers {
            let (state, fds): (DeviceState, _) = match self.hear(LIMIT)? {
                (Saying::Device(state), fds) => (state, fds),
                _ => return Err(HandOverError::Malformed),
            };
            let bags = self.unpack(state.bags)?;
            server.take_over(state, fds, bags)?;
        }
        // All that may fail comes before there is no way back.
        let started = servers.into_iter().map(|(id, s)| fleet.start_when(id, s));
        let started = started.collect::<Result<Vec<_>, _>>();
        let started = started.map_err(|error| match error {
            FleetError::System(e) => HandOverError::System(e),
            _ => HandOverError::Ending,
        })?;
        self.wire.look()?;
        // Whoever is told to end from here on does so with what he has, as the
        // old process is gone perhaps.
        self.wire.ignore_the_end();
        self.wire.send(&Saying::Ready, &[])?;
        let (Saying::Yours, _) = self.hear(LAST_LIMIT)? else {
            return Err(HandOverError::Malformed);
        };
        for go in started {
            // Gone only if it panicked, and then its device has no session.
            let _ = go.send(());
        }
        Ok(())
    }

    fn unpack(&self, bags: u32) -> Result<Vec<Unpacked>, HandOverError> {
        if bags > MOST_BAGS {
            return Err(HandOverError::Malformed);
        }
        (0..bags)
            .map(|_| match self.hear(LIMIT)? {
                (Saying::Bag { text }, descriptors) => Ok(Unpacked { text, descriptors }),
                _ => Err(HandOverError::Malformed),
            })
            .collect()
    }

    fn hear(&self, limit: Duration) -> Result<(Saying, Vec<OwnedFd>), HandOverError> {
        match self.wire.receive(limit)? {
            (Saying::Refused { error, mistake }, _) if mistake => {
                Err(HandOverError::Differs(error))
            }
            (Saying::Refused { error, .. }, _) => Err(HandOverError::Refused(error)),
            other => Ok(other),
        }
    }
}
