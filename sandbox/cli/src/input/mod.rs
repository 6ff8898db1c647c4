//! What the user asked for: read, checked in full, and turned into a plan.
//!
//! `options` reads the command line, `values` its numbers, `volume` its directories, `network` its network,
//! `check` compares all of it with the host. Nothing here creates, writes or starts anything; opening and locking images is the most
//! it does. Every problem found is reported, not only the first.

pub(crate) mod check;
pub(crate) mod image;
pub(crate) mod network;
pub(crate) mod options;
pub(crate) mod problem;
pub(crate) mod values;
pub(crate) mod volume;
