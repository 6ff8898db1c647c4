//! The disks that a running machine has for its containers: each a process of `pericarp-block` and
//! a device that comes to the machine and leaves it.
//!
//! Kept by `machine`, on the keeper's thread; asked for by `blocks`. A process for each disk: it has
//! one file open, its rings are made for what that disk can do, and its death is no other disk's. One
//! that dies is started again under the guest, which sees requests take longer: the driver's program
//! dials again, and keeps the record of those in flight.

use std::{
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use pericarp_hypervisor::{DiskSpec, Machine};
use pericarp_pod::{
    Deaths, PodError, Sidecar, during,
    sidecar::{Device, Limits},
};

use crate::{
    directory::Directory,
    error::ShimError,
    oom::{Ordinary, as_killable_as},
};

/// How many a machine may have at once: places on its bus that are kept for them.
pub(crate) const MOST: u8 = 8;
const QUEUE_SIZE: u16 = 256;

/// A disk to be added.
#[derive(Debug)]
pub(crate) struct Backing {
    /// Its name in the machine, which no other had, and by which the guest finds it.
    pub(crate) id: String,
    /// The block device or image, held by its place (O_PATH).
    pub(crate) file: OwnedFd,
    pub(crate) read_only: bool,
    /// What may be done with it in a second.
    pub(crate) limits: Limits,
}

#[derive(Debug)]
pub(crate) struct Disks {
    directory: Directory,
    queues: u16,
    all: Vec<One>,
}

#[derive(Debug)]
struct One {
    backing: Backing,
    socket: PathBuf,
    sidecar: Sidecar,
    deaths: Deaths,
}

impl Disks {
    /// None yet; those to come have so many queues.
    pub(crate) fn new(directory: Directory, queues: u16) -> Self {
        Self {
            directory,
            queues,
            all: Vec::new(),
        }
    }

    pub(crate) fn pids(&self) -> impl Iterator<Item = u32> {
        self.all.iter().map(|one| one.sidecar.pid())
    }

    pub(crate) fn exit_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.all.iter().map(|one| one.sidecar.exit_fd())
    }

    /// Serves it and adds it to the machine. On failure nothing of it is left.
    pub(crate) fn add(&mut self, machine: &mut Machine, backing: Backing) -> Result<(), ShimError> {
        let socket = self.directory.join(&format!("{}.sock", backing.id));
        let sidecar = {
            let _ordinary = Ordinary::begin();
            launch(&backing, &socket, self.queues)?
        };
        as_killable_as(machine.pid(), sidecar.pid());
        let spec = DiskSpec {
            id: backing.id.clone(),
            socket: socket.clone(),
            num_queues: self.queues,
            queue_size: QUEUE_SIZE,
        };
        let mut one = One {
            backing,
            socket,
            sidecar,
            deaths: Deaths::default(),
        };
        if let Err(error) = machine.add_disk(&spec) {
            let death = one.sidecar.death();
            one.end();
            let text = || ShimError::Machine(error.to_string());
            return Err(death.map_or_else(text, ShimError::from));
        }
        self.all.push(one);
        Ok(())
    }

    /// Takes it from the machine, and then lets go of its file. True once that is done; until then it
    /// is to be called again. Not later than this call if it `must`: a guest that does not give the
    /// device up is left with one that answers nothing.
    pub(crate) fn remove(&mut self, machine: &mut Machine, id: &str, must: bool) -> bool {
        let Some(index) = self.all.iter().position(|one| one.backing.id == id) else {
            return true;
        };
        let outcome = match machine.has_ended() {
            true => Ok(true),
            false => machine.remove_disk(id),
        };
        match outcome {
            Ok(true) => {}
            _ if !must => return false,
            Ok(false) => {
                log::warn!("the guest does not give the disk '{id}' up, and has it no more");
            }
            Err(error) => log::warn!("the disk '{id}' stays in the machine, and is dead: {error}"),
        }
        self.all.swap_remove(index).end();
        true
    }

    /// Starts those again that have ended. An error is for the pod to end with. How many there
    /// were.
    pub(crate) fn revive(&mut self, machine: u32) -> Result<u64, ShimError> {
        if self.all.iter_mut().all(|one| one.sidecar.death().is_none()) {
            return Ok(0);
        }
        let mut revived = 0;
        let _ordinary = Ordinary::begin();
        for one in &mut self.all {
            let again = || launch(&one.backing, &one.socket, self.queues);
            if let Some(death) = one.deaths.revive(&mut one.sidecar, again)? {
                log::warn!("{death}; it was started again");
                as_killable_as(machine, one.sidecar.pid());
                revived += 1;
            }
        }
        Ok(revived)
    }

    /// Lets go of all of them; the machine has ended.
    pub(crate) fn end(self) {
        self.all.into_iter().for_each(One::end);
    }
}

fn launch(backing: &Backing, socket: &Path, queues: u16) -> Result<Sidecar, PodError> {
    let file = backing.file.try_clone().map_err(during("a descriptor"))?;
    let device = Device {
        id: backing.id.clone(),
        socket: socket.to_owned(),
        // The same file whatever its name leads to by then.
        file: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        read_only: backing.read_only,
        queues,
        limits: backing.limits,
    };
    Sidecar::block_with(&device, file, &control(socket), &mut || Ok(()))
}

impl One {
    fn end(self) {
        self.sidecar.end();
        // One that was killed has left it.
        for left in [&self.socket, &control(&self.socket)] {
            let _ = std::fs::remove_file(left);
        }
    }
}

/// Where the process answers what it does and may do, for whoever looks after the node.
fn control(socket: &Path) -> PathBuf {
    socket.with_extension("control")
}
