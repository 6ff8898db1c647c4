//! The vrings of a session: what the front end configured, and whether a
//! worker has the queue.
//!
//! A queue runs while its rings, its kick descriptor and the memory are known
//! and it is enabled. Every message that changes one of these goes through
//! [`Session::change`], which takes the queue back, applies the change, and
//! starts the queue again if it may run.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use log::debug;
use pericarp_ring::{QueueError, QueueLayout, SplitQueue};
use rustix::fs::{AtFlags, StatxFlags, statx};
use vhost::vhost_user::message::{FrontendReq, VhostUserVringAddr, VhostUserVringState};

use super::{Refusal, Session, number_in, one_fd};
use crate::channel::Message;
use crate::device::Device;
use crate::features;
use crate::mailbox::{Bell, Command, QueueId, StartQueue, Stopped};

/// Bits of the number in SET_VRING_KICK, CALL and ERR.
const INDEX_MASK: u64 = 0xff;
const NO_FD: u64 = 0x100;

/// One vring as the front end set it up.
#[derive(Debug, Default)]
pub(super) struct Vring {
    pub(super) size: u16,
    pub(super) addresses: Option<Addresses>,
    pub(super) base: u16,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Option<Bell>,
    pub(super) error: Option<Bell>,
    pub(super) enabled: bool,
    pub(super) running: bool,
    /// The device was told that it is served.
    pub(super) told: bool,
    /// The driver broke the ring; it stays stopped until it is set up anew.
    pub(super) broken: bool,
}

/// Ring addresses in the front end's own address space.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
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
                self.change(index, |v| {
                    v.addresses = Some(addresses);
                    v.broken = false;
                })
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
            FrontendReq::SET_VRING_BASE => self.change(index, |v| {
                v.base = number as u16;
                v.broken = false;
            }),
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
            Some(bell(one_fd(message)?)?)
        };
        match request {
            FrontendReq::SET_VRING_KICK => {
                let kick = fd.filter(|b| b.is_eventfd).ok_or(Refusal::NoKick)?.fd;
                self.change(index, |v| {
                    v.kick = Some(kick);
                    v.broken = false;
                })
            }
            FrontendReq::SET_VRING_CALL => {
                self.vrings[index].call.clone_from(&fd);
                if !self.vrings[index].running {
                    return Ok(());
                }
                let id = self.id(index);
                let (reply, answer) = sync_channel(1);
                self.workers.of(id).send(Command::SetCall(id, fd, reply));
                Ok(answer.recv().map_err(|_| Refusal::WorkerGone)??)
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
        if vring.running || vring.broken {
            return Ok(());
        }
        // Without protocol features there is no SET_VRING_ENABLE, and queues
        // are enabled from the start.
        let enabled = vring.enabled || self.features & features::PROTOCOL == 0;
        let (Some(addresses), Some(kick)) = (&vring.addresses, &vring.kick) else {
            return Ok(());
        };
        let kick = Arc::clone(kick);
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
        let mut queue = SplitQueue::new(Arc::clone(&self.memory), layout, vring.base, event_idx)?;
        // Where there is a record, it knows better than SET_VRING_BASE.
        let record = self.recover(index, &mut queue, &layout)?;
        if !std::mem::replace(&mut self.vrings[index].told, true) {
            self.device.serves(id.queue, true);
        }
        let vring = &self.vrings[index];
        let (reply, answer) = sync_channel(1);
        let start = Box::new(StartQueue {
            id,
            device: Arc::clone(self.device),
            queue,
            kick,
            call: vring.call.clone(),
            error: vring.error.clone(),
            record,
            oversight: self.oversight.clone(),
        });
        self.workers.of(id).send(Command::Start(start, reply));
        answer.recv().map_err(|_| Refusal::WorkerGone)??;
        self.vrings[index].running = true;
        Ok(())
    }

    /// Takes the queue back from its worker, drained.
    fn pause(&mut self, index: usize) {
        if let Some(answer) = self.ask_back(index) {
            self.take_back(index, &answer);
        }
    }

    /// Tells the device of the queues that are not served any more. Between two
    /// messages, so that it hears nothing of those that only rest.
    pub(super) fn tell(&mut self) {
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            if vring.told && !vring.running {
                vring.told = false;
                self.device.serves(index as u16, false);
            }
        }
    }

    /// Takes all queues back. They drain together.
    pub(super) fn pause_all(&mut self) {
        let answers: Vec<_> = (0..self.vrings.len())
            .map(|index| self.ask_back(index))
            .collect();
        for (index, answer) in answers.iter().enumerate() {
            if let Some(answer) = answer {
                self.take_back(index, answer);
            }
        }
    }

    /// Tells the worker of a running queue to drain it.
    pub(super) fn ask_back(&mut self, index: usize) -> Option<Receiver<Stopped>> {
        if !std::mem::take(&mut self.vrings[index].running) {
            return None;
        }
        let id = self.id(index);
        let (reply, answer) = sync_channel(1);
        self.workers.of(id).send(Command::Stop(id, reply));
        Some(answer)
    }

    fn take_back(&mut self, index: usize, answer: &Receiver<Stopped>) {
        // A worker that is gone takes the process with it.
        if let Ok(stopped) = answer.recv() {
            self.stopped(index, stopped);
        }
    }

    /// A worker gave the queue back.
    pub(super) fn stopped(&mut self, index: usize, stopped: Stopped) {
        self.vrings[index].base = stopped.next_avail;
        self.vrings[index].broken = stopped.broken;
    }

    /// Has the worker keep a queue that it was asked for, if it still can.
    pub(super) fn leave_there(&mut self, index: usize, answer: &Receiver<Stopped>) {
        let id = self.id(index);
        self.workers.of(id).send(Command::GoOn(id));
        match answer.recv() {
            Ok(stopped) => self.stopped(index, stopped),
            Err(_) => self.vrings[index].running = true,
        }
    }

    /// Starts every queue that may run. One whose rings are not in memory now
    /// waits for a memory table that has them: front ends replace a region by
    /// removing and adding it.
    pub(super) fn resume_all(&mut self) -> Result<(), Refusal> {
        let mut first = Ok(());
        for index in 0..self.vrings.len() {
            match self.start(index) {
                Err(Refusal::Queue(QueueError::BadAddress { ring, .. })) => {
                    debug!("queue {index} waits for memory with its {ring} ring");
                }
                other => first = first.and(other),
            }
        }
        first
    }
}

/// Whether a socket is connected to one with a name, as the front end's own end of this very session
/// is: held here, the session would not see the end of its front end, and never end itself. Pairs of
/// sockets, by which front ends are told something, have no names.
fn leads_back(fd: OwnedFd) -> (OwnedFd, bool) {
    let socket = UnixStream::from(fd);
    let named = socket.peer_addr().is_ok_and(|peer| !peer.is_unnamed());
    (socket.into(), named)
}

/// Takes a descriptor that the driver is to be told something by, or that it
/// kicks. Only what can be waited for will do: a file on a file system of the
/// front end's own could hold us up for ever.
pub(super) fn bell(fd: OwnedFd) -> Result<Bell, Refusal> {
    // Without asking the file system behind it, which could wait, too.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let kind = statx(&fd, c"", flags, StatxFlags::TYPE)
        .map(|s| u32::from(s.stx_mode) & libc::S_IFMT)
        .map_err(|_| Refusal::BadBell)?;
    // Eventfds have no file type at all.
    if ![0, libc::S_IFIFO, libc::S_IFSOCK].contains(&kind) {
        return Err(Refusal::BadBell);
    }
    // Closing any other socket can wait for its peer (SO_LINGER), and the
    // worker may be the one that closes it.
    let foreign = kind == libc::S_IFSOCK
        && rustix::net::sockopt::socket_domain(&fd) != Ok(rustix::net::AddressFamily::UNIX);
    let (fd, leads_back) = match kind == libc::S_IFSOCK && !foreign {
        true => leads_back(fd),
        false => (fd, false),
    };
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|_| Refusal::BadBell)?;
    // O_PATH names a file and can do nothing with it: no engine takes it.
    if foreign || leads_back || flags.contains(rustix::fs::OFlags::PATH) {
        return Err(Refusal::BadBell);
    }
    // A full pipe must not stop a worker that calls the driver.
    let _ = rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK);
    Ok(Bell {
        fd: Arc::new(fd),
        is_eventfd: kind == 0,
        is_socket: kind == libc::S_IFSOCK,
    })
}
