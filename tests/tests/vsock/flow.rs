//! How much, how fast, how often: credit in both directions, memory that stays
//! bounded, connections that leave nothing behind.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread::spawn;
use std::time::{Duration, Instant};

use crate::rig::{self, op};
use crate::{STEP, pattern};

#[test]
fn a_slow_reader_on_the_host_holds_the_guest_back() {
    let vsock = start!("a_slow_reader_on_the_host_holds_the_guest_back");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    let connection = guest.dial(5000, 1);
    let mut host = rig::accept(&listener);
    let before = vsock.footprint();
    // An honest guest sends until it is out of credit.
    let data = pattern(4 << 20);
    let mut sent = 0;
    let stuck = Instant::now();
    while stuck.elapsed() < Duration::from_secs(1) {
        sent += guest.send_with_credit(&connection, &data[sent..]);
        assert!(
            sent < 1 << 20,
            "a host program that does not read stops the guest"
        );
    }
    assert!(sent >= 65536, "{sent}");
    let held = vsock.footprint().anon_kib.saturating_sub(before.anon_kib);
    assert!(held <= 512, "{held} KiB for one connection");
    // Others are not held back by this one.
    let other = guest.dial(6000, 1);
    let mut quick = rig::accept(&listener);
    guest.answer_with(&other, b"quick");
    let mut bytes = [0; 5];
    quick.read_exact(&mut bytes).unwrap();
    // Once it reads, everything arrives, in order.
    let len = data.len();
    let reader = spawn(move || {
        let mut all = vec![0; len];
        host.read_exact(&mut all).unwrap();
        (all, host)
    });
    let end = Instant::now() + Duration::from_secs(20);
    while sent < data.len() {
        assert!(Instant::now() < end, "{sent} of {} bytes", data.len());
        sent += guest.send_with_credit(&connection, &data[sent..]);
    }
    let (all, mut host) = reader.join().unwrap();
    assert!(all == data, "bytes differ");
    // What was sent before the guest closed arrives although nobody read yet:
    // the socket is full and the device holds the last bytes.
    let rest = pattern(1 << 20);
    let mut at = 0;
    let stuck = Instant::now();
    while stuck.elapsed() < Duration::from_millis(500) {
        at += guest.send_with_credit(&connection, &rest[at..]);
    }
    let rest = &rest[..at];
    guest.shutdown(&connection, 3);
    guest.expect(op::RST);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert!(
        all == rest,
        "{} of {} bytes after the end",
        all.len(),
        rest.len()
    );
}

#[test]
fn a_slow_reader_in_the_guest_holds_the_host_back() {
    let vsock = start!("a_slow_reader_in_the_guest_holds_the_host_back");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    guest.room = 10_000;
    let connection = guest.dial(5000, 1);
    let host = rig::accept(&listener);
    let before = vsock.footprint();
    let data = pattern(2 << 20);
    let copy = data.clone();
    let writer = spawn(move || {
        let mut host = host;
        host.set_write_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        host.write_all(&copy).unwrap();
    });
    // Not a byte more than the guest has room for, then it is asked for more.
    let mut got = Vec::new();
    while got.len() < 10_000 {
        got.extend(guest.expect(op::RW).payload);
    }
    assert_eq!(got.len(), 10_000);
    guest.expect(op::CREDIT_REQUEST);
    guest.quiet();
    let held = vsock.footprint().anon_kib.saturating_sub(before.anon_kib);
    assert!(held <= 512, "{held} KiB for one connection");
    let end = Instant::now() + Duration::from_secs(20);
    while got.len() < data.len() {
        assert!(
            Instant::now() < end,
            "{} of {} bytes",
            got.len(),
            data.len()
        );
        guest.read = got.len() as u32;
        guest.answer(&connection, op::CREDIT_UPDATE);
        let target = (got.len() + 10_000).min(data.len());
        while got.len() < target {
            let packet = guest.next(STEP).expect("data");
            assert!(
                matches!(packet.op, op::RW | op::CREDIT_REQUEST | op::SHUTDOWN),
                "{packet:?}"
            );
            got.extend(packet.payload);
        }
        assert!(
            got.len() <= guest.read as usize + 10_000,
            "more than the credit"
        );
    }
    assert!(got == data, "bytes differ");
    writer.join().unwrap();
}

#[test]
fn a_thousand_short_connections_each_way_leave_nothing_behind() {
    let vsock = start!("a_thousand_short_connections_each_way_leave_nothing_behind");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    let mut round = |count: u32| {
        for index in 0..count {
            let connection = guest.dial(10_000 + index, 1);
            assert_eq!(connection.op, op::RESPONSE);
            let mut host = rig::accept(&listener);
            guest.answer_with(&connection, &index.to_le_bytes());
            let mut bytes = [0; 4];
            host.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, index.to_le_bytes());
            if index % 2 == 0 {
                guest.shutdown(&connection, 3);
                guest.expect(op::RST);
            } else {
                drop(host);
                guest.expect_shutdown(3);
                guest.answer(&connection, op::RST);
            }
            let mut host = vsock.dial();
            host.write_all(b"CONNECT 9\n").unwrap();
            let request = guest.expect(op::REQUEST);
            guest.answer(&request, op::RESPONSE);
            rig::line(&mut host);
            if index % 2 == 0 {
                guest.shutdown(&request, 3);
                guest.expect(op::RST);
                assert_eq!(host.read(&mut bytes).unwrap(), 0);
            } else {
                drop(host);
                guest.expect_shutdown(3);
                guest.answer(&request, op::RST);
            }
        }
        guest.quiet();
    };
    round(50);
    let before = vsock.footprint();
    round(1000);
    let after = vsock.footprint();
    assert_eq!(after.fds, before.fds);
    assert!(
        after.anon_kib <= before.anon_kib + 256,
        "{} KiB before, {} KiB after",
        before.anon_kib,
        after.anon_kib
    );
    println!("{before:?}\n{after:?}");
}

#[test]
fn small_receive_buffers_work() {
    let vsock = start!("small_receive_buffers_work");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest_with(100);
    guest.dial(5000, 1);
    let mut host = rig::accept(&listener);
    let data = pattern(5000);
    host.write_all(&data).unwrap();
    let mut got = Vec::new();
    while got.len() < data.len() {
        let packet = guest.expect(op::RW);
        assert!(packet.payload.len() <= 56);
        got.extend(packet.payload);
    }
    assert!(got == data);
}
