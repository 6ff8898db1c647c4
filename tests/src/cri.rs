//! A node of Kubernetes without Kubernetes: a containerd of the test's own, in namespaces of its
//! own, and the calls by which a kubelet tells it what to do. For the suite `cri`.
//!
//! ```text
//! node     containerd, its configuration, network and image; what was started ends with it
//! pod      a pod and its containers, as a test sees them
//! disk     a block device of the node's
//! traces   what pods leave behind
//! client   the calls of CRI, by the client that `pericarp node serve` has
//! exec     a command with streams, over the socket whose address CRI gives
//! log      the files that containers' output is in
//! ```

pub mod client;
pub mod config;
pub mod disk;
pub mod exec;
pub mod log;
pub mod node;
pub mod pod;
pub mod traces;

pub use client::CallError;
pub use config::{Handler, SMALL, container, mount, pod};
pub use disk::Disk;
pub use node::Node;
pub use pericarp_kube::cri::proto;
pub use pod::{Container, Pod};
