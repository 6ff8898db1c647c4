//! A sidecar that is started again when it dies, while the machine finds it where it was: that of
//! the network cards, and that of the shares where the driver dials them again
//! ([`finds_shares_again`](pericarp_hypervisor::Hypervisor::finds_shares_again)).
//!
//! Kept by whoever keeps the machine. A card's state is in the guest's memory, and packets that were
//! on their way are sent again by whoever misses them. What a guest knows and has open of its shares
//! the file server writes into memory that is kept here and that each successor inherits; requests
//! in flight are kept by the front end.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    Deaths, PodError, Sidecar, during,
    sidecar::{Card, Check, Share},
};

/// A running sidecar, and what another is started with.
#[derive(Debug)]
pub struct Lasting {
    sidecar: Sidecar,
    what: What,
    deaths: Deaths,
}

#[derive(Debug)]
enum What {
    /// With queues of their own of the same taps, and where the sidecar answers.
    Cards(Vec<Card>, PathBuf),
    /// And what is known of them. Memory without a name: what a guest has it grow to is charged to
    /// the machine's control group, and takes no room of a file system that others need.
    Shares(Vec<Share>, OwnedFd, PathBuf),
}

impl Lasting {
    /// Starts that of these cards. It answers at `control`, as each of its successors does.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub fn cards(cards: Vec<Card>, control: PathBuf) -> Result<Self, PodError> {
        Self::start(What::Cards(cards, control))
    }

    /// Starts that of these shares. It answers at `control`, as each of its successors does.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub fn shares(shares: Vec<Share>, control: PathBuf) -> Result<Self, PodError> {
        let state = memfd_create("shares", MemfdFlags::CLOEXEC);
        let state = state.map_err(during("memory for what is known of shares"))?;
        Self::start(What::Shares(shares, state, control))
    }

    fn start(what: What) -> Result<Self, PodError> {
        Ok(Self {
            sidecar: what.launch()?,
            what,
            deaths: Deaths::default(),
        })
    }

    /// Waits until it listens, as [`Sidecar::listening`].
    ///
    /// # Errors
    ///
    /// [`PodError`], or what `check` says.
    pub fn listening<E: From<PodError>>(&mut self, check: Check<'_, E>) -> Result<(), E> {
        self.sidecar.listening(check)
    }

    /// Its program.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.sidecar.name()
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
        let what = &self.what;
        self.deaths.revive(&mut self.sidecar, || {
            let mut successor = what.launch()?;
            successor.listening(&mut || Ok::<_, PodError>(()))?;
            Ok(successor)
        })
    }

    /// Ends it in an orderly way.
    pub fn end(self) {
        self.sidecar.end();
    }
}

impl What {
    fn launch(&self) -> Result<Sidecar, PodError> {
        match self {
            Self::Cards(cards, control) => {
                let copies: io::Result<_> = cards.iter().map(Card::try_clone).collect();
                let copies = copies.map_err(during("the queues of a tap"))?;
                Sidecar::net(copies, control)
            }
            Self::Shares(shares, state, control) => {
                let state = state.try_clone().map_err(during("a descriptor"))?;
                Sidecar::fs(shares, Some(state), control)
            }
        }
    }
}
