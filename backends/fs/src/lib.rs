//! `pericarp-fs`: host directories for guests, over virtio-fs.
//!
//! [`FsDevice`] is the virtio-fs device (virtio 1.3, 5.11): FUSE requests in,
//! steps and calls of `pericarp-share` out; [`Options`] is the command line. The
//! binary puts it behind a socket with `pericarp-vhost` and confines itself;
//! benches and tests use the parts.

mod device;
mod handover;
mod options;
mod wire;

pub use device::{Cache, FsDevice, MAX_TAG, Request, Settings};
pub use handover::identity;
pub use options::{
    BadOption, Command, DeviceOptions, HELP, MOST_DESCRIPTORS, Options, SocketOption, parse,
};
