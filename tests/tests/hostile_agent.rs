//! A guest that lies to `pericarp run`: every deed ends in one clear line or in
//! the user's own signal, in bounded time and in bounded memory.
//!
//! The agent is `pericarp-hostile-agent`, which takes the place of the vsock
//! device; the machine behind it is a program that only sleeps.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pericarp_tests::parts::{Part, beside_us, have};
use pericarp_tests::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};

const PARTS: [Part; 4] = [
    Part::Ours("pericarp"),
    Part::PERICARP_BLOCK,
    Part::Ours("pericarp-hostile-agent"),
    Part::MkfsExt4,
];
const LIMIT: Duration = Duration::from_secs(60);
/// Nothing a guest does may take more than this from its host.
const MEMORY_KIB: u64 = 40 * 1024;

/// A machine that is set up well and then does nothing: it answers whatever
/// its control connection says, and ends with it.
const MACHINE: &str = r#"#!/bin/bash
for argument in "$@"; do
    case $argument in *id=control,*fd=*) fd=${argument##*fd=} ;; esac
done
while read -r line <&"$fd"; do
    number=${line##*'"id":'}
    echo "{\"return\": {}, \"id\": ${number%%[,\}]*}}" >&"$fd"
done
"#;

struct Rig {
    scratch: Scratch,
}

impl Rig {
    fn new(test: &str) -> Option<Self> {
        if !have(test, &PARTS) {
            return None;
        }
        let rig = Self {
            scratch: Scratch::new(),
        };
        let bin = rig.scratch.path("bin");
        fs::create_dir(&bin).unwrap();
        for (from, to) in [
            ("pericarp", "pericarp"),
            ("pericarp-block", "pericarp-block"),
            ("pericarp-hostile-agent", "pericarp-vsock"),
        ] {
            let (from, to) = (beside_us().join(from), bin.join(to));
            // A second name is as good as a copy where there can be one.
            if fs::hard_link(&from, &to).is_err() {
                fs::copy(from, to).unwrap();
            }
        }
        let qemu = bin.join("qemu-system-x86_64");
        fs::write(&qemu, MACHINE).unwrap();
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
        let assets = rig.scratch.path("assets");
        for file in [
            "kernel/modules/order",
            "kernel/vmlinuz",
            "pericarp-agent",
            "guest/bin/crun",
        ] {
            let path = assets.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = match file {
                "kernel/modules/order" => "",
                // As much of a kernel as is looked at.
                "kernel/vmlinuz" => "\x7fELF",
                _ => "x",
            };
            fs::write(path, text).unwrap();
        }
        let image = rig.scratch.sparse("root.img", 4 << 20);
        let made = Command::new(Part::MkfsExt4.find().unwrap())
            .args(["-q", "-F"])
            .arg(image)
            .status()
            .unwrap();
        assert!(made.success());
        Some(rig)
    }

    fn start(&self, deed: &str, more: &[&str]) -> Child {
        let bin = self.scratch.path("bin");
        let path = format!(
            "{}:{}",
            bin.display(),
            std::env::var("PATH").unwrap_or_default()
        );
        Command::new(bin.join("pericarp"))
            .arg("run")
            .arg("--rootfs-image")
            .arg(self.scratch.path("root.img"))
            .args(more)
            .args(["--", "true"])
            .env("PATH", path)
            .env("PERICARP_HOSTILE", deed)
            .env("PERICARP_ASSETS", self.scratch.path("assets"))
            .env("XDG_RUNTIME_DIR", self.scratch.dir())
            .env("TMPDIR", self.scratch.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Exit code and error output of a run that ends by itself.
    fn run(&self, deed: &str, more: &[&str]) -> (i32, String) {
        let mut child = self.start(deed, more);
        let code = wait(&mut child);
        let mut text = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        self.assert_clean();
        (code, text)
    }

    fn assert_clean(&self) {
        let base = self
            .scratch
            .path(&format!("pericarp-{}", rustix::process::geteuid().as_raw()));
        let left: Vec<_> = fs::read_dir(base).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Waits for the end, and looks at the memory on the way.
fn wait(child: &mut Child) -> i32 {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        assert_memory(child);
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the run does not end");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The most the process has ever had resident.
fn assert_memory(child: &Child) {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok());
    if let Some(kib) = peak {
        assert!(kib < MEMORY_KIB, "{kib} KiB");
    }
}

#[test]
fn each_lie_is_one_clear_line() {
    let Some(rig) = Rig::new("each_lie_is_one_clear_line") else {
        return;
    };
    let version = format!(
        "pericarp: the guest could not be set up: the agent speaks version 77 of the protocol \
         instead of {}; `cargo xtask setup` makes the guest's files anew\n",
        pericarp_api::VERSION
    );
    for (deed, message) in [
        ("version", version.as_str()),
        (
            "garbage",
            "pericarp: the guest is not to be trusted any more: it sent no greeting of an agent\n",
        ),
        (
            "half",
            "pericarp: the guest is not to be trusted any more: it sent half a greeting\n",
        ),
        (
            "handshake",
            "pericarp: the guest could not be set up: the guest's answer is not part of the \
             protocol\n",
        ),
        (
            "report",
            "pericarp: the guest is not to be trusted any more: it sent an exit report that is \
             none\n",
        ),
    ] {
        let (code, text) = rig.run(deed, &[]);
        assert_eq!(code, 125, "{deed}: {text}");
        assert_eq!(text, message, "{deed}");
    }
}

#[test]
fn what_the_guest_says_is_cut_to_one_line() {
    let Some(rig) = Rig::new("what_the_guest_says_is_cut_to_one_line") else {
        return;
    };
    let (code, text) = rig.run("error", &[]);
    assert_eq!(code, 125);
    assert!(
        text.starts_with("pericarp: the guest could not be set up: \u{fffd}[2Jno\u{fffd}way yyy"),
        "{text}"
    );
    assert!(text.len() < 1000 && text.lines().count() == 1, "{text}");
    let (code, text) = rig.run("words", &[]);
    assert_eq!(code, 125);
    assert!(
        text.starts_with("pericarp: the guest agent is gone: the end\u{fffd}]0;title"),
        "{text}"
    );
    assert!(text.len() < 2000 && text.lines().count() == 1, "{text}");
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let Some(rig) = Rig::new("a_guest_that_does_not_answer_is_given_up") else {
        return;
    };
    // An answer of 4 GiB is thrown away as it comes, and then named.
    let (code, text) = rig.run("huge", &[]);
    assert_eq!((code, text.lines().count()), (125, 1), "{text}");
    assert!(text.contains("exceed maximum message size"), "{text}");
    for deed in ["silent", "mute", "flood"] {
        let (code, text) = rig.run(deed, &["--boot-timeout", "2"]);
        assert_eq!(code, 125, "{deed}: {text}");
        assert!(
            text.starts_with("pericarp: the virtual machine did not start its command within 2 s"),
            "{deed}: {text}"
        );
    }
}

#[test]
fn an_end_without_an_end_is_an_end() {
    let Some(rig) = Rig::new("an_end_without_an_end_is_an_end") else {
        return;
    };
    // Its outputs stay open after the exit report, and the machine stays on.
    let (code, text) = rig.run("open", &[]);
    assert_eq!((code, text.lines().count()), (5, 1), "{text}");
    assert!(text.contains("did not switch itself off"), "{text}");
    // It never says whether the disks were written back: that is no success.
    let (code, text) = rig.run("no-power-off", &[]);
    assert_eq!(code, 125, "{text}");
    assert!(text.contains("did not write its disks back"), "{text}");
    for deed in ["half-report", "vanish"] {
        let (code, text) = rig.run(deed, &[]);
        assert_eq!((code, text.lines().count()), (125, 1), "{deed}: {text}");
    }
}

#[test]
fn floods_and_deaf_ears_cost_no_memory() {
    let Some(rig) = Rig::new("floods_and_deaf_ears_cost_no_memory") else {
        return;
    };
    // Output without end, read slowly.
    let mut child = rig.start("endless", &[]);
    let mut output = child.stdout.take().unwrap();
    let mut seen = 0;
    let end = Instant::now() + Duration::from_secs(3);
    let mut buffer = vec![0; 64 * 1024];
    while Instant::now() < end {
        seen += output.read(&mut buffer).unwrap();
        assert_memory(&child);
    }
    assert!(seen > 1 << 20, "{seen}");
    // Then not at all, and the user has enough.
    end_by_signals(&mut child);
    rig.assert_clean();

    // Input that is never read.
    let mut child = rig.start("deaf", &[]);
    let mut input = child.stdin.take().unwrap();
    let feeding = thread::spawn(move || {
        let piece = vec![b'x'; 1 << 20];
        // Ends when the run does.
        while input.write_all(&piece).is_ok() {}
    });
    thread::sleep(Duration::from_secs(2));
    assert_memory(&child);
    end_by_signals(&mut child);
    feeding.join().unwrap();
    rig.assert_clean();
}

/// The third signal ends a run whatever the guest does.
fn end_by_signals(child: &mut Child) {
    for _ in 0..3 {
        kill_process(Pid::from_child(child), Signal::TERM).unwrap();
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(wait(child), 128 + 15);
}
