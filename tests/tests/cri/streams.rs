//! What goes in and out of containers: commands, their output and codes, logs and terminals.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pericarp_tests::cri::container;
use pericarp_tests::cri::exec::Exec;
use pericarp_tests::cri::log::Stream;

use crate::stage::{Stage, script};

pub(crate) fn a_command_has_its_own_output_and_code(stage: &mut Stage) {
    let (_, one) = stage.idle("exec");
    let output = one.exec(&script("echo out; echo err >&2; exit 42"));
    let output = output.unwrap();
    assert_eq!(output.code, 42);
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");

    // Bytes, and more of them than a pipe holds, on both streams at once.
    let text = "printf '\\0\\377'; yes a | head -c 300000 & yes b | head -c 300000 >&2; wait";
    let output = one.exec(&script(text)).unwrap();
    assert_eq!(output.code, 0);
    assert_eq!(output.stdout.len(), 300_002);
    assert_eq!(output.stderr.len(), 300_000);
    assert!(output.stdout.starts_with(&[0]) && output.stdout.contains(&0xff));

    // It is a process of the container, with its name and its files.
    assert_eq!(one.shell("hostname; cat /proc/1/comm"), "exec\nsh");

    let begun = Instant::now();
    let error = stage.node.client();
    let error = error.exec_sync(&one.id, &["sleep", "1000"], 1).unwrap_err();
    assert!(error.message().contains("timeout"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    // Nothing of it goes on. The container's own sleep is another.
    assert_eq!(
        one.shell("ps -o args | grep -c '^sleep 1000$' || true"),
        "0"
    );
}

pub(crate) fn a_log_has_all_lines_in_their_order(stage: &mut Stage) {
    let pod = stage.pod("logs");
    // The last word is said right before the end, and is no line.
    let text = "for n in $(seq 500); do echo line $n; done; head -c 20000 /dev/zero | tr '\\0' x; \
                echo; echo wrong >&2; printf last; exit 3";
    let one = pod.start(&container("one", &script(text))).unwrap();
    assert_eq!(one.ended().exit_code, 3);
    let log = one.log_until(|log| log.iter().any(|line| line.text == "last"));

    let (errors, output): (Vec<_>, Vec<_>) =
        log.iter().partition(|line| line.stream == Stream::Error);
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0].text, "wrong");
    let lines: Vec<String> = (1..=500).map(|n| format!("line {n}")).collect();
    let seen: Vec<_> = output[..500].iter().map(|line| line.text.clone()).collect();
    assert_eq!(seen, lines);
    assert!(output[..500].iter().all(|line| line.whole));
    assert!(output.windows(2).all(|two| two[0].time <= two[1].time));
    // A line that is too long is cut, and said to be.
    let [long, rest, last] = &output[500..] else {
        panic!("{:?}", &output[500..]);
    };
    assert_eq!((long.whole, long.text.len()), (false, 16_384));
    assert_eq!((rest.whole, rest.text.len()), (true, 20_000 - 16_384));
    assert_eq!(last.text, "last");
}

pub(crate) fn a_command_is_spoken_to(stage: &mut Stage) {
    let (_, one) = stage.idle("talk");
    let text = "read word; echo got $word; echo aside >&2; exit 5";
    let mut talk = one.stream(&script(text), false);
    talk.write(b"a word\n").unwrap();
    let said = talk.wait().unwrap();
    assert_eq!(said.stdout, b"got a word\n");
    assert_eq!(said.stderr, b"aside\n");
    assert_eq!(said.code, 5);

    let said = one.stream(&["true"], false).wait().unwrap();
    assert_eq!((said.code, said.stdout.len()), (0, 0));

    // All of it, every byte there is, and more than one frame has.
    let size = megabytes() << 20;
    let sum = sum_of_input(size);
    let text = format!("head -c {size} | md5sum; exit 1");
    let mut exec = one.stream(&script(&text), false);
    let begun = Instant::now();
    write_input(&mut exec, size);
    let said = exec.wait().unwrap();
    println!("{size} bytes to a command in {:?}", begun.elapsed());
    assert_eq!((said.text(), said.code), (sum.clone(), 1));

    // To a container's own process, too.
    let text = format!("head -c {size} | md5sum; sleep 1");
    let mut config = container("own", &script(&text));
    config.stdin = true;
    let pod = stage.pod("own");
    let own = pod.create(&config).unwrap();
    own.start().unwrap();
    let mut streams = own.attach();
    let begun = Instant::now();
    write_input(&mut streams, size);
    let log = own.log_until(|log| !log.is_empty());
    println!("{size} bytes to a container in {:?}", begun.elapsed());
    assert_eq!(log[0].text, sum);
}

/// How much a command is told, for those who want to know whether a gigabyte comes through.
fn megabytes() -> usize {
    let said = std::env::var("PERICARP_STDIN_MB").ok();
    said.and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// All bytes that there are, in an order that is not the same twice in a row.
fn input(size: usize) -> impl Iterator<Item = Vec<u8>> {
    let byte = |at: usize| (at.wrapping_mul(167) ^ (at >> 8) ^ (at >> 16)) as u8;
    let part = 1 << 20;
    (0..size)
        .step_by(part)
        .map(move |from| (from..size.min(from + part)).map(byte).collect())
}

fn write_input(exec: &mut Exec, size: usize) {
    for part in input(size) {
        exec.write(&part).unwrap();
    }
}

fn sum_of_input(size: usize) -> String {
    let mut sums = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = sums.stdin.take().unwrap();
    for part in input(size) {
        stdin.write_all(&part).unwrap();
    }
    drop(stdin);
    let output = sums.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(crate) fn a_terminal_has_its_size_and_one_output(stage: &mut Stage) {
    let (_, one) = stage.idle("terminal");
    let mut shell = one.stream(&["/bin/bash"], true);
    shell.resize(132, 43).unwrap();
    // The size comes on a way of its own: it is asked for until it is there.
    shell
        .write(b"stty -echo; until stty size | grep '43 132'; do sleep 0.02; done\n")
        .unwrap();
    shell.wait_for("43 132\r\n").unwrap();
    shell
        .write(b"echo to the error >&2; tty_of=$(readlink /proc/self/fd/0); echo $tty_of; exit 6\n")
        .unwrap();
    let said = shell.wait().unwrap();
    let text = said.text();
    assert!(text.contains("to the error\r\n"), "{text:?}");
    assert!(text.contains("/dev/pts/"), "{text:?}");
    assert_eq!(said.stderr, b"");
    assert_eq!(said.code, 6);

    // A container may have one for itself.
    let mut config = container("own", &script("stty size; echo done"));
    config.tty = true;
    let pod = stage.pod("own");
    let own = pod.start(&config).unwrap();
    assert_eq!(own.ended().exit_code, 0);
    let log = own.log_until(|log| log.iter().any(|line| line.text.contains("done")));
    assert!(log.iter().all(|line| line.stream == Stream::Output));
}
