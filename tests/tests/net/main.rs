//! `pericarp-net` on a tap in a network of the test's own: packets both ways, large
//! ones, everything a driver can get wrong, and what the operator asks for.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod card;
mod guest;
mod hand_over;
mod hostile;
mod life;
mod uml;

use std::net::UdpSocket;
use std::time::Duration;

use pericarp_tests::network::{GUEST, HOST, Network, TAP, datagram, dotted};
use pericarp_tests::parts::Part;
use pericarp_tests::process::command;

use card::{Card, HEADER, LARGE, LIMIT, PLAIN, Packet, Served, USO, without};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

/// The host's end of the traffic, on a port of its own.
fn host() -> UdpSocket {
    let socket = UdpSocket::bind((dotted(HOST), 0)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

fn send_to_guest(socket: &UdpSocket, payload: &[u8]) {
    socket.send_to(payload, (dotted(GUEST), 7)).unwrap();
}

/// Sends from the guest to this socket, and it must arrive.
fn reaches(card: &mut Card, socket: &UdpSocket, payload: &[u8], cuts: &[usize]) {
    let frame = datagram(socket.local_addr().unwrap().port(), payload);
    card.send([0; HEADER], &frame, cuts);
    let mut got = [0; 2000];
    let len = socket.recv(&mut got).unwrap();
    assert_eq!(&got[..len], payload);
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + len) as u8).collect()
}

#[test]
fn packets_go_both_ways() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net packets", &parts, 1) else {
        return;
    };
    for engine in ["uring", "sync"] {
        packets(engine);
    }
}

fn packets(engine: &str) {
    let card = ["--mac", "02:00:00:00:00:02", "--mtu", "1400"];
    let served = Served::start(&[&card[..], &["--io-engine", engine]].concat());
    let mut card = Card::connect(&served, PLAIN, 1);
    assert_eq!(
        card.driver.config(12).unwrap(),
        [2, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0x78, 0x05]
    );
    card.offer_many(8, 1526);
    let socket = host();
    // Cut anywhere: in the header, after it, in single bytes.
    let cuts: [&[usize]; 4] = [&[], &[HEADER], &[1, 1, 1, 9], &[11, 2, 14, 1]];
    for (round, cuts) in cuts.into_iter().enumerate() {
        reaches(&mut card, &socket, &bytes(100 * round + 1), cuts);
        let sent = bytes(300 * round + 5);
        send_to_guest(&socket, &sent);
        let packet = card.receive(LIMIT).unwrap();
        assert_eq!(packet.payload(), sent);
        assert_eq!(
            (packet.buffers(), packet.header[0], packet.header[1]),
            (1, 0, 0)
        );
    }
    let stats = served.ask(r#"{"op":"stats"}"#);
    let queues = &stats["devices"][0]["queues"];
    assert_eq!(queues[0]["requests"]["rx"]["count"], 4, "{stats}");
    assert_eq!(queues[1]["requests"]["tx"]["count"], 4, "{stats}");
    assert_eq!(
        queues[1]["requests"]["tx"]["bytes"],
        4 * 42 + 604,
        "{stats}"
    );
    served.finish();
}

#[test]
fn a_burst_keeps_its_order_and_loses_what_is_none() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net burst", &parts, 1) else {
        return;
    };
    for engine in ["uring", "sync"] {
        let served = Served::start(&["--io-engine", engine]);
        let mut card = Card::connect(&served, PLAIN, 1);
        let socket = host();
        let port = socket.local_addr().unwrap().port();
        for count in [1, 2, 3, 31, 32, 33, 64, 65, 100] {
            let packets: Vec<Vec<u8>> = (0..count)
                .map(|n| match n % 7 {
                    // A frame that is too short among the others.
                    5 => vec![0; HEADER + 3],
                    _ => [vec![0; HEADER], datagram(port, &bytes(n + 1))].concat(),
                })
                .collect();
            card.burst(&packets);
            for n in (0..count).filter(|n| n % 7 != 5) {
                let mut got = [0; 2000];
                let len = socket.recv(&mut got).unwrap();
                assert_eq!(&got[..len], bytes(n + 1), "{n} of {count}");
            }
        }
        assert_eq!(served.dropped("tx-dropped-length"), 4 + 4 + 4 + 9 + 9 + 14);
        served.finish();
    }
}

/// A datagram that the host's stack hands over uncut if it is let.
fn send_large(socket: &UdpSocket, payload: &[u8], piece: u16) {
    use std::os::fd::AsRawFd;
    let piece = i32::from(piece);
    // SAFETY: a number of four bytes, for UDP_SEGMENT.
    #[expect(unsafe_code, reason = "rustix has no UDP_SEGMENT")]
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const piece).cast(),
            4,
        )
    };
    assert_eq!(set, 0);
    send_to_guest(socket, payload);
}

#[test]
fn large_packets_come_whole_over_many_buffers_or_in_frames() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net large", &parts, 1) else {
        return;
    };
    let served = Served::start(&[]);
    let sent = bytes(40_000);
    {
        let mut card = Card::connect(&served, PLAIN | LARGE, 1);
        card.offer_many(100, 1526);
        send_large(&host(), &sent, 1400);
        let packet = card.receive(LIMIT).unwrap();
        assert_eq!(packet.payload(), sent);
        assert_eq!(packet.buffers(), (40_042 + HEADER).div_ceil(1526));
        assert_eq!(packet.header[1], 5, "VIRTIO_NET_HDR_GSO_UDP_L4");
        assert_eq!(packet.header[0] & 1, 1, "NEEDS_CSUM");
        // A small one after it is not made to wait for room.
        send_to_guest(&host(), b"small");
        assert_eq!(card.receive(LIMIT).unwrap().payload(), b"small");
        // Out: the host's stack cuts it.
        let socket = host();
        let port = socket.local_addr().unwrap().port();
        let mut header = [0; HEADER];
        header[0] = 1;
        header[1] = 5;
        header[2..4].copy_from_slice(&42u16.to_le_bytes());
        header[4..6].copy_from_slice(&1000u16.to_le_bytes());
        header[6..8].copy_from_slice(&34u16.to_le_bytes());
        header[8..10].copy_from_slice(&6u16.to_le_bytes());
        card.send(header, &datagram(port, &sent[..3500]), &[HEADER, 42]);
        let mut got: Vec<u8> = Vec::new();
        for len in [1000, 1000, 1000, 500] {
            let mut piece = [0; 2000];
            assert_eq!(socket.recv(&mut piece).unwrap(), len);
            got.extend(&piece[..len]);
        }
        assert_eq!(got, sent[..3500]);
        // As many buffers as it takes do not fit its ring's rest: it waits.
        let before = served.dropped("rx-dropped-no-room");
        send_large(&host(), &sent, 1400);
        let packet = card.receive(LIMIT).unwrap();
        assert_eq!(packet.chains, 27);
        send_large(&host(), &sent, 1400);
        send_large(&host(), &sent, 1400);
        assert_eq!(card.receive(LIMIT).unwrap().payload(), sent);
        assert!(card.receive(Duration::from_millis(200)).is_none());
        card.offer_many(27, 1526);
        assert_eq!(card.receive(LIMIT).unwrap().payload(), sent);
        assert_eq!(served.dropped("rx-dropped-no-room"), before);
    }
    // Another driver takes none: the host's stack cuts them.
    let mut card = Card::connect(&served, PLAIN, 1);
    card.offer_many(100, 1526);
    send_large(&host(), &sent[..4000], 1400);
    for len in [1400, 1400, 1200] {
        let packet: Packet = card.receive(LIMIT).unwrap();
        assert_eq!(packet.payload().len(), len);
        assert_eq!((packet.buffers(), packet.header[1]), (1, 0));
    }
    served.finish();
}

#[test]
fn a_driver_that_merges_nothing_gets_each_packet_in_one_chain() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net unmerged", &parts, 1) else {
        return;
    };
    let served = Served::start(&[]);
    let features = without(PLAIN | LARGE, VIRTIO_NET_F_MRG_RXBUF) & !USO;
    let mut card = Card::connect(&served, features, 1);
    card.offer(0, &[HEADER as u32, 42, 100]);
    card.offer(8, &[HEADER as u32, 1600]);
    let socket = host();
    // Larger than the first chain: gone. The chain is used for the next.
    send_to_guest(&socket, &bytes(101));
    send_to_guest(&socket, &bytes(100));
    send_to_guest(&socket, &bytes(1400));
    for len in [100, 1400] {
        let packet = card.receive(LIMIT).unwrap();
        assert_eq!(packet.payload(), bytes(len));
        assert_eq!(packet.buffers(), 1);
    }
    assert_eq!(served.dropped("rx-dropped-no-room"), 1);
    served.finish();
}

#[test]
fn what_cannot_be_served_is_one_line() {
    let parts = [Part::PERICARP_NET];
    let Some(network) = Network::here("net mistakes", &parts, 1) else {
        return;
    };
    network.ip("link add plain type veth peer name other");
    let said = |arguments: &[&str]| {
        let mut program = command(&Part::PERICARP_NET.find().unwrap());
        let output = program.args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap()
    };
    let socket = "/tmp/pericarp-net-never";
    for (arguments, want) in [
        (
            ["--tap", "nowhere"],
            "--tap nowhere: no interface has this name: make it",
        ),
        (
            ["--tap", "plain"],
            "--tap plain: it is no tap, or one made with other flags: make it anew",
        ),
        (
            ["--tap", "lo"],
            "--tap lo: it is no tap, or one made with other flags: make it anew",
        ),
        (
            ["--tap-fds", "77"],
            "--tap-fds 77: not an open descriptor of a tap, or given twice",
        ),
        (
            ["--tap-fds", "0"],
            "--tap-fds \"0\": not a number from 3 to",
        ),
    ] {
        let line = said(&[&arguments[..], &["--socket-path", socket]].concat());
        assert!(line.starts_with(&format!("pericarp-net: {want}")), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
    assert!(!std::path::Path::new(socket).exists());
    // One that has it already.
    let served = Served::start(&[]);
    let line = said(&["--tap", TAP, "--socket-path", socket]);
    assert!(line.contains("another program has it open"), "{line}");
    served.finish();
}
