//! `pericarp-block --fd`: sockets opened by somebody else, as a supervisor or
//! systemd hands them over. A listening one is served until SIGTERM, a
//! connected one until its front end goes.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use pericarp_tests::client::Client;
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::wire;
use rustix::process::Signal;

const LIFETIME: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_secs(10);
/// GET_FEATURES, and the flags of a version 1 request.
const GET_FEATURES: u32 = 1;
const VERSION: u32 = 1;

/// Starts the program with `socket` as an inherited descriptor.
fn start(scratch: &Scratch, socket: &impl AsFd) -> Process {
    let disk = scratch.sparse("disk", 1 << 20);
    let socket = socket.as_fd();
    rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::empty()).unwrap();
    let mut command = command(&Part::PERICARP_BLOCK.find().unwrap());
    command
        .arg(format!("--fd={}", socket.as_raw_fd()))
        .arg(format!("--blk-file={}", disk.display()))
        .arg("--cache=buffered");
    let process = Process::start(&mut command, LIFETIME).unwrap();
    rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::CLOEXEC).unwrap();
    process
}

#[test]
fn a_listening_socket_is_served_until_sigterm() {
    if !have("passed listening socket", &[Part::PERICARP_BLOCK]) {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("passed.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut process = start(&scratch, &listener);
    for round in 0..3u8 {
        let mut client = Client::connect(&path, 1, 4).unwrap();
        client.write(0, 4096, &[round; 512]).unwrap();
        assert_eq!(client.read(0, 4096, 512).unwrap(), [round; 512]);
    }
    process.signal(Signal::TERM);
    assert!(process.wait(STEP).unwrap().success());
    assert!(path.exists(), "the socket belongs to who made it");
}

#[test]
fn a_connected_socket_is_served_once() {
    if !have("passed connected socket", &[Part::PERICARP_BLOCK]) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(STEP)).unwrap();
    let mut process = start(&scratch, &theirs);
    drop(theirs);
    wire::send(&ours, &wire::message(GET_FEATURES, VERSION, &[]), &[]).unwrap();
    let (request, features) = wire::receive(&ours).unwrap();
    assert_eq!((request, features.len()), (GET_FEATURES, 8));
    assert!(process.ended().is_none(), "it serves while we are here");
    drop(ours);
    assert!(process.wait(STEP).unwrap().success());
}
