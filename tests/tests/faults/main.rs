//! What breaks on a host: a disk that fails or is full, descriptors and memory that run
//! out, io_uring that is forbidden, clocks that jump. Nothing that was flushed is lost,
//! nobody hangs, nothing stays behind. The programs run as an operator starts them, beside
//! a store that does as it is told ([`pericarp_tests::fuse`]) or under a tracer that has
//! single calls fail ([`pericarp_tests::failing`]).
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod clocks;
mod famine;
mod forbidden;
mod programs;
mod share;
mod start;
mod store;

const OK: u8 = 0;
const IOERR: u8 = 1;
