//! Split virtqueues over validated guest memory.
//!
//! [`GuestMemory`] maps the regions a front end shares. [`SplitQueue`] is one
//! virtqueue (virtio 1.3, 2.7) on raw pointers that were checked once, when the
//! queue was set up. [`RequestQueue`] adds what a device needs around it: a
//! slab of in-flight requests indexed by descriptor head, each with the
//! segments of its chain already translated for the kernel.
//!
//! The workers of `pericarp-vhost` call this crate; it does no I/O, owns no
//! socket and starts no thread. Everything it reads from guest memory is
//! hostile: a value is read once, checked, and never read again.
//!
//! All the `unsafe` of the data path that touches guest memory lives here.

mod chain;
#[cfg(test)]
mod differential;
mod memory;
#[cfg(test)]
mod notification;
mod queue;
mod request;
mod shared;
mod sigbus;
#[cfg(test)]
mod testing;

pub use chain::{Chain, ChainError, MAX_SEGMENTS};
pub use memory::{GuestMemory, MAX_REGIONS, MemoryError, Region, RegionSpec};
pub use queue::{MAX_QUEUE_SIZE, QueueError, QueueLayout, SplitQueue};
pub use request::{Buffer, RequestQueue};
