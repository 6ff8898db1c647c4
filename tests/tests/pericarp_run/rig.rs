//! What the tests of `pericarp run` stand on: a root file system, runs that are
//! watched and bounded, and a look at what they leave behind.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pericarp_tests::guest;
use pericarp_tests::oci;
use pericarp_tests::parts::{Part, beside_us, have, skip};
use pericarp_tests::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};

pub(crate) const MIB: u64 = 1 << 20;
/// Longer than any run here takes on a slow machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
pub(crate) const PERICARP: Part = Part::Ours("pericarp");
pub(crate) const VM: [Part; 6] = [
    PERICARP,
    Part::PERICARP_BLOCK,
    Part::PERICARP_VSOCK,
    Part::QemuSystem,
    Part::MkfsExt4,
    Part::Busybox,
];
pub(crate) const IMAGE: [Part; 7] = [
    PERICARP,
    Part::PERICARP_BLOCK,
    Part::PERICARP_VSOCK,
    Part::QemuSystem,
    Part::MkfsExt4,
    Part::MkfsErofs,
    Part::Busybox,
];
pub(crate) const RUNC_IMAGE: [Part; 5] = [
    PERICARP,
    Part::Runc,
    Part::MkfsExt4,
    Part::MkfsErofs,
    Part::Busybox,
];
pub(crate) const RUNC: [Part; 4] = [PERICARP, Part::Runc, Part::MkfsExt4, Part::Busybox];

/// A root file system, and a place of its own for what the runs create.
pub(crate) struct Rig {
    pub(crate) scratch: Scratch,
}

impl Rig {
    /// None when a part is missing, which was said then.
    pub(crate) fn new(test: &str, parts: &[Part]) -> Option<Self> {
        if !have(test, parts) {
            return None;
        }
        let needs_kernel = parts.contains(&Part::QemuSystem);
        if needs_kernel && !assets().join("kernel/vmlinuz").is_file() {
            let why = format!(
                "no guest kernel in {} (cargo xtask setup)",
                assets().display()
            );
            skip(test, &why);
            return None;
        }
        let is_root = rustix::process::geteuid().is_root();
        if parts.contains(&Part::Runc) && !is_root {
            skip(test, "containers need root");
            return None;
        }
        let rig = Self {
            scratch: Scratch::new(),
        };
        let more = parts.contains(&Part::Iperf3).then_some("iperf3");
        rig.make_root(more.as_slice());
        Some(rig)
    }

    /// A tree with busybox and these programs of the host, and an image of it.
    pub(crate) fn make_root(&self, programs: &[&str]) {
        let tree = self.tree();
        oci::busybox(&tree, oci::ALL_TOOLS);
        guest::programs(&tree, programs).unwrap();
        fs::write(tree.join("etc/not-executable"), "text").unwrap();
        let image = self.scratch.sparse("root.img", 32 * MIB);
        let made = Command::new(Part::MkfsExt4.find().unwrap())
            .args(["-q", "-F", "-d"])
            .args([&tree, &image])
            .status()
            .unwrap();
        assert!(made.success());
    }

    pub(crate) fn tree(&self) -> PathBuf {
        self.scratch.path("tree")
    }

    pub(crate) fn image(&self) -> String {
        self.scratch.path("root.img").display().to_string()
    }

    /// `pericarp` with a subcommand, in this rig's surroundings.
    pub(crate) fn pericarp(&self, subcommand: &str) -> Command {
        let mut command = Command::new(PERICARP.find().unwrap());
        command
            .arg(subcommand)
            .env("XDG_RUNTIME_DIR", self.scratch.dir())
            .env("XDG_CACHE_HOME", self.scratch.path("cache"))
            .env("TMPDIR", self.scratch.dir())
            .env("PERICARP_ASSETS", assets());
        command
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.pericarp("run");
        command.args(arguments);
        command
    }

    /// Calls another subcommand, without input.
    pub(crate) fn call(&self, subcommand: &str, arguments: &[&str]) -> Ended {
        self.feed(self.pericarp(subcommand), arguments, b"")
    }

    /// Runs a command with this input to its end.
    pub(crate) fn feed(&self, mut command: Command, arguments: &[&str], input: &[u8]) -> Ended {
        command.args(arguments);
        let mut running = Running::start(command);
        running.feed(input.to_vec());
        running.wait()
    }

    /// Runs to the end.
    pub(crate) fn run(&self, arguments: &[&str], input: &[u8]) -> Ended {
        self.feed(self.pericarp("run"), arguments, input)
    }

    /// Starts a run and waits until its command has said `ready`.
    pub(crate) fn start_ready(&self, arguments: &[&str]) -> Running {
        let running = Running::start(self.command(arguments));
        running.wait_for("ready");
        running
    }

    /// Process ids of `program` started for this rig's runs.
    pub(crate) fn processes(&self, program: &str) -> Vec<Pid> {
        let needle = self.scratch.dir().display().to_string();
        fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| {
                let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
                let line = fs::read(entry.path().join("cmdline")).ok()?;
                let line = String::from_utf8_lossy(&line).into_owned();
                let first = line.split('\0').next()?.to_owned();
                let name = Path::new(&first).file_name()?.to_str()?.to_owned();
                (line.contains(&needle) && name.starts_with(program))
                    .then(|| Pid::from_raw(pid))
                    .flatten()
            })
            .collect()
    }

    pub(crate) fn kill(&self, program: &str) {
        let pids = self.processes(program);
        assert_eq!(pids.len(), 1, "{program}: {pids:?}");
        kill_process(pids[0], Signal::KILL).unwrap();
    }

    /// What the runs' own directory still holds.
    pub(crate) fn left_files(&self) -> Vec<PathBuf> {
        let uid = rustix::process::geteuid().as_raw();
        let base = self.scratch.path(&format!("pericarp-{uid}"));
        let entries = fs::read_dir(base).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Loop devices on this rig's files, and mounts below its directory.
    pub(crate) fn left_mounts(&self) -> Vec<String> {
        let needle = self.scratch.dir().display().to_string();
        let mut left: Vec<String> = fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .lines()
            .filter(|line| line.contains(&needle))
            .map(str::to_owned)
            .collect();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let file = fs::read_to_string(entry.path().join("loop/backing_file"));
            left.extend(file.ok().filter(|path| path.contains(&needle)));
        }
        left
    }

    /// Nothing is left: no process at once, no mount or loop device soon (the
    /// kernel lets go of them a moment after their last user).
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.left_files(), Vec::<PathBuf>::new());
        self.assert_no_process_or_mount();
    }

    /// The same where the test has mounted something below this directory.
    pub(crate) fn assert_clean_but(&self, directory: &Path) {
        assert_eq!(self.left_files(), Vec::<PathBuf>::new());
        self.assert_no_process_or_mount_but(Some(directory));
    }

    pub(crate) fn assert_no_process_or_mount(&self) {
        self.assert_no_process_or_mount_but(None);
    }

    fn assert_no_process_or_mount_but(&self, directory: Option<&Path>) {
        let own = directory.map(|directory| directory.display().to_string());
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let processes = self.processes("");
            let mut mounts = self.left_mounts();
            mounts.retain(|line| own.as_ref().is_none_or(|own| !line.contains(own)));
            if processes.is_empty() && mounts.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left: {processes:?} {mounts:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

pub(crate) fn assets() -> PathBuf {
    match std::env::var_os("PERICARP_ASSETS") {
        Some(path) => path.into(),
        None => beside_us().join("../assets"),
    }
}

/// A run that has not ended.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) stdout: Arc<Mutex<Vec<u8>>>,
    pub(crate) stderr: Arc<Mutex<Vec<u8>>>,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

/// A run that has.
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The lines of the form `key=value`.
    pub(crate) fn values(&self) -> HashMap<String, String> {
        self.text()
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut threads = Vec::new();
        let mut follow = |mut source: Box<dyn Read + Send>| {
            let kept = Arc::new(Mutex::new(Vec::new()));
            let shared = Arc::clone(&kept);
            threads.push(thread::spawn(move || {
                let mut buffer = [0; 16 * 1024];
                while let Ok(count @ 1..) = source.read(&mut buffer) {
                    shared.lock().unwrap().extend_from_slice(&buffer[..count]);
                }
            }));
            kept
        };
        let stdout = follow(Box::new(child.stdout.take().unwrap()));
        let stderr = follow(Box::new(child.stderr.take().unwrap()));
        Self {
            child,
            stdout,
            stderr,
            threads,
        }
    }

    /// Writes the whole input and closes it.
    pub(crate) fn feed(&mut self, input: Vec<u8>) {
        let mut stdin = self.child.stdin.take().unwrap();
        self.threads.push(thread::spawn(move || {
            // The command need not read it.
            let _ = stdin.write_all(&input);
        }));
    }

    pub(crate) fn wait_for(&self, text: &str) {
        let end = Instant::now() + LIMIT;
        while !String::from_utf8_lossy(&self.stdout.lock().unwrap()).contains(text) {
            let stderr = String::from_utf8_lossy(&self.stderr.lock().unwrap()).into_owned();
            assert!(Instant::now() < end && stderr.is_empty(), "{stderr}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn wait(mut self) -> Ended {
        let end = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "the run does not end");
            thread::sleep(Duration::from_millis(5));
        };
        drop(self.child.stdin.take());
        for thread in std::mem::take(&mut self.threads) {
            thread.join().unwrap();
        }
        let stderr = String::from_utf8_lossy(&self.stderr.lock().unwrap()).into_owned();
        Ended {
            code: status.code().unwrap_or(-status.signal().unwrap_or(0)),
            stdout: self.stdout.lock().unwrap().clone(),
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes that do not repeat in any simple way.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

pub(crate) fn host_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap()
        .trim()
        .to_owned()
}
