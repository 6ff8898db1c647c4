//! What a person does in a pod: types at a shell in it, and copies files in and out.

use std::fs;
use std::thread;
use std::time::Duration;

use pericarp_tests::screen::Screen;

use crate::stage::{Stage, write};
use crate::streams::{SPDY, WEBSOCKETS};

/// What is copied in and out.
const SIZE: usize = 8 << 20;

/// `kubectl exec -it` on a real terminal, over both transports: keys, the size and its changes,
/// Ctrl-C, the exit code, and the terminal as it was.
pub(crate) fn a_shell_is_typed_at(stage: &Stage, pod: &str) {
    let release = stage.kubectl(&["exec", pod, "--", "uname", "-r"]);
    for transport in [WEBSOCKETS, SPDY] {
        let mut command = stage.kubectl_command(&["exec", "-it", pod, "--", "/bin/sh"]);
        command.envs(transport);
        let mut screen = Screen::open(command, 100, 30);
        // The prompt, which only an interactive shell shows.
        screen.wait_for("# ");
        assert!(!screen.is_cooked(), "keys are passed on as they are");
        screen.type_in("test -t 0 && test -t 2 && echo is$((40 + 2)) && uname -r\r");
        screen.wait_for(&format!("is42\r\n{}\r\n", release.trim_end()));
        screen.type_until("stty size\r", "30 100\r\n");
        screen.resize(71, 17);
        screen.type_until("stty size\r", "17 71\r\n");
        // Ctrl-C ends the command in the pod and nothing else.
        screen.type_in("echo sle''eps; sleep 1000\r");
        screen.wait_for("sleeps\r\n");
        // The next command is there a moment later.
        thread::sleep(Duration::from_millis(500));
        screen.type_in("\x03");
        screen.type_in("echo code $?\r");
        screen.wait_for("code 130\r\n");
        screen.type_in("exit 7\r");
        assert_eq!(screen.code(), 7, "{:?}", screen.text());
        assert!(screen.is_cooked(), "the terminal is as it was");
    }
}

/// `kubectl cp` of a large file and of a directory, there and back.
pub(crate) fn files_are_copied(stage: &Stage, pod: &str) {
    let scratch = stage.node.scratch();
    let mut bytes = vec![0; SIZE];
    let mut random = fs::File::open("/dev/urandom").unwrap();
    std::io::Read::read_exact(&mut random, &mut bytes).unwrap();
    let large = write(stage, "large", &bytes);
    let there = |path: &str| format!("{pod}:/tmp/{path}");
    stage.kubectl(&["cp", "large", &there("large")]);
    let sum = |text: String| text.split_whitespace().next().map(str::to_owned);
    let here = std::process::Command::new("md5sum").arg(&large).output();
    let here = String::from_utf8(here.unwrap().stdout).unwrap();
    let said = stage.kubectl(&["exec", pod, "--", "md5sum", "/tmp/large"]);
    assert_eq!(sum(said), sum(here));
    stage.kubectl(&["cp", &there("large"), "large-again"]);
    assert!(fs::read(scratch.path("large-again")).unwrap() == bytes);

    fs::create_dir_all(scratch.path("copied/deep/er")).unwrap();
    for (name, text) in [
        ("copied/one", "1\n"),
        ("copied/deep/two", "2\n"),
        ("copied/deep/er/three", ""),
    ] {
        write(stage, name, text.as_bytes());
    }
    stage.kubectl(&["cp", "copied", &there("copied")]);
    stage.kubectl(&["cp", &there("copied"), "copied-again"]);
    let same = std::process::Command::new("diff")
        .arg("-r")
        .args([scratch.path("copied"), scratch.path("copied-again")])
        .output()
        .unwrap();
    assert!(same.status.success(), "{same:?}");
    for name in ["large", "large-again"] {
        fs::remove_file(scratch.path(name)).unwrap();
    }
    for name in ["copied", "copied-again"] {
        fs::remove_dir_all(scratch.path(name)).unwrap();
    }
}
