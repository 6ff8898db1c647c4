//! Front ends and backends that come and go, taps that go down, limits.

use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::network::{Network, TAP, datagram};
use pericarp_tests::parts::Part;

use crate::card::{Card, HEADER, LIMIT, PLAIN, Served};
use crate::{bytes, host, reaches, send_to_guest};

#[test]
fn buffers_outlive_a_killed_backend() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net killed", &parts, 1) else {
        return;
    };
    let mut served = Served::start(&[]);
    let mut card = Card::connect(&served, PLAIN, 1);
    let socket = host();
    card.offer_many(32, 1526);
    let mut sent = 0u16;
    for round in 0..4 {
        for _ in 0..5 {
            send_to_guest(&socket, &bytes(usize::from(sent) + 1));
            let packet = card.receive(LIMIT).unwrap();
            assert_eq!(packet.payload(), bytes(usize::from(sent) + 1));
            sent += 1;
        }
        reaches(&mut card, &socket, &bytes(round + 7), &[]);
        served.again();
        card.driver.reconnect(&served.socket).unwrap();
    }
    // The buffers of before are still good, each once.
    for _ in 20..32 {
        send_to_guest(&socket, b"again");
        assert_eq!(card.receive(LIMIT).unwrap().payload(), b"again");
    }
    send_to_guest(&socket, b"no room");
    assert!(card.receive(Duration::from_millis(100)).is_none());
    card.offer(3, &[1526]);
    assert_eq!(card.receive(LIMIT).unwrap().payload(), b"no room");
    // A stopped queue says where it is: nothing of it is in flight.
    let base = card.driver.stop(0).unwrap();
    assert_eq!(base, 33);
    served.finish();
}

#[test]
fn a_tap_goes_down_and_comes_up() {
    let parts = [Part::PERICARP_NET];
    let Some(network) = Network::here("net down", &parts, 1) else {
        return;
    };
    let served = Served::start(&[]);
    let mut card = Card::connect(&served, PLAIN, 1);
    let socket = host();
    card.offer_many(8, 1526);
    reaches(&mut card, &socket, b"before", &[]);
    network.ip(&format!("link set {TAP} down"));
    card.send([0; HEADER], &datagram(9, b"nowhere"), &[]);
    assert_eq!(served.dropped("tx-dropped-refused"), 1);
    network.ip(&format!("link set {TAP} up"));
    let up = poll(LIMIT, || Network::is_up().then_some(()));
    assert!(up.is_some(), "the tap stays down");
    // Its neighbour went with it.
    let again = Network::neighbour();
    network.ip(&again);
    reaches(&mut card, &socket, b"after", &[]);
    send_to_guest(&socket, b"and back");
    assert_eq!(card.receive(LIMIT).unwrap().payload(), b"and back");
    served.finish();
}

#[test]
fn a_driver_that_kicks_as_it_is_asked_is_never_forgotten() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net kicks", &parts, 1) else {
        return;
    };
    for engine in ["uring", "sync"] {
        let served = Served::start(&["--io-engine", engine]);
        let mut card = Card::connect(&served, PLAIN, 1);
        let socket = host();
        let pause = || std::thread::sleep(Duration::from_millis(50));
        // A packet that takes three buffers, which come one by one.
        for round in 0..20 {
            let head = 3 * round % 30;
            card.offer(head, &[100]);
            pause();
            send_to_guest(&socket, &bytes(200));
            for more in [1, 2] {
                pause();
                assert!(card.receive(Duration::ZERO).is_none());
                card.offer(head + more, &[100]);
            }
            let packet = card.receive(LIMIT).unwrap();
            assert_eq!((packet.payload(), packet.chains), (&bytes(200)[..], 3));
        }
        served.finish();
    }
}

#[test]
fn with_nothing_to_do_it_rests() {
    let parts = [Part::PERICARP_NET];
    let Some(network) = Network::here("net rest", &parts, 1) else {
        return;
    };
    for engine in ["uring", "sync"] {
        let served = Served::start(&["--io-engine", engine]);
        let mut card = Card::connect(&served, PLAIN, 1);
        let socket = host();
        served.rests("before there is a buffer");
        card.offer_many(16, 1526);
        for _ in 0..40 {
            reaches(&mut card, &socket, b"awake", &[]);
        }
        served.rests("with buffers");
        // It runs dry, and is filled up while there is nothing.
        for _ in 0..16 {
            send_to_guest(&socket, b"dry");
            card.receive(LIMIT).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        card.offer_many(16, 1526);
        for _ in 0..40 {
            std::thread::sleep(Duration::from_millis(1));
            reaches(&mut card, &socket, b"awake", &[]);
        }
        served.rests("after it ran dry");
        network.ip(&format!("link del {TAP}"));
        served.rests("without its tap");
        // Set up anew, with the tap still gone.
        card.driver.stop(0).unwrap();
        card.driver.configure(0).unwrap();
        card.offer_many(16, 1526);
        served.rests("set up without its tap");
        served.finish();
        network.tap(1);
    }
}

#[test]
fn limits_hold_by_direction_and_can_be_changed() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net limits", &parts, 1) else {
        return;
    };
    let served = Served::start(&["--rx-packets", "200", "--tx-bandwidth", "100K"]);
    let mut card = Card::connect(&served, PLAIN, 1);
    let socket = host();
    card.offer_many(200, 1526);
    // 100 packets at 200 a second, but for what a bucket holds.
    for _ in 0..100 {
        send_to_guest(&socket, b"many");
    }
    let begin = Instant::now();
    for _ in 0..100 {
        assert_eq!(card.receive(LIMIT).unwrap().payload(), b"many");
    }
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(400), "{took:?}");
    // 50 KiB at 100 KiB a second.
    // To a port that is there: nobody is to complain.
    let frame = datagram(socket.local_addr().unwrap().port(), &bytes(1400));
    let begin = Instant::now();
    for _ in 0..36 {
        card.send([0; HEADER], &frame, &[]);
    }
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(400), "{took:?}");
    let answer = served.ask(r#"{"op":"limits","rx-packets":0,"tx-bandwidth":0}"#);
    assert_eq!(answer["ok"], true, "{answer}");
    assert_eq!(answer["limits"]["rx-packets"], 0, "{answer}");
    let wrong = served.ask(r#"{"op":"limits","iops":1}"#);
    assert_eq!(wrong["ok"], false, "{wrong}");
    for round in 0..50 {
        send_to_guest(&socket, &bytes(round + 1));
        assert_eq!(card.receive(LIMIT).unwrap().payload(), bytes(round + 1));
        card.send([0; HEADER], &frame, &[]);
    }
    served.finish();
}
