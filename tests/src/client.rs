//! A block driver on the crate `virtio-driver`: an implementation of both the
//! vhost-user front end and the split ring that shares nothing with ours.
//! Used by `tests/driver.rs` and by the benches as load generator.
#![expect(unsafe_code)]
// UNSAFETY: `virtio-driver` takes buffers as raw pointers where they live in
// memory that was mapped for the device.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::bounded::{Deadline, poll as poll_until};

/// Largest transfer of one request, unless it is said.
pub const SLOT: usize = 128 * 1024;

/// A connected driver. Each queue has `depth` slots of one request each.
pub struct Client {
    // Before the transport: the rings live in the transport's memory.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    memory: GuestMemoryMmap,
    depth: usize,
    /// Bytes of a slot.
    room: usize,
    early: Vec<VecDeque<Finished>>,
    /// The longest wait for one completion.
    pub limit: Duration,
    /// Kicks written so far.
    pub kicks: u64,
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its slot.
    pub slot: usize,
    /// Zero or a negative errno.
    pub ret: i32,
}

impl Client {
    /// Connects and sets up `queues` queues for `depth` requests each.
    ///
    /// # Errors
    /// When the backend is not there, offers too little or refuses.
    pub fn connect(socket: &Path, queues: usize, depth: usize) -> Result<Self> {
        Self::with_slots(socket, queues, depth, SLOT)
    }

    /// The same with slots of `room` bytes.
    ///
    /// # Errors
    /// As of [`connect`](Self::connect).
    pub fn with_slots(socket: &Path, queues: usize, depth: usize, room: usize) -> Result<Self> {
        let wanted = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::all().bits();
        // The crate connects by itself; wait until someone listens.
        let path = socket.to_str().ok_or(ErrorKind::InvalidInput)?;
        let vhost = poll_until(Duration::from_secs(10), || {
            match VhostUser::new(path, wanted) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => None,
                answer => Some(answer),
            }
        });
        let vhost = vhost.ok_or(ErrorKind::ConnectionRefused)??;
        let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
        // Three descriptors a request.
        let size = (depth * 4).next_power_of_two().max(16) as u16;
        let mut rings = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, size)?;
        // The crate starts with them off, for drivers that poll.
        rings
            .iter_mut()
            .for_each(|ring: &mut VirtioBlkQueue<_>| ring.set_used_notif_enabled(true));

        let len = queues * depth * room;
        let file = File::from(memfd_create("buffers", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        let range = (
            GuestAddress(0),
            len,
            Some(FileOffset::new(file.try_clone()?, 0)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).map_err(Error::other)?;
        let address = memory
            .get_host_address(GuestAddress(0))
            .map_err(Error::other)?;
        transport.map_mem_region(address as usize, len, file.as_raw_fd(), 0)?;
        let early = vec![VecDeque::new(); queues];
        // Long: a disk that others keep busy is not what is tested.
        let limit = Duration::from_secs(30);
        Ok(Client {
            queues: rings,
            transport,
            memory,
            depth,
            room,
            early,
            limit,
            kicks: 0,
        })
    }

    /// The device's configuration space.
    ///
    /// # Errors
    /// When the backend does not give it.
    pub fn config(&self) -> Result<VirtioBlkConfig> {
        self.transport.get_config()
    }

    /// Bytes on the disk.
    ///
    /// # Errors
    /// When the backend does not give its configuration.
    pub fn capacity(&self) -> Result<u64> {
        Ok(u64::from(self.config()?.capacity) * crate::model::SECTOR)
    }

    /// True when the device offered `feature`.
    pub fn offers(&self, feature: VirtioBlkFeatureFlags) -> bool {
        self.transport.get_features() & feature.bits() != 0
    }

    fn at(&self, queue: usize, slot: usize) -> GuestAddress {
        assert!(slot < self.depth, "slot {slot} of {}", self.depth);
        GuestAddress(((queue * self.depth + slot) * self.room) as u64)
    }

    fn pointer(&self, queue: usize, slot: usize, len: usize) -> *mut u8 {
        assert!(len <= self.room, "{len} bytes do not fit a slot");
        let region = self.memory.iter().next().expect("there is one region");
        region
            .as_ptr()
            .wrapping_add(self.at(queue, slot).0 as usize)
    }

    /// Puts a read into the ring; [`Client::kick`] makes it known.
    ///
    /// # Errors
    /// When the ring is full or the offset is no sector.
    pub fn submit_read(
        &mut self,
        queue: usize,
        slot: usize,
        offset: u64,
        len: usize,
    ) -> Result<()> {
        let pointer = self.pointer(queue, slot, len);
        // SAFETY: `pointer` checked that the slot's bytes are in `memory`,
        // which lives as long as the queue and is only touched through
        // volatile accesses.
        unsafe { self.queues[queue].read_raw(offset, pointer, len, slot) }
    }

    /// Puts a write of `data` into the ring.
    ///
    /// # Errors
    /// When the ring is full or the offset is no sector.
    pub fn submit_write(
        &mut self,
        queue: usize,
        slot: usize,
        offset: u64,
        data: &[u8],
    ) -> Result<()> {
        let pointer = self.pointer(queue, slot, data.len());
        self.memory
            .write_slice(data, self.at(queue, slot))
            .map_err(Error::other)?;
        // SAFETY: as in `submit_read`.
        unsafe { self.queues[queue].write_raw(offset, pointer, data.len(), slot) }
    }

    /// Puts a flush into the ring.
    ///
    /// # Errors
    /// When the ring is full.
    pub fn submit_flush(&mut self, queue: usize, slot: usize) -> Result<()> {
        self.queues[queue].flush(slot)
    }

    /// Notifies the device if it wants to be.
    ///
    /// # Errors
    /// When the kick cannot be written.
    pub fn kick(&mut self, queue: usize) -> Result<()> {
        if self.queues[queue].avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify()?;
            self.kicks += 1;
        }
        Ok(())
    }

    /// The data a read left in its slot.
    ///
    /// # Errors
    /// Never for a slot of this client.
    pub fn data(&self, queue: usize, slot: usize, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, self.at(queue, slot))
            .map_err(Error::other)?;
        Ok(data)
    }

    /// The next request that is back already, without waiting.
    pub fn ready(&mut self, queue: usize) -> Option<Finished> {
        let early = &mut self.early[queue];
        if early.is_empty() {
            early.extend(self.queues[queue].completions().map(|done| Finished {
                slot: done.context,
                ret: done.ret,
            }));
        }
        early.pop_front()
    }

    /// Waits for the next request that comes back, by the call eventfd only:
    /// a device that forgets to signal is a time-out here.
    ///
    /// # Errors
    /// When none comes within the limit.
    pub fn finished(&mut self, queue: usize) -> Result<Finished> {
        let deadline = Deadline::after(self.limit);
        loop {
            if let Some(done) = self.ready(queue) {
                return Ok(done);
            }
            if deadline.passed() {
                let what = format!("no completion signalled within {:?}", self.limit);
                return Err(Error::new(ErrorKind::TimedOut, what));
            }
            let call = self.transport.get_completion_fd(queue);
            let timeout = Timespec::try_from(deadline.left()).map_err(Error::other)?;
            let mut fds = [PollFd::new(call.as_ref(), PollFlags::IN)];
            if poll(&mut fds, Some(&timeout))? == 1 {
                call.read()?;
            }
        }
    }

    /// Sleeps until the queue is called, whatever is back already. Returns how
    /// often it was since it was asked last.
    ///
    /// # Errors
    /// When it is not called within the limit.
    pub fn called(&mut self, queue: usize) -> Result<u64> {
        let call = self.transport.get_completion_fd(queue);
        let timeout = Timespec::try_from(self.limit).map_err(Error::other)?;
        let mut fds = [PollFd::new(call.as_ref(), PollFlags::IN)];
        if poll(&mut fds, Some(&timeout))? == 0 {
            return Err(ErrorKind::TimedOut.into());
        }
        call.read()
    }

    /// Sleeps until one of these queues is called, and takes the calls that are
    /// there. What is back already must have been taken first.
    ///
    /// # Errors
    /// When none is called within `limit`.
    pub fn wait_any(lanes: &[(&Self, usize)], limit: Duration) -> Result<()> {
        let calls: Vec<_> = lanes
            .iter()
            .map(|(client, queue)| client.transport.get_completion_fd(*queue))
            .collect();
        let mut fds: Vec<_> = calls
            .iter()
            .map(|call| PollFd::new(call.as_ref(), PollFlags::IN))
            .collect();
        let timeout = Timespec::try_from(limit).map_err(Error::other)?;
        if poll(&mut fds, Some(&timeout))? == 0 {
            return Err(ErrorKind::TimedOut.into());
        }
        for (call, fd) in calls.iter().zip(&fds) {
            if !fd.revents().is_empty() {
                call.read()?;
            }
        }
        Ok(())
    }

    fn one(&mut self, queue: usize) -> Result<()> {
        self.kick(queue)?;
        match self.finished(queue)?.ret {
            0 => Ok(()),
            errno => Err(Error::from_raw_os_error(-errno)),
        }
    }

    /// Reads alone: submits, waits, returns the data.
    ///
    /// # Errors
    /// The device's error, or a time-out.
    pub fn read(&mut self, queue: usize, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.submit_read(queue, 0, offset, len)?;
        self.one(queue)?;
        self.data(queue, 0, len)
    }

    /// Writes alone.
    ///
    /// # Errors
    /// The device's error, or a time-out.
    pub fn write(&mut self, queue: usize, offset: u64, data: &[u8]) -> Result<()> {
        self.submit_write(queue, 0, offset, data)?;
        self.one(queue)
    }

    /// Flushes alone.
    ///
    /// # Errors
    /// The device's error, or a time-out.
    pub fn flush(&mut self, queue: usize) -> Result<()> {
        self.submit_flush(queue, 0)?;
        self.one(queue)
    }
}
