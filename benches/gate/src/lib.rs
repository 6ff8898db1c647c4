//! The hot pieces of the data plane, each alone and without a system call: for
//! the criterion suites beside this package, and for the program `pericarp-gate`
//! that `cargo xtask bench regress` runs on two commits.
//!
//! A piece does the same work in every turn, so its instructions can be
//! counted. One that is changed to do other work gets another name: the gate
//! compares by name, also with the pieces of an older commit.

pub mod guest;
mod pieces;

pub use pieces::{ALL, Entry, Piece};
