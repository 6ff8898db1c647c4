//! What a guest can end `virtiofsd` with, and not our server: it answers, or
//! lets a request without room for an answer go, and serves on.

use std::fs;

use pericarp_tests::fs::wire::posix::O_RDWR;
use pericarp_tests::fs::wire::{ROOT, op};
use pericarp_tests::fs::{Client, Server, transfer_body};

use crate::stage::{Outcome, turned_down};

/// What a client does, and what came of it.
type Act = fn(&mut Client) -> Outcome;

/// Acts of one request each.
const ENDS: [(&str, Act); 6] = [
    ("a READ from 2^63 on", |c| transfer(c, op::READ, 1 << 63)),
    ("a READ from 2^64 - 1 on", |c| {
        transfer(c, op::READ, u64::MAX)
    }),
    ("a WRITE from 2^63 on", |c| transfer(c, op::WRITE, 1 << 63)),
    ("room of 15 bytes for a reply", |c| {
        let (_, request) = c.request(op::GETATTR, ROOT, &[0; 16]);
        turned_down(&c.send(&request, 15)?)
    }),
    ("a request of 39 bytes", |c| {
        turned_down(&c.send(&[39; 39], 144)?)
    }),
    ("a length that is a lie", |c| {
        let (_, mut request) = c.request(op::LOOKUP, ROOT, b"file\0");
        request[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        turned_down(&c.send(&request, 144)?)
    }),
];

fn transfer(c: &mut Client, opcode: u32, offset: u64) -> Outcome {
    let node = c.lookup(ROOT, "file")?.node;
    let handle = c.open(node, O_RDWR)?;
    let body = transfer_body(handle, offset, 4, 0).bytes(b"data");
    let (_, request) = c.request(opcode, node, &body.0);
    turned_down(&c.send(&request, 64)?)
}

/// Plays one act; what went wrong, on the same session and the next one.
fn play(server: &mut Server, act: fn(&mut Client) -> Outcome) -> Outcome {
    let mut setup = Client::setup();
    if !server.is_ours() {
        setup.limit = std::time::Duration::from_secs(1);
    }
    let mut client = server.connect(&setup)?;
    client.init()?;
    act(&mut client)?;
    client.getattr(ROOT)?;
    if server.is_alive() {
        Ok(())
    } else {
        Err(server.epitaph().into())
    }
}

#[test]
fn what_ends_the_peer_does_not_end_us() {
    let Some((mut ours, mut theirs)) = super::both("what_ends_the_peer_does_not_end_us") else {
        return;
    };
    for server in [&ours, &theirs] {
        fs::write(server.path("file"), b"content").unwrap();
    }
    for (name, act) in ENDS {
        play(&mut ours, act).unwrap_or_else(|wrong| panic!("{name}: {wrong}"));
        // What the peer does is no affair of this test, and worth knowing.
        match play(&mut theirs, act) {
            Ok(()) => eprintln!("virtiofsd survives {name}"),
            Err(wrong) => {
                let wrong = wrong.to_string();
                let first = wrong.lines().next().unwrap_or_default();
                eprintln!("virtiofsd does not survive {name}: {first}");
            }
        }
        theirs.restart();
        assert_eq!(fs::read(ours.path("file")).unwrap(), b"content", "{name}");
    }
}
