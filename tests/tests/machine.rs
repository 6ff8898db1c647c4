//! A machine's life and the ways it can fail, each brought about with a real
//! QEMU: what is missing, what is refused, what the guest does, what is done to
//! it. `pericarp-hypervisor` must have one error for each that names the cause.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pericarp_hypervisor::qemu::Qemu;
use pericarp_hypervisor::select::Accelerator;
use pericarp_hypervisor::{ConsoleSpec, DiskSpec, Hypervisor, Machine, MachineError, MachineSpec};
use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::guest::{Assets, initramfs};
use pericarp_tests::parts::{Part, have, skip};
use pericarp_tests::scratch::Scratch;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit};

/// No guest here does more than boot.
const LIMIT: Duration = Duration::from_secs(120);
const INSIDE: &str = "PERICARP_TEST_INSIDE";

struct Rig {
    scratch: Scratch,
    spec: MachineSpec,
    _alone: Alone,
}

/// A machine without devices whose first process runs `script`, or a skipped test.
fn rig(test: &str, script: &str) -> Option<Rig> {
    let assets = Assets::for_test(test, &[])?;
    let alone = Alone::turn();
    let scratch = Scratch::new();
    let initramfs = initramfs(&scratch, &assets, &[], script).unwrap();
    let spec = spec(assets.kernel(), initramfs);
    Some(Rig {
        scratch,
        spec,
        _alone: alone,
    })
}

fn spec(kernel: PathBuf, initramfs: PathBuf) -> MachineSpec {
    MachineSpec {
        kernel,
        initramfs,
        cmdline: "quiet panic=-1".into(),
        cpus: 1,
        memory: 256 << 20,
        disks: vec![],
        shares: Vec::new(),
        cards: Vec::new(),
        vsock: None,
        spare_slots: 0,
        console: ConsoleSpec::default(),
    }
}

impl Rig {
    fn disk(&mut self, socket: PathBuf) {
        self.spec.disks = vec![DiskSpec {
            id: "root".into(),
            socket,
            num_queues: 1,
            queue_size: 128,
        }];
    }

    /// Starts it with an emulated CPU, which every host has.
    fn start(&self) -> Machine {
        Qemu::new(Accelerator::Tcg).start(&self.spec).unwrap()
    }

    /// The error with which it does not start.
    fn refusal(&self) -> MachineError {
        let limit = Duration::from_secs(3);
        let qemu = Qemu::new(Accelerator::Tcg).with_set_up_limit(limit);
        qemu.start(&self.spec).unwrap_err()
    }
}

/// True in a copy of this test that runs under `wrapper`. Elsewhere that copy is
/// run first and must succeed.
fn inside(test: &str, wrapper: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new(wrapper[0])
        .args(&wrapper[1..])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{wrapper:?}: {text}");
    false
}

/// Waits until the guest has printed `word`.
fn printed(machine: &mut Machine, word: &str) {
    let seen = poll(LIMIT, || {
        let lines = machine.console_lines(50);
        let there = lines.iter().any(|line| line.contains(word));
        (there || machine.has_ended()).then_some(there)
    });
    assert_eq!(
        seen,
        Some(true),
        "{word}: {}",
        machine.console_lines(50).join("\n")
    );
}

fn ended(machine: &mut Machine) {
    let ended = poll(LIMIT, || machine.has_ended().then_some(()));
    assert!(ended.is_some(), "{}", machine.console_lines(50).join("\n"));
}

#[test]
fn what_the_guest_boots_from_must_be_readable() {
    let Some(mut rig) = rig("what_the_guest_boots_from_must_be_readable", "true") else {
        return;
    };
    let good = rig.spec.clone();
    rig.spec.initramfs = rig.scratch.path("nonesuch");
    let error = rig.refusal();
    assert!(matches!(&error, MachineError::File { what, .. } if *what == "initramfs"));
    let text = error.to_string();
    assert!(
        text.contains("nonesuch") && text.contains("No such file"),
        "{text}"
    );
    rig.spec = MachineSpec {
        kernel: rig.scratch.dir().to_owned(),
        ..good.clone()
    };
    let text = rig.refusal().to_string();
    assert!(
        text.contains("kernel") && text.contains("no regular file"),
        "{text}"
    );
    let kernel = rig.scratch.path("kernel");
    std::fs::write(&kernel, "no kernel").unwrap();
    rig.spec = MachineSpec { kernel, ..good };
    let error = rig.refusal();
    assert!(matches!(error, MachineError::Kernel { .. }), "{error}");
    assert!(error.to_string().contains("no Linux kernel"), "{error}");
}

#[test]
fn a_backend_that_is_no_use_is_named_with_the_reason() {
    let Some(mut rig) = rig("a_backend_that_is_no_use_is_named_with_the_reason", "true") else {
        return;
    };
    let socket = rig.scratch.path("front,end.sock");
    rig.disk(socket.clone());
    let reason = |error: &MachineError| match error {
        MachineError::Backend { device, reason, .. } if device == "root" => reason.clone(),
        other => panic!("{other}"),
    };
    assert!(reason(&rig.refusal()).contains("No such file"));
    // A file, and a socket nobody listens on any more.
    std::fs::write(&socket, "x").unwrap();
    assert!(reason(&rig.refusal()).contains("Connection refused"));
    std::fs::remove_file(&socket).unwrap();
    drop(UnixListener::bind(&socket).unwrap());
    assert!(reason(&rig.refusal()).contains("Connection refused"));
    std::fs::remove_file(&socket).unwrap();
    // One that hangs up, one that talks nonsense: QEMU's words.
    let listener = UnixListener::bind(&socket).unwrap();
    for nonsense in [&b""[..], &[b'x'; 100]] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.write_all(nonsense);
            });
            let reason = reason(&rig.refusal());
            assert!(reason.contains("vhost"), "{reason}");
        });
    }
    // One that says nothing.
    let error = rig.refusal();
    assert!(matches!(error, MachineError::SetUpTimeout(_)), "{error}");
    // One whose backlog is full: nobody waits for it.
    let address = SocketAddrUnix::new(&socket).unwrap();
    let mut waiting = Vec::new();
    while let Some(one) = connect_at_once(&address) {
        waiting.push(one);
    }
    let reason = reason(&rig.refusal());
    assert!(reason.contains("busy"), "{reason}");
}

fn connect_at_once(address: &SocketAddrUnix) -> Option<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    connect(&fd, address).ok().map(|()| fd)
}

#[test]
fn what_qemu_refuses_is_told_in_its_words() {
    let Some(mut rig) = rig("what_qemu_refuses_is_told_in_its_words", "true") else {
        return;
    };
    // More than a bus has.
    rig.spec.spare_slots = 40;
    let error = rig.refusal();
    assert!(matches!(error, MachineError::SetUp { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("exit code 1") && text.contains("no slot"),
        "{text}"
    );
}

#[test]
fn qemu_may_be_missing() {
    if !inside("qemu_may_be_missing", &["env", "PATH=/nonesuch"]) {
        return;
    }
    let file = std::env::current_exe().unwrap();
    let spec = spec(file.clone(), file);
    let error = Qemu::new(Accelerator::Tcg).start(&spec).unwrap_err();
    assert!(matches!(error, MachineError::Start { .. }), "{error}");
    assert!(error.to_string().contains("cargo xtask setup"), "{error}");
}

#[test]
fn kvm_may_be_refused() {
    let test = "kvm_may_be_refused";
    if !have(test, &[Part::QemuSystem, Part::Busybox]) {
        return;
    }
    let wrapper: &[&str] = if !Path::new("/dev/kvm").exists() {
        &["env"]
    } else if rustix::process::geteuid().is_root() {
        // A file in its place that opens and is something else.
        let hide = "mount --bind /dev/null /dev/kvm && exec \"$0\" \"$@\"";
        &["unshare", "--mount", "sh", "-c", hide]
    } else {
        skip(test, "only root can take /dev/kvm away (run it as root)");
        return;
    };
    if !inside(test, wrapper) {
        return;
    }
    let Some(rig) = rig(test, "true") else {
        return;
    };
    let error = Qemu::new(Accelerator::Kvm).start(&rig.spec).unwrap_err();
    let MachineError::Kvm(reason) = &error else {
        panic!("{error}");
    };
    assert!(
        reason.contains("No such file") || reason.contains("Inappropriate ioctl"),
        "{reason}"
    );
    assert!(error.to_string().contains("qemu-tcg"), "{error}");
}

#[test]
fn the_host_may_have_no_memory_for_it() {
    let test = "the_host_may_have_no_memory_for_it";
    if !have(test, &[Part::QemuSystem, Part::Busybox]) {
        return;
    }
    // Of the limits a process can have, these two stop it from having guest memory.
    if !inside(
        test,
        &[
            "prlimit",
            "--as=4294967296:4294967296",
            "--fsize=1073741824:unlimited",
        ],
    ) {
        return;
    }
    let Some(mut rig) = rig(test, "true") else {
        return;
    };
    for (gib, why) in [(2, "limit of a file's size"), (16, "")] {
        if gib == 16 {
            let none = Rlimit {
                current: None,
                maximum: None,
            };
            setrlimit(Resource::Fsize, none).unwrap();
        }
        rig.spec.memory = gib << 30;
        let error = rig.refusal();
        let MachineError::Memory { bytes, reason } = &error else {
            panic!("{error}");
        };
        assert_eq!(*bytes, gib << 30);
        assert!(reason.contains(why), "{reason}");
        assert!(!reason.is_empty());
    }
}

#[test]
fn a_panic_is_told_with_its_reason() {
    let script = "echo c >/proc/sysrq-trigger; sleep 100";
    let Some(rig) = rig("a_panic_is_told_with_its_reason", script) else {
        return;
    };
    let mut machine = rig.start();
    ended(&mut machine);
    let error = machine.death();
    let MachineError::Panicked(line) = &error else {
        panic!("{error}");
    };
    assert!(line.contains("sysrq triggered crash"), "{line}");
}

#[test]
fn a_reset_and_a_power_off_are_told_apart() {
    let test = "a_reset_and_a_power_off_are_told_apart";
    // What it prints does not make it a panic.
    let off = "echo 'Kernel panic - not syncing: a lie'";
    for (script, reset) in [("reboot -f; sleep 100", true), (off, false)] {
        let Some(rig) = rig(test, script) else {
            return;
        };
        let mut machine = rig.start();
        ended(&mut machine);
        let error = machine.death();
        match error {
            MachineError::Reset if reset => {}
            MachineError::PoweredOff if !reset => {}
            other => panic!("{other}: {}", machine.console_lines(50).join("\n")),
        }
        assert!(machine.wait_for_power_off(Duration::ZERO));
    }
}

#[test]
fn what_is_done_to_it_is_told() {
    let script = "echo running; sleep 1000";
    for (signal, word) in [
        (Signal::KILL, "killed by signal 9"),
        (Signal::TERM, "terminating on signal 15"),
    ] {
        let Some(rig) = rig("what_is_done_to_it_is_told", script) else {
            return;
        };
        let mut machine = rig.start();
        printed(&mut machine, "running");
        let pid = Pid::from_raw(machine.pid() as i32).unwrap();
        kill_process(pid, signal).unwrap();
        ended(&mut machine);
        let error = machine.death();
        assert!(matches!(error, MachineError::Died { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
        let error = machine.pause().unwrap_err();
        assert!(matches!(error, MachineError::Control { .. }), "{error}");
    }
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let script = "while :; do echo tick; usleep 20000; done";
    let Some(rig) = rig("a_paused_guest_stands_still_and_goes_on", script) else {
        return;
    };
    let mut machine = rig.start();
    printed(&mut machine, "tick");
    machine.pause().unwrap();
    machine.pause().unwrap();
    // What it had printed may be on its way.
    std::thread::sleep(Duration::from_millis(300));
    let then = machine.console_bytes();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(machine.console_bytes(), then);
    machine.resume().unwrap();
    let more = poll(LIMIT, || (machine.console_bytes() > then).then_some(()));
    assert!(more.is_some(), "it does not go on");
    machine.resume().unwrap();
    // A paused one can be ended, too.
    machine.pause().unwrap();
    assert!(!machine.wait_for_power_off(Duration::from_millis(10)));
    assert!(machine.has_ended());
}

#[test]
fn nothing_stays_of_a_dropped_machine() {
    let Some(mut rig) = rig("nothing_stays_of_a_dropped_machine", "sleep 1000") else {
        return;
    };
    let log = rig.scratch.path("console.log");
    rig.spec.console.file = Some(log.clone());
    let machine = rig.start();
    let process = format!("/proc/{}", machine.pid());
    let firmware = poll(LIMIT, || {
        let text = std::fs::read(&log).unwrap();
        (!text.is_empty()).then_some(())
    });
    assert!(firmware.is_some(), "the log has the console");
    assert!(Path::new(&process).exists());
    drop(machine);
    assert!(!Path::new(&process).exists());
}
