//! A hostile guest against the queue and the block device, in one thread.
//!
//! The script is the driver, the front end and the disk: it writes descriptors,
//! tables and indices, offers heads, completes I/O in any order and with any
//! result, and restarts the queue on other memory. The player is the worker.
//! What must hold is checked as it goes, by panics:
//!
//! - a chain is refused exactly when it breaks a rule of the specification;
//! - every popped head is completed exactly once, and nothing is in flight at
//!   the end;
//! - no byte of guest memory changes that the guest did not name as writable
//!   in a chain in flight, the used ring apart, which holds what was pushed;
//! - status bytes, used lengths and read data are right, and a status byte is
//!   not touched before the end;
//! - calls and kicks follow virtio 1.3, 2.7.7 and 2.7.10.

mod judge;
mod player;
mod store;

use std::cell::RefCell;

use crate::script::{KINDS, Script};
use player::{Player, Rig};

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
    let mut player = Player::new(&mut rig, Script::new(bytes));
    player.run();
    RIG.set(Some(rig));
}

/// Hand-made scripts: a good request of every type, in every cache mode.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let modes = [(0x03, "buffered"), (0x0b, "direct"), (0x07, "read-only")];
    let mut seeds = Vec::new();
    for (mode, mode_name) in modes {
        for (kind, name) in KINDS {
            for indirect in [0u8, 1] {
                let request = [player::REQUEST, kind, 2, 3, 1, indirect, player::TURN];
                let mut script = vec![mode, 4, 0, 0];
                script.extend(request);
                script.extend([player::COMPLETE, 0, 0, player::TURN, player::RESTART, 0, 1]);
                script.extend(request);
                let suffix = ["direct", "indirect"][usize::from(indirect)];
                seeds.push((format!("{mode_name}-{name}-{suffix}"), script));
            }
        }
    }
    seeds.extend(space_seeds());
    seeds
}

/// DISCARD and WRITE_ZEROES where they were agreed on: lists of each length,
/// good and bad ranges, and disks that lack a way.
fn space_seeds() -> Vec<(String, Vec<u8>)> {
    // Sector, sectors, flags and oddities of each range.
    let lists: [(&str, &[[u8; 3]]); 8] = [
        ("one", &[[3, 2, 0]]),
        (
            "several",
            &[[0, 8, 0], [64, 16, 0], [64, 1, 0], [120, 8, 0]],
        ),
        ("unmap", &[[8, 8, 1], [32, 8, 0]]),
        ("beyond", &[[3, 2, 0], [127, 2, 0]]),
        ("top", &[[0, 1, 0xf0], [0, 1, 0xe0]]),
        ("huge", &[[0, 1, 0x0c]]),
        ("flags", &[[0, 1, 0x12]]),
        ("none", &[]),
    ];
    // The disk's answers: all, a part, that it cannot, an error, none yet.
    let answers = [0, 0x85, 0xfb, 0xfb, 0xfc, 0];
    let mut seeds = Vec::new();
    for (mode, mode_name) in [(0x13, "buffered"), (0x1b, "direct"), (0x11, "through")] {
        for (kind, name) in [(0u8, "discard"), (1, "zeroes")] {
            for (n, (list_name, list)) in (0..).zip(lists) {
                let request = |which: u8| {
                    let mut bytes = vec![player::SPACE, which, n & 1, list.len() as u8];
                    bytes.extend(list.iter().flatten());
                    bytes.push(player::TURN);
                    bytes
                };
                let mut script = vec![mode, 4, 0, 0];
                script.extend(request(kind));
                for answer in answers {
                    script.extend([player::COMPLETE, 0, answer]);
                }
                script.extend(request(kind | 4));
                script.extend([player::RESTART, 0, 1]);
                seeds.push((format!("space-{mode_name}-{name}-{list_name}"), script));
            }
        }
    }
    seeds
}
