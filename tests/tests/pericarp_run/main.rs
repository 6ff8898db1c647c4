//! `pericarp run` from the outside: what the user gives it, what comes back,
//! and that nothing stays behind, however a run ends.
//!
//! Every machine boots a stock kernel, which takes seconds where the CPU is
//! emulated, so one boot serves several checks. All runs of a test keep their
//! files below its scratch directory, which is how leftovers are found.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod bad_input;
mod counters;
mod detached;
mod image;
mod network;
mod rig;
mod rootfs;
mod terminal;
mod volumes;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use pericarp_tests::parts::Part;
use rustix::process::Signal;

use rig::*;

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
        echo cpu.max=$(cat /sys/fs/cgroup/cpu.max)
        echo memory.max=$(cat /sys/fs/cgroup/memory.max)
        echo hostname=$(hostname)
        echo home=$HOME
        echo loopback=$(grep -q 127.0.0.1 /proc/net/fib_trie && echo up)
        echo root=$(touch /x 2>/dev/null && echo writable || echo read-only)
        echo written > /dev/pericarp/disk1 && echo disk1=written
        (echo written > /dev/pericarp/disk2) 2>/dev/null && sync && echo disk2=written
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
    // It has no /etc/passwd.
    is("home", "/");
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
    let script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
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
    assert_eq!(run.code, 9, "{}", run.stderr);
    assert_eq!(run.text(), "ready\ncaught\n");
    assert_eq!(run.stderr, "");
    rig.assert_clean();
}

#[test]
fn a_directory_is_a_root_and_memory_has_its_limit() {
    let Some(rig) = Rig::new(
        "a_directory_is_a_root_and_memory_has_its_limit",
        &rootfs::ROOTFS,
    ) else {
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
        "pericarp: 'nope': no such program in the container\n"
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
        first.starts_with(
            "pericarp: a sidecar of the machine died (pericarp-block: killed by signal 9"
        ),
        "{}",
        run.stderr
    );
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    rig.assert_clean();
}

#[test]
fn an_agent_that_ends_is_one_error_with_the_consoles_last_lines() {
    let name = "an_agent_that_ends_is_one_error_with_the_consoles_last_lines";
    let Some(rig) = Rig::new(name, &VM) else {
        return;
    };
    // A first process that ends is a kernel panic.
    let own = rig.scratch.path("assets");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::symlink(assets().join("kernel"), own.join("kernel")).unwrap();
    fs::create_dir_all(own.join("guest/bin")).unwrap();
    let busybox = Part::Busybox.find().unwrap();
    for program in ["sh", "crun"] {
        fs::copy(&busybox, own.join("guest/bin").join(program)).unwrap();
    }
    fs::write(own.join("pericarp-agent"), "#!/bin/sh\nexit 3\n").unwrap();
    let log = rig.scratch.path("console.log");
    let run = rig.run(
        &[
            "--rootfs-image",
            &rig.image(),
            "--assets",
            own.to_str().unwrap(),
            "--console-log",
            log.to_str().unwrap(),
            "--",
            "true",
        ],
        b"",
    );
    assert_eq!(run.code, 125);
    assert!(
        run.stderr.starts_with(
            "pericarp: the virtual machine's kernel panicked (\"Kernel panic - not syncing: \
             Attempted to kill init! exitcode=0x00000300"
        ),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("\n  console: "), "{}", run.stderr);
    assert!(
        fs::read_to_string(&log)
            .unwrap()
            .contains("Attempted to kill init!")
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
