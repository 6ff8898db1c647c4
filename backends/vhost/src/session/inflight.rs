//! Requests that a killed predecessor left in flight, as a session sees them:
//! the INFLIGHT messages, the wait for the predecessor's I/O to end, and the
//! recovery of a queue before it starts.
//!
//! The front end keeps the memory and hands it to the next backend. It is a
//! memfd of ours, but what comes back may be anything: it is used only if the
//! kernel says that it is memory which cannot shrink.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use pericarp_ring::{
    Found, IDENTITY_BYTES, InflightMemory, MAX_QUEUE_SIZE, QueueLayout, Recovered, SplitQueue,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vm_memory::ByteValued;

use super::{Refusal, Session, one_fd};
use crate::causes;
use crate::channel::{ChannelError, Message};
use crate::device::Device;
use crate::records::{Fence, Records};

/// How long the I/O of a dead process may take.
const FENCE_LIMIT: Duration = Duration::from_secs(60);
/// From when on waiting is worth a line.
const FENCE_PATIENCE: Duration = Duration::from_millis(200);
/// Between two looks at the lock.
const FENCE_PAUSE: Duration = Duration::from_millis(2);

/// The record of a running queue, and the lock its worker's ring holds.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) recovered: Recovered,
    pub(crate) fence: Arc<Fence>,
}

impl<D: Device> Session<'_, D> {
    /// Whether the INFLIGHT messages can be served.
    pub(super) fn inflight_feature(&self) -> VhostUserProtocolFeatures {
        if self.safety.reopener.is_some() {
            VhostUserProtocolFeatures::INFLIGHT_SHMFD
        } else {
            VhostUserProtocolFeatures::empty()
        }
    }

    /// GET_INFLIGHT_FD. A size of zero is the protocol's way to say that there
    /// is none.
    pub(super) fn answer_inflight(&mut self, message: &Message) -> Result<(), ChannelError> {
        match self.make_inflight(message) {
            Ok((answer, memory)) => {
                let memory = Some(memory.as_fd());
                self.channel
                    .reply_with(message.code, answer.as_slice(), memory)
            }
            Err(refusal) => {
                let why = causes(&refusal);
                warn!("device {}: GET_INFLIGHT_FD refused: {why}", self.device_id);
                let none = VhostUserInflight::default();
                self.channel.reply(message.code, none.as_slice())
            }
        }
    }

    fn make_inflight(&self, message: &Message) -> Result<(VhostUserInflight, OwnedFd), Refusal> {
        let wanted = self.inflight_body(message)?;
        let size = InflightMemory::bytes(wanted.num_queues, wanted.queue_size);
        // A whole number of pages, so that the mapping ends where the file does.
        let size = size.next_multiple_of(4096);
        let memory = memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memory, size)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&memory, seals)?;
        let answer = VhostUserInflight::new(size, 0, wanted.num_queues, wanted.queue_size);
        Ok((answer, memory))
    }

    /// SET_INFLIGHT_FD: the records of this session, or of its predecessor.
    pub(super) fn set_inflight(&mut self, message: &mut Message) -> Result<(), Refusal> {
        let given = self.inflight_body(message)?;
        let memory = one_fd(message)?;
        let Some(reopener) = &self.safety.reopener else {
            return Err(Refusal::Unknown(message.code));
        };
        // Only memory has seals, and what cannot shrink cannot fault. Opening
        // a file of another kind anew could wait for ever.
        let seals = fcntl_get_seals(&memory).map_err(|_| Refusal::NotMemory)?;
        if !seals.contains(SealFlags::SHRINK) {
            fcntl_add_seals(&memory, SealFlags::SHRINK).map_err(|_| Refusal::NotMemory)?;
        }
        let fence = Fence::new(reopener.reopen(memory.as_fd())?);
        let memory = InflightMemory::open(
            File::from(memory),
            given.mmap_offset,
            given.num_queues,
            given.queue_size,
            [0; IDENTITY_BYTES],
        )?;
        self.pause_all();
        self.shared = Some(Records::new(memory, fence));
        self.resume_all()
    }

    fn inflight_body(&self, message: &Message) -> Result<VhostUserInflight, Refusal> {
        let body: VhostUserInflight = message.body().ok_or(Refusal::Short)?;
        let negotiated = self
            .protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        if !negotiated {
            return Err(Refusal::Unknown(message.code));
        }
        let (queues, count) = (body.num_queues, self.vrings.len());
        if queues == 0 || usize::from(queues) > count {
            let index = u64::from(queues);
            return Err(Refusal::NoSuchQueue { index, count });
        }
        if body.queue_size == 0 || body.queue_size > MAX_QUEUE_SIZE {
            return Err(pericarp_ring::QueueError::BadSize(body.queue_size).into());
        }
        Ok(body)
    }

    /// Finds out what a predecessor left of a queue that is about to start, and
    /// sets the queue to where it stood. `None` where nothing is recorded.
    pub(super) fn recover(
        &self,
        index: usize,
        queue: &mut SplitQueue,
        layout: &QueueLayout,
    ) -> Result<Option<Kept>, Refusal> {
        let Some(records) = self.shared.as_ref().or(self.safety.file.as_ref()) else {
            return Ok(None);
        };
        let id = self.device_id;
        if records.memory.is_lost() {
            warn!("device {id} queue {index}: the memory for requests in flight is gone");
            return Ok(None);
        }
        // Before anything of the ring is believed: the dead process's I/O may
        // still go on, into guest memory and onto the disk.
        self.wait_for(&records.fence)?;
        let record = records.memory.queue(index as u16);
        let Some((recovered, found)) = record.and_then(|r| r.recover(queue, layout)) else {
            warn!("device {id} queue {index}: no room to record its requests in flight");
            return Ok(None);
        };
        match found {
            Found::Nothing => {}
            Found::Requests(count) => {
                info!("device {id} queue {index}: {count} requests were in flight; done again");
            }
            Found::Stranger(why) => warn!(
                "device {id} queue {index}: the record of requests in flight is dropped: {why}"
            ),
        }
        let fence = Arc::clone(&records.fence);
        Ok(Some(Kept { recovered, fence }))
    }

    /// Waits until no other process owns the records, not even a dead one
    /// through I/O that goes on.
    fn wait_for(&self, fence: &Fence) -> Result<(), Refusal> {
        let begin = Instant::now();
        let mut told = false;
        while !fence.try_take()? {
            if begin.elapsed() > FENCE_LIMIT {
                return Err(Refusal::Fenced);
            }
            if !told && begin.elapsed() > FENCE_PATIENCE {
                told = true;
                let id = self.device_id;
                info!("device {id}: waiting for the I/O of the process that served it before");
            }
            // A front end that goes, or the end of the program, ends the wait.
            self.channel
                .pause(FENCE_PAUSE)
                .map_err(|_| Refusal::Fenced)?;
        }
        Ok(())
    }
}
