//! A real new process and a real old one with somebody between them, who knows
//! how far they are: either is killed at every step, told to end, or kept
//! waiting while an operator changes things.

use std::fs::OpenOptions;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Op};
use pericarp_tests::verified::{BLOCK, BLOCKS, Load};
use rustix::process::Signal;
use serde_json::json;

use super::failures::ends;
use super::rig::{Rig, SAID, SOON};

const STEP: Duration = Duration::from_millis(20);

/// Runs `act` under load, and the load for a while after that.
fn under_load<T>(driver: &mut Driver, load: &mut Load, act: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let driving = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                load.run(driver, STEP)?;
            }
            Ok::<_, String>(())
        });
        let result = {
            // Also when it panics.
            let _over = Over(&over);
            act()
        };
        driving.join().unwrap().unwrap();
        result
    })
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The load gets something done. How soon is not asked here.
fn goes_on(driver: &mut Driver, load: &mut Load, rig: &Rig, step: usize) {
    let before = load.done;
    let went_on = poll(SOON, || {
        let ran = load.run(driver, STEP);
        ran.unwrap_or_else(|e| panic!("{:?}: {e}\n{}", SAID.get(step), rig.told()));
        (load.done > before).then_some(())
    });
    assert!(went_on.is_some(), "{:?}\n{}", SAID.get(step), rig.told());
}

/// Waits until the old process has seen so many new ones end: until then it
/// refuses another.
fn noticed(rig: &Rig, times: usize) {
    let count = || {
        let lines = rig.serving.output().lines();
        lines.iter().filter(|l| l.contains("serving on")).count()
    };
    let noticed = poll(SOON, || (count() >= times).then_some(()));
    assert!(noticed.is_some(), "{times}\n{}", rig.told());
}

/// SIGKILL when each word has been said, and has not been heard.
#[test]
fn a_new_process_killed_at_every_step() {
    let test = "a_new_process_killed_at_every_step";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let mut load = Load::new(31);
    goes_on(&mut driver, &mut load, &rig, 0);
    let before = rig.descriptors();
    for step in 0..SAID.len() - 1 {
        under_load(&mut driver, &mut load, || {
            let (mut new, mut relay) = rig.relayed();
            relay.hold(step);
            new.kill();
            drop(relay);
            noticed(&rig, step);
        });
        goes_on(&mut driver, &mut load, &rig, step);
        assert!(rig.serving.ended().is_none(), "{step}");
    }
    // Nothing of all those is left.
    let left = poll(SOON, || (rig.descriptors() <= before).then_some(()));
    assert!(
        left.is_some(),
        "{before} descriptors, {}",
        rig.descriptors()
    );
    // And when the old one has let go: unheard, and a moment after it was heard.
    for step in [SAID.len() - 1, SAID.len()] {
        load.run(&mut driver, STEP).unwrap();
        let (mut new, mut relay) = rig.relayed();
        relay.carry(step.min(SAID.len() - 1));
        if step == SAID.len() {
            relay.carry(step);
        }
        assert_eq!(rig.serving.wait(SOON).and_then(|s| s.code()), Some(0));
        new.kill();
        rig.fresh();
        super::reconnect(&mut driver, &rig);
        goes_on(&mut driver, &mut load, &rig, step);
    }
    load.drain(&mut driver).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
}

/// The old process killed while a real new one waits for it.
#[test]
fn an_old_process_killed_at_every_step() {
    let test = "an_old_process_killed_at_every_step";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let mut load = Load::new(37);
    for step in 0..SAID.len() {
        goes_on(&mut driver, &mut load, &rig, step);
        let (new, mut relay) = rig.relayed();
        relay.hold(step);
        rig.serving.kill();
        if step == SAID.len() - 1 {
            // It has let go, and the new one has it all.
            relay.carry(SAID.len());
            drop(std::mem::replace(&mut rig.serving, new));
        } else {
            drop(relay);
            ends(new, 1, &["--take-over", "ended in the middle"]);
            rig.fresh();
            super::reconnect(&mut driver, &rig);
        }
    }
    goes_on(&mut driver, &mut load, &rig, SAID.len());
    load.drain(&mut driver).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
}

/// Whoever tells the new process to end does not want the front ends to end.
#[test]
fn a_new_process_told_to_end_leaves_the_old_one_serving() {
    let test = "a_new_process_told_to_end_leaves_the_old_one_serving";
    let Some(mut rig) = Rig::start(test, &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let mut load = Load::new(41);
    // While it waits for each word of the old one but the last.
    for (times, step) in [1, 3, 6].into_iter().enumerate() {
        under_load(&mut driver, &mut load, || {
            let (mut new, mut relay) = rig.relayed();
            relay.hold(step);
            new.signal(Signal::TERM);
            ends(new, 1, &["--take-over", "is ending"]);
            drop(relay);
            noticed(&rig, times + 1);
        });
        goes_on(&mut driver, &mut load, &rig, step);
        assert!(rig.serving.ended().is_none(), "{step}");
    }
    // The signal comes before the new one is ready, and the word after that.
    let (mut new, mut relay) = rig.relayed();
    relay.hold(5);
    new.signal(Signal::STOP);
    new.signal(Signal::TERM);
    relay.carry(7);
    new.signal(Signal::CONT);
    ends(new, 1, &["--take-over", "is ending"]);
    goes_on(&mut driver, &mut load, &rig, 7);
    load.drain(&mut driver).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
}

/// What an operator changes on the way is there after it, or was refused.
#[test]
fn what_changes_on_the_way_is_not_lost() {
    let Some(mut rig) = Rig::start("what_changes_on_the_way_is_not_lost", &[]) else {
        return;
    };
    let mut driver = rig.connect(true);
    let size = (BLOCK * BLOCKS) as u64;
    let (mut new, mut relay) = rig.relayed();
    // The new one has opened the disk by now.
    relay.hold(2);
    let disk = OpenOptions::new()
        .write(true)
        .open(rig.scratch.path("disk"));
    disk.unwrap().set_len(size * 2).unwrap();
    assert_eq!(rig.ask(&json!({"op": "resize"}))["size"], size * 2);
    let set = rig.ask(&json!({"op": "limits", "iops": 7000}));
    assert_eq!(set["limits"]["iops"], 7000, "{set}");
    relay.hold(7);
    for request in [json!({"op": "limits", "iops": 9}), json!({"op": "resize"})] {
        let refused = rig.ask(&request);
        assert_eq!(refused["ok"], false, "{refused}");
        let error = refused["error"].as_str().unwrap();
        assert!(error.contains("ask again"), "{error}");
    }
    assert_eq!(rig.ask(&json!({"op": "version"}))["ok"], true);
    relay.carry(SAID.len());
    std::mem::swap(&mut rig.serving, &mut new);
    assert_eq!(new.wait(SOON).and_then(|s| s.code()), Some(0));
    assert_eq!(driver.sectors().unwrap(), size * 2 / 512);
    let last = Op::Read {
        sector: size * 2 / 512 - 1,
        len: 512,
    };
    assert_eq!(driver.request(0, &last).unwrap().status, 0);
    assert_eq!(rig.ask(&json!({"op": "limits"}))["limits"]["iops"], 7000);
    // Nor after one that failed.
    let (mut new, mut relay) = rig.relayed();
    relay.hold(7);
    new.kill();
    drop(relay);
    let set = poll(SOON, || {
        let set = rig.ask(&json!({"op": "limits", "iops": 8000}));
        (set["ok"] == true).then_some(())
    });
    assert!(set.is_some());
}
