//! The sidecar of a machine's network cards, which is started again when it dies: the taps are still
//! there, and the machine finds it where it was.
//!
//! Kept by whoever keeps the machine. Nothing that the guest was told is lost: the card's state is in
//! the guest's memory, and packets that were on their way are sent again by whoever misses them.

use std::os::fd::BorrowedFd;

use crate::{
    Deaths, PodError, Sidecar, during,
    sidecar::{Card, Check},
};

/// A running `pericarp-net`, and what another is started with.
#[derive(Debug)]
pub struct Cards {
    sidecar: Sidecar,
    /// With queues of their own of the same taps.
    cards: Vec<Card>,
    deaths: Deaths,
}

impl Cards {
    /// Starts it and waits until every card's socket is there.
    ///
    /// # Errors
    ///
    /// [`PodError`], or what `check` says.
    pub fn start<E: From<PodError>>(cards: Vec<Card>, check: Check<'_, E>) -> Result<Self, E> {
        Ok(Self {
            sidecar: launch(&cards, check)?,
            cards,
            deaths: Deaths::default(),
        })
    }

    /// Its process, which is another after each death.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.sidecar.pid()
    }

    /// Becomes readable when it has ended.
    #[must_use]
    pub fn exit_fd(&self) -> BorrowedFd<'_> {
        self.sidecar.exit_fd()
    }

    /// What to report if it has ended.
    pub fn death(&mut self) -> Option<PodError> {
        self.sidecar.death()
    }

    /// Starts it again if it has ended; returns how it did.
    ///
    /// # Errors
    ///
    /// For the machine to end with: it has died too often, or cannot be started.
    pub fn revive(&mut self) -> Result<Option<PodError>, PodError> {
        let Some(mut end) = self.sidecar.how_it_ended() else {
            return Ok(None);
        };
        loop {
            end = self.deaths.another(end)?;
            match launch(&self.cards, &mut || Ok(())) {
                Ok(sidecar) => {
                    self.sidecar = sidecar;
                    return Ok(Some(PodError::Sidecar(end)));
                }
                // Before it served anybody: that is one death more.
                Err(PodError::Sidecar(again)) => end = again,
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends it in an orderly way.
    pub fn end(self) {
        self.sidecar.end();
    }
}

fn launch<E: From<PodError>>(cards: &[Card], check: Check<'_, E>) -> Result<Sidecar, E> {
    let copies: Result<_, _> = cards.iter().map(Card::try_clone).collect();
    let copies = copies.map_err(during("the queues of a tap"))?;
    Sidecar::net(copies, check)
}
