//! `pericarp-block`: vhost-user block devices on files and block devices.
//!
//! [`Disk`] opens and measures a file, [`BlockDevice`] is the virtio-blk state
//! machine (virtio 1.3, 5.2) over it, [`Options`] is the command line. The
//! binary puts them behind sockets with `pericarp-vhost` and confines itself;
//! benches and tests use the parts.

mod control;
mod device;
mod disk;
mod handover;
mod hotplug;
mod options;
mod sockets;

pub use control::operations;
pub use device::{BlockDevice, Request};
pub use disk::{Abilities, CacheMode, Disk, DiskError, DiskOptions, MEASURING, NoPolling};
pub use handover::identity;
pub use hotplug::{Hotplug, added, removed};
pub use options::{
    BadOption, Change, Command, DeviceOptions, HELP, MAX_QUEUES, Options, SocketOption, parse,
};
pub use pericarp_control::start_logging;
pub use sockets::Sockets;
