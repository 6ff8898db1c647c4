//! A hostile guest against the virtio-fs device, in one thread.
//!
//! The script is the guest's kernel, the front end and the host: it sends FUSE
//! requests, good ones and spoilt ones, in descriptors of any shape, completes
//! I/O in any order and with any result, changes the directory under the
//! server, and mounts and leaves at any time. The device, the share and the
//! system calls are real; the directory is a scratch one, with a file beside it
//! that nobody may read, change or look at. What must hold is checked as it
//! goes, by panics:
//!
//! - a chain is refused exactly when it breaks a rule of the specification;
//! - every request is completed exactly once, with a reply that is one: length,
//!   number, an errno or the body of its kind, inside its writable area and
//!   nowhere else;
//! - I/O goes to the file that was opened, for as long as it is under way;
//! - nothing outside of the directory is read, named or changed, special files
//!   are not opened, and a read-only directory is not changed;
//! - nodes, descriptors and open files stay within their limits, and a guest
//!   that is gone leaves none of them.

mod bodies;
mod judge;
mod player;
mod rig;

use std::cell::RefCell;

use crate::script::Script;
use player::Player;
use rig::Rig;

thread_local! {
    static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) };
}

/// Plays one script.
///
/// # Panics
/// When something that must hold does not.
pub fn play(bytes: &[u8]) {
    // Taken out, so that a panic leaves no half-played rig to the next script.
    let mut rig = RIG.take().unwrap_or_else(Rig::new);
    rig.clear();
    let mut script = Script::new(bytes);
    let stage = rig.stage(script.u8());
    let mut player = Player::new(&mut rig, &stage, script);
    player.run();
    drop(player);
    rig.judge(&stage);
    drop(stage);
    rig.settled();
    RIG.set(Some(rig));
}

/// Hand-made scripts: each request with good fields, of a file, a directory and
/// something that is neither, and what once went wrong in other servers.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for mode in 0..rig::MODES {
        seeds.push((format!("life-of-a-file-{mode}"), life(mode)));
    }
    for (_, name) in bodies::KINDS {
        let mut script = opened(0);
        // The file, then the directory, then the fifo; numbers for all picks of
        // a body.
        for node in [1, 2, 3] {
            ask(&mut script, name, node, &[0, 0, 1, 0, 1, 0, 1, 0]);
            script.extend([player::COMPLETE, 0, 0]);
        }
        seeds.push((format!("each-{name}"), script));
    }
    for (name, acts) in [
        ("destroy", &[player::LEAVE, 0][..]),
        ("gone", &[player::LEAVE, 1]),
        ("init", &[player::MOUNT, 7, 41, 0xff]),
        (
            "poked",
            &[player::POKE, 0, 0, 0x40, 8, 1, 2, 3, 4, 5, 6, 7, 8],
        ),
        ("floods", &[player::FLOOD, 4, 9]),
    ] {
        let mut script = opened(0);
        for _ in 0..3 {
            ask(&mut script, "read", 1, &[0, 0, 90, 0]);
        }
        ask(&mut script, "release", 1, &[0, 0]);
        script.extend(acts);
        for outcome in [0x81, 0, 0xfd, 0xff] {
            script.extend([player::COMPLETE, 1, outcome]);
        }
        seeds.push((format!("in-flight-{name}"), script));
    }
    for mode in [0, 3, 4] {
        let mut script = opened(mode);
        for what in 0..5 {
            script.extend([player::FLOOD, what, 99]);
        }
        seeds.push((format!("floods-{mode}"), script));
    }
    for what in 0..8 {
        let mut script = opened(0);
        script.extend([player::HOST, what]);
        for name in 0..6 {
            ask(&mut script, "lookup", 0, &[name, 0]);
        }
        ask(&mut script, "lookup", 2, &[10, 0]);
        ask(&mut script, "read", 1, &[0, 0, 90, 0]);
        ask(&mut script, "open", 1, &[0, 0, 0]);
        ask(&mut script, "readdirplus", 2, &[1, 0, 200, 0]);
        seeds.push((format!("host-{what}"), script));
    }
    seeds
}

/// A request: its kind, its node by place, root as the caller, then the picks of
/// its body and how it lies in memory.
fn ask(script: &mut Vec<u8>, name: &str, node: u8, rest: &[u8]) {
    script.extend([player::REQUEST, bodies::kind(name), node, 0]);
    script.extend(rest);
}

/// Looks `file`, `dir` and `fifo` up, which are nodes 1, 2 and 3 then, and opens
/// the first two: handles 0 and 1.
fn opened(mode: u8) -> Vec<u8> {
    let mut script = vec![mode];
    for name in [0, 1, 4] {
        ask(&mut script, "lookup", 0, &[name, 0]);
    }
    ask(&mut script, "open", 1, &[2, 0, 0]);
    ask(&mut script, "opendir", 2, &[0, 0, 0]);
    script
}

/// Made, written, read, linked, renamed, removed.
fn life(mode: u8) -> Vec<u8> {
    let mut script = opened(mode);
    let acts: [(&str, u8, &[u8]); 11] = [
        ("create", 0, &[2, 1, 0, 12, 0]),
        ("write", 4, &[2, 0, 40, 0, 0x61, 0]),
        ("read", 4, &[2, 0, 40, 0]),
        ("setattr", 4, &[0x0f, 0, 2, 1, 0, 0, 0, 0, 1, 0, 0, 0]),
        ("setxattr", 4, &[0, 3, 1, 2, 3, 0, 0, 0, 0]),
        ("link", 2, &[4, 13, 0]),
        ("rename2", 0, &[2, 0, 12, 14, 0]),
        ("unlink", 2, &[13, 0]),
        ("readdirplus", 2, &[1, 0, 200, 0]),
        ("fsync", 4, &[2, 0, 0]),
        ("release", 4, &[2, 0]),
    ];
    for (name, node, rest) in acts {
        ask(&mut script, name, node, rest);
        script.extend([player::COMPLETE, 0, 0]);
    }
    script
}
