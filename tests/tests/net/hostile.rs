//! Drivers that get everything wrong. What they send is dropped and counted; the
//! next packet goes through.

use std::time::Duration;

use pericarp_tests::frontend::{Desc, WRITE};
use pericarp_tests::network::{GUEST_MAC, HOST_MAC, Network, datagram};
use pericarp_tests::parts::Part;
use pericarp_tests::usage::Watch;

use crate::card::{Card, HEADER, LARGE, LIMIT, PLAIN, Served};
use crate::{bytes, host, reaches, send_to_guest};

#[test]
fn frames_that_are_none_are_dropped_and_counted() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net frames", &parts, 1) else {
        return;
    };
    let served = Served::start(&[]);
    let mut card = Card::connect(&served, PLAIN | LARGE, 1);
    let socket = host();
    let port = socket.local_addr().unwrap().port();
    let ethernet = [&HOST_MAC[..], &GUEST_MAC[..]].concat();
    let mut lengths = 0;
    // Nothing, a part of the header, the header alone, a byte less than a frame's
    // header, a byte more than there can be.
    for len in [1, 5, HEADER, HEADER + 13, HEADER + 18 + 65536] {
        let mut packet = vec![0; len];
        let end = len.min(HEADER + 12);
        if end == HEADER + 12 {
            packet[HEADER..end].copy_from_slice(&ethernet);
        }
        card.send_raw(&packet, &[], 0);
        lengths += 1;
        assert_eq!(served.dropped("tx-dropped-length"), lengths, "{len} bytes");
        reaches(&mut card, &socket, b"after", &[]);
    }
    // The device is to write what it should read.
    card.send_raw(&[0; 100], &[50], WRITE);
    assert_eq!(served.dropped("tx-dropped-chain"), 1);
    // Headers that lie: the kernel refuses them or takes them for what they are; it is
    // the next packet that counts.
    let frame = datagram(port, &bytes(200));
    let mut refused = 0;
    for (flags, kind, length, size, start, offset) in [
        // A checksum beyond the packet.
        (1, 0, 0, 0, 60_000, 6),
        (1, 0, 0, 0, 34, 60_000),
        // Pieces of no bytes.
        (1, 1, 54, 0, 34, 16),
        (1, 5, 42, 0, 34, 6),
        // A kind that there is not, and all bits.
        (0, 0x7f, 0, 1, 0, 0),
        (0xff, 0xff, 0xffff, 0xffff, 0xffff, 0xffff),
        // A header longer than the packet.
        (1, 1, 60_000, 1000, 34, 16),
    ] {
        let mut header = [0; HEADER];
        header[0] = flags;
        header[1] = kind;
        for (at, field) in [(2, length), (4, size), (6, start), (8, offset)] {
            header[at..at + 2].copy_from_slice(&u16::to_le_bytes(field));
        }
        card.send(header, &frame, &[]);
        let now = served.dropped("tx-dropped-refused");
        refused += u64::from(now > refused);
        // Whatever became of it is not what is read next.
        socket.set_nonblocking(true).unwrap();
        while socket.recv(&mut [0; 2000]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        reaches(&mut card, &socket, b"after", &[]);
    }
    assert!(refused >= 3, "{refused} were refused");
    // More segments than the kernel takes, and as many as it does.
    let long = datagram(port, &bytes(1300));
    card.send([0; HEADER], &long, &[1; 250]);
    let mut got = [0; 2000];
    assert_eq!(socket.recv(&mut got).unwrap(), 1300);
    served.finish();
}

#[test]
fn rings_and_chains_that_are_none_harm_nobody() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net chains", &parts, 1) else {
        return;
    };
    let served = Served::start(&[]);
    let socket = host();
    {
        let mut card = Card::connect(&served, PLAIN | LARGE, 1);
        // Out of memory, a loop, a buffer that the device may not write, one that is
        // too small for a header.
        let ring = &mut card.driver.rings[0];
        let bad = [
            (0, u64::MAX - 10, 100, WRITE, 0),
            (1, 0x20_0000, 100, WRITE | 1, 1),
            (2, 0x20_0000, 100, 0, 0),
            (3, 0x20_0000, 11, WRITE, 0),
        ];
        for (head, addr, len, flags, next) in bad {
            let desc = Desc {
                addr,
                len,
                flags,
                next,
            };
            ring.set_desc(head, desc);
            ring.queue(head);
        }
        ring.publish();
        send_to_guest(&socket, b"one");
        ring.notify();
        let used = ring.watch(4, LIMIT).unwrap();
        assert!(used.iter().all(|used| used.len == 0), "{used:?}");
        card.offer(8, &[1526]);
        assert_eq!(card.receive(LIMIT).unwrap().payload(), b"one");
        assert_eq!(served.dropped("rx-dropped-chain"), 4);
        // The same buffer offered again and again is filled as often.
        for _ in 0..3 {
            card.offer(8, &[1526]);
        }
        for payload in [b"two", b"thr", b"fou"] {
            send_to_guest(&socket, payload);
            assert_eq!(card.receive(LIMIT).unwrap().payload(), payload);
        }
        // More than a ring holds: that queue stops, the other does not.
        let ring = &card.driver.rings[0];
        ring.publish_at(ring.next_avail().wrapping_add(1000));
        ring.notify();
        send_to_guest(&socket, b"lost");
        reaches(&mut card, &socket, b"still", &[]);
    }
    // The front end vanished with buffers offered; the next one is served.
    let mut card = Card::connect(&served, PLAIN, 1);
    card.offer_many(4, 1526);
    let first = card.receive(LIMIT).unwrap();
    assert_eq!(first.payload(), b"lost", "it waited in the tap");
    served.finish();
}

#[test]
fn commands_are_obeyed_or_refused() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net commands", &parts, 2) else {
        return;
    };
    let served = Served::start(&["--queue-pairs", "2"]);
    let mq = 1 << 22;
    let mut card = Card::connect(&served, PLAIN | LARGE | mq, 2);
    let control = 4;
    let offloads = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    for (command, want) in [
        (vec![4, 0, 1, 0], Some(0)),
        (vec![4, 0, 2, 0], Some(0)),
        // No pair, more than there are, no number, another command, another class.
        (vec![4, 0, 0, 0], Some(1)),
        (vec![4, 0, 3, 0], Some(1)),
        (vec![4, 0, 2], Some(1)),
        (vec![4, 9, 2, 0], Some(1)),
        (vec![77, 0, 1, 2], Some(1)),
        (vec![4], Some(1)),
        (offloads(0), Some(0)),
        (offloads(1 << 1 | 1 << 7), Some(0)),
        // Not agreed on, and no offload.
        (offloads(1 << 8), Some(1)),
        (offloads(1 << 17), Some(1)),
    ] {
        assert_eq!(card.command(control, &command, true), want, "{command:?}");
    }
    // Nowhere to answer.
    assert_eq!(card.command(control, &[4, 0, 1, 0], false), None);
    card.offer_many(8, 1526);
    let socket = host();
    assert_eq!(card.command(control, &[4, 0, 1, 0], true), Some(0));
    // With one pair in use all comes to it.
    for round in 0..20 {
        let other = host();
        send_to_guest(&other, &bytes(round + 1));
        let packet = card.receive(LIMIT).unwrap();
        assert_eq!(packet.payload(), bytes(round + 1));
        card.offer((round % 8) as u16, &[1526]);
    }
    reaches(&mut card, &socket, b"out", &[]);
    assert!(card.receive(Duration::from_millis(50)).is_none());
    served.finish();
}

/// Frames from both sides, and nobody who takes them: they are left in the tap's queue, or dropped by
/// the host's stack, and nothing of them is kept.
#[test]
fn floods_that_nobody_reads_are_kept_by_nobody() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net floods", &parts, 1) else {
        return;
    };
    for engine in ["uring", "sync"] {
        let served = Served::start(&["--io-engine", engine]);
        let mut card = Card::connect(&served, PLAIN | LARGE, 1);
        let (silent, socket) = (host(), host());
        reaches(&mut card, &socket, b"before", &[]);
        let watch = Watch::begin(served.process.pid());
        // There is no buffer for these.
        for _ in 0..5000 {
            send_to_guest(&socket, &bytes(1400));
        }
        // Nobody reads what comes here.
        let port = silent.local_addr().unwrap().port();
        let frame = [vec![0; HEADER], datagram(port, &bytes(1400))].concat();
        for _ in 0..40 {
            card.burst(&vec![frame.clone(); 250]);
        }
        // A queue's worth of the largest packets is 16 MiB, and nothing like that is held.
        watch.end(&format!("net ({engine}), 5000 in and 10000 out"), 1024);
        reaches(&mut card, &socket, b"after", &[]);
        card.offer_many(100, 1526);
        assert_eq!(card.receive(LIMIT).unwrap().payload(), bytes(1400));
        served.finish();
    }
}
