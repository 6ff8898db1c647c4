//! Hand-overs that fail: the old process serves on, or, where it was killed, a
//! successor does.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::Op;
use pericarp_tests::process::Process;
use pericarp_tests::verified::Load;
use rustix::process::Signal;
use serde_json::json;

use super::rig::{Pretender, Rig, SOON};

const STEP: Duration = Duration::from_millis(50);

/// It ended with this code and one line with these words.
pub(crate) fn ends(mut process: Process, code: i32, words: &[&str]) {
    let status = process.wait(Duration::from_secs(30));
    process.kill();
    let text = process.output().last(20);
    let status = status.expect("it ends by itself");
    assert_eq!(status.code(), Some(code), "{text}");
    let lines: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("pericarp-block: --"))
        .collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert!(words.iter().all(|word| lines[0].contains(word)), "{text}");
}

/// A new process that ends, falls silent or talks nonsense at every step.
#[test]
fn a_new_process_that_fails_leaves_the_old_one_serving() {
    let test = "a_new_process_that_fails_leaves_the_old_one_serving";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let mut load = Load::new(17);
    let config = driver.config(60).unwrap();
    for step in 0..6 {
        let mut pretender = rig.pretender();
        let mut drain = |load: &mut Load| {
            pretender.send(&rig.offer(&config));
            for _ in 0..2 {
                assert_eq!(pretender.read()["step"], "estate");
            }
            pretender.send(&json!({"step": "drain"}));
            let device = pretender.read();
            assert_eq!(device["step"], "device", "{device}");
            let ring = &device["session"]["vrings"][0];
            assert_eq!(ring["broken"], false);
            // Nothing moves while the queues stand still.
            load.longest = Duration::ZERO;
        };
        match step {
            0 => {}
            1 => pretender.send(&rig.offer(&config)),
            2 => drain(&mut load),
            3 => {
                // Silence. The driver waits for that long and no longer.
                drain(&mut load);
                let begin = Instant::now();
                load.run(&mut driver, Duration::from_secs(3)).unwrap();
                let refused = pretender.read();
                assert_eq!(refused["step"], "refused", "{refused}");
                assert!(begin.elapsed() < SOON);
            }
            4 => {
                drain(&mut load);
                pretender.send(&json!({"step": "offer"}));
                assert_eq!(pretender.read()["step"], "refused");
            }
            _ => {
                let other = rig.ask(&json!({"op": "hand-over", "version": 2}));
                assert_eq!(other["ok"], false, "{other}");
                assert!(other["error"].as_str().unwrap().contains("already"));
            }
        }
        drop(pretender);
        let before = load.done;
        let went_on = poll(SOON, || {
            load.run(&mut driver, STEP).unwrap();
            (load.done > before).then_some(())
        });
        assert!(went_on.is_some(), "after step {step}\n{}", rig.told());
        // It has noticed before the next one asks.
        let over = || {
            let lines = rig.serving.output().lines();
            let count = lines.iter().filter(|l| l.contains("serving on")).count();
            (count > step).then_some(())
        };
        assert!(poll(SOON, over).is_some(), "{step}\n{}", rig.told());
    }
    assert_eq!(
        rig.ask(&json!({"op": "hand-over", "version": 3}))["ok"],
        false
    );
    assert_eq!(rig.ask(&json!({"op": "hand-over"}))["ok"], false);
    load.run(&mut driver, STEP).unwrap();
    load.drain(&mut driver).unwrap();
    // After all of this it can still be handed over.
    rig.hand_over();
    driver.request(0, &Op::Flush).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
}

/// New processes killed at any moment, real ones.
#[test]
fn a_new_process_that_is_killed_loses_nothing() {
    let test = "a_new_process_that_is_killed_loses_nothing";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let mut load = Load::new(23);
    let (mut stayed, mut moved) = (0, 0);
    for round in 0..24 {
        let mut new = rig.successor(&[]);
        // All of it takes about 20 ms.
        let micros = load.below(25_000);
        let ran = load.run(&mut driver, Duration::from_micros(micros));
        ran.unwrap_or_else(|e| panic!("{e}\n{}", rig.told()));
        new.kill();
        // More is done than was in flight, or the old one ends, now or soon.
        let before = load.done;
        let ended = poll(SOON, || {
            let ended = rig.serving.ended().is_some();
            let ran = load.run(&mut driver, STEP);
            ran.unwrap_or_else(|e| panic!("round {round}: {e}\n{}", rig.told()));
            (ended || load.done > before + 2 * Rig::DEPTH).then_some(ended)
        });
        if ended.unwrap_or_else(|| panic!("round {round}\n{}", rig.told())) {
            // There was no way back any more: it is as with any killed backend.
            moved += 1;
            rig.fresh();
            super::reconnect(&mut driver, &rig);
        } else {
            stayed += 1;
        }
        let ran = load.run(&mut driver, STEP);
        ran.unwrap_or_else(|e| panic!("round {round}: {e}\n{}", rig.told()));
    }
    load.drain(&mut driver).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
    eprintln!("{test}: killed in time {stayed} times, too late {moved} times");
    assert!(stayed > 0);
}

/// The old process killed before it answers.
#[test]
fn an_old_process_that_is_killed_leaves_its_record() {
    let test = "an_old_process_that_is_killed_leaves_its_record";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let mut load = Load::new(29);
    load.run(&mut driver, STEP).unwrap();
    rig.serving.signal(Signal::STOP);
    let new = rig.successor(&[]);
    // Its connection waits in the queue of the old one's socket, which has the path, too.
    let control = rig.control().display().to_string();
    let asks = poll(SOON, || {
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
        let there = sockets.lines().filter(|line| line.ends_with(&control));
        (there.count() > 1).then_some(())
    });
    assert!(asks.is_some());
    rig.serving.kill();
    ends(new, 1, &["--take-over", "ended in the middle"]);
    rig.fresh();
    super::reconnect(&mut driver, &rig);
    load.run(&mut driver, STEP).unwrap();
    load.drain(&mut driver).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
}

/// Somebody who plays an old process and ends at every step.
#[test]
fn a_new_process_ends_when_the_old_one_does() {
    let test = "a_new_process_ends_when_the_old_one_does";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    rig.serving.kill();
    let _ = std::fs::remove_file(rig.control());
    let control = UnixListener::bind(rig.control()).unwrap();
    let device = UnixListener::bind(rig.scratch.path("other")).unwrap();
    for step in 0..3 {
        let new = rig.successor(&[]);
        // Whoever gets it makes it so for us, too.
        control.set_nonblocking(false).unwrap();
        let mut old = Pretender(control.accept().unwrap().0);
        old.0.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(old.read_line(), json!({"op": "hand-over", "version": 2}));
        old.line(&json!({"ok": true, "version": 2}));
        let offer = old.read();
        assert_eq!(offer["devices"][0]["id"], "disk", "{offer}");
        if step > 0 {
            for listener in [&device, &control] {
                let estate = br#"{"step":"estate"}"#;
                let header = [estate.len() as u32, 1].map(u32::to_le_bytes).concat();
                let bytes = [&header, &estate[..]].concat();
                send_with(
                    &old.0,
                    &bytes,
                    &[listener.as_fd().try_clone_to_owned().unwrap()],
                );
            }
            assert_eq!(old.read()["step"], "drain");
        }
        if step > 1 {
            old.send(&json!({"step": "device", "limits": null, "session": null}));
            assert_eq!(old.read()["step"], "ready");
        }
        drop(old);
        ends(new, 1, &["--take-over", "ended in the middle"]);
        assert!(rig.socket().exists() && rig.control().exists());
    }
}

/// Sends bytes, with descriptors beside the first.
pub(crate) fn send_with(to: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let slices = [std::io::IoSlice::new(bytes)];
    let sent = sendmsg(to, &slices, &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

/// Options that are not those of the running process.
#[test]
fn what_serves_something_else_takes_nothing_over() {
    let test = "what_serves_something_else_takes_nothing_over";
    let Some(rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    driver.request(0, &Op::Flush).unwrap();
    for (option, word) in [
        ("--num-queues=2", "another number of queues"),
        ("--queue-size=512", "another size of queues"),
        ("--read-only", "read-only in one"),
    ] {
        let new = rig.successor(&[option]);
        ends(new, 2, &["--take-over", word, "started with"]);
        driver.request(0, &Op::Flush).unwrap();
    }
    let mut pretender = rig.pretender();
    let mut offer = rig.offer(&driver.config(60).unwrap());
    offer["devices"][0]["geometry"] = json!("4096");
    pretender.send(&offer);
    let refused = pretender.read();
    assert!(
        refused["mistake"] == true && refused["error"].as_str().unwrap().contains("block size"),
        "{refused}"
    );
    let record = format!("--inflight-file={}", rig.scratch.file("r", b"").display());
    ends(rig.successor(&[&record]), 2, &["another --inflight-file"]);
    assert_eq!(std::fs::read(rig.scratch.path("r")).unwrap(), b"");
    // Another file of the same name.
    std::fs::copy(rig.scratch.path("disk"), rig.scratch.path("copy")).unwrap();
    std::fs::rename(rig.scratch.path("copy"), rig.scratch.path("disk")).unwrap();
    ends(rig.successor(&[]), 2, &["--take-over", "another disk"]);
    driver.request(0, &Op::Flush).unwrap();
}
