//! A hostile driver against a network card and its worker, in one thread.
//!
//! The script is the driver, the front end and the host: it offers memory and sends
//! packets in chains of any shape, with any header and length, gives commands, stops and
//! starts queues, agrees on other features, and breaks rings; the host sends packets,
//! reads none for a while, and refuses what the tap is told. Rings, chains, the worker
//! and the card are those of `pericarp-net`; the tap is a pair of sockets, and the
//! worker sleeps where it would. What must hold is checked as it goes, by panics:
//!
//! - each chain is used once, those of a queue in order, with the right length, and a
//!   queue that is taken back says where it stands;
//! - what the guest sent is what the host reads, byte for byte and in order, but for what
//!   is no packet, which is counted by reason; nothing is left when the worker sleeps;
//! - what the host sent is what the guest sees, in as many buffers as it says, whole when
//!   it is published; it is dropped only where it is no packet or cannot fit, and waits
//!   only where there is no room;
//! - commands are answered as virtio says, and the tap is told what the driver chose;
//! - no byte of guest memory changes that the guest did not name as writable, used rings
//!   apart; a ring that nobody broke is not said to be broken;
//! - the driver is called for what is used, and kicks no more than it was asked to; the
//!   worker comes to rest.

mod judge;
mod lane;
mod player;
mod rig;
mod rules;

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
    rig.memory.clear();
    let mut script = Script::new(bytes);
    let (memory, bench, bells) = rig.parts(script.u8());
    Player::new(memory, bench, bells, script).run();
    RIG.set(Some(rig));
}

/// Hand-made scripts: packets of each kind both ways, over chains of each shape, with
/// each card, and what queues may meet on the way.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    use player::{COMMAND, FRAME, HOLD, OFFER, REFUSE, RESTART, SEND, SWITCH, WORK};
    let mut seeds = Vec::new();
    // Card, manners and size of rings, features that are left out.
    let modes: [(&str, [u8; 3]); 6] = [
        ("plain", [0, 0x10, 0]),
        ("pairs", [1, 0x12, 0]),
        ("sync", [3, 0x22, 0]),
        ("unmerged", [0, 0x12, 1]),
        ("legacy", [2, 0x10, 9]),
        ("no-commands", [1, 0x10, 6]),
    ];
    for (name, mode) in modes {
        // Lengths as `length` reads them, shapes as `cut` and `lay` do.
        let mut both = mode.to_vec();
        for (kind, more) in [(2, 0), (8, 0), (8, 90), (1, 1), (4, 1), (5, 80), (6, 0)] {
            let shape = kind + more;
            both.extend([OFFER, 0, shape & 7, 0x64, 0, OFFER, 0, 0x18, 7, 2]);
            both.extend([
                FRAME, 0, kind, more, 0, FRAME, 0x40, kind, more, 0, 8, 20, 0,
            ]);
            both.extend([SEND, 0, shape & 7, kind, more, 0]);
            both.extend([SEND, 1, 0x18 | shape & 7, kind, more, 0, WORK]);
        }
        seeds.push((format!("{name}-both-ways"), both));
        let mut stopped = mode.to_vec();
        for number in [0, 1, 0, 1] {
            stopped.extend([
                OFFER, 0, 0, 0x42, 40, FRAME, 0x80, 8, 60, 0, 8, 9, 0, 2, 0, 0,
            ]);
            stopped.extend([SWITCH, number, SEND, 0, 2, 8, 5, 0, WORK]);
        }
        stopped.extend([RESTART, 2, mode[2] ^ 0x71, OFFER, 0, 0, 3, 0, WORK]);
        stopped.extend([
            FRAME, 0, 8, 60, 0, RESTART, 3, mode[2], FRAME, 0, 2, 0, 0, WORK,
        ]);
        seeds.push((format!("{name}-stopped"), stopped));
        let mut commands = mode.to_vec();
        for what in [
            0x90, 0x50, 0xd0, 0x10, 0x12, 0x14, 0x15, 0x16, 0x37, 0x00, 0x08,
        ] {
            commands.extend([COMMAND, 0, 2, what]);
            commands.extend([0xff; 8]);
            commands.extend([REFUSE, what & 3]);
        }
        seeds.push((format!("{name}-commands"), commands));
    }
    let mut spoilt = vec![0, 0x11, 0];
    for what in 0..8 {
        spoilt.extend([
            OFFER, 0, 0xe2, 3, 0, what, OFFER, 0, 0, 3, 0, FRAME, 0, 8, 9, 0,
        ]);
        spoilt.extend([SEND, 0, 0xe4, 8, 30, 0, what, WORK]);
    }
    seeds.push(("spoilt".to_owned(), spoilt));
    let mut full = vec![0, 0x20, 0, HOLD];
    for _ in 0..6 {
        full.extend([SEND, 0, 0, 4, 0, 0, SEND, 0, 2, 8, 8, 0, WORK]);
    }
    full.extend([HOLD, WORK, SEND, 0, 0, 8, 8, 0]);
    seeds.push(("full".to_owned(), full));
    let hostile: [&[u8]; 4] = [
        &[player::JUMP, 0, 0x7f],
        &[player::HEAD, 0, 0xff],
        &[player::HEAD, 0, 0],
        &[player::POKE, 0, 2, 2, 4, 1, 2, 3, 4],
    ];
    for (number, act) in hostile.into_iter().enumerate() {
        let mut script = vec![0, 0x11, 0, OFFER, 0, 2, 0x63, 0, FRAME, 0, 8, 9, 0];
        script.extend(act);
        script.extend([player::DESCRIPTOR, 1, 0, 0, 0, 9, 1, 2, 0, WORK]);
        script.extend([RESTART, 1, 0, OFFER, 0, 0, 3, 0, FRAME, 0, 8, 9, 0, WORK]);
        seeds.push((format!("hostile-{number}"), script));
    }
    seeds
}
