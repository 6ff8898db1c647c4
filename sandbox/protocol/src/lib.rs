//! What the host and the guest's first process say to each other.
//!
//! One byte channel (today a virtio-serial port) carries frames in both directions; see
//! [`frame`] for their form and [`spec`] for the description of the run that the host sends first.
//! Used by `pericarp` on the host and by `pericarp-init` in the guest, so that both sides check
//! the same limits. It does no input or output of its own, and must never trust a length, a kind
//! or an amount that came from the other side: each side treats the other as hostile.
//!
//! # The conversation
//!
//! ```text
//! guest                          host
//!   Hello(version)          ->
//!                           <-   Spec part, Spec part, empty Spec
//!   Started(two times)      ->
//!   Stdout, Stderr          ->
//!                           <-   Stdin, StdinEof, Signal
//!   Credit, Closed         <->   Credit, Closed
//!   Exit or Error           ->   (the disks are flushed and read-only by now)
//! ```
//!
//! # Flow control
//!
//! Each of the three streams has a window of [`WINDOW`] bytes. The sender may have that much
//! outstanding; the receiver hands credit back as its reader takes the bytes. So neither side ever
//! has to stop reading the channel because one stream is stuck, a signal never waits behind
//! unread input, and the memory for a peer that keeps sending is bounded by the window.

pub mod frame;
pub mod spec;
pub mod window;

pub use frame::{Decoder, ExitReport, Failure, Frame, FrameError, Sender, Stream};
pub use spec::{Disk, Limits, RunSpec, SpecError};
pub use window::{ReceiveWindow, SendWindow, WindowError};

/// Version of this protocol; host and guest must agree exactly.
pub const VERSION: u32 = 1;

/// Largest payload of one frame.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Bytes of one stream that may be outstanding.
pub const WINDOW: u32 = 256 * 1024;

/// Name of the virtio-serial port that carries the frames.
pub const PORT_NAME: &str = "pericarp.control";

/// Largest serial a virtio disk can carry, which is how the guest tells its disks apart.
pub const MAX_DISK_ID: usize = 20;
