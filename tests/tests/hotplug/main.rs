//! Disks that come to and leave a running `pericarp-block`: served and verified
//! while another one is under load, removed without a trace, added again.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod handover;
mod kinds;
mod refusals;
mod rig;

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::client::Client;
use pericarp_tests::frontend::Op;
use pericarp_tests::parts::Part;
use pericarp_tests::process::{Process, command};
use pericarp_tests::verified::Load;
use rig::{Rig, SOON, listens};
use rustix::process::Signal;
use serde_json::json;

/// A while of load.
const STEP: Duration = Duration::from_millis(150);

/// Does something while disk `a` is under verified load, which must not feel it.
fn beside_a_load(rig: &Rig, act: impl FnOnce()) {
    let mut driver = rig.connect("a");
    let over = AtomicBool::new(false);
    let done = std::thread::scope(|scope| {
        let driving = scope.spawn(|| {
            let mut load = Load::new(3);
            while !over.load(Ordering::Relaxed) {
                load.run(&mut driver, Duration::from_millis(20))?;
            }
            load.drain(&mut driver)?;
            load.compare(&rig.scratch.path("a"))?;
            Ok::<_, String>(load.done)
        });
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let end = Over(&over);
        act();
        drop(end);
        driving.join().unwrap()
    });
    let done = done.unwrap_or_else(|e| panic!("disk a: {e}\n{}", rig.told()));
    assert!(done > 100, "disk a got {done} requests done");
}

fn comes_and_goes(test: &str, extra: &[&str], keys: &str) {
    let Some(mut rig) = Rig::start(test, extra) else {
        return;
    };
    let mut load = Load::new(7);
    beside_a_load(&rig, || {
        for round in 0..3 {
            let said = rig.add("b", &format!(",serial=S{round}{keys}"));
            said.is_done();
            assert_eq!(said.answer["size"], 16 << 20);
            assert_eq!(rig.ids(), ["a", "b"]);
            let mut driver = rig.connect("b");
            let id = driver.request(0, &Op::GetId { len: 20 }).unwrap();
            assert_eq!(&id.data[..2], [b'S', b'0' + round]);
            // What earlier rounds wrote is compared, too.
            let ran = load.run(&mut driver, STEP);
            ran.unwrap_or_else(|e| panic!("{round}: {e}\n{}", rig.told()));
            // It has its own statistics, limits and size.
            let stats = rig.ask(&json!({"op": "stats", "device": "b"}));
            let reads = &stats["devices"][0]["queues"][0]["requests"]["read"]["count"];
            assert!(reads.as_u64() > Some(0), "{stats}");
            let metrics = rig.ask(&json!({"op": "metrics"}));
            assert!(
                metrics["metrics"]
                    .as_str()
                    .unwrap()
                    .contains("device=\"b\"")
            );
            let limits = json!({"op": "limits", "device": "b", "iops": 100_000});
            assert_eq!(rig.ask(&limits)["ok"], true);
            let resized = rig.ask(&json!({"op": "resize", "device": "b"}));
            assert_eq!(resized["size"], 16 << 20, "{resized}");
            // Nobody pulls it out from under its front end.
            rig.remove("b")
                .is_refused(2, &["\"b\"", "front end is connected"]);
            load.run(&mut driver, Duration::from_millis(20)).unwrap();
            load.drain(&mut driver).unwrap();
            drop(driver);
            // The session notices a moment later.
            let gone = poll(SOON, || (rig.remove("b").code == Some(0)).then_some(()));
            assert!(gone.is_some(), "{}", rig.told());
            assert!(!rig.socket("b").exists());
            assert_eq!(rig.ids(), ["a"]);
            load.compare(&rig.scratch.path("b")).unwrap();
        }
    });
    rig.add("b", "").is_done();
    rig.serving.signal(Signal::TERM);
    assert_eq!(rig.serving.wait(SOON).unwrap().code(), Some(0));
    let left = ["a.sock", "b.sock", "control"].map(|name| rig.scratch.path(name).exists());
    assert_eq!(left, [false; 3], "sockets are removed at the end");
}

#[test]
fn a_disk_comes_and_goes_beside_a_load() {
    let test = "a_disk_comes_and_goes_beside_a_load";
    comes_and_goes(test, &["--workers=2"], ",num-queues=2");
}

#[test]
fn a_disk_comes_and_goes_with_the_synchronous_engine() {
    let test = "a_disk_comes_and_goes_with_the_synchronous_engine";
    comes_and_goes(test, &["--io-engine=sync"], ",cache=buffered");
}

/// By force, in the middle of verified I/O: the front end sees the end of its
/// connection, every request that was answered is on the disk.
#[test]
fn a_disk_is_taken_away_by_force() {
    let Some(rig) = Rig::start("a_disk_is_taken_away_by_force", &[]) else {
        return;
    };
    beside_a_load(&rig, || {
        rig.add("b", "").is_done();
        let mut driver = rig.connect("b");
        let mut load = Load::new(11);
        load.run(&mut driver, STEP).unwrap();
        let said = rig.client(&["--remove-device=b", "--force"]);
        said.is_done();
        // Queues were drained before the device went: all that was started is
        // back.
        load.drain(&mut driver).unwrap();
        load.compare(&rig.scratch.path("b")).unwrap();
        let limit = Some(Duration::from_secs(10));
        driver.stream.set_read_timeout(limit).unwrap();
        assert_eq!((&driver.stream).read(&mut [0]).unwrap(), 0, "hung up");
        assert!(!listens(&rig.socket("b")));
        // And it comes again while the old connection still exists.
        rig.add("b", "").is_done();
        rig.connect("b").request(0, &Op::Flush).unwrap();
    });
    // The first disk may leave, too, and others go on without it.
    assert!(poll(SOON, || (rig.remove("a").code == Some(0)).then_some(())).is_some());
    assert!(!rig.socket("a").exists());
    assert_eq!(rig.ids(), ["b"]);
    rig.connect("b").request(0, &Op::Flush).unwrap();
    rig.add("a", "").is_done();
    assert_eq!(rig.ids(), ["b", "a"]);
    rig.connect("a").request(0, &Op::Flush).unwrap();
}

/// 200 rounds, each with a front end that does I/O.
#[test]
fn nothing_of_a_removed_disk_stays() {
    let Some(rig) = Rig::start("nothing_of_a_removed_disk_stays", &["--workers=2"]) else {
        return;
    };
    let round = |number: u32| {
        rig.add("b", ",num-queues=2,cache=buffered").is_done();
        let mut client = Client::connect(&rig.socket("b"), 2, 8).unwrap();
        for queue in 0..2 {
            client
                .write(queue, 4096, &number.to_le_bytes().repeat(128))
                .unwrap();
            client.flush(queue).unwrap();
            client.read(queue, 4096, 8192).unwrap();
        }
        let force = if number.is_multiple_of(2) {
            rig.client(&["--remove-device=b", "--force"])
        } else {
            drop(client);
            poll(SOON, || {
                Some(rig.remove("b")).filter(|said| said.code == Some(0))
            })
            .unwrap()
        };
        force.is_done();
    };
    // Arenas and stacks are there after a while.
    (0..20).for_each(round);
    let before = rig.settled();
    (20..220).for_each(round);
    let settled = poll(SOON, || {
        let after = rig.holds();
        (after.0 == before.0 && after.1 == before.1).then_some(after)
    });
    let after = settled.unwrap_or_else(|| panic!("{before:?} -> {:?}", rig.holds()));
    eprintln!("descriptors, threads, KiB: {before:?} -> {after:?}");
    assert!(after.2 < before.2 + 512, "{before:?} -> {after:?}");
    rig.connect("a").request(0, &Op::Flush).unwrap();
}

/// A directory that a socket of the start lies in stays within reach when that
/// is gone, and only such directories are.
#[test]
fn sockets_in_other_directories() {
    let Some(rig) = Rig::start("sockets_in_other_directories", &[]) else {
        return;
    };
    let directory = rig.scratch.path("near");
    std::fs::create_dir(&directory).unwrap();
    std::fs::create_dir(rig.scratch.path("far")).unwrap();
    // Another program, with its first disk's socket in a directory of its own.
    let near = |id: &str| directory.join(format!("{id}.sock"));
    let file = |id: &str| rig.scratch.path(id).display().to_string();
    let first = format!(
        "--device=id=x,file={},socket={}",
        file("b"),
        near("x").display()
    );
    let control = directory.with_file_name("other");
    let mut program = command(&Part::PERICARP_BLOCK.find().unwrap());
    program
        .arg(first)
        .arg(format!("--control-path={}", control.display()));
    let mut serving = Process::start(&mut program, Duration::from_secs(60)).unwrap();
    assert!(poll(SOON, || control.exists().then_some(())).is_some());
    let ask = |options: &[&str]| {
        let mut client = command(&Part::PERICARP_BLOCK.find().unwrap());
        client.arg(format!("--control-path={}", control.display()));
        let output = client.args(options).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    assert_eq!(ask(&["--remove-device=x"])["socket"], "removed");
    for _ in 0..2 {
        let again = format!(
            "--add-device=id=x,file={},socket={}",
            file("b"),
            near("x").display()
        );
        ask(&[&again]);
        assert_eq!(ask(&["--remove-device=x"])["socket"], "removed");
        assert!(!near("x").exists());
    }
    let far = rig.scratch.path("far/y.sock");
    let other = format!(
        "--add-device=id=y,file={},socket={}",
        file("b"),
        far.display()
    );
    for _ in 0..2 {
        // The dead socket that stays is replaced.
        ask(&[&other]);
        assert!(listens(&far));
        assert_eq!(ask(&["--remove-device=y", "--force"])["socket"], "left");
        assert!(far.exists() && !listens(&far));
    }
    let last = format!(
        "--add-device=id=z,file={},socket={}",
        file("b"),
        near("z").display()
    );
    ask(&[&last]);
    serving.signal(Signal::TERM);
    assert_eq!(serving.wait(SOON).unwrap().code(), Some(0));
    assert!(!near("z").exists() && !control.exists());
}
