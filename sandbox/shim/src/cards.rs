//! The sidecar of a pod's network cards, which is started again when it dies: the taps are still
//! there, and the machine finds it where it was.
//!
//! Kept by `machine`. Nothing that the guest was told is lost: the card's state is in the guest's
//! memory, and packets that were on their way are sent again by whoever misses them.

use std::os::fd::BorrowedFd;

use pericarp_config::CpuSet;
use pericarp_pod::{PodError, Sidecar, sidecar::Card};

use crate::{
    error::{ShimError, during},
    lives::{Lives, as_killable_as},
    oom::Ordinary,
    pinned::Pinned,
};

#[derive(Debug)]
pub(crate) struct Cards {
    sidecar: Sidecar,
    /// With queues of their own of the same taps.
    cards: Vec<Card>,
    cpus: Option<CpuSet>,
    lives: Lives,
}

impl Cards {
    /// Starts it. The caller's CPUs and score are the sidecar's.
    pub(crate) fn start(cards: Vec<Card>, cpus: Option<CpuSet>) -> Result<Self, ShimError> {
        Ok(Self {
            sidecar: launch(&cards)?,
            cards,
            cpus,
            lives: Lives::default(),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.sidecar.pid()
    }

    pub(crate) fn exit_fd(&self) -> BorrowedFd<'_> {
        self.sidecar.exit_fd()
    }

    /// What to report if it has ended.
    pub(crate) fn death(&mut self) -> Option<PodError> {
        self.sidecar.death()
    }

    /// Starts it again if it has ended. An error is for the pod to end with. Whether it was started.
    pub(crate) fn revive(&mut self, machine: u32) -> Result<bool, ShimError> {
        let Some(death) = self.sidecar.death() else {
            return Ok(false);
        };
        if !self.lives.spend() {
            return Err(death.into());
        }
        log::warn!("{death}; it is started again");
        let _ordinary = Ordinary::begin();
        let _pinned = self.cpus.as_ref().map(Pinned::to).transpose()?;
        self.sidecar = launch(&self.cards)?;
        as_killable_as(machine, self.pid());
        Ok(true)
    }

    pub(crate) fn end(self) {
        self.sidecar.end();
    }
}

fn launch(cards: &[Card]) -> Result<Sidecar, ShimError> {
    let copies: Result<_, _> = cards.iter().map(Card::try_clone).collect();
    let copies = copies.map_err(during("the queues of a tap"))?;
    Sidecar::net(copies, &mut || Ok::<(), ShimError>(()))
}
