//! The virtio network device over vhost-user, on a tap: what `pericarp-net` is made
//! of, as a library for its program, its tests and the benches.
//!
//! Packets go between the guest's memory and the tap in one copy, which the kernel
//! makes; what the workers of `pericarp-vhost` do for that is in their `flow`. Here is
//! what is virtio-net's own: features and offloads ([`NetDevice`]), the control queue,
//! and the tap ([`Tap`]).

mod control;
mod device;
pub mod features;
mod handover;
mod options;
mod tap;

pub use device::{Card, Host, NetDevice, Order};
pub use handover::identity;
pub use options::{BadOption, Command, DeviceOptions, HELP, Options, Source, parse};
pub use tap::{IOCTLS, Tap, TapError};
