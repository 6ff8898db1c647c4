//! `pericarp-block`, its successors, and somebody who only plays one.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Setup};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::verified::{BLOCK, BLOCKS};
use serde_json::{Value, json};

pub(crate) const SOON: Duration = Duration::from_secs(20);
/// What the pauses of one process are said in.
const PAUSE: &str = "stood still for ";

/// A process that serves, and the options to start its successor with.
pub(crate) struct Rig {
    pub(crate) serving: Process,
    options: Vec<String>,
    pub(crate) scratch: Scratch,
}

impl Rig {
    /// `None` when there is no program to test.
    pub(crate) fn start(test: &str, extra: &[&str]) -> Option<Self> {
        if !have(test, &[Part::PERICARP_BLOCK]) {
            return None;
        }
        let scratch = Scratch::new();
        // Written once, or direct writes would have to allocate.
        scratch.file("disk", &vec![0; BLOCK * BLOCKS]);
        Some(Self::on(scratch, extra))
    }

    /// On a scratch directory with a `disk`.
    pub(crate) fn on(scratch: Scratch, extra: &[&str]) -> Self {
        let path = |name: &str| scratch.path(name).display().to_string();
        let mut options = vec![
            format!("--socket-path={}", path("s")),
            format!("--blk-file={}", path("disk")),
            format!("--control-path={}", path("control")),
            "--log-level=info".to_owned(),
        ];
        options.extend(extra.iter().map(|option| option.replace('@', &path(""))));
        let serving = start(&options, &[]);
        let rig = Self {
            serving,
            options,
            scratch,
        };
        // It is bound after the device's own.
        assert!(poll(SOON, || rig.control().exists().then_some(())).is_some());
        rig
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.scratch.path("control")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.scratch.path("s")
    }

    pub(crate) fn connect(&self, inflight: bool) -> Driver {
        let setup = Setup {
            queue_size: 256,
            inflight,
            ..Setup::default()
        };
        Driver::connect(&self.socket(), &setup).unwrap()
    }

    /// Starts a process without a predecessor.
    pub(crate) fn fresh(&mut self) {
        drop(std::mem::replace(
            &mut self.serving,
            start(&self.options, &[]),
        ));
    }

    /// Starts one that takes over, with more options.
    pub(crate) fn successor(&self, extra: &[&str]) -> Process {
        let mut more = vec![format!("--take-over={}", self.control().display())];
        more.extend(extra.iter().map(|&option| option.to_owned()));
        start(&self.options, &more)
    }

    /// Hands over once; returns the pause that the new process saw, if it had a
    /// front end, and how long all of it took.
    pub(crate) fn hand_over(&mut self) -> (Option<Duration>, Duration) {
        let begin = Instant::now();
        let new = self.successor(&[]);
        let mut old = std::mem::replace(&mut self.serving, new);
        let status = old.wait(SOON);
        let took = begin.elapsed();
        old.kill();
        let told = || format!("{}\n--\n{}", old.output().last(9), self.told());
        let code = status.and_then(|status| status.code());
        assert_eq!(code, Some(0), "{}", told());
        assert!(old.output().find("handed over").is_some(), "{}", told());
        let front_end =
            old.output().find("connected").is_some() || old.output().find("taken over").is_some();
        let pause = front_end.then(|| {
            let line = poll(SOON, || self.serving.output().find(PAUSE));
            let line = line.unwrap_or_else(|| panic!("{}", told()));
            duration(line.split_once(PAUSE).unwrap().1)
        });
        (pause, took)
    }

    pub(crate) fn told(&self) -> String {
        self.serving.output().last(12)
    }

    /// A peer on the control socket, with bounded patience.
    pub(crate) fn peer(&self) -> UnixStream {
        pericarp_tests::peer::connect(&self.control()).unwrap()
    }

    pub(crate) fn ask(&self, request: &Value) -> Value {
        let mut stream = self.peer();
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Somebody who asks for a hand-over and knows what to offer.
    pub(crate) fn pretender(&self) -> Pretender {
        let mut pretender = Pretender(self.peer());
        pretender.line(&json!({"op": "hand-over", "version": 1}));
        assert_eq!(pretender.read_line()["ok"], json!(true));
        pretender
    }

    /// What a true successor would offer.
    pub(crate) fn offer(&self) -> Value {
        use std::os::unix::fs::MetadataExt;
        let named = |name: &str| {
            let found = std::fs::metadata(self.scratch.path(name)).unwrap();
            format!("{:x}:{:x}:{:x}", found.dev(), found.ino(), found.rdev())
        };
        let device = json!({
            "id": "disk", "store": named("disk"), "socket": named("s"),
            "queues": 1, "queue_size": 1024, "read_only": false,
        });
        json!({"step": "offer", "devices": [device], "records": null})
    }
}

fn start(options: &[String], more: &[String]) -> Process {
    let mut program = command(&Part::PERICARP_BLOCK.find().unwrap());
    program.args(options).args(more);
    Process::start(&mut program, Duration::from_secs(400)).unwrap()
}

/// As `{:?}` writes it.
fn duration(text: &str) -> Duration {
    let units = [("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let text = text.trim();
    let (number, unit) = units
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?.parse::<f64>().ok()?, unit)))
        .unwrap();
    Duration::from_secs_f64(number * unit)
}

/// Speaks the new process's half by hand. Descriptors that come are closed.
pub(crate) struct Pretender(pub(crate) UnixStream);

impl Pretender {
    pub(crate) fn line(&mut self, line: &Value) {
        self.0.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub(crate) fn read_line(&mut self) -> Value {
        let mut line = Vec::new();
        let mut byte = [0];
        while byte != *b"\n" {
            self.0.read_exact(&mut byte).unwrap();
            line.extend_from_slice(&byte);
        }
        serde_json::from_slice(&line).unwrap()
    }

    pub(crate) fn send(&mut self, body: &Value) {
        let body = body.to_string();
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&0u32.to_le_bytes());
        bytes.extend_from_slice(body.as_bytes());
        self.0.write_all(&bytes).unwrap();
    }

    /// A message; the descriptors that came with it are lost.
    pub(crate) fn read(&mut self) -> Value {
        let mut header = [0; 8];
        self.0.read_exact(&mut header).unwrap();
        let len = u32::from_le_bytes(*header.first_chunk().unwrap());
        let mut body = vec![0; len as usize];
        self.0.read_exact(&mut body).unwrap();
        serde_json::from_slice(&body).unwrap()
    }
}
