//! The device in another process: what was agreed on with the guest, and what
//! the share says of itself.

use std::sync::atomic::Ordering;

use pericarp_share::{Passed, Piece};
use pericarp_vhost::{Bag, Unpacked};

use super::FsDevice;
use crate::wire::feature;

impl FsDevice {
    /// The first bag is the session's, the others are the share's.
    pub(super) fn packed(&self) -> Vec<Bag> {
        let session = self.session.agreed().to_string();
        let first = Bag {
            text: session,
            descriptors: Vec::new(),
        };
        let bag = |piece: Piece<Passed>| Bag {
            text: piece.text,
            descriptors: piece.descriptors,
        };
        let share = self.share.pack().into_iter().map(bag);
        std::iter::once(first).chain(share).collect()
    }

    pub(super) fn unpacked(&self, bags: Vec<Unpacked>) -> Result<(), String> {
        let mut bags = bags.into_iter();
        let Some(first) = bags.next() else {
            return Ok(());
        };
        let session: u64 = first
            .text
            .parse()
            .map_err(|_| "it says no session".to_owned())?;
        let piece = |bag: Unpacked| Piece {
            text: bag.text,
            descriptors: bag.descriptors,
        };
        let restored = self.share.unpack(bags.map(piece).collect())?;
        self.share
            .set_writeback(session & feature::WRITEBACK_CACHE != 0);
        self.session.0.store(session, Ordering::Relaxed);
        let (nodes, open, lost) = (restored.nodes, restored.open, restored.lost);
        if nodes > 0 || open > 0 {
            log::info!("taken over {nodes} files that a guest knows, {open} open");
        }
        if lost > 0 {
            log::warn!("{lost} files that were open are not to be had any more");
        }
        Ok(())
    }
}
