//! A session that moves from one process to another: packed once its queues
//! stand still, unpacked where it goes on. What arrives is checked as if the
//! front end had sent it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use log::{info, warn};
use pericarp_ring::{
    GuestMemory, IDENTITY_BYTES, InflightMemory, QueueError, QueueLayout, Region, RegionSpec,
    SplitQueue,
};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::vring::{Addresses, Vring, bell};
use super::{Refusal, Session};
use crate::causes;
use crate::device::Device;
use crate::features;
use crate::handover::{
    Descriptor, DeviceState, Fds, HandOverError, LOOK, Meeting, Parcel, RecordsState, RegionState,
    SessionState, Verdict, VringState, monotonic,
};
use crate::oversight::Notices;
use crate::records::{Fence, Records};

/// A session that can go on here, up to its connection and to starting its queues.
#[derive(Debug)]
pub(crate) struct Moved {
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// The configuration space as the driver may have read it.
    config: Vec<u8>,
    stood_since: u64,
    regions: Vec<Region>,
    memory: Arc<GuestMemory>,
    vrings: Vec<Vring>,
    backend_channel: Option<Notices>,
    shared: Option<Records>,
}

impl<D: Device> Session<'_, D> {
    /// Another process wants the session: brings the queues to rest and waits
    /// for what becomes of them. True when they are ours no more.
    pub(super) fn meet(&mut self) -> bool {
        let Some(meeting) = self.meeting else {
            return false;
        };
        if self.rest(meeting) {
            let parcel = self.pack(monotonic());
            let parcel = parcel.map_err(|e| HandOverError::Session(self.device_id, e.to_string()));
            if meeting.arrive(self.device_id, parcel) == Verdict::Leave {
                return true;
            }
        }
        self.go_on();
        false
    }

    /// Takes all queues back, for as long as somebody waits for it. A disk may
    /// take any time: when that is over, queues with requests in flight go on
    /// where they are. False then.
    fn rest(&mut self, meeting: &Meeting) -> bool {
        let answers: Vec<_> = (0..self.vrings.len())
            .map(|index| self.ask_back(index))
            .collect();
        let mut wanted = true;
        for (index, answer) in answers.iter().enumerate() {
            let Some(answer) = answer else {
                continue;
            };
            while wanted {
                match answer.recv_timeout(LOOK) {
                    Ok(stopped) => {
                        self.stopped(index, stopped);
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) => wanted = meeting.is_gathering(),
                    // A worker that is gone takes the process with it.
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            if !wanted {
                self.leave_there(index, answer);
            }
        }
        wanted
    }

    fn go_on(&mut self) {
        if let Err(refusal) = self.resume_all() {
            let (id, why) = (self.device_id, causes(&refusal));
            warn!("device {id}: a queue does not go on: {why}");
        }
    }

    fn pack(&self, stood_since: u64) -> std::io::Result<Parcel> {
        let mut fds: Vec<Descriptor> = vec![Arc::new(self.channel.descriptor()?)];
        let gone = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let mut regions = Vec::with_capacity(self.regions.len());
        for region in &self.regions {
            let file = region.file().ok_or_else(gone)?;
            fds.push(Arc::new(file.as_fd().try_clone_to_owned()?));
            let spec = region.spec();
            regions.push(RegionState {
                guest_address: spec.guest_address,
                size: spec.size,
                user_address: spec.user_address,
                file_offset: spec.file_offset,
            });
        }
        let mut vrings = Vec::with_capacity(self.vrings.len());
        for vring in &self.vrings {
            fds.extend(vring.kick.clone());
            fds.extend(vring.call.as_ref().map(|bell| Arc::clone(&bell.fd)));
            fds.extend(vring.error.as_ref().map(|bell| Arc::clone(&bell.fd)));
            vrings.push(VringState {
                size: vring.size,
                addresses: vring
                    .addresses
                    .map(|a| [a.descriptors, a.available, a.used]),
                base: vring.base,
                enabled: vring.enabled,
                broken: vring.broken,
                kick: vring.kick.is_some(),
                call: vring.call.is_some(),
                error: vring.error.is_some(),
            });
        }
        let channel = self.backend_channel.as_ref().map(Notices::descriptor);
        fds.extend(channel.clone());
        let records = match &self.shared {
            None => None,
            Some(records) => {
                let (file, offset) = records.memory.place().ok_or_else(gone)?;
                let fence = records.fence.description();
                fds.push(Arc::new(file.as_fd().try_clone_to_owned()?));
                fds.push(Arc::new(fence.try_clone_to_owned()?));
                let (queues, queue_size) = records.memory.geometry();
                Some(RecordsState {
                    offset,
                    queues,
                    queue_size,
                })
            }
        };
        let session = SessionState {
            features: self.features,
            protocol: self.protocol.bits(),
            config: self.device.config(),
            stood_since,
            regions,
            vrings,
            channel: channel.is_some(),
            records,
        };
        let limits = self.oversight.as_ref().map(|o| o.all_limits());
        let mut parcel = Parcel::idle(&limits.unwrap_or_default());
        parcel.state.session = Some(session);
        parcel.fds = fds;
        Ok(parcel.with(self.device.pack()?))
    }

    /// Makes a fresh session the one that moved here.
    pub(crate) fn adopt(&mut self, moved: Moved) {
        self.features = moved.features;
        self.protocol = moved.protocol;
        self.regions = moved.regions;
        self.memory = moved.memory;
        self.vrings = moved.vrings;
        self.backend_channel = moved.backend_channel;
        self.shared = moved.shared;
        self.device.resumed(moved.features, &moved.config);
        self.go_on();
        if self.vrings.iter().any(|vring| vring.running) {
            // From the last request that the other process served until the
            // workers here look at the rings.
            let pause = Duration::from_nanos(monotonic().saturating_sub(moved.stood_since));
            let id = self.device_id;
            info!("device {id}: taken over, its queues stood still for {pause:?}");
        }
        self.hear();
        // A disk that was resized between the two.
        if self.device.config() != moved.config
            && let Some(oversight) = &self.oversight
        {
            oversight.config_changed();
        }
    }
}

impl Moved {
    /// Unpacks a session for this device and the front end's connection.
    /// `Ok(None)` where there was none.
    pub(crate) fn unpack<D: Device>(
        device: &D,
        state: DeviceState,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<(UnixStream, Self)>, Refusal> {
        let mut fds = Fds::new(fds);
        let Some(state) = state.session else {
            fds.end()?;
            return Ok(None);
        };
        let offered = device.features() | features::COMMON;
        if state.features & !offered != 0 {
            return Err(Refusal::Features(state.features & !offered));
        }
        // Bits unknown here are promises that could not be kept.
        let known = super::PROTOCOL_FEATURES | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let protocol = VhostUserProtocolFeatures::from_bits(state.protocol)
            .filter(|protocol| known.contains(*protocol));
        let protocol = protocol.ok_or(Refusal::Features(state.protocol))?;
        let stream = UnixStream::from(fds.take()?);
        stream.set_nonblocking(false)?;
        let mut regions = Vec::with_capacity(state.regions.len());
        for region in &state.regions {
            let spec = RegionSpec {
                guest_address: region.guest_address,
                size: region.size,
                user_address: region.user_address,
                file_offset: region.file_offset,
            };
            regions.push(Region::map(File::from(fds.take()?), spec)?);
        }
        let memory = Arc::new(GuestMemory::new(regions.clone())?);
        let (queues, count) = (state.vrings.len(), usize::from(device.queue_count()));
        if queues != count {
            let index = queues as u64;
            return Err(Refusal::NoSuchQueue { index, count });
        }
        let mut vrings = Vec::with_capacity(queues);
        for vring in &state.vrings {
            vrings.push(unpack_vring(vring, &mut fds, &memory, device)?);
        }
        let backend_channel = match fds.take_if(state.channel)? {
            None => None,
            Some(fd) => {
                let channel = bell(fd)?;
                Some(Notices::new(channel.fd, channel.is_socket))
            }
        };
        let shared = match &state.records {
            None => None,
            Some(records) => {
                let memory = InflightMemory::open(
                    File::from(fds.take()?),
                    records.offset,
                    records.queues,
                    records.queue_size,
                    [0; IDENTITY_BYTES],
                )?;
                Some(Records::new(memory, Fence::new(fds.take()?)))
            }
        };
        fds.end()?;
        let moved = Self {
            features: state.features,
            protocol,
            config: state.config,
            stood_since: state.stood_since,
            regions,
            memory,
            vrings,
            backend_channel,
            shared,
        };
        Ok(Some((stream, moved)))
    }
}

fn unpack_vring<D: Device>(
    state: &VringState,
    fds: &mut Fds,
    memory: &Arc<GuestMemory>,
    device: &D,
) -> Result<Vring, Refusal> {
    if state.size != 0 && (state.size > device.max_queue_size() || !state.size.is_power_of_two()) {
        return Err(QueueError::BadSize(state.size).into());
    }
    let kick = fds.take_if(state.kick)?.map(bell).transpose()?;
    if kick.as_ref().is_some_and(|kick| !kick.is_eventfd) {
        return Err(Refusal::NoKick);
    }
    let call = fds.take_if(state.call)?.map(bell).transpose()?;
    let error = fds.take_if(state.error)?.map(bell).transpose()?;
    let addresses = state.addresses.map(|[descriptors, available, used]| {
        let layout = QueueLayout {
            size: state.size,
            descriptors,
            available,
            used,
        };
        // Found now rather than when there is no way back. Rings that are not in
        // memory at the moment wait for it, as they did in the other process.
        if state.size != 0 {
            match SplitQueue::new(Arc::clone(memory), layout, state.base, false) {
                Ok(_) | Err(QueueError::BadAddress { .. }) => {}
                Err(error) => return Err(Refusal::from(error)),
            }
        }
        Ok(Addresses {
            descriptors,
            available,
            used,
        })
    });
    Ok(Vring {
        size: state.size,
        addresses: addresses.transpose()?,
        base: state.base,
        kick: kick.map(|kick| kick.fd),
        call,
        error,
        enabled: state.enabled,
        running: false,
        told: false,
        broken: state.broken,
    })
}
