//! The sidecar of a pod's network cards, as `pericarp_pod::Cards` keeps it: another one is on the
//! pod's CPUs, too, and as killable as the machine is.
//!
//! Kept by `machine`.

use std::os::fd::BorrowedFd;

use pericarp_config::CpuSet;
use pericarp_pod::{PodError, sidecar::Card};

use crate::{
    error::ShimError,
    oom::{Ordinary, as_killable_as},
    pinned::Pinned,
};

#[derive(Debug)]
pub(crate) struct Cards {
    served: pericarp_pod::Cards,
    cpus: Option<CpuSet>,
}

impl Cards {
    /// Starts it. The caller's CPUs and score are the sidecar's.
    pub(crate) fn start(cards: Vec<Card>, cpus: Option<CpuSet>) -> Result<Self, ShimError> {
        let served = pericarp_pod::Cards::start(cards, &mut || Ok::<(), ShimError>(()))?;
        Ok(Self { served, cpus })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.served.pid()
    }

    pub(crate) fn exit_fd(&self) -> BorrowedFd<'_> {
        self.served.exit_fd()
    }

    /// What to report if it has ended.
    pub(crate) fn death(&mut self) -> Option<PodError> {
        self.served.death()
    }

    /// Starts it again if it has ended. An error is for the pod to end with. Whether it was started.
    pub(crate) fn revive(&mut self, machine: u32) -> Result<bool, ShimError> {
        if self.served.death().is_none() {
            return Ok(false);
        }
        let _ordinary = Ordinary::begin();
        let _pinned = self.cpus.as_ref().map(Pinned::to).transpose()?;
        let death = self.served.revive()?;
        if let Some(death) = death {
            log::warn!("{death}; it was started again");
        }
        as_killable_as(machine, self.pid());
        Ok(true)
    }

    pub(crate) fn end(self) {
        self.served.end();
    }
}
