//! `pericarp-vsock` from outside: a front end in this process plays the guest's
//! driver on rings built by hand, host programs are unix sockets. Nothing of
//! the backend's own code is used.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

/// A running device, or the end of the test where the program is missing.
macro_rules! start {
    ($name:literal) => {{
        if !pericarp_tests::parts::have($name, &[$crate::PART]) {
            return;
        }
        $crate::rig::Vsock::start(&[])
    }};
}

mod flow;
mod hostile;
mod program;
mod rig;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::Part;
use rig::{CID, op};

const PART: Part = Part::Ours("pericarp-vsock");
const STEP: Duration = Duration::from_secs(20);

/// Deterministic bytes.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

#[test]
fn a_host_program_reaches_the_guest() {
    let vsock = start!("a_host_program_reaches_the_guest");
    let mut guest = vsock.guest();
    assert_eq!(guest.driver.config(8).unwrap(), CID.to_le_bytes());
    let mut host = vsock.dial();
    host.write_all(b"CONNECT 1234\nearly").unwrap();
    let request = guest.expect(op::REQUEST);
    assert_eq!((request.src_cid, request.dst_cid), (2, CID));
    assert_eq!((request.dst_port, request.kind), (1234, 1));
    assert_eq!(request.buf_alloc, 65536);
    guest.answer(&request, op::RESPONSE);
    let ok = rig::line(&mut host);
    assert_eq!(ok, format!("OK {}", request.src_port));
    // What came with the greeting is not lost.
    assert_eq!(guest.expect(op::RW).payload, b"early");
    guest.answer_with(&request, b"hello from the guest");
    let mut bytes = [0; 20];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello from the guest");
    host.write_all(b"and back").unwrap();
    assert_eq!(guest.expect(op::RW).payload, b"and back");
    drop(host);
    guest.expect_shutdown(3);
    guest.answer(&request, op::RST);
    guest.quiet();
}

#[test]
fn the_guest_reaches_a_host_program() {
    let vsock = start!("the_guest_reaches_a_host_program");
    let listener = UnixListener::bind(vsock.port(52)).unwrap();
    let mut guest = vsock.guest();
    let connection = guest.dial(5000, 52);
    assert_eq!(connection.op, op::RESPONSE);
    let mut host = rig::accept(&listener);
    guest.answer_with(&connection, b"ping");
    let mut bytes = [0; 4];
    host.read_exact(&mut bytes).unwrap();
    host.write_all(b"pong").unwrap();
    let pong = guest.expect(op::RW);
    assert_eq!(
        (pong.payload.as_slice(), pong.src_port, pong.dst_port),
        (&b"pong"[..], 52, 5000)
    );
    // The guest closes: it is confirmed, and the host program sees the end.
    guest.shutdown(&connection, 3);
    assert_eq!(guest.expect(op::RST).src_port, 52);
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    guest.quiet();
}

#[test]
fn nobody_there_is_a_reset() {
    let vsock = start!("nobody_there_is_a_reset");
    let mut guest = vsock.guest();
    assert_eq!(guest.dial(5000, 9999).op, op::RST);
    // A file, a directory and a dead socket are nobody, too.
    fs::write(vsock.port(1), b"x").unwrap();
    fs::create_dir(vsock.port(2)).unwrap();
    drop(UnixListener::bind(vsock.port(3)).unwrap());
    for port in 1..4 {
        assert_eq!(guest.dial(5000, port).op, op::RST, "{port}");
    }
    // The guest refuses a host program.
    let mut host = vsock.dial();
    host.write_all(b"CONNECT 7\n").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.answer(&request, op::RST);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    guest.quiet();
}

#[test]
fn links_do_not_lead_out_of_the_directory() {
    let vsock = start!("links_do_not_lead_out_of_the_directory");
    let outside = pericarp_tests::scratch::Scratch::new();
    let _listener = UnixListener::bind(outside.path("s")).unwrap();
    std::os::unix::fs::symlink(outside.path("s"), vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    assert_eq!(guest.dial(5000, 1).op, op::RST);
}

#[test]
fn either_side_may_close_one_direction() {
    let vsock = start!("either_side_may_close_one_direction");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    let mut all = Vec::new();

    // The host program first.
    let connection = guest.dial(5000, 1);
    let mut host = rig::accept(&listener);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::RW).payload, b"question");
    guest.expect_shutdown(2);
    guest.answer_with(&connection, b"answer");
    guest.shutdown(&connection, 3);
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"answer");
    guest.expect(op::RST);

    // The guest first.
    let connection = guest.dial(5001, 1);
    let mut host = rig::accept(&listener);
    guest.answer_with(&connection, b"question");
    guest.shutdown(&connection, 2);
    all.clear();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"question");
    host.write_all(b"answer").unwrap();
    drop(host);
    assert_eq!(guest.expect(op::RW).payload, b"answer");
    guest.expect_shutdown(3);
    guest.answer(&connection, op::RST);

    // The guest takes no more: the host program cannot write.
    let connection = guest.dial(5002, 1);
    let mut host = rig::accept(&listener);
    guest.shutdown(&connection, 1);
    let refused = poll(STEP, || host.write_all(b"x").err().map(|e| e.kind()));
    assert_eq!(refused, Some(ErrorKind::BrokenPipe));
    guest.answer_with(&connection, b"still");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    guest.shutdown(&connection, 2);
    guest.expect(op::RST);
    guest.quiet();
}
