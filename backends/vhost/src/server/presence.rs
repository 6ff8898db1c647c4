//! Whether a front end is there, decided between the session thread that takes
//! it in and the operator who removes the device: of the two, one comes first.

use std::sync::atomic::{AtomicU8, Ordering};

const ALONE: u8 = 0;
const FRONT_END: u8 = 1;
const LEAVING: u8 = 2;

/// How one device stands.
#[derive(Debug, Default)]
pub(super) struct Presence(AtomicU8);

impl Presence {
    /// A front end comes. False when the device leaves.
    pub(super) fn arrive(&self) -> bool {
        self.step(ALONE, FRONT_END) || !self.is_leaving()
    }

    /// The front end is gone.
    pub(super) fn depart(&self) {
        self.step(FRONT_END, ALONE);
    }

    /// The device leaves, with its front end only if that is wanted. False when
    /// there is one and it is not.
    pub(super) fn leave(&self, force: bool) -> bool {
        if force {
            self.0.store(LEAVING, Ordering::SeqCst);
        }
        self.step(ALONE, LEAVING) || self.is_leaving()
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.0.load(Ordering::SeqCst) == LEAVING
    }

    fn step(&self, from: u8, to: u8) -> bool {
        let order = Ordering::SeqCst;
        self.0.compare_exchange(from, to, order, order).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_first_decides() {
        let presence = Presence::default();
        assert!(presence.arrive());
        assert!(!presence.leave(false), "in use");
        presence.depart();
        assert!(presence.leave(false));
        assert!(!presence.arrive(), "too late");
        let presence = Presence::default();
        assert!(presence.arrive() && presence.leave(true));
        presence.depart();
        assert!(presence.is_leaving() && !presence.arrive());
        assert!(presence.leave(false), "asked again");
    }
}
