//! A shared directory as guests see it: what files and directories must do,
//! front ends that lie in every field of FUSE, ways out of the directory, and
//! Linux's own driver in two kinds of guests.
//!
//! The server is `pericarp-fs`. `PERICARP_FS_PEER` names another one, to prove
//! the rig: see [`pericarp_tests::fs`].
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod directories;
mod escapes;
mod exerciser;
mod guests;
mod hand_over;
mod hostile;
mod later;
mod limits;
mod locks;
mod messages;
mod older;
mod peer;
mod posix;
mod privileges;
mod restart;
mod round_trips;
mod semantics;
mod settings;
mod slow;
mod stage;
mod stress;
mod sweep;
mod walls;
mod xattr_map;

use pericarp_tests::fs::{Client, Options, Server};

/// A server and a session with it; `None` is a skipped test.
fn session(test: &str, options: Options) -> Option<(Server, Client)> {
    let mut server = Server::for_test(test, &[], options)?;
    let client = server.client().unwrap();
    Some((server, client))
}

/// `len` bytes that repeat nowhere within 64 KiB of them.
fn pattern(seed: u32, len: usize) -> Vec<u8> {
    (0..len.div_ceil(4) as u32)
        .flat_map(|word| (word ^ seed).wrapping_mul(0x9e37_79b1).to_le_bytes())
        .take(len)
        .collect()
}
