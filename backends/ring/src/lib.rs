//! Split virtqueues over validated guest memory.
//!
//! [`GuestMemory`] maps the regions a front end shares. [`SplitQueue`] is one
//! virtqueue (virtio 1.3, 2.7) on raw pointers that were checked once, when the
//! queue was set up. [`RequestQueue`] adds what a device needs around it: a
//! slab of in-flight requests indexed by descriptor head, each with the
//! segments of its chain already translated for the kernel. [`Arrivals`] and
//! [`Departures`] are that for packets, which are never in flight. [`QueueRecord`] keeps
//! in shared memory what a successor of a killed process needs to go on.
//!
//! The workers of `pericarp-vhost` call this crate; it does no I/O, owns no
//! socket and starts no thread. Everything it reads from guest memory is
//! hostile: a value is read once, checked, and never read again.
//!
//! All the `unsafe` of the data path that touches guest memory lives here.

mod chain;
#[cfg(test)]
mod differential;
mod inflight;
mod memory;
#[cfg(test)]
mod notification;
mod packets;
mod queue;
mod request;
mod shared;
mod sigbus;
#[cfg(test)]
mod testing;
mod watched;

pub use chain::{Chain, ChainError, MAX_SEGMENTS};
pub use inflight::{Found, IDENTITY_BYTES, InflightError, InflightMemory, QueueRecord, Recovered};
pub use memory::{GuestMemory, MAX_REGIONS, MemoryError, Region, RegionSpec};
pub use packets::{Arrivals, Delivery, Departures};
pub use queue::{MAX_QUEUE_SIZE, QueueError, QueueLayout, SplitQueue};
pub use request::{Buffer, RequestQueue};
pub use watched::Watched;
