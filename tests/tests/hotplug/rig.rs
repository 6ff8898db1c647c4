//! A running `pericarp-block` with one disk, and the operator who adds others.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Setup};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::verified::{BLOCK, BLOCKS};
use pericarp_tests::wire;
use serde_json::Value;

pub(crate) const SOON: Duration = Duration::from_secs(20);

/// What a client said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    /// The answer it printed, if it did.
    pub(crate) answer: Value,
    pub(crate) errors: String,
}

impl Said {
    pub(crate) fn is_done(&self) {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert_eq!(self.answer["ok"], true, "{self:?}");
        assert_eq!(self.errors, "", "{self:?}");
    }

    /// Refused with this code, one line, and these words in it.
    pub(crate) fn is_refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.errors.lines().count(), 1, "{self:?}");
        let all = words.iter().all(|word| self.errors.contains(word));
        assert!(all, "{self:?} without {words:?}");
    }
}

pub(crate) struct Rig {
    pub(crate) serving: Process,
    pub(crate) scratch: Scratch,
}

impl Rig {
    /// Serves disk `a`. `None` when there is no program to test.
    pub(crate) fn start(test: &str, extra: &[&str]) -> Option<Self> {
        if !have(test, &[Part::PERICARP_BLOCK]) {
            return None;
        }
        let scratch = Scratch::new();
        for disk in ["a", "b", "c"] {
            // Written once, or direct writes would have to allocate.
            scratch.file(disk, &vec![0; BLOCK * BLOCKS]);
        }
        let mut options = vec![keys(&scratch, "a")];
        options.extend(extra.iter().map(|&option| option.to_owned()));
        let serving = start(&scratch, &options);
        let rig = Self { serving, scratch };
        assert!(poll(SOON, || rig.control().exists().then_some(())).is_some());
        // All threads run once it answers.
        assert_eq!(rig.ids(), ["a"]);
        Some(rig)
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.scratch.path("control")
    }

    pub(crate) fn socket(&self, id: &str) -> PathBuf {
        self.scratch.path(&format!("{id}.sock"))
    }

    pub(crate) fn connect(&self, id: &str) -> Driver {
        let setup = Setup {
            queue_size: 256,
            inflight: true,
            ..Setup::default()
        };
        Driver::connect(&self.socket(id), &setup).unwrap_or_else(|e| panic!("{e}: {}", self.told()))
    }

    /// A client of the same binary with these options.
    pub(crate) fn client(&self, options: &[&str]) -> Said {
        let mut client = command(&Part::PERICARP_BLOCK.find().unwrap());
        let control = format!("--control-path={}", self.control().display());
        let output = client.arg(control).args(options).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said {
            code: output.status.code(),
            answer: serde_json::from_slice(&output.stdout).unwrap_or_default(),
            errors: text(&output.stderr),
        }
    }

    /// Adds the disk of this name, with more keys.
    pub(crate) fn add(&self, id: &str, more: &str) -> Said {
        let keys = keys(&self.scratch, id).replace("--device=", "--add-device=");
        self.client(&[&format!("{keys}{more}")])
    }

    pub(crate) fn remove(&self, id: &str) -> Said {
        self.client(&["--remove-device", id])
    }

    /// A line with descriptors, and what is answered.
    pub(crate) fn send(&self, line: &Value, descriptors: &[BorrowedFd<'_>]) -> Value {
        exchange(&self.peer(), line, descriptors)
    }

    pub(crate) fn ask(&self, line: &Value) -> Value {
        self.send(line, &[])
    }

    pub(crate) fn peer(&self) -> UnixStream {
        pericarp_tests::peer::connect(&self.control()).unwrap()
    }

    /// The ids that `stats` knows.
    pub(crate) fn ids(&self) -> Vec<String> {
        let stats = self.ask(&serde_json::json!({"op": "stats"}));
        let devices = stats["devices"].as_array().unwrap();
        let id = |device: &Value| device["id"].as_str().unwrap().to_owned();
        devices.iter().map(id).collect()
    }

    /// Open descriptors, threads, and private memory in KiB.
    pub(crate) fn holds(&self) -> (usize, u64, u64) {
        let proc = PathBuf::from(format!("/proc/{}", self.serving.pid()));
        let status = std::fs::read_to_string(proc.join("status")).unwrap();
        let field = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let descriptors = std::fs::read_dir(proc.join("fd")).unwrap().count();
        (descriptors, field("Threads:"), field("RssAnon:"))
    }

    /// As [`holds`](Self::holds), once connections that were closed are gone.
    pub(crate) fn settled(&self) -> (usize, u64, u64) {
        let same = || {
            let before = self.holds();
            std::thread::sleep(Duration::from_millis(100));
            (self.holds() == before).then_some(before)
        };
        poll(SOON, same).unwrap()
    }

    pub(crate) fn told(&self) -> String {
        self.serving.output().last(12)
    }
}

/// The option that serves a disk of the scratch directory.
pub(crate) fn keys(scratch: &Scratch, id: &str) -> String {
    let (file, socket) = (scratch.path(id), scratch.path(&format!("{id}.sock")));
    format!(
        "--device=id={id},file={},socket={}",
        file.display(),
        socket.display()
    )
}

/// Starts a program with a control socket.
pub(crate) fn start(scratch: &Scratch, options: &[String]) -> Process {
    let mut program = command(&Part::PERICARP_BLOCK.find().unwrap());
    let control = scratch.path("control");
    program
        .arg(format!("--control-path={}", control.display()))
        .arg("--log-level=info")
        .args(options);
    Process::start(&mut program, Duration::from_secs(180)).unwrap()
}

/// One line each way.
pub(crate) fn exchange(
    mut stream: &UnixStream,
    line: &Value,
    descriptors: &[BorrowedFd<'_>],
) -> Value {
    let line = format!("{line}\n");
    // The descriptors with the first byte, the rest in pieces.
    wire::send(stream, &line.as_bytes()[..1], descriptors).unwrap();
    stream.write_all(&line.as_bytes()[1..]).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer:?}"))
}

/// Whether somebody listens there.
pub(crate) fn listens(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}
