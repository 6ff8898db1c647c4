//! One PCI bus, its configuration space and its message interrupts.
//!
//! [`config`] is a function's 256 bytes, [`msix`] its interrupts, [`bus`] the 32
//! places and who answers a guest's access. What is not there reads as all ones,
//! as on a real bus.

pub mod bus;
pub mod config;
pub mod msix;

/// The bytes of `value` at `offset`, read into `data`, zero beyond.
pub(crate) fn copy(value: &[u8], offset: usize, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = value.get(offset + index).copied().unwrap_or(0);
    }
}
