//! vhost-user sessions and the worker threads behind them.
//!
//! A sidecar (`pericarp-block`, `pericarp-fs`) describes its device by the
//! [`Device`] trait and runs it with a [`Server`] per socket and one [`Pool`] of
//! workers; what all such programs do around that is in [`program`].
//! The session thread speaks the vhost-user protocol and owns the memory table
//! and the vring state; workers own running queues and do all the I/O. The two
//! meet in each worker's mailbox and nowhere else.
//!
//! A front end is untrusted: what it sends can end its own session, never the
//! process, and never reach memory that it did not share itself.

mod channel;
mod clock;
mod device;
mod handover;
mod helpers;
pub mod histogram;
mod limiter;
mod mailbox;
#[doc(hidden)]
pub mod measured;
mod oversight;
mod pool;
pub mod program;
mod records;
mod server;
mod session;
mod stats;
mod worker;

pub use device::{Account, ConfigRefused, Device, Dropped, FileRef, Step, Traffic, Way};
pub use handover::{
    BAG_BYTES, BAG_DESCRIPTORS, Bag, DeviceIdentity, Estate, Giver, HandOverError, Identity,
    Inheritance, Meeting, Predecessor, Unpacked,
};
pub use helpers::{Errand, Report};
pub use limiter::{LIMIT_NAMES, LimitNames, Limits, MAX_LANES};
pub use oversight::{Overseen, Oversight, Told, device_named, metrics_of, with_operations};
pub use pericarp_control::{Ending, Stop};
pub use pericarp_uring::Place;
pub use pool::{Pool, PoolError, PoolOptions, Running};
pub use records::{
    CrashSafety, InflightFile, InflightFileError, Made, RecordOf, Records, Reopener, identity_of,
    inherit_file, own_file,
};
pub use server::{Change, Endpoint, EndpointError, Fleet, FleetError, Server};
#[doc(hidden)]
pub use worker::{Given, Hand, Taken};

/// Feature bits every device of ours offers (virtio 1.3, 6): indirect
/// descriptors, event index, version 1; and bit 30, by which vhost-user
/// announces its own protocol features.
pub mod features {
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub const PROTOCOL: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// All of the above.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | PROTOCOL | VERSION_1;
}

/// An error and what caused it, in one line.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
