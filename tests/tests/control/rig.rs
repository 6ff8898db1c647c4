//! A backend with a control socket, and an operator in front of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::peer::{Backend, Kind, Options};
use pericarp_tests::scratch::Scratch;
use serde_json::Value;

/// Bytes of the disk.
pub(crate) const DISK: u64 = 64 << 20;

pub(crate) struct Rig {
    // Before the directory it works in.
    pub(crate) backend: Backend,
    pub(crate) control: PathBuf,
    pub(crate) scratch: Scratch,
}

impl Rig {
    /// `None` when there is no program to test.
    pub(crate) fn start(test: &str, extra: &[&str]) -> Option<Self> {
        if !Kind::Pericarp.usable(test) {
            return None;
        }
        let scratch = Scratch::new();
        let control = scratch.path("control.sock");
        let disk = scratch.sparse("disk", DISK);
        let mut options = Options::default();
        options
            .extra
            .push(format!("--control-path={}", control.display()));
        for argument in extra {
            match argument.strip_prefix("--num-queues=") {
                Some(count) => options.num_queues = count.parse().unwrap(),
                None => options.extra.push((*argument).to_owned()),
            }
        }
        let backend = Backend::start(Kind::Pericarp, &scratch, &disk, &options).unwrap();
        // It is bound after the device's own.
        assert!(poll(SOON, || control.exists().then_some(())).is_some());
        Some(Self {
            backend,
            control,
            scratch,
        })
    }

    /// Asks on a connection of its own.
    pub(crate) fn ask(&self, request: &Value) -> Value {
        ask(&self.control, request)
    }

    /// Context switches of all threads so far.
    pub(crate) fn switches(&self) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.backend.pid())).unwrap();
        tasks
            .map(|task| {
                let status = task.unwrap().path().join("status");
                let status = std::fs::read_to_string(status).unwrap();
                let line = status
                    .lines()
                    .find(|l| l.starts_with("voluntary_ctxt_switches:"));
                line.unwrap()
                    .split_whitespace()
                    .nth(1)
                    .unwrap()
                    .parse::<u64>()
                    .unwrap()
            })
            .sum()
    }
}

/// A peer with bounded patience. Waits until somebody listens.
pub(crate) fn peer(control: &Path) -> UnixStream {
    pericarp_tests::peer::connect(control).unwrap()
}

pub(crate) fn ask(control: &Path, request: &Value) -> Value {
    let mut stream = peer(control);
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

pub(crate) fn http(control: &Path, path: &str) -> String {
    let mut stream = peer(control);
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Long enough for anything that is to happen at once.
pub(crate) const SOON: Duration = Duration::from_secs(10);
