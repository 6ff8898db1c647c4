//! What the macro benches share: their options, turns, tables, raw numbers, the
//! disk they read, and fio's reports.
//!
//! Called by the programs in `src/bin`. A bench measures several targets on one
//! file in one run: they take turns for a number of rounds, so that what the
//! machine does meanwhile hits all of them, and the table shows medians with
//! minimum and maximum.

pub mod cpu;
pub mod disk;
pub mod fio;
pub mod frames;
pub mod laboratory;
pub mod microvm;
pub mod options;
pub mod plot;
pub mod raw;
pub mod served;
pub mod table;
pub mod trees;
pub mod turns;

/// An error here is told to a person and nothing else.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
