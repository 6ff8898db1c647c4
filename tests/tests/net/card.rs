//! A `pericarp-net` on a tap. The driver of its card is `pericarp_tests::card`. For the tests beside.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::bounded::poll;
pub(crate) use pericarp_tests::card::{Card, HEADER, LARGE, LIMIT, PLAIN, Packet, USO};
use pericarp_tests::frontend::bit;
use pericarp_tests::network::{Network, TAP};
use pericarp_tests::parts::beside_us;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use serde_json::Value;

/// The program, with its tap and sockets.
pub(crate) struct Served {
    pub(crate) process: Process,
    pub(crate) scratch: Scratch,
    pub(crate) socket: PathBuf,
    control: PathBuf,
    arguments: Vec<String>,
}

impl AsRef<Path> for Served {
    fn as_ref(&self) -> &Path {
        &self.socket
    }
}

impl Served {
    /// Starts it in this thread's network.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let scratch = Scratch::new();
        let (socket, control) = (scratch.path("net"), scratch.path("control"));
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let process = Self::process(&socket, &control, &arguments);
        Self {
            process,
            scratch,
            socket,
            control,
            arguments,
        }
    }

    fn process(socket: &PathBuf, control: &PathBuf, arguments: &[String]) -> Process {
        let net = beside_us().join("pericarp-net");
        let mut net = Self::options(command(&net), socket, control, arguments);
        let mut process = Process::start(&mut net, 2 * LIMIT).unwrap();
        let there = poll(LIMIT, || {
            let ended = process.ended().is_some();
            (ended || socket.exists() && control.exists()).then_some(!ended)
        });
        assert_eq!(there, Some(true), "{}", process.output().last(20));
        let up = poll(LIMIT, || Network::is_up().then_some(()));
        assert!(up.is_some(), "the tap stays down");
        process
    }

    fn options(
        mut net: Command,
        socket: &PathBuf,
        control: &PathBuf,
        arguments: &[String],
    ) -> Command {
        net.args(["--log-level", "info", "--socket-path"])
            .arg(socket)
            .arg("--control-path")
            .arg(control)
            .args(arguments);
        if !arguments.iter().any(|word| word == "--tap") {
            net.args(["--tap", TAP]);
        }
        net
    }

    /// Starts one that takes over, with another option, and with at most so many descriptors
    /// if it is said.
    pub(crate) fn successor(&self, more: &[&str], descriptors: Option<u32>) -> Process {
        let net = beside_us().join("pericarp-net");
        let net = match descriptors {
            None => command(&net),
            Some(most) => {
                let mut shell = command(Path::new("/bin/sh"));
                let script = format!("ulimit -n {most}; exec \"$0\" \"$@\"");
                shell.args(["-c", &script]).arg(net);
                shell
            }
        };
        // An option may be given once.
        let given = self.arguments.chunks(2);
        let given = given.filter(|pair| more.first() != Some(&pair[0].as_str()));
        let more = more.iter().map(|&word| word.to_owned());
        let arguments: Vec<String> = given.flatten().cloned().chain(more).collect();
        let mut net = Self::options(net, &self.socket, &self.control, &arguments);
        net.arg("--take-over").arg(&self.control);
        Process::start(&mut net, 2 * LIMIT).unwrap()
    }

    /// Has a new process take over, which is to end well.
    pub(crate) fn hand_over(&mut self) {
        let new = self.successor(&[], None);
        self.handed_to(new);
    }

    /// This process has taken over, or does so now.
    pub(crate) fn handed_to(&mut self, new: Process) {
        let mut old = std::mem::replace(&mut self.process, new);
        let code = old.wait(LIMIT).and_then(|status| status.code());
        let told = format!(
            "{}\n--\n{}",
            old.output().last(9),
            self.process.output().last(9)
        );
        assert_eq!(code, Some(0), "{told}");
        assert!(old.output().find("handed over").is_some(), "{told}");
    }

    /// Kills it, and starts another in its place.
    pub(crate) fn again(&mut self) {
        self.process.kill();
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(&self.control);
        self.process = Self::process(&self.socket, &self.control, &self.arguments);
    }

    /// Asks the control socket.
    pub(crate) fn ask(&self, request: &str) -> Value {
        let mut stream = UnixStream::connect(&self.control).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// How many packets were dropped for this reason.
    pub(crate) fn dropped(&self, reason: &str) -> u64 {
        let stats = self.ask(r#"{"op":"stats"}"#);
        let count = &stats["devices"][0]["held"][reason];
        count
            .as_u64()
            .unwrap_or_else(|| panic!("{reason}: {stats}"))
    }

    /// CPU time of all its threads.
    pub(crate) fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.pid())).unwrap();
        let nanos = tasks.map(|task| {
            let text = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            let running = text.split_whitespace().next().unwrap();
            running.parse::<u64>().unwrap()
        });
        Duration::from_nanos(nanos.sum())
    }

    /// With nothing to do it does nothing: not even half of the time.
    pub(crate) fn rests(&self, when: &str) {
        let (begin, before) = (std::time::Instant::now(), self.cpu());
        std::thread::sleep(Duration::from_secs(1));
        let (took, spent) = (begin.elapsed(), self.cpu() - before);
        assert!(spent < took / 2, "{when}: {spent:?} of {took:?}");
    }

    /// It lives, and ends when it is told to.
    pub(crate) fn finish(mut self) {
        assert!(self.process.ended().is_none(), "{}", self.process.epitaph());
        self.process.signal(rustix::process::Signal::TERM);
        let status = self.process.wait(LIMIT);
        let code = status.and_then(|status| status.code());
        assert_eq!(code, Some(0), "{}", self.process.output().last(20));
    }
}

/// Bit numbers as a mask.
pub(crate) fn without(features: u64, number: u32) -> u64 {
    features & !bit(number)
}
