//! The vrings of a session: what the front end configured, and whether a
//! worker has the queue.
//!
//! A queue runs while its rings, its kick descriptor and the memory are known
//! and it is enabled. Every message that changes one of these goes through
//! [`Session::change`], which takes the queue back, applies the change, and
//! starts the queue again if it may run.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use pericarp_ring::{QueueError, QueueLayout, SplitQueue};
use vhost::vhost_user::message::{FrontendReq, VhostUserVringAddr, VhostUserVringState};

use super::{Refusal, Session, number_in, one_fd};
use crate::channel::Message;
use crate::device::Device;
use crate::features;
use crate::mailbox::{Command, QueueId, StartQueue};

/// Bits of the number in SET_VRING_KICK, CALL and ERR.
const INDEX_MASK: u64 = 0xff;
const NO_FD: u64 = 0x100;

/// One vring as the front end set it up.
#[derive(Debug, Default)]
pub(super) struct Vring {
    size: u16,
    addresses: Option<Addresses>,
    base: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    enabled: bool,
    running: bool,
}

/// Ring addresses in the front end's own address space.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    descriptors: u64,
    available: u64,
    used: u64,
}

impl<D: Device> Session<'_, D> {
    /// The SET_VRING_* messages.
    pub(super) fn set_vring(
        &mut self,
        request: FrontendReq,
        message: &mut Message,
    ) -> Result<(), Refusal> {
        match request {
            FrontendReq::SET_VRING_ADDR => {
                let body: VhostUserVringAddr = message.body().ok_or(Refusal::Short)?;
                let index = self.index(u64::from(body.index))?;
                let addresses = Addresses {
                    descriptors: body.descriptor,
                    available: body.available,
                    used: body.used,
                };
                self.change(index, |v| v.addresses = Some(addresses))
            }
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR => self.set_descriptor(request, message),
            _ => {
                let state: VhostUserVringState = message.body().ok_or(Refusal::Short)?;
                let index = self.index(u64::from(state.index))?;
                let number = state.num;
                self.set_state(request, index, number)
            }
        }
    }

    fn set_state(
        &mut self,
        request: FrontendReq,
        index: usize,
        number: u32,
    ) -> Result<(), Refusal> {
        match request {
            FrontendReq::SET_VRING_NUM => {
                let size = u16::try_from(number).unwrap_or(u16::MAX);
                if !size.is_power_of_two() || size > self.device.max_queue_size() {
                    return Err(QueueError::BadSize(size).into());
                }
                self.change(index, |v| v.size = size)
            }
            FrontendReq::SET_VRING_BASE => self.change(index, |v| v.base = number as u16),
            _ => self.change(index, |v| v.enabled = number & 1 != 0),
        }
    }

    fn set_descriptor(
        &mut self,
        request: FrontendReq,
        message: &mut Message,
    ) -> Result<(), Refusal> {
        let number = number_in(message)?;
        let index = self.index(number & INDEX_MASK)?;
        let fd = if number & NO_FD != 0 {
            None
        } else {
            let fd = one_fd(message)?;
            // A full pipe must not stop a worker that calls the driver. For a
            // kick nothing changes: it is polled before it is read.
            if let Ok(flags) = rustix::fs::fcntl_getfl(fd.as_fd()) {
                let _ = rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK);
            }
            Some(Arc::new(fd))
        };
        match request {
            FrontendReq::SET_VRING_KICK => {
                let kick = fd.ok_or(Refusal::NoKick)?;
                self.change(index, |v| v.kick = Some(kick))
            }
            FrontendReq::SET_VRING_CALL => {
                self.vrings[index].call.clone_from(&fd);
                if self.vrings[index].running {
                    let id = self.id(index);
                    self.workers.of(id).send(Command::SetCall(id, fd));
                }
                Ok(())
            }
            _ => self.change(index, |v| v.error = fd),
        }
    }

    /// GET_VRING_BASE: the queue stops, and its kick descriptor is forgotten
    /// (vhost-user, "Ring states").
    pub(super) fn get_base(&mut self, index: u32) -> Result<(u32, u32), Refusal> {
        let at = self.index(u64::from(index))?;
        self.pause(at);
        self.vrings[at].kick = None;
        Ok((index, u32::from(self.vrings[at].base)))
    }

    fn index(&self, index: u64) -> Result<usize, Refusal> {
        let count = self.vrings.len();
        usize::try_from(index)
            .ok()
            .filter(|&i| i < count)
            .ok_or(Refusal::NoSuchQueue { index, count })
    }

    fn id(&self, index: usize) -> QueueId {
        QueueId {
            device: self.device_id,
            queue: index as u16,
        }
    }

    /// Applies a change to a queue that no worker has.
    fn change(&mut self, index: usize, apply: impl FnOnce(&mut Vring)) -> Result<(), Refusal> {
        self.pause(index);
        apply(&mut self.vrings[index]);
        self.start(index)
    }

    /// Hands the queue to its worker, if it may run.
    fn start(&mut self, index: usize) -> Result<(), Refusal> {
        let id = self.id(index);
        let vring = &self.vrings[index];
        // Without protocol features there is no SET_VRING_ENABLE, and queues
        // are enabled from the start.
        let enabled = vring.enabled || self.features & features::PROTOCOL == 0;
        let (Some(addresses), Some(kick)) = (&vring.addresses, &vring.kick) else {
            return Ok(());
        };
        if !enabled || vring.size == 0 || self.regions.is_empty() {
            return Ok(());
        }
        let layout = QueueLayout {
            size: vring.size,
            descriptors: addresses.descriptors,
            available: addresses.available,
            used: addresses.used,
        };
        let event_idx = self.features & features::EVENT_IDX != 0;
        let queue = SplitQueue::new(Arc::clone(&self.memory), layout, vring.base, event_idx)?;
        let (reply, answer) = sync_channel(1);
        let start = Box::new(StartQueue {
            id,
            device: Arc::clone(self.device),
            queue,
            kick: Arc::clone(kick),
            call: vring.call.clone(),
            error: vring.error.clone(),
        });
        self.workers.of(id).send(Command::Start(start, reply));
        answer.recv().map_err(|_| Refusal::WorkerGone)??;
        self.vrings[index].running = true;
        Ok(())
    }

    /// Takes the queue back from its worker, drained. True when it ran.
    fn pause(&mut self, index: usize) -> bool {
        if !std::mem::take(&mut self.vrings[index].running) {
            return false;
        }
        let id = self.id(index);
        let (reply, answer) = sync_channel(1);
        self.workers.of(id).send(Command::Stop(id, reply));
        // A worker that is gone takes the process with it.
        if let Ok(next) = answer.recv() {
            self.vrings[index].base = next;
        }
        true
    }

    /// Takes all queues back; returns those that ran.
    pub(super) fn pause_all(&mut self) -> Vec<usize> {
        (0..self.vrings.len()).filter(|&i| self.pause(i)).collect()
    }

    /// Starts the queues again that [`pause_all`](Self::pause_all) stopped.
    pub(super) fn resume_all(&mut self, queues: &[usize]) -> Result<(), Refusal> {
        queues.iter().try_for_each(|&index| self.start(index))
    }

    /// Ends all queues.
    pub(super) fn stop_all(&mut self) {
        self.pause_all();
    }
}
