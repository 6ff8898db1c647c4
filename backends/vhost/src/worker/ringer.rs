//! A registered descriptor of the driver's: what a queue calls it by.

use std::os::fd::AsRawFd;

use pericarp_uring::{Engine, EngineError, FileSlot};

use crate::mailbox::Bell;

/// A registered descriptor of the driver's.
#[derive(Debug)]
pub(super) struct Ringer {
    bell: Bell,
    slot: FileSlot,
}

impl Ringer {
    pub(super) fn new(
        engine: &mut Engine,
        bell: Option<Bell>,
    ) -> Result<Option<Self>, EngineError> {
        bell.map(|bell| {
            let slot = engine.add_file(bell.fd.as_raw_fd())?;
            Ok(Self { bell, slot })
        })
        .transpose()
    }

    pub(super) fn ring(&self, engine: &mut Engine) {
        engine.signal(self.slot, self.bell.is_eventfd);
    }

    /// What was rung must be on its way before the slot means something else.
    pub(super) fn retire(this: Option<Self>, engine: &mut Engine) -> Result<(), EngineError> {
        let Some(ringer) = this else {
            return Ok(());
        };
        engine.submit(false)?;
        engine.remove_file(ringer.slot);
        Ok(())
    }
}
