//! The program itself: its sockets, its confinement, its front ends.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::have;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use rustix::process::Signal;

use crate::rig::{self, CID, Guest, Vsock, op};
use crate::{PART, STEP};

#[test]
fn front_ends_come_and_go() {
    let vsock = start!("front_ends_come_and_go");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut before = None;
    for index in 0..30 {
        let mut guest = vsock.guest();
        let connection = guest.dial(5000, 1);
        assert_eq!(connection.op, op::RESPONSE, "{index}");
        let mut first = rig::accept(&listener);
        let mut second = vsock.dial();
        second.write_all(b"CONNECT 9\n").unwrap();
        let request = guest.expect(op::REQUEST);
        guest.answer(&request, op::RESPONSE);
        rig::line(&mut second);
        // Pictures are taken of a guest with its connections up. Without one the number of
        // threads is that of whatever step between two sessions the device has come to.
        if index == 5 {
            before = Some(vsock.footprint());
        }
        if index == 29 {
            let before = before.unwrap();
            // The last session's threads leave the table a moment after they were joined.
            let calm = poll(STEP, || {
                let now = vsock.footprint();
                (now.fds <= before.fds && now.threads <= before.threads).then_some(now)
            });
            let now = calm.unwrap_or_else(|| panic!("{before:?} became {:?}", vsock.footprint()));
            assert!(
                now.anon_kib <= before.anon_kib + 256,
                "{before:?} became {now:?}"
            );
        }
        // The guest vanishes: both host programs see the end.
        drop(guest);
        assert_eq!(first.read(&mut [0; 8]).unwrap(), 0, "{index}");
        assert_eq!(second.read(&mut [0; 8]).unwrap(), 0, "{index}");
    }
}

#[test]
fn a_driver_that_starts_over_finds_nothing_open() {
    let vsock = start!("a_driver_that_starts_over_finds_nothing_open");
    let listener = UnixListener::bind(vsock.port(1)).unwrap();
    let mut guest = vsock.guest();
    guest.dial(5000, 1);
    let mut host = rig::accept(&listener);
    // Stopped and started where it stood, as for a pause: nothing changes.
    guest.restart(false);
    host.write_all(b"x").unwrap();
    assert_eq!(guest.expect(op::RW).payload, b"x");
    // From the beginning, as after a reboot.
    guest.restart(true);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(guest.dial(5000, 1).op, op::RESPONSE);
}

#[test]
fn it_is_confined_and_ends_cleanly() {
    let vsock = start!("it_is_confined_and_ends_cleanly");
    let guest = vsock.guest();
    let status = fs::read_to_string(format!("/proc/{}/status", vsock.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("CapEff:"), "0000000000000000");
    let root = fs::read_dir(format!("/proc/{}/root", vsock.pid()));
    if let Ok(root) = root {
        assert_eq!(root.count(), 0, "the root directory is empty");
    }
    drop(guest);
    let (front, host) = (vsock.socket(), vsock.uds());
    let status = vsock.stop();
    assert!(status.success(), "{status}");
    assert!(!front.exists() && !host.exists(), "sockets are removed");
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_refused() {
    if !have("a_dead_socket_is_replaced_and_a_live_one_refused", &[PART]) {
        return;
    }
    let first = Vsock::start(&["--no-confine"]);
    let again = |socket: &str, uds: &str| {
        let program = PART.find().unwrap();
        let output = std::process::Command::new(program)
            .args([
                "--socket-path",
                socket,
                "--guest-cid",
                "9",
                "--uds-path",
                uds,
            ])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (front, host) = (first.socket(), first.uds());
    let (front, host) = (front.to_str().unwrap(), host.to_str().unwrap());
    let other = format!("{front}x");
    for (socket, uds, option) in [
        (front, other.as_str(), "--socket-path"),
        (&other, host, "--uds-path"),
    ] {
        let (code, line) = again(socket, uds);
        assert_eq!(code, Some(2), "{line}");
        assert!(
            line.contains(option) && line.contains("a live program listens"),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(!fs::exists(&other).unwrap(), "nothing is created");
    }
    let scratch = first.crash();
    assert!(
        fs::exists(scratch.path("front")).unwrap(),
        "left behind by the crash"
    );
    let second = Vsock::start_in(scratch, &[]);
    let mut guest = second.guest();
    assert_eq!(guest.dial(5000, 1).op, op::RST);
}

/// Starts the program in `scratch` with `socket` as an inherited descriptor.
fn start_with(scratch: &Scratch, socket: &impl AsFd) -> Process {
    let socket = socket.as_fd();
    rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::empty()).unwrap();
    let mut command = command(&PART.find().unwrap());
    command
        .arg(format!("--fd={}", socket.as_raw_fd()))
        .arg("--uds-path")
        .arg(scratch.path("host"))
        .arg(format!("--guest-cid={CID}"));
    let process = Process::start(&mut command, Duration::from_secs(60)).unwrap();
    rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::CLOEXEC).unwrap();
    process
}

#[test]
fn a_listening_socket_may_be_passed() {
    if !have("a_listening_socket_may_be_passed", &[PART]) {
        return;
    }
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.path("front")).unwrap();
    let mut process = start_with(&scratch, &listener);
    for _ in 0..3 {
        let mut guest = Guest::connect(&scratch.path("front"), 4096);
        assert_eq!(guest.dial(5000, 1).op, op::RST);
    }
    process.signal(Signal::TERM);
    assert!(process.wait(STEP).unwrap().success());
    assert!(fs::exists(scratch.path("front")).unwrap(), "not its own");
    assert!(!fs::exists(scratch.path("host")).unwrap(), "its own");
}

#[test]
fn a_connected_socket_is_refused() {
    if !have("a_connected_socket_is_refused", &[PART]) {
        return;
    }
    let scratch = Scratch::new();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let mut process = start_with(&scratch, &theirs);
    let status = process.wait(STEP).unwrap();
    process.kill();
    let line = process.output().last(10);
    assert_eq!(status.code(), Some(2), "{line}");
    assert!(
        line.contains("--fd") && line.contains("pass a listening socket"),
        "{line}"
    );
    assert!(
        !fs::exists(scratch.path("host")).unwrap(),
        "nothing is created"
    );
}
