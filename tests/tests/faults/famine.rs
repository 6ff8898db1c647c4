//! Descriptors run out, for good: from the start on, and while a program serves. It never
//! dies of it; who cannot be served is turned away or waits, and is served once there are
//! some again.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Setup};
use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::{Client, refused};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::wire;
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

use super::programs::{LIMIT, Program, ending, picture};

const ALL: [Program; 4] = [Program::Block, Program::Fs, Program::Net, Program::Vsock];
/// As many descriptors as no program here needs.
const PLENTY: u64 = 4096;
/// Who waits is given so long to be served all the same.
const MOMENT: Duration = Duration::from_millis(200);

/// Starts it under this program, and waits until it listens on its last socket or ends.
fn start(program: Program, dir: &Path, under: &[&str]) -> (Process, bool) {
    let mut command = match under.split_first() {
        None => command(&program.path()),
        Some((first, rest)) => {
            let mut command = command(Path::new(first));
            command.args(rest).arg(program.path());
            command
        }
    };
    program.describe(dir, &mut command);
    let mut process = Process::start(&mut command, 4 * LIMIT).unwrap();
    let last = dir.join(match program {
        Program::Vsock => "s",
        _ => "c",
    });
    let ready = poll(LIMIT, || {
        let ended = process.ended().is_some();
        // The last thing of its start is to let others in.
        let waits = || UnixStream::connect(&last).is_ok();
        (ended || waits()).then_some(!ended)
    });
    (process, ready.unwrap())
}

/// Whether there is a descriptor to let a front end in with.
fn is_heard(program: Program, dir: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(program.socket(dir)) else {
        return false;
    };
    stream.set_read_timeout(Some(MOMENT)).unwrap();
    let ask = wire::message(wire::request::GET_FEATURES, wire::VERSION, &[]);
    wire::send(&stream, &ask, &[]).is_ok() && wire::receive(&stream).is_ok()
}

/// Limits the descriptors of a process that runs to numbers below `most`.
fn limit(process: &Process, most: u64) {
    let limits = Rlimit {
        current: Some(most),
        maximum: Some(PLENTY),
    };
    prlimit(Pid::from_raw(process.pid()), Resource::Nofile, limits).unwrap();
}

/// The lowest number that is not open.
fn lowest_free(process: &Process) -> u64 {
    let open =
        |number: &u64| fs::symlink_metadata(format!("/proc/{}/fd/{number}", process.pid())).is_ok();
    (0..PLENTY).find(|number| !open(number)).unwrap()
}

#[test]
fn programs_start_with_enough_descriptors_or_say_so() {
    let test = "programs_start_with_enough_descriptors_or_say_so";
    if !have(test, &[Part::Unshare]) {
        return;
    }
    for program in ALL {
        let Some(_ground) = program.ground(test) else {
            continue;
        };
        let scratch = Scratch::new();
        let (mut wrong, mut refused, mut started) = (Vec::new(), 0, 0);
        // With fewer the loader finds no libraries.
        for most in (5..64).chain([128, 256, 320, 384, 1024]) {
            let dir = scratch.path(&most.to_string());
            program.prepare(&dir);
            let before = picture(&dir);
            let nofile = format!("--nofile={most}:{most}");
            let (mut process, is_ready) = start(program, &dir, &["prlimit", &nofile]);
            // It listens before it is confined, which takes descriptors, too.
            let is_heard = is_ready && is_heard(program, &dir);
            let is_ready = is_ready && process.ended().is_none();
            let faults = if is_ready {
                started += 1;
                // With so few a front end may wait, or be turned away.
                let served = match is_heard && (most == 1024 || program != Program::Vsock) {
                    true if most == 1024 => program.answers(&dir),
                    true => program.answers_within(5 * MOMENT, &dir),
                    false => Err("nobody is let in".into()),
                };
                process.signal(Signal::TERM);
                let code = process.wait(LIMIT).and_then(|status| status.code());
                let mut faults = match code {
                    Some(0) => Vec::new(),
                    // What it listened with may have been the last that it had.
                    _ => ending(program, &process.output().last(99), code, &[1]),
                };
                if served.is_ok() && code != Some(0) {
                    faults.push(format!("it served and ended with {code:?}"));
                }
                if most == 1024 && served.is_err() {
                    faults.push(format!("it serves nobody: {served:?}"));
                }
                faults
            } else {
                refused += 1;
                let code = process.wait(LIMIT).and_then(|status| status.code());
                // That a share needs more is a rule for its operator.
                ending(program, &process.output().last(99), code, &[1, 2])
            };
            let mut after = picture(&dir);
            let said = process.output().last(9);
            if is_ready || said.contains("cannot confine itself") || said.contains("threads") {
                after.retain(|name, _| !["inflight", "state"].contains(&name.as_str()));
            }
            if !faults.is_empty() || after != before {
                wrong.push(format!("{most}: {faults:?}, left {after:?}: {said}"));
            }
        }
        eprintln!("{program:?}: {refused} starts ended with a line, {started} served");
        assert!(wrong.is_empty(), "{program:?}:\n  {}", wrong.join("\n  "));
        assert!(refused > 0 && started > 0);
    }
}

/// Each front end finds one descriptor more than the one before, until it is served.
#[test]
fn front_ends_come_while_descriptors_are_few() {
    let test = "front_ends_come_while_descriptors_are_few";
    // Who comes to a vsock then may wait for as long as it stays: see the known gaps.
    for program in [Program::Block, Program::Fs, Program::Net] {
        let Some(_ground) = program.ground(test) else {
            continue;
        };
        let scratch = Scratch::new();
        let dir = scratch.path("d");
        program.prepare(&dir);
        let (mut process, is_ready) = start(program, &dir, &[]);
        assert!(is_ready, "{}", process.output().last(9));
        program.answers(&dir).unwrap();
        let calm = poll(LIMIT, || {
            let before = lowest_free(&process);
            std::thread::sleep(MOMENT / 4);
            (lowest_free(&process) == before).then_some(before)
        });
        let free = calm.unwrap();
        // Nobody can be let in, nor a session be made: who comes waits, and is served after that.
        limit(&process, 3);
        let mut waiting = UnixStream::connect(program.socket(&dir)).unwrap();
        waiting.set_read_timeout(Some(MOMENT)).unwrap();
        let silence = waiting.read(&mut [0]).map_err(|e| e.kind());
        assert!(
            matches!(silence, Err(ErrorKind::WouldBlock) | Ok(0)),
            "{program:?}: {silence:?}"
        );
        assert!(
            process.ended().is_none(),
            "{program:?}: {}",
            process.epitaph()
        );
        limit(&process, PLENTY);
        drop(waiting);
        program
            .answers(&dir)
            .unwrap_or_else(|e| panic!("{program:?}: {e}"));
        let mut turned_away = 0;
        for more in 1..40 {
            limit(&process, free + more);
            let served = program.answers_within(5 * MOMENT, &dir).is_ok();
            let said = process.output().last(5);
            assert!(process.ended().is_none(), "{program:?}, {more}: {said}");
            if served {
                break;
            }
            turned_away += 1;
        }
        limit(&process, PLENTY);
        program
            .answers(&dir)
            .unwrap_or_else(|e| panic!("{program:?}: {e}"));
        eprintln!("{program:?}: {turned_away} front ends turned away");
        assert!(turned_away > 0, "{program:?}");
        asks(&dir.join("c"));
        process.signal(Signal::TERM);
        let code = process.wait(LIMIT).and_then(|status| status.code());
        assert_eq!(code, Some(0), "{program:?}: {}", process.output().last(9));
        assert!(!program.socket(&dir).exists());
    }
}

/// The control socket answers.
fn asks(control: &Path) {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"{\"op\":\"stats\"}\n").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    assert!(answer.contains("\"ok\":true"), "{answer}");
}

/// Who asks where nobody can be let in waits for it, and disks go on meanwhile.
#[test]
fn a_front_end_that_is_served_stays_so() {
    let test = "a_front_end_that_is_served_stays_so";
    for program in [Program::Block, Program::Fs] {
        let Some(_ground) = program.ground(test) else {
            continue;
        };
        let scratch = Scratch::new();
        let dir = scratch.path("d");
        program.prepare(&dir);
        let (mut process, _) = start(program, &dir, &[]);
        match program {
            Program::Block => disk_goes_on(&process, &dir),
            _ => guest_is_told(&process, &dir),
        }
        assert!(process.ended().is_none(), "{}", process.epitaph());
        asks(&dir.join("c"));
    }
}

fn disk_goes_on(process: &Process, dir: &Path) {
    use pericarp_tests::frontend::Op;
    let mut driver = Driver::connect(&dir.join("s"), &Setup::default()).unwrap();
    let read = Op::Read {
        sector: 8,
        len: 4096,
    };
    assert_eq!(driver.request(0, &read).unwrap().status, 0);
    limit(process, 3);
    let mut control = UnixStream::connect(dir.join("c")).unwrap();
    control.set_read_timeout(Some(MOMENT)).unwrap();
    control.write_all(b"{\"op\":\"stats\"}\n").unwrap();
    assert!(
        control.read(&mut [0]).is_err(),
        "there was nothing to let it in with"
    );
    for op in [read, Op::Flush, Op::GetId { len: 20 }] {
        assert_eq!(driver.request(0, &op).unwrap().status, 0);
    }
    limit(process, PLENTY);
    // The same that waited.
    control.set_read_timeout(Some(LIMIT)).unwrap();
    assert!(control.read(&mut [0; 64]).unwrap() > 0);
}

fn guest_is_told(process: &Process, dir: &Path) {
    for name in ["one", "two", "three"] {
        fs::write(dir.join("tree").join(name), name).unwrap();
    }
    let mut guest = Client::connect(&dir.join("s"), &Client::setup()).unwrap();
    guest.init().unwrap();
    let one = guest.lookup(ROOT, "one").unwrap().node;
    let fh = guest.open(one, 2).unwrap();
    limit(process, 3);
    let few = [Errno::MFILE, Errno::NFILE];
    refused(guest.open(one, 0), &few).unwrap();
    refused(guest.lookup(ROOT, "two"), &few).unwrap();
    refused(guest.opendir(ROOT), &few).unwrap();
    refused(guest.create(ROOT, "new", 0o644, 2), &few).unwrap();
    assert!(
        !dir.join("tree/new").exists(),
        "what was refused is not there"
    );
    // What it has open is as it was.
    assert_eq!(guest.read(one, fh, 0, 16).unwrap(), b"one");
    assert_eq!(guest.write(one, fh, 3, b"!").unwrap(), 1);
    guest.fsync(one, fh).unwrap();
    limit(process, PLENTY);
    let two = guest.lookup(ROOT, "two").unwrap().node;
    let second = guest.open(two, 0).unwrap();
    assert_eq!(guest.read(two, second, 0, 16).unwrap(), b"two");
    assert_eq!(guest.list(ROOT, true, 4096).unwrap().len(), 3);
}
