//! What a sidecar and its operator say to each other: what all command lines
//! have in common ([`command_line`]), how programs end ([`Failure`]), log lines
//! ([`start_logging`]), and the control socket (`--control-path`), by which one asks a running program and
//! changes it.
//!
//! A program fills an [`Operations`] table before it confines itself and gives
//! it to a [`Server`] with the socket it bound; one thread serves all peers
//! after that. A peer writes one JSON object per line and reads one per line:
//!
//! ```text
//! {"op":"version"}
//! {"ok":true,"program":"pericarp-block","version":"0.1.0"}
//! {"op":"fly"}
//! {"error":"unknown op \"fly\": use version, metrics or stats","ok":false}
//! ```
//!
//! A line that starts with `GET ` is HTTP instead, for a scraper: `/metrics` in
//! Prometheus' text format, and nothing else.
//!
//! Whoever may connect may do all of it; the socket's mode (0600) is the only
//! check. A peer is still not trusted with the program's time or memory: lines
//! and connections are bounded, nobody is waited for, and when all places are
//! taken the peer that was silent longest loses its own. An operation itself
//! runs on the serving thread and must not block; one that may is an errand,
//! which has a thread of its own.
//!
//! A line can come with descriptors (SCM_RIGHTS), which an errand gets. They
//! are sent with the first byte of their line, after the answers to all lines
//! before it were read. What no errand asked for is closed and refused.

pub mod command_line;
mod connection;
mod descriptors;
mod errands;
mod failure;
mod listen;
mod logger;
mod operations;
mod server;
mod stop;

pub use failure::{Failure, exit_code, print};
pub use listen::listen;
pub use logger::start_logging;
pub use operations::{Answer, Arguments, Operations, Outcome, Refused, only};
pub use server::Server;
pub use stop::{Ending, Stop};
