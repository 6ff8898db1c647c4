//! The memory table of a session: SET_MEM_TABLE and the memory slots.
//!
//! A changed table first takes every running queue back, drained, then maps,
//! then starts the queues again on addresses resolved anew: the rings may have
//! moved with the memory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use pericarp_ring::{GuestMemory, MAX_REGIONS, Region, RegionSpec};
use vhost::vhost_user::message::{VhostUserMemory, VhostUserMemoryRegion};

use super::{Refusal, Session, one_fd};
use crate::channel::Message;
use crate::device::Device;

/// Where the region starts in ADD_MEM_REG and REM_MEM_REG, after padding.
const SINGLE_REGION_OFFSET: usize = 8;

impl<D: Device> Session<'_, D> {
    pub(super) fn set_mem_table(&mut self, message: &mut Message) -> Result<(), Refusal> {
        let header: VhostUserMemory = message.body().ok_or(Refusal::Short)?;
        let wanted = header.num_regions as usize;
        let given = message.fds.len();
        if wanted == 0 || wanted > MAX_REGIONS || given != wanted {
            return Err(Refusal::Descriptors { given, wanted });
        }
        let mut regions = Vec::with_capacity(wanted);
        for (index, fd) in message.fds.drain(..).enumerate().collect::<Vec<_>>() {
            let offset = size_of::<VhostUserMemory>() + index * size_of::<VhostUserMemoryRegion>();
            regions.push(map(message, offset, fd)?);
        }
        self.replace_memory(regions)
    }

    pub(super) fn add_region(&mut self, message: &mut Message) -> Result<(), Refusal> {
        let fd = one_fd(message)?;
        let mut regions = self.regions.clone();
        regions.push(map(message, SINGLE_REGION_OFFSET, fd)?);
        self.replace_memory(regions)
    }

    pub(super) fn remove_region(&mut self, message: &Message) -> Result<(), Refusal> {
        let spec = spec(message, SINGLE_REGION_OFFSET)?;
        let mut regions = self.regions.clone();
        // The offset in the file is not part of a region's identity.
        let found = regions.iter().position(|r| {
            let have = r.spec();
            have.guest_address == spec.guest_address
                && have.user_address == spec.user_address
                && have.size == spec.size
        });
        regions.swap_remove(found.ok_or(Refusal::NoSuchRegion)?);
        self.replace_memory(regions)
    }

    /// Installs a new table and starts the queues it has the rings of. A table
    /// that is refused leaves everything as it was.
    fn replace_memory(&mut self, regions: Vec<Region>) -> Result<(), Refusal> {
        let memory = Arc::new(GuestMemory::new(regions.clone())?);
        self.pause_all();
        self.regions = regions;
        self.memory = memory;
        self.resume_all()
    }
}

fn spec(message: &Message, offset: usize) -> Result<RegionSpec, Refusal> {
    let region: VhostUserMemoryRegion = message.body_at(offset).ok_or(Refusal::Short)?;
    Ok(RegionSpec {
        guest_address: region.guest_phys_addr,
        size: region.memory_size,
        user_address: region.user_addr,
        file_offset: region.mmap_offset,
    })
}

fn map(message: &Message, offset: usize, fd: OwnedFd) -> Result<Region, Refusal> {
    Ok(Region::map(File::from(fd), spec(message, offset)?)?)
}
