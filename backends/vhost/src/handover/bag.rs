//! What a device hands over beside its session: text of its own, and descriptors.
//! Only its own successor reads it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The most descriptors of one [`Bag`].
pub const BAG_DESCRIPTORS: usize = 200;
/// The most bytes of text of one.
pub const BAG_BYTES: usize = 64 * 1024;
/// The most that come for one device.
pub(super) const MOST_BAGS: u32 = 1 << 16;

/// A piece of what a device knows, on its way out.
#[derive(Default)]
pub struct Bag {
    /// In a form of the device's own, at most [`BAG_BYTES`]; no control
    /// characters but newlines.
    pub text: String,
    /// Descriptors that it speaks of, at most [`BAG_DESCRIPTORS`].
    pub descriptors: Vec<Arc<dyn AsFd + Send + Sync>>,
}

impl Bag {
    pub(super) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.descriptors.iter().map(|fd| fd.as_fd()).collect()
    }
}

impl fmt::Debug for Bag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bag")
            .field("bytes", &self.text.len())
            .field("descriptors", &self.descriptors.len())
            .finish()
    }
}

/// The same piece, where it arrived.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// The text.
    pub text: String,
    /// The descriptors, in their order.
    pub descriptors: Vec<OwnedFd>,
}
