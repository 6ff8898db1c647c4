//! Runs in the background, and the commands that look at them: `exec`, `ps`,
//! `logs`, `stop` and `rm`.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::rig::*;

#[test]
fn a_detached_run_is_used_and_forgotten() {
    let Some(rig) = Rig::new("a_detached_run_is_used_and_forgotten", &IMAGE) else {
        return;
    };
    let image = rig.oci();
    let script = "trap 'echo stopping; exit 4' USR1
        echo out; echo err >&2; i=0; while :; do sleep 0.2; done";
    let started = rig.run(
        &[
            "-d",
            "--name",
            "web",
            "--memory",
            "64M",
            "--image",
            image.to_str().unwrap(),
            "-e",
            "COLOUR=blue",
            "--",
            script,
        ],
        b"",
    );
    assert_eq!(started.code, 0, "{}", started.stderr);
    let id = started.text().trim().to_owned();
    assert_eq!(id.len(), 12, "{id:?}");

    let listed = rig.call("ps", &[]);
    assert_eq!(listed.text().lines().count(), 2, "{}", listed.text());
    for part in [&id, "image.tar", "running", "web"] {
        assert!(listed.text().contains(part), "{part}: {}", listed.text());
    }
    // A name is given once.
    let again = ["-d", "--name", "web", "--image", image.to_str().unwrap()];
    let again = rig.run(&again, b"");
    assert_eq!(again.code, 2);
    assert!(
        again.stderr.contains("--name 'web': is in use by"),
        "{}",
        again.stderr
    );

    // Streams, user, surroundings, exit codes.
    let exec = |arguments: &[&str], input: &[u8]| rig.feed(rig.pericarp("exec"), arguments, input);
    let run = exec(&["web", "sh", "-c", "cat; echo err >&2; exit 7"], b"in\n");
    assert_eq!(
        (run.code, run.text().as_str(), run.stderr.as_str()),
        (7, "in\n", "err\n")
    );
    let line = [
        "-e",
        "A=1",
        "web",
        "sh",
        "-c",
        "echo $A $COLOUR $(id -u) $PWD $HOME",
    ];
    assert_eq!(exec(&line, b"").text(), "1 blue 1234 /home/ada /home/ada\n");
    let line = [
        "-u",
        "root",
        "-w",
        "/etc",
        &id[..6],
        "sh",
        "-c",
        "echo $(id -u) $PWD",
    ];
    assert_eq!(exec(&line, b"").text(), "0 /etc\n");
    assert_eq!(exec(&["web", "sh", "-c", "kill -9 $$"], b"").code, 137);
    let missing = exec(&["web", "nope"], b"");
    assert_eq!(missing.code, 127, "{}", missing.stderr);
    assert_eq!(missing.stderr.lines().count(), 1, "{}", missing.stderr);
    assert_eq!(exec(&["web", "/etc/not-executable"], b"").code, 126);
    let unknown = exec(&["-u", "nobody-knows", "web", "true"], b"");
    assert_eq!(unknown.code, 125, "{}", unknown.stderr);
    assert!(
        unknown.stderr.contains("nobody-knows"),
        "{}",
        unknown.stderr
    );
    // A signal to the client reaches the command.
    let mut command = rig.pericarp("exec");
    command.args([
        "web",
        "sh",
        "-c",
        "trap 'exit 6' TERM; echo ready; while :; do sleep 0.1; done",
    ]);
    let running = Running::start(command);
    running.wait_for("ready");
    running.signal(Signal::TERM);
    assert_eq!(running.wait().code, 6);

    // What uses too much memory is killed, and the container lives on.
    let greedy = exec(&["web", "tail", "/dev/zero"], b"");
    assert_eq!(greedy.code, 137, "{}", greedy.stderr);
    assert!(
        greedy.stderr.contains("more memory than"),
        "{}",
        greedy.stderr
    );

    let logs = rig.call("logs", &["web"]);
    assert_eq!(
        (logs.text().as_str(), logs.stderr.as_str()),
        ("out\n", "err\n")
    );
    let stopped = rig.call("stop", &["web"]);
    assert_eq!(
        (stopped.code, stopped.text().as_str()),
        (0, "web\n"),
        "{}",
        stopped.stderr
    );
    rig.assert_no_process_or_mount();
    // The image's own stop signal was sent.
    let logs = rig.call("logs", &["--tail", "1", "web"]);
    assert_eq!(logs.text(), "stopping\n");
    assert_eq!(rig.call("ps", &[]).text().lines().count(), 1);
    let ended = rig.call("ps", &["-a", "--json"]);
    assert!(
        ended.text().contains(r#""state":"exited (4)""#),
        "{}",
        ended.text()
    );
    let gone = rig.feed(rig.pericarp("exec"), &["web", "true"], b"");
    assert_eq!(gone.code, 2);
    assert_eq!(
        gone.stderr,
        "pericarp exec: NAME 'web': is not running: it is exited (4); `pericarp ps` lists what \
         is running\n"
    );
    assert_eq!(rig.call("rm", &["web"]).code, 0);
    rig.assert_clean();
}

#[test]
fn fifty_commands_at_once() {
    let Some(rig) = Rig::new("fifty_commands_at_once", &VM) else {
        return;
    };
    let image = rig.image();
    let line = ["--name", "busy", "--rootfs-image", &image, "--"];
    let script = "echo ready; while :; do sleep 0.2; done";
    let running = rig.start_ready(&[&line[..], &["sh", "-c", script]].concat());
    thread::scope(|scope| {
        let commands: Vec<_> = (0..50u8)
            .map(|number| {
                let rig = &rig;
                scope.spawn(move || {
                    let script = format!("cat; exit {number}");
                    let input = noise(10_000 + usize::from(number));
                    let line = ["busy", "sh", "-c", &script];
                    let run = rig.feed(rig.pericarp("exec"), &line, &input);
                    assert_eq!(run.code, i32::from(number), "{}", run.stderr);
                    assert!(run.stdout == input, "{number}: {} bytes", run.stdout.len());
                })
            })
            .collect();
        for command in commands {
            command.join().unwrap();
        }
    });
    running.signal(Signal::KILL);
    running.wait();
    rig.assert_no_process_or_mount();
}

#[test]
fn what_ends_a_detached_run_is_told_and_nothing_is_left() {
    let name = "what_ends_a_detached_run_is_told_and_nothing_is_left";
    let Some(rig) = Rig::new(name, &VM) else {
        return;
    };
    let image = rig.image();
    for (program, error) in [
        ("qemu", "the virtual machine died"),
        ("pericarp-block", "pericarp-block: killed by signal 9"),
        ("pericarp-vsock", "pericarp-vsock: killed by signal 9"),
    ] {
        let line = [
            "-d",
            "--name",
            "x",
            "--rootfs-image",
            &image,
            "--",
            "sleep",
            "1000",
        ];
        let started = rig.run(&line, b"");
        assert_eq!(started.code, 0, "{}", started.stderr);
        rig.kill(program);
        let end = Instant::now() + LIMIT;
        while !rig.call("ps", &["-q"]).text().is_empty() {
            assert!(Instant::now() < end, "{program}: the run goes on");
            thread::sleep(Duration::from_millis(50));
        }
        let listed = rig.call("ps", &["-a", "--json"]).text();
        assert!(listed.contains(error), "{program}: {listed}");
        rig.assert_no_process_or_mount();
        assert_eq!(rig.call("rm", &["x"]).code, 0);
    }
    // Even the run itself: then only its history is there.
    let line = [
        "-d",
        "--name",
        "x",
        "--rootfs-image",
        &image,
        "--",
        "sleep",
        "1000",
    ];
    assert_eq!(rig.run(&line, b"").code, 0);
    let supervisors = rig.processes("pericarp");
    let own: Vec<_> = supervisors
        .into_iter()
        .filter(|pid| {
            let line = fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
            line.is_ok_and(|line| line.contains("\0-d\0"))
        })
        .collect();
    assert_eq!(own.len(), 1, "{own:?}");
    rustix::process::kill_process(own[0], Signal::KILL).unwrap();
    rig.assert_no_process_or_mount();
    assert!(rig.call("ps", &["-a"]).text().contains("died"));
    assert_eq!(rig.call("rm", &["-f", "x", "never-was"]).code, 0);
    rig.assert_clean();
}
