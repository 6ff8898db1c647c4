//! Rigs that drive the backends with real clients: an independent driver
//! (`virtio-driver`), a front end that lies, User-mode Linux with the kernel's
//! own virtio drivers, QEMU, and a containerd that is told what to do as a
//! Kubernetes node tells it. The suites in `tests/tests` are written once
//! against [`peer::Backend`] and run against a reference peer first, then
//! against ours.
//!
//! Nothing here may be used by the programs themselves.

pub mod attack;
pub mod audit;
pub mod bounded;
pub mod card;
pub mod client;
pub mod conformance;
pub mod cri;
pub mod endure;
pub mod failing;
pub mod forbidden;
pub mod frontend;
pub mod fs;
pub mod fuse;
pub mod guest;
pub mod lab;
pub mod model;
pub mod network;
pub mod oci;
pub mod parts;
pub mod peer;
pub mod process;
pub mod puppet;
pub mod relay;
pub mod scratch;
pub mod screen;
pub mod uml;
pub mod usage;
pub mod verified;
pub mod vsock;
pub mod wire;
