//! What a machine of containers is made of on its host: the guest's files, the
//! sidecars beside it, and the first words with its agent.
//!
//! `pericarp run` makes one machine of it for one command, the containerd shim one for
//! a pod. Nothing here knows either: whoever asks says where sockets lie and when to
//! give up.

pub mod assets;
mod cpio;
mod deaths;
mod error;
pub mod greeting;
pub mod history;
pub mod initramfs;
mod lasting;
pub mod network;
pub mod overhead;
pub mod power_off;
pub mod process;
pub mod pump;
pub mod record;
pub mod sidecar;
pub mod spec;
pub mod starts;

pub use assets::Assets;
pub use deaths::Deaths;
pub use error::{PodError, during};
pub use greeting::Greeting;
pub use lasting::Lasting;
pub use sidecar::Sidecar;
