//! Rigs for a virtio-fs backend: a guest that speaks FUSE by hand, the program
//! that serves it, and what a directory must look like afterwards.
//!
//! [`Client`] is built on the front end that lies ([`crate::frontend`]), so a
//! request can lie in memory in any shape and say anything; [`Server`] is the
//! program under test and the directory it shares. The suite is
//! `tests/tests/fs`.

mod calls;
mod client;
mod counts;
pub mod mounted;
mod server;
pub mod wire;

pub use calls::{Change, Space, init_body, release_body, transfer_body};
pub use client::{AREA, Client, GUARD, Pieces, REQUEST, SLOTS, Shape, Wrong, refused};
pub use counts::Counts;
pub use server::{Kind, Options, Server, TAG};
