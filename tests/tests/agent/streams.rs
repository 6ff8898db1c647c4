//! The standard streams: apart, whole, half-closed, closed too early, and as a terminal.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use pericarp_api::ExitReport;

use crate::conversation::Wish;
use crate::rig::Machine;

const BULK: usize = 8 << 20;

pub(crate) fn outputs_are_apart(machine: &Machine) {
    let ended = machine.run(
        "apart",
        &Wish::run(&["sh", "-c", "echo out; echo err >&2; cat"]),
    );
    assert_eq!((ended.text(), &ended.stderr[..]), ("out\n", &b"err\n"[..]));
    // Its own outputs can be opened by name, by another user too.
    let script = "echo out >/dev/stdout; echo err >/dev/stderr";
    let ended = machine.run(
        "apart",
        &Wish {
            user: "web",
            ..Wish::run(&["sh", "-c", script])
        },
    );
    assert_eq!((ended.text(), &ended.stderr[..]), ("out\n", &b"err\n"[..]));
}

pub(crate) fn bulk_arrives_bit_exact(machine: &Machine) {
    let mut state = 1u32;
    let sent: Vec<u8> = (0..BULK)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    let process = machine.create("bulk", &Wish::run(&["cat"])).unwrap();
    process.start().unwrap();
    let began = Instant::now();
    let ended = process.finish(&sent);
    println!("{} MiB there and back in {:?}", BULK >> 20, began.elapsed());
    assert!(
        ended.stdout == sent,
        "{} bytes came back",
        ended.stdout.len()
    );
    assert_eq!(ended.report, ExitReport::Code(0));
    machine.remove("bulk");
    // All of the output has arrived before the report, even that of a slow host.
    let script = "head -c 3000000 /dev/zero";
    let mut process = machine
        .create("bulk", &Wish::run(&["sh", "-c", script]))
        .unwrap();
    process.start().unwrap();
    thread::sleep(Duration::from_millis(1500));
    let mut count = 0;
    let mut piece = vec![0; 10_000];
    let mut stdout = process.stdout.take().unwrap();
    loop {
        match stdout.read(&mut piece).unwrap() {
            0 => break,
            read => count += read,
        }
    }
    assert_eq!((count, process.report()), (3_000_000, ExitReport::Code(0)));
    machine.remove("bulk");
}

pub(crate) fn closed_ends_hang_nothing(machine: &Machine) {
    let main = machine
        .create("closed", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    main.start().unwrap();
    // The process closes its input, and the host goes on writing.
    let script = "exec <&-; echo closed; sleep 1; exit 4";
    let mut process = machine
        .exec("closed", "in", &Wish::run(&["sh", "-c", script]))
        .unwrap();
    process.start().unwrap();
    process.read_until("closed\n");
    let mut stdin = process.stdin.take().unwrap();
    // As much as fits on the way, and then an error rather than a hang.
    while stdin.write_all(&[0; 65536]).is_ok() {}
    assert_eq!(process.report(), ExitReport::Code(4));
    // The host takes no more output: the process is told by the usual signal.
    let mut process = machine.exec("closed", "out", &Wish::run(&["yes"])).unwrap();
    process.start().unwrap();
    process.read_until("y\n");
    drop(process.stdout.take());
    let report = process.report();
    assert!(
        report
            == ExitReport::Signal {
                signal: 13,
                out_of_memory: false
            }
            || report.code() == 1,
        "{report:?}"
    );
    // The host ends its input in the middle of the output.
    let script = "cat; echo after";
    let mut process = machine
        .exec("closed", "half", &Wish::run(&["sh", "-c", script]))
        .unwrap();
    process.start().unwrap();
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(b"first\n").unwrap();
    process.read_until("first\n");
    stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(process.finish(b"").text(), "after\n");
    machine.remove("closed");
}

pub(crate) fn those_left_behind_do_not_hold_the_end_up(machine: &Machine) {
    let main = machine
        .create("lingering", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    main.start().unwrap();
    // The first leaves a silent holder of its output behind, the second one that never stops.
    for (id, script) in [
        ("silent", "echo said; sleep 1000 &"),
        ("loud", "yes & echo said"),
    ] {
        let process = machine
            .exec("lingering", id, &Wish::run(&["sh", "-c", script]))
            .unwrap();
        process.start().unwrap();
        let ended = process.finish(b"");
        assert_eq!(ended.report, ExitReport::Code(0), "{id}");
        assert!(ended.text().contains("said\n"), "{id}");
    }
    machine.remove("lingering");
}

pub(crate) fn a_terminal_has_a_size(machine: &Machine) {
    // A size that is known before the start is there from the first moment.
    let script = "tty; stty size; read line; echo got $line; read line; stty size; exit 5";
    let mut process = machine
        .create("tty", &Wish::terminal(&["sh", "-c", script]))
        .unwrap();
    process.resize(100, 30).unwrap();
    process.start().unwrap();
    let seen = process.read_until("30 100\r\n");
    assert!(seen.starts_with("/dev/"), "{seen}");
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(b"typed\n").unwrap();
    process.read_until("got typed\r\n");
    process.resize(132, 43).unwrap();
    stdin.write_all(b"\n").unwrap();
    process.read_until("43 132\r\n");
    assert_eq!(process.report(), ExitReport::Code(5));
    machine.remove("tty");
    // A further process, ended by what is typed; the last of its output is not lost.
    let main = machine
        .create("tty", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    main.start().unwrap();
    let script =
        "stty size; trap 'echo interrupted; exit 6' INT; echo ready; while :; do sleep 0.1; done";
    let mut process = machine
        .exec("tty", "p", &Wish::terminal(&["sh", "-c", script]))
        .unwrap();
    process.resize(90, 20).unwrap();
    process.start().unwrap();
    let seen = process.read_until("ready\r\n");
    assert!(seen.starts_with("20 90\r\n"), "{seen}");
    process.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    process.read_until("interrupted\r\n");
    assert_eq!(process.report(), ExitReport::Code(6));
    // Much output at once, and its end.
    let script = "head -c 200000 /dev/zero | tr '\\0' x; echo; echo the end";
    let process = machine
        .exec("tty", "q", &Wish::terminal(&["sh", "-c", script]))
        .unwrap();
    process.start().unwrap();
    let ended = process.finish(b"");
    assert_eq!(ended.stdout.len(), 200_000 + 11, "{:?}", ended.report);
    assert!(ended.text().ends_with("x\r\nthe end\r\n"));
    machine.remove("tty");
}

pub(crate) fn twenty_at_once(machine: &Machine) {
    let main = machine
        .create("crowd", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    main.start().unwrap();
    let before = machine.stats("crowd");
    let began = Instant::now();
    thread::scope(|scope| {
        for number in 0..20u8 {
            scope.spawn(move || {
                let (id, code) = (format!("p{number}"), format!("cat; exit {number}"));
                let args = ["sh", "-c", &code];
                let process = machine.exec("crowd", &id, &Wish::run(&args)).unwrap();
                process.start().unwrap();
                let ended = process.finish(id.as_bytes());
                assert_eq!(ended.text(), id);
                assert_eq!(ended.report, ExitReport::Code(number));
            });
        }
    });
    println!("twenty in {:?}", began.elapsed());
    // Nothing of them stays.
    let back = pericarp_tests::bounded::poll(Duration::from_secs(20), || {
        let after = machine.stats("crowd");
        (after.agent_open_files <= before.agent_open_files
            && after.agent_threads <= before.agent_threads)
            .then_some(after)
    });
    let after = back.unwrap_or_else(|| panic!("{before:?} {:?}", machine.stats("crowd")));
    println!(
        "resident before {} KiB, after {} KiB",
        before.agent_rss / 1024,
        after.agent_rss / 1024
    );
    machine.remove("crowd");
}
