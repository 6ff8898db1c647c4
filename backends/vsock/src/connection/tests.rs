//! One connection against a socket pair: what it says when, and what it never
//! does. The engine's events are played by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::credit::BUF_ALLOC;

const PORTS: Ports = Ports { host: 7, guest: 8 };

fn pair() -> (OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours.into(), theirs)
}

fn from_guest(op: u16) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: PORTS.guest,
        dst_port: PORTS.host,
        kind: STREAM,
        op,
        buf_alloc: 100_000,
        ..Header::default()
    }
}

/// A connection the guest opened, its RESPONSE sent.
fn open() -> (Connection, UnixStream) {
    let (ours, theirs) = pair();
    let mut connection = Connection::dialled(ours, PORTS, &from_guest(op::REQUEST), BUF_ALLOC);
    connection.socket_event(false, true, false);
    assert_eq!(next(&mut connection).unwrap().0.op, op::RESPONSE);
    assert_eq!(next(&mut connection), None);
    (connection, theirs)
}

fn next(connection: &mut Connection) -> Option<(Header, Vec<u8>)> {
    let mut data = vec![0; MAX_PAYLOAD];
    let header = connection.produce(3, &mut data)?;
    data.truncate(header.len as usize);
    Some((header, data))
}

fn greeting(bytes: &[u8]) -> Result<Option<u32>, ()> {
    let (ours, mut theirs) = pair();
    theirs.write_all(bytes).unwrap();
    Connection::greeting(ours, BUF_ALLOC).greeting_line()
}

#[test]
fn greetings() {
    assert_eq!(greeting(b"CONNECT 1234\n"), Ok(Some(1234)));
    assert_eq!(greeting(b"CONNECT 4294967295\n"), Ok(Some(u32::MAX)));
    assert_eq!(greeting(b""), Ok(None));
    assert_eq!(greeting(b"CONNECT 12"), Ok(None));
    for bad in [
        &b"CONNECT 4294967296\n"[..],
        b"CONNECT \n",
        b"CONNECT +1\n",
        b"CONNECT 1\r\n",
        b"\n",
        b"\xff\xff\n",
        b"nineteen characters",
    ] {
        assert_eq!(greeting(bad), Err(()), "{bad:?}");
    }
    let (ours, theirs) = pair();
    drop(theirs);
    assert_eq!(
        Connection::greeting(ours, BUF_ALLOC).greeting_line(),
        Err(())
    );
}

#[test]
fn a_greeting_takes_nothing_behind_its_line() {
    let (ours, mut theirs) = pair();
    theirs.write_all(b"CONNECT 8\nCONNECT 9\n").unwrap();
    let mut connection = Connection::greeting(ours, BUF_ALLOC);
    assert_eq!(connection.greeting_line(), Ok(Some(8)));
    connection.ask(PORTS);
    connection.socket_event(true, true, false);
    assert_eq!(next(&mut connection).unwrap().0.op, op::REQUEST);
    assert_eq!(next(&mut connection), None, "the guest has not answered");
    assert_eq!(
        connection.receive(&from_guest(op::RESPONSE), &[]),
        Verdict::Keep
    );
    let mut line = [0; 5];
    theirs.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 7\n");
    assert_eq!(next(&mut connection).unwrap().1, b"CONNECT 9\n");
}

#[test]
fn only_a_response_or_a_reset_answers_a_request() {
    for operation in 0..9 {
        let (ours, _theirs) = pair();
        let mut connection = Connection::greeting(ours, BUF_ALLOC);
        connection.ask(PORTS);
        let verdict = match operation {
            op::RESPONSE => Verdict::Keep,
            op::RST => Verdict::Gone,
            _ => Verdict::Broken,
        };
        let header = from_guest(operation);
        assert_eq!(connection.receive(&header, &[]), verdict, "{operation}");
    }
}

#[test]
fn what_an_open_connection_makes_of_operations() {
    for operation in 0..9 {
        let (mut connection, _theirs) = open();
        let verdict = match operation {
            op::RST => Verdict::Gone,
            op::SHUTDOWN | op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST => Verdict::Keep,
            _ => Verdict::Broken,
        };
        let header = from_guest(operation);
        assert_eq!(connection.receive(&header, &[]), verdict, "{operation}");
        let answer = next(&mut connection).map(|(header, _)| header.op);
        let expected = (operation == op::CREDIT_REQUEST).then_some(op::CREDIT_UPDATE);
        assert_eq!(answer, expected, "{operation}");
    }
}

#[test]
fn the_end_of_the_host_program_is_told_once() {
    let (mut connection, mut theirs) = open();
    theirs.write_all(b"last words").unwrap();
    drop(theirs);
    connection.socket_event(true, true, true);
    assert_eq!(next(&mut connection).unwrap().1, b"last words");
    // It hears nothing more, then it says nothing more.
    let told: Vec<_> = std::iter::from_fn(|| next(&mut connection))
        .map(|(header, _)| (header.op, header.flags))
        .collect();
    assert_eq!(told, [(op::SHUTDOWN, shutdown::BOTH)]);
    assert!(connection.over());
    // What the guest still sends is dropped, and it gets its credit back.
    for _ in 0..10 {
        assert_eq!(
            connection.receive(&from_guest(op::RW), &[0; 30_000]),
            Verdict::Keep
        );
        while next(&mut connection).is_some() {}
    }
    assert!(!connection.holds_data());
}

#[test]
fn a_half_close_of_the_guest_waits_for_its_bytes() {
    let (mut connection, mut theirs) = open();
    // More than a socket takes is not needed: the socket is said to be full.
    connection.writable = false;
    assert_eq!(
        connection.receive(&from_guest(op::RW), b"bytes"),
        Verdict::Keep
    );
    let end = Header {
        flags: shutdown::SEND,
        ..from_guest(op::SHUTDOWN)
    };
    assert_eq!(connection.receive(&end, &[]), Verdict::Keep);
    assert!(
        theirs.read(&mut [0; 8]).is_err(),
        "nothing, and not the end"
    );
    assert_eq!(
        connection.receive(&from_guest(op::RW), b"more"),
        Verdict::Broken
    );
    connection.socket_event(false, true, false);
    let mut all = Vec::new();
    theirs.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"bytes");
    let rest = Header {
        flags: shutdown::RECEIVE,
        ..end
    };
    assert_eq!(connection.receive(&rest, &[]), Verdict::Finished);
}

#[test]
fn the_buffer_is_the_limit() {
    let (mut connection, _theirs) = open();
    connection.writable = false;
    let half = vec![1; BUF_ALLOC as usize / 2];
    assert_eq!(
        connection.receive(&from_guest(op::RW), &half),
        Verdict::Keep
    );
    assert_eq!(
        connection.receive(&from_guest(op::RW), &half),
        Verdict::Keep
    );
    assert_eq!(connection.receive(&from_guest(op::RW), &[]), Verdict::Keep);
    assert_eq!(
        connection.receive(&from_guest(op::RW), &[1]),
        Verdict::Broken
    );
}

proptest! {
    /// Bytes arrive in order and complete whatever the sizes, in both
    /// directions at once, with a guest that keeps to its credit.
    #[test]
    fn streams_are_streams(sizes in proptest::collection::vec((1usize..20_000, 1usize..20_000), 1..60)) {
        let (mut connection, mut theirs) = open();
        let (mut down, mut up) = (0u64, 0u64);
        let (mut down_seen, mut up_seen) = (0u64, 0u64);
        let (mut sent, mut announced, mut read) = (0u32, 0u32, 0u32);
        let byte = |at: u64| (at.wrapping_mul(31) >> 3) as u8;
        for (from_guest_len, from_host_len) in sizes {
            let room = BUF_ALLOC - (sent - announced);
            let data: Vec<u8> = (down..down + from_guest_len.min(room as usize) as u64).map(byte).collect();
            let header = Header { fwd_cnt: read, buf_alloc: 30_000, ..from_guest(op::RW) };
            prop_assert_eq!(connection.receive(&header, &data), Verdict::Keep);
            down += data.len() as u64;
            sent += data.len() as u32;
            let data: Vec<u8> = (up..up + from_host_len as u64).map(byte).collect();
            up += theirs.write(&data).unwrap_or(0) as u64;
            let mut buffer = vec![0; 10_000];
            if let Ok(len) = theirs.read(&mut buffer) {
                for got in &buffer[..len] {
                    prop_assert_eq!(*got, byte(down_seen));
                    down_seen += 1;
                }
            }
            connection.socket_event(true, true, false);
            while let Some((header, data)) = next(&mut connection) {
                announced = header.fwd_cnt;
                for got in data {
                    prop_assert_eq!(got, byte(up_seen));
                    up_seen += 1;
                }
                prop_assert!(up_seen <= u64::from(read) + 30_000, "beyond the credit");
            }
            read = up_seen as u32;
        }
        prop_assert!(down_seen <= down && up_seen <= up);
    }
}
