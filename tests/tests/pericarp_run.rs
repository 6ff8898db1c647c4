//! `pericarp run` from the outside: what the user gives it, what comes back,
//! and that nothing stays behind, however a run ends.
//!
//! Every machine boots a stock kernel, which takes seconds where the CPU is
//! emulated, so one boot serves several checks. All runs of a test keep their
//! files below its scratch directory, which is how leftovers are found.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pericarp_tests::parts::{Part, beside_us, have, skip};
use pericarp_tests::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};

const MIB: u64 = 1 << 20;
/// Longer than any run here takes on a slow machine.
const LIMIT: Duration = Duration::from_secs(120);
const PERICARP: Part = Part::Ours("pericarp");
const VM: [Part; 5] = [
    PERICARP,
    Part::PERICARP_BLOCK,
    Part::QemuSystem,
    Part::MkfsExt4,
    Part::Busybox,
];
const RUNC: [Part; 4] = [PERICARP, Part::Runc, Part::MkfsExt4, Part::Busybox];

/// A root file system, and a place of its own for what the runs create.
struct Rig {
    scratch: Scratch,
}

impl Rig {
    /// None when a part is missing, which was said then.
    fn new(test: &str, parts: &[Part]) -> Option<Self> {
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
        rig.make_root();
        Some(rig)
    }

    /// A tree with busybox, and an image of it.
    fn make_root(&self) {
        let tree = self.tree();
        for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
            fs::create_dir_all(tree.join(dir)).unwrap();
        }
        let busybox = Part::Busybox.find().unwrap();
        fs::copy(&busybox, tree.join("bin/busybox")).unwrap();
        for tool in [
            "cat", "dd", "echo", "grep", "head", "hostname", "id", "ls", "md5sum", "mount",
            "nproc", "ping", "printf", "ps", "readlink", "sh", "sleep", "sync", "tail", "touch",
            "true", "uname", "wc", "yes",
        ] {
            std::os::unix::fs::symlink("busybox", tree.join("bin").join(tool)).unwrap();
        }
        fs::write(tree.join("etc/not-executable"), "text").unwrap();
        let image = self.scratch.sparse("root.img", 32 * MIB);
        let made = Command::new(Part::MkfsExt4.find().unwrap())
            .args(["-q", "-F", "-d"])
            .args([&tree, &image])
            .status()
            .unwrap();
        assert!(made.success());
    }

    fn tree(&self) -> PathBuf {
        self.scratch.path("tree")
    }

    fn image(&self) -> String {
        self.scratch.path("root.img").display().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PERICARP.find().unwrap());
        command
            .arg("run")
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.scratch.dir())
            .env("TMPDIR", self.scratch.dir())
            .env("PERICARP_ASSETS", assets());
        command
    }

    /// Runs to the end.
    fn run(&self, arguments: &[&str], input: &[u8]) -> Ended {
        let mut running = Running::start(self.command(arguments));
        running.feed(input.to_vec());
        running.wait()
    }

    /// Starts a run and waits until its command has said `ready`.
    fn start_ready(&self, arguments: &[&str]) -> Running {
        let running = Running::start(self.command(arguments));
        running.wait_for("ready");
        running
    }

    /// Process ids of `program` started for this rig's runs.
    fn processes(&self, program: &str) -> Vec<Pid> {
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

    fn kill(&self, program: &str) {
        let pids = self.processes(program);
        assert_eq!(pids.len(), 1, "{program}: {pids:?}");
        kill_process(pids[0], Signal::KILL).unwrap();
    }

    /// What the runs' own directory still holds.
    fn left_files(&self) -> Vec<PathBuf> {
        let uid = rustix::process::geteuid().as_raw();
        let base = self.scratch.path(&format!("pericarp-{uid}"));
        let entries = fs::read_dir(base).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Loop devices on this rig's files, and mounts below its directory.
    fn left_mounts(&self) -> Vec<String> {
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
    fn assert_clean(&self) {
        assert_eq!(self.left_files(), Vec::<PathBuf>::new());
        self.assert_no_process_or_mount();
    }

    fn assert_no_process_or_mount(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let processes = self.processes("");
            let mounts = self.left_mounts();
            if processes.is_empty() && mounts.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left: {processes:?} {mounts:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn assets() -> PathBuf {
    match std::env::var_os("PERICARP_ASSETS") {
        Some(path) => path.into(),
        None => beside_us().join("../assets"),
    }
}

/// A run that has not ended.
struct Running {
    child: Child,
    stdout: Arc<Mutex<Vec<u8>>>,
    stderr: Arc<Mutex<Vec<u8>>>,
    threads: Vec<JoinHandle<()>>,
}

/// A run that has.
struct Ended {
    code: i32,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ended {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The lines of the form `key=value`.
    fn values(&self) -> HashMap<String, String> {
        self.text()
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }
}

impl Running {
    fn start(mut command: Command) -> Self {
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
    fn feed(&mut self, input: Vec<u8>) {
        let mut stdin = self.child.stdin.take().unwrap();
        self.threads.push(thread::spawn(move || {
            // The command need not read it.
            let _ = stdin.write_all(&input);
        }));
    }

    fn wait_for(&self, text: &str) {
        let end = Instant::now() + LIMIT;
        while !String::from_utf8_lossy(&self.stdout.lock().unwrap()).contains(text) {
            let stderr = String::from_utf8_lossy(&self.stderr.lock().unwrap()).into_owned();
            assert!(Instant::now() < end && stderr.is_empty(), "{stderr}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn wait(mut self) -> Ended {
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
fn noise(len: usize) -> Vec<u8> {
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

fn host_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn a_command_sees_its_machine_and_is_heard() {
    let Some(rig) = Rig::new("a_command_sees_its_machine_and_is_heard", &VM) else {
        return;
    };
    let writable = rig.scratch.sparse("writable.img", 4 * MIB);
    let protected = rig.scratch.file("a,b.img", &vec![b'p'; MIB as usize]);
    let script = r"
        echo release=$(uname -r)
        echo cpus=$(nproc)
        echo memory=$(grep MemTotal /proc/meminfo)
        echo cpu.max=$(cat /sys/fs/cgroup/pericarp/cpu.max)
        echo memory.max=$(cat /sys/fs/cgroup/pericarp/memory.max)
        echo hostname=$(hostname)
        echo home=$HOME
        echo loopback=$(ping -c 1 -W 5 127.0.0.1 >/dev/null && echo up)
        echo root=$(touch /x 2>/dev/null && echo writable || echo read-only)
        echo written > /dev/pericarp/disk1 && echo disk1=written
        echo written > /dev/pericarp/disk2 2>/dev/null && sync && echo disk2=written
        echo disk2.content=$(head -c 3 /dev/pericarp/disk2)
        echo to the error output >&2
        exit 7";
    let run = rig.run(
        &[
            "--rootfs-image",
            &format!("{}:ro", rig.image()),
            "--cpus",
            "0.5",
            "--memory",
            "64M",
            "--disk",
            writable.to_str().unwrap(),
            "--disk",
            &format!("{}:ro", protected.display()),
            "--",
            "sh",
            "-c",
            script,
        ],
        b"",
    );
    assert_eq!(run.code, 7, "{}", run.stderr);
    assert_eq!(run.stderr, "to the error output\n");
    let seen = run.values();
    let is = |key: &str, value: &str| assert_eq!(seen.get(key).unwrap(), value, "{key}");
    assert_ne!(seen["release"], host_release());
    is("cpus", "2");
    // 2 GiB + 64 MiB, less what the kernel keeps for itself.
    let kib: u64 = seen["memory"]
        .chars()
        .filter(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .unwrap();
    assert!((1_900_000..2_162_689).contains(&kib), "{kib}");
    is("cpu.max", "50000 100000");
    is("memory.max", &(64 * MIB).to_string());
    is("hostname", "pericarp");
    is("home", "/root");
    is("loopback", "up");
    is("root", "read-only");
    is("disk1", "written");
    assert!(!seen.contains_key("disk2"));
    is("disk2.content", "ppp");
    assert!(fs::read(&writable).unwrap().starts_with(b"written\n"));
    assert_eq!(fs::read(&protected).unwrap(), vec![b'p'; MIB as usize]);
    rig.assert_clean();
}

#[test]
fn streams_are_exact_in_both_directions() {
    let Some(rig) = Rig::new("streams_are_exact_in_both_directions", &VM) else {
        return;
    };
    // Several windows of flow control, and every byte value.
    let input = noise(3 * MIB as usize);
    let root = format!("{}:ro", rig.image());
    // Error output while standard output is busy, and more of it than a pipe holds.
    let script = "yes error | head -c 300000 >&2 & cat; wait; exit 0";
    let run = rig.run(&["--rootfs-image", &root, "--", "sh", "-c", script], &input);
    assert_eq!(run.code, 0, "{}", &run.stderr[..run.stderr.len().min(2000)]);
    assert!(run.stdout == input, "{} bytes came back", run.stdout.len());
    assert_eq!(run.stderr.len(), 300_000);
    assert!(run.stderr.starts_with("error\nerror\n"));
    rig.assert_clean();
}

#[test]
fn signals_are_passed_on_and_images_are_locked() {
    let Some(rig) = Rig::new("signals_are_passed_on_and_images_are_locked", &VM) else {
        return;
    };
    let script = "trap 'echo caught; kill -9 $$' TERM; echo ready; while :; do sleep 0.1; done";
    let running = rig.start_ready(&["--rootfs-image", &rig.image(), "--", "sh", "-c", script]);

    let second = rig.run(&["--rootfs-image", &rig.image(), "--", "true"], b"");
    assert_eq!(second.code, 2);
    assert_eq!(
        second.stderr,
        format!(
            "pericarp run: --rootfs-image '{}': is in use by another run; wait for that run to \
             end; runs may share an image only if all use ':ro'\n",
            rig.image()
        )
    );

    running.signal(Signal::TERM);
    let run = running.wait();
    assert_eq!(run.code, 128 + 9, "{}", run.stderr);
    assert_eq!(run.text(), "ready\ncaught\n");
    assert_eq!(run.stderr, "");
    rig.assert_clean();
}

#[test]
fn a_directory_is_a_root_and_memory_has_its_limit() {
    let Some(rig) = Rig::new("a_directory_is_a_root_and_memory_has_its_limit", &VM) else {
        return;
    };
    let tree = rig.tree();
    // The second half needs more memory than it may have.
    let script = "echo new > /new && cat /new; exec tail /dev/zero";
    let arguments = ["--rootfs", tree.to_str().unwrap(), "--memory", "32M", "--"];
    let run = rig.run(&[&arguments[..], &["sh", "-c", script]].concat(), b"");
    assert_eq!(run.code, 128 + 9, "{}", run.stderr);
    assert_eq!(run.text(), "new\n");
    assert_eq!(
        run.stderr,
        "pericarp: the command was killed: it used more memory than its --memory limit\n"
    );
    assert!(!tree.join("new").exists(), "changes are discarded");
    rig.assert_clean();
}

#[test]
fn a_missing_program_is_127() {
    let Some(rig) = Rig::new("a_missing_program_is_127", &VM) else {
        return;
    };
    let run = rig.run(&["--rootfs-image", &rig.image(), "--", "nope"], b"");
    assert_eq!(run.code, 127);
    assert_eq!(
        run.stderr,
        "pericarp: 'nope': no such program in the root file system\n"
    );
    rig.assert_clean();
}

#[test]
fn a_killed_machine_is_one_error() {
    let Some(rig) = Rig::new("a_killed_machine_is_one_error", &VM) else {
        return;
    };
    let running = rig.start_ready(&[
        "--rootfs-image",
        &rig.image(),
        "--",
        "sh",
        "-c",
        "echo ready; sleep 100",
    ]);
    rig.kill("qemu");
    let run = running.wait();
    assert_eq!(run.code, 125);
    let mut lines = run.stderr.lines();
    assert_eq!(
        lines.next().unwrap(),
        "pericarp: the virtual machine died (qemu-system-x86_64: killed by signal 9)"
    );
    assert!(lines.all(|line| line.starts_with("  ")), "{}", run.stderr);
    rig.assert_clean();
}

#[test]
fn a_killed_backend_is_one_error() {
    let Some(rig) = Rig::new("a_killed_backend_is_one_error", &VM) else {
        return;
    };
    let running = rig.start_ready(&[
        "--rootfs-image",
        &rig.image(),
        "--",
        "sh",
        "-c",
        "echo ready; sleep 100",
    ]);
    rig.kill("pericarp-block");
    let run = running.wait();
    assert_eq!(run.code, 125);
    let first = run.stderr.lines().next().unwrap();
    assert!(
        first.starts_with("pericarp: the block backend died (pericarp-block: killed by signal 9"),
        "{}",
        run.stderr
    );
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    rig.assert_clean();
}

#[test]
fn a_panic_is_one_error_with_the_consoles_last_lines() {
    let name = "a_panic_is_one_error_with_the_consoles_last_lines";
    let Some(rig) = Rig::new(name, &VM) else {
        return;
    };
    let log = rig.scratch.path("console.log");
    let run = rig.run(
        &[
            "--rootfs-image",
            &rig.image(),
            "--console-log",
            log.to_str().unwrap(),
            "--",
            "sh",
            "-c",
            "echo c > /proc/sysrq-trigger; sleep 100",
        ],
        b"",
    );
    assert_eq!(run.code, 125);
    assert!(
        run.stderr.starts_with(
            "pericarp: the virtual machine's kernel panicked (\"Kernel panic - not syncing: \
             sysrq triggered crash\")\n"
        ),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("\n  console: "), "{}", run.stderr);
    assert!(
        fs::read_to_string(&log)
            .unwrap()
            .contains("sysrq triggered crash")
    );
    rig.assert_clean();
}

#[test]
fn a_boot_that_takes_too_long_is_one_error() {
    let Some(rig) = Rig::new("a_boot_that_takes_too_long_is_one_error", &VM) else {
        return;
    };
    let run = rig.run(
        &[
            "--rootfs-image",
            &rig.image(),
            "--boot-timeout",
            "0.3",
            "--",
            "true",
        ],
        b"",
    );
    assert_eq!(run.code, 125);
    assert!(
        run.stderr
            .starts_with("pericarp: the virtual machine did not start its command within 0.3 s\n"),
        "{}",
        run.stderr
    );
    rig.assert_clean();
    // A signal before the command runs ends the run.
    let running = Running::start(rig.command(&["--rootfs-image", &rig.image(), "--", "true"]));
    let end = Instant::now() + LIMIT;
    while rig.processes("qemu").is_empty() && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    running.signal(Signal::INT);
    let run = running.wait();
    assert_eq!(run.code, 130, "{}", run.stderr);
    assert_eq!(run.stderr, "pericarp: ended by signal 2\n");
    rig.assert_clean();
}

#[test]
fn not_even_sigkill_leaves_a_process() {
    let Some(rig) = Rig::new("not_even_sigkill_leaves_a_process", &VM) else {
        return;
    };
    let running = Running::start(rig.command(&["--rootfs-image", &rig.image(), "--", "true"]));
    let end = Instant::now() + LIMIT;
    while rig.processes("qemu").is_empty() && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    running.signal(Signal::KILL);
    assert_eq!(running.wait().code, -9);
    rig.assert_no_process_or_mount();
    assert_eq!(rig.left_files().len(), 1, "the directory alone may stay");
    // Any later run removes it; this one gives up early.
    let run = rig.run(
        &[
            "--rootfs-image",
            &rig.image(),
            "--boot-timeout",
            "0.1",
            "--",
            "true",
        ],
        b"",
    );
    assert_eq!(run.code, 125);
    rig.assert_clean();
}

#[test]
fn the_same_commands_run_in_a_container() {
    let Some(rig) = Rig::new("the_same_commands_run_in_a_container", &RUNC) else {
        return;
    };
    let runc = |root: &[&str], command: &[&str], input: &[u8]| {
        let line = [&["--runtime", "runc"], root, &["--"], command].concat();
        let run = rig.run(&line, input);
        rig.assert_clean();
        run
    };
    let image = rig.image();
    let image = ["--rootfs-image", image.as_str()];
    let script = "uname -r; cat; echo to the error output >&2; exit 7";
    let run = runc(&image, &["sh", "-c", script], b"input\n");
    assert_eq!(run.code, 7, "{}", run.stderr);
    assert_eq!(run.text(), format!("{}\ninput\n", host_release()));
    assert_eq!(run.stderr, "to the error output\n");

    assert_eq!(
        runc(&image, &["sh", "-c", "kill -9 $$; sleep 1"], b"").code,
        0
    );
    assert_eq!(
        runc(&image, &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], b"").code,
        137
    );
    assert_eq!(runc(&image, &["nope"], b"").code, 127);
    assert_eq!(runc(&image, &["/etc/not-executable"], b"").code, 126);

    let read_only = format!("{}:ro", rig.image());
    let run = runc(
        &["--rootfs-image", &read_only],
        &["touch", "true", "/x"],
        b"",
    );
    assert_eq!(run.code, 1);

    let tree = rig.tree();
    let directory = ["--rootfs", tree.to_str().unwrap()];
    let run = runc(&directory, &["sh", "-c", "echo new > /new; cat /new"], b"");
    assert_eq!(
        (run.code, run.text().as_str()),
        (0, "new\n"),
        "{}",
        run.stderr
    );
    assert!(!tree.join("new").exists(), "changes are discarded");

    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let line = [
        "--runtime",
        "runc",
        image[0],
        image[1],
        "--",
        "sh",
        "-c",
        script,
    ];
    let running = rig.start_ready(&line);
    running.signal(Signal::TERM);
    assert_eq!(running.wait().code, 9);
    rig.assert_clean();

    let running = rig.start_ready(&line);
    running.signal(Signal::KILL);
    assert_eq!(running.wait().code, -9);
    rig.assert_no_process_or_mount();
    // The next run removes what that one left.
    assert_eq!(runc(&image, &["true"], b"").code, 0);
}

#[test]
fn bad_input_is_refused_with_one_line_each() {
    let name = "bad_input_is_refused_with_one_line_each";
    let Some(rig) = Rig::new(name, &[PERICARP, Part::MkfsExt4, Part::Busybox]) else {
        return;
    };
    let image = rig.image();
    let file = |name: &str, bytes: &[u8]| rig.scratch.file(name, bytes).display().to_string();
    let (empty, odd) = (file("empty", b""), file("odd", &[0; 700]));
    let tree = rig.tree().display().to_string();
    let missing = rig.scratch.path("missing").display().to_string();
    let hollow = rig.scratch.path("hollow").display().to_string();
    fs::create_dir(&hollow).unwrap();
    let disk = ["--rootfs-image", image.as_str()];
    let with = |more: &[&str]| -> Vec<String> {
        let line = [&disk[..], more, &["--", "true"]].concat();
        line.into_iter().map(str::to_owned).collect()
    };
    let root = |option: &str, value: &str| -> Vec<String> {
        [option, value, "--", "true"].map(str::to_owned).to_vec()
    };
    let cases: Vec<(Vec<String>, String)> = vec![
        (
            root("--rootfs-image", &missing),
            format!("--rootfs-image '{missing}': no such file; check the path"),
        ),
        (
            root("--rootfs-image", &tree),
            format!(
                "--rootfs-image '{tree}': is a directory; name an image file, or use '--rootfs' \
                 for a directory"
            ),
        ),
        (
            root("--rootfs-image", &empty),
            format!("--rootfs-image '{empty}': is empty; make a file system in it, with mkfs.ext4"),
        ),
        (
            root("--rootfs-image", &odd),
            format!(
                "--rootfs-image '{odd}': its size of 700 bytes is not a multiple of 512; round it \
                 up with `truncate --size %512`"
            ),
        ),
        (
            root("--rootfs", &hollow),
            format!("--rootfs '{hollow}': is empty; name a directory with a root file system"),
        ),
        (
            root("--rootfs", &missing),
            format!("--rootfs '{missing}': no such directory; check the path"),
        ),
        (
            root("--rootfs", &odd),
            format!(
                "--rootfs '{odd}': is a file of 700 bytes, not a directory; use '--rootfs-image' \
                 for a disk image"
            ),
        ),
        (
            with(&["--cpus", "0"]),
            "--cpus '0': is less than 0.01 CPUs".into(),
        ),
        (
            with(&["--cpus", "-1"]),
            "--cpus '-1': is less than 0.01 CPUs".into(),
        ),
        (
            with(&["--cpus", "nan"]),
            "--cpus 'nan': is not a number".into(),
        ),
        (
            with(&["--cpus", "1e9"]),
            "--cpus '1e9': is not a number".into(),
        ),
        (
            with(&["--cpus", "100000"]),
            "--cpus '100000': is more than the".into(),
        ),
        (
            with(&["--memory", "1M"]),
            "--memory '1M': is less than 8 MiB, which a command needs at least; write a number \
             and a unit, such as 512M or 1.5G"
                .into(),
        ),
        (
            with(&["--memory", "512Q"]),
            "--memory '512Q': has the unknown unit 'Q'".into(),
        ),
        (
            with(&["--memory", "500T"]),
            "--memory '500T': the machine would have 2 GiB + 512000 GiB, and this host has".into(),
        ),
        (
            with(&["--memory", "1G", "--memory", "2G"]),
            "--memory '2G': is given twice; leave one out".into(),
        ),
        (
            with(&["--runtime", "docker"]),
            "--runtime 'docker': no such runtime; use vm or runc".into(),
        ),
        (
            with(&["--memroy", "1G"]),
            "'--memroy': unknown option; did you mean '--memory'?".into(),
        ),
        (
            with(&["--disk", &image]),
            format!(
                "--disk '{image}': is used twice in this run; leave one out, or use ':ro' for both"
            ),
        ),
        (
            with(&["--boot-timeout", "0"]),
            "--boot-timeout '0': is out of range; write seconds from 0.1 to 3600".into(),
        ),
        (
            with(&["--assets", &missing]),
            format!(
                "--assets '{missing}': no such directory; the guest's files are not there; run \
                 `cargo xtask setup`, which makes them"
            ),
        ),
        (
            disk.map(str::to_owned).to_vec(),
            "COMMAND: there is no command to run; put it after '--'".into(),
        ),
    ];
    assert!(cases.len() >= 15);
    for (line, message) in cases {
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let run = rig.run(&line, b"");
        assert_eq!(run.code, 2, "{line:?}: {}", run.stderr);
        assert_eq!(run.text(), "", "{line:?}");
        // Where the guest's files are missing too, that is a second line.
        let said: Vec<&str> = run
            .stderr
            .lines()
            .filter(|text| !text.contains("PERICARP_ASSETS"))
            .collect();
        assert_eq!(said.len(), 1, "{line:?}: {}", run.stderr);
        let start = format!("pericarp run: {message}");
        assert!(said[0].starts_with(&start), "{line:?}: {}", said[0]);
        assert_eq!(rig.left_files(), Vec::<PathBuf>::new(), "{line:?}");
    }
}
