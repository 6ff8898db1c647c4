//! What the host and the guest agent say to each other.
//!
//! Used by `pericarp` on the host and by `pericarp-agent` in the guest. All of it runs over vsock,
//! which `pericarp-vsock` turns into unix sockets on the host.
//!
//! # The conversation
//!
//! ```text
//! guest                                     host
//!   connects to port HELLO_PORT       ->    (a unix socket the host listens on)
//!   Hello                             ->
//!                                     <-    connects to port AGENT_PORT: ttrpc, see `Agent`
//!                                           Configure, CreateContainer
//!                                     <-    connects to port STREAM_PORT, once per stream
//!                                     <-    StartProcess
//!   output, and at last an ExitReport ->
//!                                     <-    PowerOff
//! ```
//!
//! The hello connection stays open as long as the agent lives: its end is the agent's end. Last
//! words may follow the hello on it, see [`hello`].
//!
//! # Trust
//!
//! The agent obeys whoever reaches its ports, which is the host alone. The host believes nothing:
//! sizes are bounded here, output streams are bytes and no more, and one ttrpc message is at most
//! 4 MiB. Rings and credit are the vsock device's business.

pub mod hello;
pub mod host;
pub mod network;
pub mod share;
pub mod stream;

/// The messages of the service.
#[allow(
    warnings,
    clippy::all,
    clippy::unwrap_used,
    reason = "generated from proto/agent.proto, which has the documentation"
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The service's client and the trait of its server.
#[allow(
    warnings,
    clippy::all,
    clippy::unwrap_used,
    reason = "generated from proto/agent.proto, which has the documentation"
)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub use hello::{Hello, HelloError};
pub use stream::{ExitReport, StreamKind, StreamTarget};

/// Version of everything in this crate; host and guest must agree exactly.
pub const VERSION: u32 = 8;

/// Guest port of the ttrpc service.
pub const AGENT_PORT: u32 = 1024;
/// Guest port of the streams.
pub const STREAM_PORT: u32 = 1025;
/// Host port the agent greets.
pub const HELLO_PORT: u32 = 1024;

/// Context id of the host, as the guest sees it.
pub const HOST_CID: u32 = 2;

/// Where the guest has what its containers read in `/etc/resolv.conf`, if they are told any.
pub const RESOLV_CONF: &str = "/resolv.conf";

/// Largest id of a container or process, bytes.
pub const MAX_ID: usize = 64;
/// Largest serial a virtio disk can carry, which is how the guest tells its disks apart.
pub const MAX_DISK_ID: usize = 20;
/// The file systems that a guest mounts from a disk as a volume.
pub const VOLUME_KINDS: [&str; 2] = ["ext4", "xfs"];
/// Those on disks that are a container's root.
pub const ROOT_KINDS: [&str; 3] = ["ext4", "xfs", "erofs"];
/// What a kubelet has lead to all files of a volume that it writes, and changes in one step.
pub const VERSION_LINK: &str = "..data";
/// Most files and directories of such a volume of which a guest keeps a copy.
pub const MAX_COPIED: usize = 4096;
/// Most bytes of it.
pub const MAX_COPIED_BYTES: u64 = 16 << 20;

/// Whether this may be where [`VERSION_LINK`] leads: a name that is hidden by two dots.
#[must_use]
pub fn is_version(name: &str) -> bool {
    name.len() > 2
        && name.len() <= 255
        && name.starts_with("..")
        && !name.contains(['/', '\0'])
        && name != VERSION_LINK
}

/// Whether `id` may name a container or a process.
#[must_use]
pub fn is_id(id: &str) -> bool {
    let inside = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    id.len() <= MAX_ID
        && id
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && id.as_bytes().iter().all(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_hidden_names() {
        for good in ["..2024_10_18.1", "..version-1", "..a"] {
            assert!(is_version(good), "{good}");
        }
        for bad in ["", "..", "...data/x", "../a", "data", "..data", "..a\0"] {
            assert!(!is_version(bad), "{bad}");
        }
    }

    #[test]
    fn ids_are_short_and_plain() {
        for good in ["a", "web-1", "A.b_c", &"x".repeat(64)] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", "-a", ".", "..", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(!is_id(bad), "{bad}");
        }
    }
}
