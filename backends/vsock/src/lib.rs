//! A virtio socket device (virtio 1.3, 5.10) as a vhost-user backend: streams
//! between programs in the guest and unix sockets on the host.
//!
//! The `pericarp-vsock` program is its only user. The crates
//! `vhost-user-backend` and `virtio-queue` carry the session and the rings.
//!
//! # Both directions
//!
//! - A host program connects to the unix socket `P` (`--uds-path`), sends
//!   `CONNECT <port>\n` and is answered `OK <host port>\n` once a program in the
//!   guest has accepted. From then on the stream is that connection. Where
//!   nobody listens, or the guest does not answer in 10 s, it is closed.
//! - A program in the guest dials port N of context 2 and reaches the host
//!   program that listens on the unix socket `P_N`. Where nobody does, or its
//!   backlog is full, or the socket is not writable for this process, the guest
//!   is reset at once.
//!
//! `P` is served while a front end is connected; who connects earlier waits in
//! the backlog. When the front end goes, or the guest's driver starts from the
//! beginning, all connections are closed.
//!
//! # Limits
//!
//! | what | limit |
//! |---|---|
//! | connections | 4096, or what the limit of descriptors leaves; the guest may open three quarters of them |
//! | bytes held for one host program that does not read | 64 KiB; the guest is out of credit then |
//! | the same, of connections that come when there are 256 | 4 KiB: 31 MiB for all of them |
//! | bytes held for the guest | none: they stay in the host's socket until the guest has room |
//! | a host program's `CONNECT` line | 5 s, 19 bytes |
//! | a closed connection's last bytes | 30 s to be read |
//! | resets the guest does not fetch | 256 and one per connection; it is not heard beyond |
//!
//! # A hostile guest
//!
//! A packet whose length, address, type or operation is wrong, that exceeds the
//! credit or belongs to no connection is answered with one reset and ends the
//! connection it names; one from a context that is not the guest's is dropped.
//! Credit claims that cannot be true are not taken. Nothing a guest does ends
//! the process or delays the host's programs beyond a batch of 256 packets.
//!
//! # What it does not do
//!
//! SEQPACKET, the event queue (transport reset), migration, a connected socket
//! as `--fd`, User-mode Linux: its SET_MEM_TABLE has room for more regions than
//! it names, which the `vhost` crate refuses. A front end that makes a kick
//! descriptor fail stops its own session until it disconnects, and so does one
//! that cuts its memory short while it is shared.

mod chain;
mod connection;
mod credit;
mod device;
mod engine;
mod options;
mod packet;
mod session;

pub use engine::{Engine, MAX_CONNECTIONS};
pub use options::{BadOption, Command, HELP, Options, SocketOption, parse};
pub use pericarp_control::start_logging;
pub use session::{ServeError, serve};
