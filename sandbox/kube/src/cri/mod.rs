//! A client of Kubernetes' CRI, by which containerd is told what to run. For `node`, which is the
//! half of a kubelet, and for `streams`, which asks where the streams of a command are.
//!
//! ```text
//! channel  gRPC over containerd's socket; it connects again after containerd was restarted
//! client   the calls
//! ```

mod channel;
mod client;

pub use channel::CallError;
pub use client::{Client, Output, Streams};

/// The messages of CRI.
#[allow(
    warnings,
    clippy::all,
    clippy::unwrap_used,
    reason = "generated from proto/cri.proto; kubernetes/cri-api has the documentation"
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/cri/mod.rs"));
    pub use self::cri::*;
}
