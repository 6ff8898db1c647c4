//! Peers of the control socket that mean harm: noise, endless lines, crowds,
//! and those that never read. After each the operator is still answered and
//! the disk still serves.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use pericarp_tests::client::Client;
use serde_json::json;

use crate::rig::{Rig, peer};

fn is_well(rig: &mut Rig, client: &mut Client) {
    assert!(rig.backend.is_alive(), "{}", rig.backend.epitaph());
    assert_eq!(rig.ask(&json!({"op": "version"}))["ok"], true);
    client.read(0, 0, 4096).unwrap();
}

#[test]
fn peers_that_mean_harm() {
    let Some(mut rig) = Rig::start("hostile control peers", &["--num-queues=8"]) else {
        return;
    };
    let mut client = Client::connect(rig.backend.socket(), 1, 8).unwrap();
    is_well(&mut rig, &mut client);
    let before = rig.backend.footprint().unwrap();

    // Noise of every kind, a line each.
    for noise in [
        &b"\0\0\0\n"[..],
        b"{{{\n",
        b"\xff\xfe\n",
        b"[1,2]\n",
        b"GET\n",
        b"\"op\"\n",
    ] {
        let mut peer = peer(&rig.control);
        peer.write_all(noise).unwrap();
        let mut answer = [0; 512];
        let n = peer.read(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer[..n]);
        assert!(answer.contains("\"ok\":false"), "{noise:?}: {answer}");
    }
    let mut deep = peer(&rig.control);
    deep.write_all(&b"[".repeat(10_000)).unwrap();
    deep.write_all(b"\n").unwrap();
    is_well(&mut rig, &mut client);

    // A line without an end, and headers without an end: cut off.
    for start in ["{\"op\":\"", "GET /metrics HTTP/1.1\r\n"] {
        let mut peer = peer(&rig.control);
        peer.write_all(start.as_bytes()).unwrap();
        let cut = (0..1 << 20).find_map(|_| peer.write_all(&[b'x'; 1024]).err());
        let kinds = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
        assert!(cut.is_some_and(|e| kinds.contains(&e.kind())));
    }
    is_well(&mut rig, &mut client);

    // A crowd that says nothing.
    let crowd: Vec<UnixStream> = (0..1000).map(|_| peer(&rig.control)).collect();
    is_well(&mut rig, &mut client);
    let held = rig.backend.footprint().unwrap();
    assert!(held.fds <= before.fds + 32, "{held:?}, was {before:?}");
    drop(crowd);

    // Many that ask a lot and read nothing.
    let deaf: Vec<UnixStream> = (0..40)
        .map(|_| {
            let mut peer = peer(&rig.control);
            peer.set_nonblocking(true).unwrap();
            while peer.write(b"{\"op\":\"stats\"}\n").is_ok() {}
            peer
        })
        .collect();
    for _ in 0..10 {
        is_well(&mut rig, &mut client);
    }
    let held = rig.backend.footprint().unwrap();
    assert!(
        held.anon_kib < before.anon_kib + 8192,
        "{held:?}, was {before:?}"
    );
    drop(deaf);
    is_well(&mut rig, &mut client);
}
