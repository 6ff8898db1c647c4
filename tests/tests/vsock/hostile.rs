//! A guest and host programs that lie, flood and break rules. Each case ends
//! with somebody honest being served.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use pericarp_tests::frontend::{Desc, NEXT};
use pericarp_tests::usage::Watch;

use crate::STEP;
use crate::rig::{self, CID, Guest, Packet, op};

#[test]
fn wrong_packets_are_reset_once() {
    let vsock = start!("wrong_packets_are_reset_once");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    let stray = Packet::to_host(op::RW, 77, 1);
    for operation in [
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        8,
        0xffff,
    ] {
        guest.send(&Packet {
            op: operation,
            ..stray.clone()
        });
        let reset = guest.expect(op::RST);
        assert_eq!((reset.src_cid, reset.dst_cid), (2, CID));
        assert_eq!((reset.src_port, reset.dst_port), (1, 77));
    }
    for (what, packet) in [
        (
            "seqpacket",
            Packet {
                kind: 2,
                op: op::REQUEST,
                ..stray.clone()
            },
        ),
        (
            "another context",
            Packet {
                dst_cid: 7,
                op: op::REQUEST,
                ..stray.clone()
            },
        ),
        (
            "the guest itself",
            Packet {
                dst_cid: CID,
                op: op::REQUEST,
                ..stray.clone()
            },
        ),
    ] {
        guest.send(&packet);
        assert_eq!(guest.expect(op::RST).src_cid, packet.dst_cid, "{what}");
    }
    // No answer: a reset, and what claims to come from elsewhere.
    guest.send(&Packet {
        op: op::RST,
        ..stray.clone()
    });
    guest.send(&Packet {
        src_cid: 2,
        op: op::REQUEST,
        ..stray.clone()
    });
    guest.send(&Packet {
        src_cid: CID + 1,
        op: op::REQUEST,
        ..stray.clone()
    });
    guest.quiet();

    // On an open connection each of these ends it.
    type Breaker = fn(&mut Packet);
    let breakers: [(&str, Breaker); 6] = [
        ("a second request", |p| p.op = op::REQUEST),
        ("a response", |p| p.op = op::RESPONSE),
        ("an unknown operation", |p| p.op = 99),
        ("a length beyond the chain", |p| p.len = Some(5)),
        ("an immense length", |p| p.len = Some(u32::MAX)),
        ("a length short of 64 KiB", |p| p.len = Some(65_537)),
    ];
    for (index, (what, breaker)) in breakers.into_iter().enumerate() {
        let port = 5000 + index as u32;
        assert_eq!(guest.dial(port, 1).op, op::RESPONSE);
        let mut host = rig::accept(&listener);
        let mut packet = Packet::to_host(op::RW, port, 1);
        breaker(&mut packet);
        guest.send(&packet);
        assert_eq!(guest.expect(op::RST).dst_port, port, "{what}");
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 0, "{what}");
        guest.quiet();
    }
    // After its own half-close a guest may not send.
    let connection = guest.dial(6000, 1);
    let _host = rig::accept(&listener);
    guest.shutdown(&connection, 2);
    guest.answer_with(&connection, b"more");
    guest.expect(op::RST);
    guest.quiet();
}

#[test]
fn a_guest_that_ignores_its_credit_is_reset() {
    let vsock = start!("a_guest_that_ignores_its_credit_is_reset");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    let connection = guest.dial(5000, 1);
    let _host = rig::accept(&listener);
    let before = vsock.footprint();
    let mut reset = None;
    for _ in 0..200 {
        guest.answer_with(&connection, &[7; 30_000]);
        while let Some(packet) = guest.next(Duration::from_millis(1)) {
            if packet.op == op::RST {
                reset.get_or_insert(packet);
            }
        }
        if reset.is_some() {
            break;
        }
    }
    assert!(reset.is_some());
    let held = vsock.footprint().anon_kib.saturating_sub(before.anon_kib);
    assert!(held <= 512, "{held} KiB");

    // Claims about what it read that cannot be true give it nothing.
    guest.room = 1000;
    let connection = guest.dial(5001, 1);
    let mut host = rig::accept(&listener);
    host.set_nonblocking(true).unwrap();
    while host.write(&[1; 4096]).is_ok() {}
    let mut got = 0;
    while got < 1000 {
        got += guest.expect(op::RW).payload.len();
    }
    for lie in [1001, 5000, u32::MAX, 1 << 31] {
        guest.read = lie;
        guest.answer(&connection, op::CREDIT_UPDATE);
    }
    guest.expect(op::CREDIT_REQUEST);
    // Each lie may be asked about again, but brings no data.
    while let Some(packet) = guest.next(Duration::from_millis(100)) {
        assert_eq!(packet.op, op::CREDIT_REQUEST, "{packet:?}");
    }
    guest.read = 1000;
    guest.answer(&connection, op::CREDIT_UPDATE);
    guest.expect(op::RW);
}

#[test]
fn floods_are_bounded() {
    let vsock = start!("floods_are_bounded");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    // Strays while the guest takes nothing: it is heard no more at some point.
    let before = vsock.footprint();
    guest.hold_buffers = true;
    let mut sent = 0;
    while sent < 5000 && guest.try_send(&Packet::to_host(op::RW, 77, 1), Duration::from_millis(300))
    {
        sent += 1;
    }
    assert!((256..1000).contains(&sent), "{sent} packets were taken");
    assert!(vsock.footprint().anon_kib <= before.anon_kib + 512);
    // The host's programs are not affected, and it goes on where it stood.
    let mut host = vsock.dial();
    host.write_all(b"CONNECT 5\n").unwrap();
    guest.hold_buffers = false;
    guest.offer_buffers();
    let mut resets = 0;
    let request = loop {
        let packet = guest.next(STEP).expect("resets, then the request");
        if packet.op == op::REQUEST {
            break packet;
        }
        assert_eq!(packet.op, op::RST);
        resets += 1;
    };
    while let Some(packet) = guest.next(Duration::from_millis(100)) {
        assert_eq!(packet.op, op::RST);
        resets += 1;
    }
    assert!(resets >= sent, "{resets} resets for {sent} packets");
    guest.answer(&request, op::RST);

    // Requests: to a host program that does not accept, its backlog is the limit.
    let (mut open, mut refused) = (0, 0);
    for port in 0..5000 {
        match guest.dial(10_000 + port, 1).op {
            op::RESPONSE => open += 1,
            _ => refused += 1,
        }
    }
    assert!(open < 4096 && refused > 0, "{open} open, {refused} refused");
    println!("{open} of 5000 to one that does not accept, {sent} strays");
    drop(listener);
}

#[test]
fn the_number_of_connections_has_an_end_and_hosts_keep_their_share() {
    let vsock = start!("the_number_of_connections_has_an_end_and_hosts_keep_their_share");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let acceptor = spawn(move || {
        let mut all = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            let last = all.len() + 1 >= 3072;
            all.push(OwnedFd::from(stream));
            if last {
                break;
            }
        }
        // It goes on listening: only the device's limit refuses more.
        (all, listener)
    });
    raise_own_limit();
    let mut guest = vsock.guest();
    let mut open = 0;
    while open < 3072 {
        // A full backlog is a reset: try again.
        if guest.dial(10_000 + open, 1).op == op::RESPONSE {
            open += 1;
        }
    }
    let (held, listening) = acceptor.join().unwrap();
    for port in 0..10 {
        assert_eq!(guest.dial(20_000 + port, 1).op, op::RST);
    }
    let mut host = vsock.dial();
    host.write_all(b"CONNECT 5\n").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.answer(&request, op::RESPONSE);
    rig::line(&mut host);
    let many = vsock.footprint();
    println!("3073 connections: {many:?}");
    assert!(many.anon_kib < 16 << 10, "{many:?}");
    drop((held, listening));
    for _ in 0..3072 {
        guest.expect_shutdown(3);
    }
}

/// A connection that nobody reads holds what its guest was given credit for: 64 KiB for each of the
/// first 256, and 4 KiB for each of the others.
#[test]
fn connections_that_nobody_reads_hold_no_more_than_is_said() {
    const MANY: u32 = 600;
    let vsock = start!("connections_that_nobody_reads_hold_no_more_than_is_said");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    raise_own_limit();
    let mut guest = vsock.guest();
    let watch = Watch::begin(vsock.pid());
    let (mut held, mut sent) = (Vec::new(), Vec::new());
    for port in 0..MANY {
        let connection = guest.dial(10_000 + port, 1);
        assert_eq!(connection.op, op::RESPONSE);
        let room = if port < 256 { 64 << 10 } else { 4 << 10 };
        assert_eq!(connection.buf_alloc, room, "connection {port}");
        held.push(rig::accept(&listener));
        sent.push(guest.fill(&connection));
    }
    let all: usize = sent.iter().sum();
    println!(
        "{} MiB sent to {MANY} programs that read nothing",
        all >> 20
    );
    // The connections themselves take a few hundred bytes each.
    let buffers = 256 * 64 + u64::from(MANY - 256) * 4;
    watch.end("vsock, 600 connections full and unread", buffers + 4096);
    // They still have what was sent, and the first of them has its credit back when it reads.
    held[0].read_exact(&mut vec![0; sent[0]]).unwrap();
    guest.expect(op::CREDIT_UPDATE);
    assert!(vsock.is_alive());
}

/// The test's own half of a few thousand connections.
fn raise_own_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

#[test]
fn host_programs_that_misbehave_disturb_nobody() {
    let vsock = start!("host_programs_that_misbehave_disturb_nobody");
    let mut guest = vsock.guest();
    let mut silent: Vec<UnixStream> = (0..100).map(|_| vsock.dial()).collect();
    let half = silent.len();
    silent.extend((0..10).map(|_| {
        let mut stream = vsock.dial();
        stream.write_all(b"CONN").unwrap();
        stream
    }));
    for line in [
        "HELLO\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT +1\n",
        "CONNECT 4294967296\n",
        "CONNECT 1 \n",
        "connect 1\n",
        "\n",
        "CONNECT 00000000000000000001\n",
    ] {
        let mut stream = vsock.dial();
        stream.write_all(line.as_bytes()).unwrap();
        let mut all = Vec::new();
        // A close with unread bytes behind it is a reset.
        match stream.read_to_end(&mut all) {
            Ok(_) => assert!(all.is_empty(), "{line:?}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{line:?}"),
        }
    }
    guest.quiet();
    // A line in pieces is a line.
    let mut host = vsock.dial();
    for piece in ["CON", "NECT ", "12", "\n"] {
        host.write_all(piece.as_bytes()).unwrap();
        sleep(Duration::from_millis(5));
    }
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 12);
    guest.answer(&request, op::RESPONSE);
    rig::line(&mut host);
    // One that gives up while the guest is asked.
    let mut gone = vsock.dial();
    gone.write_all(b"CONNECT 13\n").unwrap();
    let request = guest.expect(op::REQUEST);
    drop(gone);
    guest.expect(op::RST);
    guest.answer(&request, op::RESPONSE);
    guest.expect(op::RST);
    // The silent ones are sent away after five seconds.
    let began = Instant::now();
    for stream in &mut silent[..half] {
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    assert!(began.elapsed() < Duration::from_secs(30));
    host.write_all(b"still there").unwrap();
    assert_eq!(guest.expect(op::RW).payload, b"still there");
}

#[test]
fn memory_that_is_cut_off_ends_only_its_session() {
    let vsock = start!("memory_that_is_cut_off_ends_only_its_session");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    // That of the rings and the buffers, with and without work in it; the rest.
    for (file, len, work) in [
        (0, 0, true),
        (0, 0, false),
        (0, 0x4_0000, true),
        (1, 0, true),
    ] {
        let mut guest = vsock.guest();
        if work {
            // Reset: there is something to be told to the guest, too.
            guest.send(&Packet::to_host(op::RW, 1, 1));
            let ring = &mut guest.driver.rings[1];
            ring.queue(0);
            ring.publish();
        }
        guest.driver.guest.files[file].set_len(len).unwrap();
        // From here on the memory is out of our reach, too.
        for _ in 0..4 {
            guest.driver.rings[1].notify();
            guest.driver.rings[0].notify();
            sleep(Duration::from_millis(5));
        }
        // The crate reads the used ring when it is told where it is.
        let _ = guest.driver.configure(1);
        drop(guest);
        assert!(vsock.is_alive(), "file {file}, {len} bytes left");
        // The next guest finds everything in order.
        let mut guest = vsock.guest();
        assert_eq!(guest.dial(5000, 1).op, op::RESPONSE, "file {file}");
        let mut host = rig::accept(&listener);
        host.write_all(b"x").unwrap();
        assert_eq!(guest.expect(op::RW).payload, b"x", "file {file}");
    }
}

#[test]
fn broken_rings_harm_only_themselves() {
    let vsock = start!("broken_rings_harm_only_themselves");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    type Breaker = fn(&mut Guest);
    let breakers: [(&str, Breaker); 6] = [
        ("an index far ahead", |guest| {
            let ring = &guest.driver.rings[1];
            ring.publish_at(ring.next_avail().wrapping_add(5000));
            ring.notify();
        }),
        ("a head that is no descriptor", |guest| {
            let ring = &mut guest.driver.rings[1];
            ring.queue(60_000);
            ring.publish();
            ring.notify();
        }),
        ("a loop", |guest| {
            let ring = &mut guest.driver.rings[1];
            ring.set_desc(
                0,
                Desc {
                    addr: 0x10_0000,
                    len: 1,
                    flags: NEXT,
                    next: 0,
                },
            );
            ring.queue(0);
            ring.publish();
            ring.notify();
        }),
        ("an address outside memory", |guest| {
            let ring = &mut guest.driver.rings[1];
            ring.set_desc(
                0,
                Desc {
                    addr: u64::MAX - 10,
                    len: 100,
                    flags: 0,
                    next: 0,
                },
            );
            ring.queue(0);
            ring.publish();
            ring.notify();
        }),
        ("receive buffers of no size and nowhere", |guest| {
            guest.take_all_buffers();
            let ring = &mut guest.driver.rings[0];
            for head in 0..100 {
                let addr = if head % 2 == 0 {
                    0x10_0000
                } else {
                    u64::MAX - 50
                };
                let len = if head % 3 == 0 { 44 } else { 100 };
                ring.set_desc(
                    head,
                    Desc {
                        addr,
                        len,
                        flags: 2,
                        next: 0,
                    },
                );
                ring.queue(head);
            }
            ring.publish();
            ring.notify();
            guest.send(&Packet::to_host(op::RW, 1, 1));
        }),
        ("receive index far ahead", |guest| {
            let ring = &guest.driver.rings[0];
            ring.publish_at(ring.next_avail().wrapping_add(9000));
            ring.notify();
            guest.send(&Packet::to_host(op::RW, 1, 1));
        }),
    ];
    for (what, breaker) in breakers {
        let mut guest = vsock.guest();
        breaker(&mut guest);
        sleep(Duration::from_millis(50));
        drop(guest);
        // The next guest finds everything in order.
        let mut guest = vsock.guest();
        assert_eq!(guest.dial(5000, 1).op, op::RESPONSE, "{what}");
        let mut host = rig::accept(&listener);
        host.write_all(b"x").unwrap();
        assert_eq!(guest.expect(op::RW).payload, b"x", "{what}");
    }
    assert!(vsock.is_alive());
}
