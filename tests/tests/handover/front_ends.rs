//! Several devices in one process, passed sockets, another user, and front ends
//! that hold a hand-over up.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::parts::{Part, absent, have, search_path};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::verified::{BLOCK, BLOCKS, Load};
use pericarp_tests::wire;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;

use super::failures::ends;
use super::rig::{Rig, SOON};

const STEP: Duration = Duration::from_millis(20);

fn program() -> Vec<String> {
    let program = Part::PERICARP_BLOCK.find().unwrap();
    vec![program.display().to_string()]
}

/// Two front ends under load, one device without any, two workers.
#[test]
fn several_devices_are_handed_over_together() {
    let test = "several_devices_are_handed_over_together";
    if !have(test, &[Part::PERICARP_BLOCK]) {
        return;
    }
    let scratch = Scratch::new();
    for name in ["da", "db", "dc"] {
        scratch.file(name, &vec![0; BLOCK * BLOCKS]);
    }
    let options = [
        "--device=id=a,socket=@/a,file=@/da,num-queues=2",
        "--device=id=b,socket=@/b,file=@/db",
        "--device=id=c,socket=@/c,file=@/dc",
        "--workers=2",
        "--inflight-file=@/record",
    ];
    let mut rig = Rig::with(scratch, program(), &options);
    let setup = |queues, inflight| Setup {
        queues,
        queue_size: 256,
        inflight,
        ..Setup::default()
    };
    let mut a = Driver::connect(&rig.scratch.path("a"), &setup(2, false)).unwrap();
    let mut c = Driver::connect(&rig.scratch.path("c"), &setup(1, true)).unwrap();
    let mut loads = [Load::new(43), Load::new(47)];
    let limits = json!({"op": "limits", "device": "c", "iops": 50_000});
    assert_eq!(rig.ask(&limits)["ok"], true);
    for round in 0..3 {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let [one, other] = &mut loads;
            let pairs = [(&mut a, one), (&mut c, other)];
            let driving = pairs.map(|(driver, load)| {
                let over = &over;
                scope.spawn(move || {
                    let before = load.done;
                    while !over.load(Ordering::Relaxed) {
                        load.run(driver, STEP)?;
                    }
                    load.run(driver, STEP)?;
                    load.drain(driver)?;
                    Ok::<_, String>(load.done - before)
                })
            });
            rig.hand_over();
            over.store(true, Ordering::Relaxed);
            for driving in driving {
                let done = driving.join().unwrap();
                let done = done.unwrap_or_else(|e| panic!("{round}: {e}\n{}", rig.told()));
                assert!(done > 0);
            }
        });
        // Of the other queue, and of the device that nobody had.
        assert_eq!(a.request(1, &Op::Flush).unwrap().status, 0);
        let mut b = Driver::connect(&rig.scratch.path("b"), &setup(1, true)).unwrap();
        assert_eq!(b.request(0, &Op::Flush).unwrap().status, 0);
    }
    let kept = rig.ask(&json!({"op": "limits", "device": "c"}));
    assert_eq!(kept["limits"]["iops"], 50_000);
    let stats = rig.ask(&json!({"op": "stats"}));
    let count = |device: usize, queue: usize| {
        let queue = &stats["devices"][device]["queues"][queue];
        queue["requests"]["flush"]["count"].as_u64()
    };
    assert_eq!((count(0, 1), count(1, 0)), (Some(1), Some(1)), "{stats}");
    // A successor finds the records of both, in the file and at the front end.
    rig.serving.kill();
    rig.fresh();
    let [one, other] = &mut loads;
    for (driver, load, name) in [(&mut a, one, "a"), (&mut c, other, "c")] {
        let socket = rig.scratch.path(name);
        let again = poll(SOON, || driver.reconnect(&socket).ok());
        assert!(again.is_some(), "{}", rig.told());
        load.run(driver, STEP).unwrap();
        load.drain(driver).unwrap();
        load.compare(&rig.scratch.path(&format!("d{name}")))
            .unwrap();
    }
}

/// Starts with a socket that somebody else opened. Its number means nothing to
/// successors, which get the socket from the old process.
fn passed(scratch: Scratch, socket: &impl AsFd) -> Rig {
    scratch.file("disk", &vec![0; BLOCK * BLOCKS]);
    let socket = socket.as_fd();
    fcntl_setfd(socket, FdFlags::empty()).unwrap();
    let option = format!("--fd={}", socket.as_raw_fd());
    let rig = Rig::with(scratch, program(), &[&option, "--blk-file=@/disk"]);
    fcntl_setfd(socket, FdFlags::CLOEXEC).unwrap();
    rig
}

fn moved_twice(rig: &mut Rig, driver: &mut Driver) {
    let mut load = Load::new(53);
    for _ in 0..2 {
        load.run(driver, STEP).unwrap();
        rig.hand_over();
    }
    load.run(driver, STEP).unwrap();
    load.drain(driver).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
}

#[test]
fn a_passed_listening_socket_is_handed_over() {
    let test = "a_passed_listening_socket_is_handed_over";
    if !have(test, &[Part::PERICARP_BLOCK]) {
        return;
    }
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.path("s")).unwrap();
    let mut rig = passed(scratch, &listener);
    drop(listener);
    let mut driver = rig.connect(true);
    moved_twice(&mut rig, &mut driver);
    drop(driver);
    let mut driver = rig.connect(true);
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, 0);
    rig.hand_over();
    rig.serving.signal(rustix::process::Signal::TERM);
    assert_eq!(rig.serving.wait(SOON).and_then(|s| s.code()), Some(0));
    assert!(rig.socket().exists(), "it belongs to who made it");
}

#[test]
fn a_passed_connection_is_handed_over() {
    let test = "a_passed_connection_is_handed_over";
    if !have(test, &[Part::PERICARP_BLOCK]) {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(SOON)).unwrap();
    let mut rig = passed(Scratch::new(), &theirs);
    drop(theirs);
    let setup = Setup {
        queue_size: 256,
        inflight: true,
        ..Setup::default()
    };
    let mut driver = Driver::over(ours, &setup).unwrap();
    moved_twice(&mut rig, &mut driver);
    // The end of the front end is the end of whoever has it by then.
    drop(driver);
    assert_eq!(rig.serving.wait(SOON).and_then(|s| s.code()), Some(0));
}

/// Both without any privilege, and root cannot take from them by mistake.
#[test]
fn an_unprivileged_user_hands_over() {
    const NOBODY: u32 = 65_534;
    let test = "an_unprivileged_user_hands_over";
    if !have(test, &[Part::PERICARP_BLOCK]) {
        return;
    }
    let setpriv = search_path("setpriv");
    let (true, Some(setpriv)) = (rustix::process::geteuid().is_root(), setpriv) else {
        absent(test, "becoming another user needs root and setpriv");
        return;
    };
    let scratch = Scratch::new();
    scratch.file("disk", &vec![0; BLOCK * BLOCKS]);
    // It may not reach the build directory.
    let copy = scratch.path("program");
    std::fs::copy(Part::PERICARP_BLOCK.find().unwrap(), &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    for path in [scratch.dir(), &scratch.path("disk")] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let other = [
        setpriv.display().to_string(),
        format!("--reuid={NOBODY}"),
        format!("--regid={NOBODY}"),
        "--clear-groups".to_owned(),
        copy.display().to_string(),
    ];
    let one = ["--socket-path=@/s", "--blk-file=@/disk"];
    let mut rig = Rig::with(scratch, other.to_vec(), &one);
    let mut driver = rig.connect(true);
    moved_twice(&mut rig, &mut driver);
    let unprivileged = std::mem::replace(&mut rig.program, program());
    ends(rig.successor(&[]), 1, &["--take-over", "65534", "own user"]);
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, 0);
    rig.program = unprivileged;
    rig.hand_over();
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, 0);
}

/// A disk that does not answer: the hand-over is given up, and everything but
/// the request that hangs goes on at once.
#[test]
fn a_request_that_hangs_does_not_hang_the_rest() {
    let test = "a_request_that_hangs_does_not_hang_the_rest";
    if !have(test, &[Part::PERICARP_BLOCK]) || !fuse::usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let mount = Fuse::mount(&scratch.path("mnt"), vec![9; 1 << 20]).unwrap();
    let disk = format!("--blk-file={}", mount.file().display());
    let options = ["--socket-path=@/s", &disk, "--cache=buffered"];
    let rig = Rig::with(scratch, program(), &options);
    let mut driver = rig.connect(true);
    let read = Op::Read {
        sector: 8,
        len: 4096,
    };
    mount.behaviour.read_ms.store(15_000, Ordering::SeqCst);
    let hangs = driver.prepare(1, &read).unwrap();
    driver.place(0, 8, &hangs);
    driver.offer(0, 8);
    let reading = || mount.behaviour.most_reading.load(Ordering::SeqCst) > 0;
    assert!(poll(SOON, || reading().then_some(())).is_some());
    mount.behaviour.read_ms.store(0, Ordering::SeqCst);
    let mut pretender = rig.pretender();
    pretender.send(&rig.offer_of(&mount.file(), &driver.config(60).unwrap()));
    for _ in 0..2 {
        assert_eq!(pretender.read()["step"], "estate");
    }
    pretender.send(&json!({"step": "drain"}));
    std::thread::sleep(Duration::from_millis(100));
    drop(pretender);
    driver.limit = Duration::from_secs(10);
    for _ in 0..3 {
        let answer = driver.request(0, &read);
        let answer = answer.unwrap_or_else(|e| panic!("{e}\n{}", rig.told()));
        assert_eq!((answer.status, answer.data[0]), (0, 9));
    }
    // Messages, too, are answered.
    driver.config(60).unwrap();
    driver.limit = SOON * 2;
    driver.settled(0, 8).unwrap();
}

/// A front end that never stops talking is handed over between two of its
/// messages. One that stops in the middle of a message keeps its process, and
/// the operator hears who it is.
#[test]
fn front_ends_that_talk_and_that_hang() {
    let test = "front_ends_that_talk_and_that_hang";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let mut ours = driver.stream.try_clone().unwrap();
    let message = wire::message(wire::request::GET_FEATURES, wire::VERSION, &[]);
    let mut answer = [0; 20];
    let (asked, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let mut writer = ours.try_clone().unwrap();
        let (asked, over) = (&asked, &over);
        let many = message.repeat(64);
        let flooding = scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                asked.fetch_add(64, Ordering::Relaxed);
                writer.write_all(&many).unwrap();
            }
        });
        let reading = scope.spawn(|| {
            let mut count = 0;
            while !over.load(Ordering::Relaxed) || count < asked.load(Ordering::Relaxed) {
                if count < asked.load(Ordering::Relaxed) {
                    ours.read_exact(&mut answer).unwrap();
                    count += 1;
                }
            }
        });
        std::thread::sleep(STEP);
        for _ in 0..2 {
            rig.hand_over();
        }
        over.store(true, Ordering::Relaxed);
        flooding.join().unwrap();
        reading.join().unwrap();
    });
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, 0);
    ours.write_all(&message[..5]).unwrap();
    ends(rig.successor(&[]), 1, &["--take-over", "device 0", "rest"]);
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, 0);
    ours.write_all(&message[5..]).unwrap();
    ours.read_exact(&mut answer).unwrap();
    rig.hand_over();
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, 0);
}
