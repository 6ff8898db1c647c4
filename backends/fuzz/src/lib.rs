//! Hostile guests and front ends, made of bytes.
//!
//! [`rings`] plays a script to the queue and the block device in this thread,
//! over a store that completes when the script says so, and checks every byte
//! of guest memory afterwards. [`requests`] does the same with FUSE requests and
//! the virtio-fs device, over a scratch directory, and [`frames`] with packets, a network
//! card and its worker. [`sessions`] plays a script to
//! a whole server over a socket. The bytes come from libFuzzer (`cargo xtask fuzz`), from the seeds
//! in `corpus/`, or from [`random::Generator`] where there is no nightly
//! toolchain. Nothing here is part of a program that is shipped.

mod chain;
pub mod frames;
mod memory;
pub mod random;
pub mod requests;
pub mod rings;
mod script;
pub mod sessions;
