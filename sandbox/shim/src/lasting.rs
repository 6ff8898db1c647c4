//! The sidecars that are started again when they die, as `pericarp_pod::Lasting` keeps them: another
//! one is as killable as the machine is.
//!
//! Kept by `machine`.

use std::os::fd::BorrowedFd;

use pericarp_pod::PodError;

use crate::{
    error::ShimError,
    oom::{Ordinary, as_killable_as},
};

#[derive(Debug, Default)]
pub(crate) struct Lasting {
    all: Vec<pericarp_pod::Lasting>,
}

impl Lasting {
    pub(crate) fn push(&mut self, one: pericarp_pod::Lasting) {
        self.all.push(one);
    }

    /// The programs and the processes.
    pub(crate) fn processes(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.all.iter().map(|one| (one.name(), one.pid()))
    }

    pub(crate) fn exit_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.all.iter().map(pericarp_pod::Lasting::exit_fd)
    }

    /// What to report if one has ended.
    pub(crate) fn death(&mut self) -> Option<PodError> {
        self.all.iter_mut().find_map(pericarp_pod::Lasting::death)
    }

    /// Starts those again that have ended. An error is for the pod to end with. How many there
    /// were.
    pub(crate) fn revive(&mut self, machine: u32) -> Result<u64, ShimError> {
        if self.death().is_none() {
            return Ok(0);
        }
        let mut revived = 0;
        let _ordinary = Ordinary::begin();
        for one in &mut self.all {
            if let Some(death) = one.revive()? {
                log::warn!("{death}; it was started again");
                as_killable_as(machine, one.pid());
                revived += 1;
            }
        }
        Ok(revived)
    }

    pub(crate) fn end(self) {
        self.all.into_iter().for_each(pericarp_pod::Lasting::end);
    }
}
