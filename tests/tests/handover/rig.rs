//! `pericarp-block`, its successors, somebody who only plays one, and somebody
//! between the two.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
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
    /// The program, and what comes before it.
    pub(crate) program: Vec<String>,
    pub(crate) scratch: Scratch,
}

impl Rig {
    /// The most requests that a driver has in flight.
    pub(crate) const DEPTH: u64 = 256;

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
        let one = ["--socket-path=@/s", "--blk-file=@/disk"];
        let program = Part::PERICARP_BLOCK.find().unwrap();
        let program = vec![program.display().to_string()];
        Self::with(scratch, program, &[&one, extra].concat())
    }

    /// With these options and a control socket; `@` is the scratch directory.
    pub(crate) fn with(scratch: Scratch, program: Vec<String>, extra: &[&str]) -> Self {
        let dir = scratch.dir().display().to_string();
        let options: Vec<String> = ["--control-path=@/control", "--log-level=info"]
            .iter()
            .chain(extra)
            .map(|option| option.replace('@', &dir))
            .collect();
        let serving = start(&program, &options);
        let rig = Self {
            serving,
            options,
            program,
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
            queue_size: Self::DEPTH as u16,
            inflight,
            ..Setup::default()
        };
        Driver::connect(&self.socket(), &setup).unwrap()
    }

    /// Starts a process without a predecessor.
    pub(crate) fn fresh(&mut self) {
        let fresh = start(&self.program, &self.options);
        drop(std::mem::replace(&mut self.serving, fresh));
    }

    /// Starts one that takes over, with more options.
    pub(crate) fn successor(&self, extra: &[&str]) -> Process {
        start(&self.program, &self.successors(&self.control(), extra))
    }

    /// The options of one that takes over at this socket.
    fn successors(&self, control: &Path, extra: &[&str]) -> Vec<String> {
        let control = control.display();
        let mut options = vec![
            format!("--take-over={control}"),
            format!("--control-path={control}"),
        ];
        options.extend_from_slice(&self.options[1..]);
        options.extend(extra.iter().map(|&option| option.to_owned()));
        options
    }

    /// Starts one whose talk goes through our hands.
    pub(crate) fn relayed(&self) -> (Process, Relay) {
        let path = self.scratch.path("relay");
        let _ = std::fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let new = start(&self.program, &self.successors(&path, &[]));
        listener.set_nonblocking(true).unwrap();
        let new_end = poll(SOON, || listener.accept().ok()).expect("it asks").0;
        new_end.set_nonblocking(false).unwrap();
        new_end.set_read_timeout(Some(SOON)).unwrap();
        let relay = Relay {
            ends: [new_end, self.peer()],
            step: 0,
            held: None,
        };
        (new, relay)
    }

    /// Descriptors that the serving process has.
    pub(crate) fn descriptors(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.serving.pid());
        std::fs::read_dir(dir).unwrap().count()
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
        pretender.line(&json!({"op": "hand-over", "version": 2}));
        assert_eq!(pretender.read_line()["ok"], json!(true));
        pretender
    }

    /// What a true successor would offer, for a driver that reads this
    /// configuration.
    pub(crate) fn offer(&self, config: &[u8]) -> Value {
        self.offer_of(&self.scratch.path("disk"), config)
    }

    pub(crate) fn offer_of(&self, disk: &Path, config: &[u8]) -> Value {
        use std::os::unix::fs::MetadataExt;
        let named = |path: &Path| {
            let found = std::fs::metadata(path).unwrap();
            format!("{:x}:{:x}:{:x}", found.dev(), found.ino(), found.rdev())
        };
        let geometry = [&config[8..24], &config[34..60]].concat();
        let geometry: String = geometry.iter().map(|byte| format!("{byte:02x}")).collect();
        let device = json!({
            "id": "disk", "store": named(disk), "socket": named(&self.socket()),
            "queues": 1, "queue_size": 1024, "read_only": false, "geometry": geometry,
        });
        json!({"step": "offer", "devices": [device], "records": null})
    }
}

fn start(program: &[String], options: &[String]) -> Process {
    let mut program_command = command(Path::new(&program[0]));
    program_command.args(&program[1..]).args(options);
    Process::start(&mut program_command, Duration::from_secs(400)).unwrap()
}

/// Everything that is said when one device is handed over, by who says it: the
/// new process, `NEW`, or the old one. The first two are lines.
pub(crate) const SAID: [(usize, &str); 9] = [
    (NEW, "hand-over"),
    (OLD, "ok"),
    (NEW, "offer"),
    (OLD, "estate"),
    (OLD, "estate"),
    (NEW, "drain"),
    (OLD, "device"),
    (NEW, "ready"),
    (OLD, "yours"),
];
const NEW: usize = 0;
const OLD: usize = 1;

/// Carries each word from one process to the other, as far as a test wants.
pub(crate) struct Relay {
    ends: [UnixStream; 2],
    step: usize,
    held: Option<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Relay {
    /// Carries what is said up to `SAID[step]`, which is heard and kept.
    pub(crate) fn hold(&mut self, step: usize) {
        self.carry(step);
        self.hear();
    }

    /// Carries what is said before `SAID[step]`.
    pub(crate) fn carry(&mut self, step: usize) {
        while self.step < step {
            self.hear();
            let (bytes, fds) = self.held.take().unwrap();
            let to = &self.ends[1 - SAID[self.step].0];
            super::failures::send_with(to, &bytes, &fds);
            self.step += 1;
        }
    }

    fn hear(&mut self) {
        if self.held.is_some() {
            return;
        }
        let (who, word) = SAID[self.step];
        let from = &self.ends[who];
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        if self.step < 2 {
            while bytes.last() != Some(&b'\n') {
                receive(from, &mut bytes, &mut fds, 1);
            }
        } else {
            receive(from, &mut bytes, &mut fds, 8);
            let len = u32::from_le_bytes(*bytes.first_chunk().unwrap());
            receive(from, &mut bytes, &mut fds, len as usize);
        }
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains(&format!("\"{word}\"")), "{word}: {text}");
        self.held = Some((bytes, fds));
    }
}

/// Receives `count` more bytes and the descriptors that come with them.
fn receive(from: &UnixStream, bytes: &mut Vec<u8>, fds: &mut Vec<OwnedFd>, count: usize) {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let end = bytes.len() + count;
    while bytes.len() < end {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut room = vec![0; end - bytes.len()];
        let mut slices = [std::io::IoSliceMut::new(&mut room)];
        let received = recvmsg(
            from.as_fd(),
            &mut slices,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let got = received.unwrap().bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        assert!(got > 0, "the end instead of {count} bytes");
        bytes.extend_from_slice(&room[..got]);
    }
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
