//! A `pericarp-vmm` and what it is told and says. For the tests beside.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::guest::{Assets, exit_code, initramfs};
use pericarp_tests::lab::Lab;
use pericarp_tests::parts::{Part, beside_us};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use serde_json::Value;

/// A guest's whole life, which takes seconds: but in a CPU that is emulated twice, on a
/// machine that may be busy with more than this. And what a test is told to go on for longer.
pub(crate) fn life() -> Duration {
    let more = std::env::var("PERICARP_POKE_SECONDS").ok();
    let more = more.and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
    Duration::from_secs(150 + more)
}

/// What a test begins with.
pub(crate) struct Rig {
    pub(crate) scratch: Scratch,
    pub(crate) assets: Assets,
}

impl Rig {
    /// `None` where the test cannot be run here: then it runs in the laboratory, or
    /// is skipped and said to be.
    pub(crate) fn here(test: &str, parts: &[Part]) -> Option<Self> {
        if !Lab::is_here() {
            return None;
        }
        let ours = Part::Ours("pericarp-vmm");
        let assets = Assets::for_test(test, &[&[ours], parts].concat())?;
        let scratch = Scratch::new();
        Some(Self { scratch, assets })
    }

    /// An initramfs that runs this script.
    pub(crate) fn image(&self, tools: &[&str], script: &str) -> PathBuf {
        initramfs(&self.scratch, &self.assets, tools, script).unwrap()
    }

    /// Starts the monitor with this initramfs and these options.
    pub(crate) fn start(&self, image: &Path, options: &[&str]) -> Monitor {
        let control = self.scratch.path("vmm.control");
        let mut vmm = command(&beside_us().join("pericarp-vmm"));
        vmm.arg("--kernel")
            .arg(self.assets.kernel())
            .arg("--initramfs")
            .arg(image)
            .args(["--cmdline", "console=ttyS0 quiet panic=-1"])
            .args(["--log-level", "info", "--kernel-cache"])
            // Of all tests, so that one of them unpacks the kernel.
            .arg("/tmp/pericarp-kernels")
            .arg("--control-path")
            .arg(&control)
            .args(options);
        let process = Process::start(&mut vmm, life()).unwrap();
        Monitor { process, control }
    }
}

/// A running monitor.
pub(crate) struct Monitor {
    pub(crate) process: Process,
    control: PathBuf,
}

impl Monitor {
    /// Asks the control socket.
    pub(crate) fn ask(&self, request: &str) -> Value {
        let stream = poll(life(), || UnixStream::connect(&self.control).ok());
        let mut stream = stream.expect("a control socket");
        stream.set_read_timeout(Some(life())).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Asks, and the answer must be yes.
    pub(crate) fn tell(&self, request: &str) -> Value {
        let answer = self.ask(request);
        assert_eq!(answer["ok"], true, "{request}: {answer}");
        answer
    }

    /// Waits until the guest has written this.
    pub(crate) fn wait_for(&mut self, text: &str) {
        let seen = poll(life(), || {
            if self.process.output().find(text).is_some() {
                return Some(true);
            }
            self.process.ended().map(|_| false)
        });
        let seen = seen == Some(true) || self.process.output().find(text).is_some();
        assert!(seen, "no {text:?}: {}", self.said());
    }

    /// The end of what the guest and the monitor said.
    pub(crate) fn said(&mut self) -> String {
        let epitaph = self.process.epitaph();
        format!("it {epitaph}:\n{}", self.process.output().last(60))
    }

    /// Waits for the guest's end. The script must have come to its own.
    pub(crate) fn finish(mut self) -> String {
        let status = self.process.wait(life());
        let code = status.and_then(|status| status.code());
        self.process.kill();
        let console = self.process.output().lines().join("\n");
        assert_eq!(code, Some(0), "{}", self.said());
        assert_eq!(exit_code(&console), Some("0"), "{}", self.said());
        console
    }
}

/// A backend that listens on `socket`.
pub(crate) fn backend(program: &str, socket: &Path, arguments: &[&str]) -> Process {
    let mut backend = command(&beside_us().join(program));
    backend.arg("--socket-path").arg(socket).args(arguments);
    started(&mut backend, socket)
}

/// Starts a backend and waits until it listens.
pub(crate) fn started(backend: &mut std::process::Command, socket: &Path) -> Process {
    let mut process = Process::start(backend, life()).unwrap();
    let there = poll(life(), || {
        let ended = process.ended().is_some();
        (ended || socket.exists()).then_some(!ended)
    });
    assert_eq!(there, Some(true), "{}", process.output().last(20));
    process
}
