//! A card goes on in a new process while packets go both ways: none is lost, comes twice
//! or out of order, and what the driver chose stays chosen. What fails on the way leaves
//! the old process serving.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::model::Sequence;
use pericarp_tests::network::{Network, TAP, datagram};
use pericarp_tests::parts::Part;
use serde_json::Value;

use crate::card::{Card, HEADER, LARGE, LIMIT, PLAIN, Served};
use crate::{bytes, host, reaches, send_large, send_to_guest};

/// Packets on their way at a time, so that neither the tap nor a socket overflows.
const WINDOW: u32 = 64;
/// Buffers that the driver offers.
const BUFFERS: u16 = 128;
/// VIRTIO_NET_F_MQ.
const MQ: u64 = 1 << 22;
/// The control queue of two pairs.
const CONTROL: usize = 4;

/// Numbered datagrams both ways, until it is over.
struct Traffic<'a> {
    socket: &'a UdpSocket,
    over: AtomicBool,
    /// Something failed: nobody waits for anything any more.
    failed: AtomicBool,
    /// The last number that came, there and here.
    to_guest: AtomicU32,
    to_host: AtomicU32,
}

impl<'a> Traffic<'a> {
    fn new(socket: &'a UdpSocket) -> Self {
        Self {
            socket,
            over: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            to_guest: AtomicU32::new(0),
            to_host: AtomicU32::new(0),
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// The host sends; gives how many.
    fn host_sends(&self) -> u32 {
        let mut sent = 0;
        while !self.is_over() && !self.has_failed() {
            if sent - self.to_guest.load(Ordering::Relaxed) >= WINDOW {
                std::thread::yield_now();
                continue;
            }
            sent += 1;
            send_to_guest(self.socket, &sent.to_le_bytes());
        }
        sent
    }

    /// The host receives, until nothing comes any more: each in its turn.
    fn host_receives(&self, sent: &AtomicU32) {
        let mut got = [0; 2000];
        loop {
            let last = self.to_host.load(Ordering::Relaxed);
            let all = self.is_over() && last == sent.load(Ordering::Relaxed);
            if all || self.has_failed() {
                return;
            }
            let Ok(len) = self.socket.recv(&mut got) else {
                continue;
            };
            let number = u32::from_le_bytes(got[..len].try_into().unwrap());
            assert_eq!(number, last + 1, "from the guest");
            self.to_host.store(number, Ordering::Relaxed);
        }
    }

    /// The driver does both, and goes on until the host has sent no more.
    fn drive(&self, card: &mut Card, sent: &AtomicU32, host_sent: &AtomicU32) {
        let port = self.socket.local_addr().unwrap().port();
        let mut head = 0;
        loop {
            let last = self.to_guest.load(Ordering::Relaxed);
            let over = self.is_over();
            let all = over && last == host_sent.load(Ordering::Acquire);
            if all || self.has_failed() {
                return;
            }
            while let Some(packet) = card.receive(Duration::ZERO) {
                let number = u32::from_le_bytes(packet.payload().try_into().unwrap());
                let last = self.to_guest.load(Ordering::Relaxed);
                assert_eq!(number, last + 1, "to the guest");
                self.to_guest.store(number, Ordering::Relaxed);
                card.offer(head, &[1526]);
                head = (head + 1) % BUFFERS;
            }
            let first = sent.load(Ordering::Relaxed);
            let on_the_way = first - self.to_host.load(Ordering::Relaxed);
            if !over && on_the_way + 8 <= WINDOW {
                let numbers = first + 1..=first + 1 + first % 8;
                let packets: Vec<Vec<u8>> = numbers
                    .clone()
                    .map(|n| [vec![0; HEADER], datagram(port, &n.to_le_bytes())].concat())
                    .collect();
                sent.store(*numbers.end(), Ordering::Relaxed);
                card.burst(&packets);
            }
        }
    }
}

/// Lets the other threads end where this one fails.
struct Failing<'a>(&'a AtomicBool);

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        self.0.fetch_or(std::thread::panicking(), Ordering::Relaxed);
    }
}

/// Hands over so often while packets go both ways; gives how many there were.
fn under_traffic(served: &mut Served, card: &mut Card, count: usize) -> (u32, u32) {
    let socket = host();
    socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    // With several pairs the host answers to the queue that it heard from last.
    reaches(card, &socket, b"first", &[]);
    card.offer_many(BUFFERS, 1526);
    let (sent, host_sent) = (AtomicU32::new(0), AtomicU32::new(u32::MAX));
    let traffic = Traffic::new(&socket);
    std::thread::scope(|scope| {
        let _failing = Failing(&traffic.failed);
        let driving = scope.spawn(|| traffic.drive(card, &sent, &host_sent));
        let receiving = scope.spawn(|| traffic.host_receives(&sent));
        let sending = scope.spawn(|| host_sent.store(traffic.host_sends(), Ordering::Release));
        for _ in 0..count {
            let passed = |last: &AtomicU32| {
                let before = last.load(Ordering::Relaxed);
                let more = || (last.load(Ordering::Relaxed) > before + 100).then_some(());
                let stuck = || driving.is_finished() || receiving.is_finished();
                let came = poll(LIMIT, || more().or_else(|| stuck().then_some(())));
                assert!(came.is_some() && !stuck(), "packets stopped after {before}");
            };
            passed(&traffic.to_guest);
            passed(&traffic.to_host);
            served.hand_over();
        }
        traffic.over.store(true, Ordering::Relaxed);
        let all = || sending.is_finished() && driving.is_finished() && receiving.is_finished();
        let all = poll(LIMIT, || all().then_some(()));
        assert!(all.is_some(), "packets are missing");
        sending.join().unwrap();
        driving.join().unwrap();
        receiving.join().unwrap();
    });
    let last = |last: &AtomicU32| last.load(Ordering::Relaxed);
    (last(&traffic.to_guest), last(&traffic.to_host))
}

#[test]
fn a_card_goes_on_in_a_new_process_under_traffic() {
    let parts = [Part::PERICARP_NET];
    for pairs in [1, 2] {
        let Some(_network) = Network::here("net hand-over", &parts, pairs) else {
            return;
        };
        for engine in ["uring", "sync"] {
            let option = pairs.to_string();
            let mut served = Served::start(&["--queue-pairs", &option, "--io-engine", engine]);
            let more = if pairs > 1 { MQ } else { 0 };
            let mut card = Card::connect(&served, PLAIN | more, pairs);
            if pairs > 1 {
                assert_eq!(card.command(CONTROL, &[4, 0, 2, 0], true), Some(0));
            }
            let (came, went) = under_traffic(&mut served, &mut card, 4);
            eprintln!("{pairs} pairs, {engine}: {came} packets in and {went} out in 4 hand-overs");
            assert_eq!(served.dropped("rx-dropped-no-room"), 0);
            served.finish();
        }
    }
}

fn limits(served: &Served) -> Value {
    served.ask(r#"{"op":"limits"}"#)["limits"].clone()
}

/// That one pair of two is in use, and that packets come in frames.
fn is_as_chosen(card: &mut Card) {
    let mut head = 0;
    for round in 0..10 {
        // Each might come to another queue, were there one.
        send_to_guest(&host(), &bytes(round + 1));
        assert_eq!(card.receive(LIMIT).unwrap().payload(), bytes(round + 1));
        card.offer(head, &[1526]);
        head += 1;
    }
    send_large(&host(), &bytes(2800), 1400);
    for _ in 0..2 {
        let packet = card.receive(LIMIT).unwrap();
        assert_eq!((packet.payload().len(), packet.header[1]), (1400, 0));
        card.offer(head, &[1526]);
        head += 1;
    }
}

fn chosen(served: &Served) -> Card {
    let mut card = Card::connect(served, PLAIN | LARGE | MQ, 2);
    assert_eq!(card.command(CONTROL, &[4, 0, 1, 0], true), Some(0));
    let none = [&[5, 0][..], &[0; 8]].concat();
    assert_eq!(card.command(CONTROL, &none, true), Some(0));
    card.offer_many(12, 1526);
    card
}

#[test]
fn what_a_driver_and_an_operator_chose_is_handed_over() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net chosen", &parts, 2) else {
        return;
    };
    let mut served = Served::start(&["--queue-pairs", "2", "--rx-packets", "4000"]);
    let set = served.ask(r#"{"op":"limits","tx-packets":5000,"tx-bandwidth":1000000}"#);
    assert_eq!(set["ok"], true, "{set}");
    let before = limits(&served);
    let mut card = chosen(&served);
    is_as_chosen(&mut card);
    for _ in 0..2 {
        served.hand_over();
        assert_eq!(limits(&served), before);
        assert_eq!(
            (&before["rx-packets"], &before["tx-packets"]),
            (&4000.into(), &5000.into())
        );
        is_as_chosen(&mut card);
    }
    // It can choose anew, and all it agreed to is there.
    let all = [&[5, 0][..], &(1u64 << 1 | 1 << 54 | 1 << 55).to_le_bytes()].concat();
    assert_eq!(card.command(CONTROL, &all, true), Some(0));
    send_large(&host(), &bytes(2800), 1400);
    let packet = card.receive(LIMIT).unwrap();
    assert_eq!((packet.payload().len(), packet.header[1]), (2800, 5));
    served.finish();
}

#[test]
fn a_queue_that_rests_is_handed_over_and_so_is_a_card_without_a_guest() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net rests", &parts, 1) else {
        return;
    };
    let mut served = Served::start(&[]);
    served.hand_over();
    let mut card = Card::connect(&served, PLAIN, 1);
    card.offer_many(8, 1526);
    card.driver.enable(0, false).unwrap();
    served.hand_over();
    let socket = host();
    send_to_guest(&socket, b"kept");
    reaches(&mut card, &socket, b"out", &[]);
    assert!(card.receive(Duration::from_millis(50)).is_none());
    served.hand_over();
    card.driver.enable(0, true).unwrap();
    assert_eq!(card.receive(LIMIT).unwrap().payload(), b"kept");
    assert_eq!(card.driver.stop(0).unwrap(), 1);
    drop(card);
    served.hand_over();
    let mut card = Card::connect(&served, PLAIN, 1);
    reaches(&mut card, &host(), b"another", &[]);
    served.finish();
}

/// A new process that runs out of descriptors ends at each point there is, also when the
/// queues stand still.
#[test]
fn a_new_process_that_fails_leaves_the_card_as_it_was() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net fails", &parts, 2) else {
        return;
    };
    let mut served = Served::start(&["--queue-pairs", "2"]);
    let mut card = chosen(&served);
    let (mut late, mut took_over) = (0, false);
    for descriptors in 12..200 {
        let mut new = served.successor(&[], Some(descriptors));
        let ended = poll(LIMIT, || new.ended().or_else(|| served.process.ended()));
        assert!(ended.is_some(), "{descriptors}: {}", new.output().last(9));
        if served.process.ended().is_some() {
            served.handed_to(new);
            took_over = true;
            break;
        }
        let status = new.wait(LIMIT).and_then(|status| status.code());
        // All that it said is there once it is gone.
        new.kill();
        let said = new.output().last(9);
        assert!(status.is_some_and(|code| code > 0), "{said}");
        if new.output().find("not all descriptors fit").is_some() {
            late += 1;
            // It has noticed, and goes on.
            let count = || {
                let lines = served.process.output().lines();
                lines
                    .iter()
                    .filter(|line| line.contains("serving on"))
                    .count()
            };
            assert!(poll(LIMIT, || (count() >= late).then_some(())).is_some());
            if late % 4 == 1 {
                is_as_chosen(&mut card);
            }
        }
    }
    assert!(took_over && late > 3, "{late} failed late");
    is_as_chosen(&mut card);
    served.finish();
}

/// New processes killed at any moment.
#[test]
fn a_new_process_that_is_killed_leaves_the_card_as_it_was() {
    let parts = [Part::PERICARP_NET];
    let Some(_network) = Network::here("net killed successor", &parts, 1) else {
        return;
    };
    let mut served = Served::start(&[]);
    let mut card = Card::connect(&served, PLAIN, 1);
    card.offer_many(64, 1526);
    let socket = host();
    let port = socket.local_addr().unwrap().port();
    let mut random = Sequence::new(11);
    let (mut stayed, mut moved, mut head) = (0, 0, 0);
    for round in 0..16 {
        let mut new = served.successor(&[], None);
        // All of it takes about 20 ms.
        let until = Instant::now() + Duration::from_micros(random.below(25_000));
        let mut sent = 0;
        while Instant::now() < until {
            if sent < 40 {
                sent += 1;
                send_to_guest(&socket, &bytes(sent));
            }
            std::thread::yield_now();
        }
        new.kill();
        // The old one takes a packet, or ends, now or soon.
        card.post(&datagram(port, &bytes(round + 1)));
        let gone = poll(LIMIT, || {
            let taken = card.driver.rings[1].take_one().map(|_| false);
            taken.or_else(|| served.process.ended().map(|_| true))
        });
        let gone = gone.unwrap_or_else(|| panic!("{}", served.process.output().last(9)));
        let mut came = 0;
        if gone {
            // There was no way back any more: it is as with any killed backend, whose tap
            // goes with it and what was in there.
            moved += 1;
            served.again();
            card.driver.reconnect(&served.socket).unwrap();
            card.driver.rings[1].watch(1, LIMIT).unwrap();
        } else {
            stayed += 1;
        }
        let patience = if gone {
            Duration::from_millis(50)
        } else {
            LIMIT
        };
        while came < sent {
            let Some(packet) = card.receive(patience) else {
                break;
            };
            came += 1;
            assert_eq!(packet.payload(), bytes(came), "round {round}");
            card.offer(head, &[1526]);
            head = (head + 1) % 64;
        }
        assert!(gone || came == sent, "round {round}: {came} of {sent}");
        let mut got = [0; 2000];
        let len = socket.recv(&mut got).unwrap();
        assert_eq!(got[..len], bytes(round + 1));
    }
    eprintln!("killed in time {stayed} times, too late {moved} times");
    assert!(stayed > 0);
    served.finish();
}

#[test]
fn what_serves_another_card_takes_nothing_over() {
    let parts = [Part::PERICARP_NET];
    let Some(network) = Network::here("net others", &parts, 1) else {
        return;
    };
    network.ip("tuntap add t1 mode tap vnet_hdr");
    let mac = ["--mac", "02:00:00:00:00:05"];
    let served = Served::start(&mac);
    let mut card = Card::connect(&served, PLAIN, 1);
    for (options, word) in [
        (["--tap", "t1"], "another id or place"),
        (["--tap", "t9"], "no interface has this name"),
        (["--mac", "02:00:00:00:00:06"], "--mac"),
        (["--mtu", "1400"], "--mac"),
        (["--queue-size", "512"], "another size of queues"),
        (["--queue-pairs", "2"], "another number of queues"),
    ] {
        let mut new = served.successor(&options, None);
        let status = new.wait(LIMIT).and_then(|status| status.code());
        new.kill();
        let said = new.output().last(9);
        assert_eq!(status, Some(2), "{options:?}: {said}");
        assert!(said.contains(word), "{options:?}: {said}");
        reaches(&mut card, &host(), b"still", &[]);
    }
    // Another interface of the same name.
    network.ip(&format!("link set {TAP} name t2"));
    network.ip(&format!("link set t1 name {TAP}"));
    let mut new = served.successor(&[], None);
    let status = new.wait(LIMIT).and_then(|status| status.code());
    new.kill();
    let said = new.output().last(9);
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("another disk, directory or tap"), "{said}");
    network.ip(&format!("link set {TAP} name t1"));
    network.ip(&format!("link set t2 name {TAP}"));
    served.finish();
}
