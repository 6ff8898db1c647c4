//! A running `pericarp-vsock`. The guest's side of it is `pericarp_tests::vsock`.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::Part;
use pericarp_tests::peer::{Footprint, connect};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
pub(crate) use pericarp_tests::vsock::{BUFFER, CID, Guest, Packet, op};
use rustix::process::Signal;

const STEP: Duration = Duration::from_secs(20);

/// One line without its end.
pub(crate) fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        if byte[0] == b'\n' {
            return String::from_utf8(line).unwrap();
        }
        line.push(byte[0]);
    }
}

/// The next one to connect, with bounded reads.
pub(crate) fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let stream = poll(STEP, || listener.accept().ok())
        .expect("nobody connects")
        .0;
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(STEP)).unwrap();
    stream
}

/// A running device. Its directory has `front`, `host`, and `host_N`.
pub(crate) struct Vsock {
    process: Process,
    scratch: Scratch,
}

impl Vsock {
    pub(crate) fn start(extra: &[&str]) -> Self {
        Self::start_in(Scratch::new(), extra)
    }

    pub(crate) fn start_in(scratch: Scratch, extra: &[&str]) -> Self {
        let path = Part::Ours("pericarp-vsock").find().unwrap();
        let mut command = command(&path);
        command.arg("--socket-path").arg(scratch.path("front"));
        command.arg("--uds-path").arg(scratch.path("host"));
        command.arg(format!("--guest-cid={CID}")).args(extra);
        let mut process = Process::start(&mut command, Duration::from_secs(120)).unwrap();
        // Bound last, and to be connected to, dead socket or not.
        let up = poll(STEP, || {
            (process.ended().is_some() || UnixStream::connect(scratch.path("front")).is_ok())
                .then(|| process.ended().is_none())
        });
        assert_eq!(up, Some(true), "{}", process.output().last(20));
        Vsock { process, scratch }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.scratch.path("front")
    }

    pub(crate) fn uds(&self) -> PathBuf {
        self.scratch.path("host")
    }

    pub(crate) fn port(&self, port: u32) -> PathBuf {
        self.scratch.path(&format!("host_{port}"))
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.pid()
    }

    pub(crate) fn is_alive(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.pid()))
            .symlink_metadata()
            .is_ok()
    }

    /// A host program.
    pub(crate) fn dial(&self) -> UnixStream {
        connect(&self.uds()).unwrap()
    }

    pub(crate) fn guest(&self) -> Guest {
        self.guest_with(BUFFER)
    }

    pub(crate) fn guest_with(&self, buffer: u32) -> Guest {
        Guest::connect(&self.socket(), buffer)
    }

    pub(crate) fn footprint(&self) -> Footprint {
        Footprint::of(self.pid()).unwrap()
    }

    pub(crate) fn stop(mut self) -> ExitStatus {
        self.process.signal(Signal::TERM);
        self.process.wait(STEP).expect("it ends on SIGTERM")
    }

    /// Kills it and gives what it left behind.
    pub(crate) fn crash(self) -> Scratch {
        let Vsock {
            mut process,
            scratch,
        } = self;
        process.kill();
        scratch
    }
}
