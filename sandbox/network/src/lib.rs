//! The network of a pod, given to a guest.
//!
//! `pericarp run` and the containerd shim use it on the host: [`Namespace`] is where the pod's
//! interfaces are, [`attach`] puts a tap beside each of them and has the kernel pass every frame
//! from one to the other, and [`cni`] asks the plugins of a node for such a namespace's
//! interfaces. The guest agent calls [`apply`] with the [`Network`] that the host has found.
//!
//! Nothing here carries packets, and nothing changes the namespace that the process is in,
//! except `apply`, which is for guests.

mod apply;
mod attach;
pub mod cni;
mod link;
mod namespace;
mod netlink;
mod network;
mod survey;
mod tap;
mod traffic;

pub use apply::{ApplyError, apply};
pub use attach::{AttachError, Attached, Card, MAX_CARDS, attach, sweep};
pub use namespace::{Namespace, NamespaceError, loopback_up};
pub use netlink::NetlinkError;
pub use network::{Address, Interface, Neighbour, Network, Route};
pub use survey::{SurveyError, survey};
