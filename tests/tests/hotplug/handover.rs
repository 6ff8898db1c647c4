//! A program whose disks have come and gone is taken over like any other: with
//! those there are, in the order in which they came.

use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Op};
use pericarp_tests::process::Process;
use pericarp_tests::verified::Load;
use rustix::process::Signal;
use serde_json::json;

use crate::rig::{Rig, SOON, exchange, keys, start};

const STEP: Duration = Duration::from_millis(100);

/// Starts a successor that serves these.
fn successor(rig: &Rig, ids: &[&str]) -> Process {
    let mut options: Vec<_> = ids.iter().map(|id| keys(&rig.scratch, id)).collect();
    options.push(format!("--take-over={}", rig.control().display()));
    start(&rig.scratch, &options)
}

/// Hands over while these front ends are under load.
fn hand_over(rig: &mut Rig, ids: &[&str], busy: &mut [(&str, Driver, Load)]) {
    let old = std::thread::scope(|scope| {
        for (_, driver, load) in busy.iter_mut() {
            scope.spawn(move || load.run(driver, 10 * STEP).unwrap());
        }
        std::thread::sleep(STEP);
        let new = successor(rig, ids);
        let mut old = std::mem::replace(&mut rig.serving, new);
        let status = old.wait(SOON);
        let told = format!("{}\n--\n{}", old.output().last(9), rig.told());
        assert_eq!(status.and_then(|s| s.code()), Some(0), "{told}");
        old
    });
    assert!(old.output().find("handed over").is_some());
    for (id, driver, load) in busy {
        load.run(driver, STEP).unwrap();
        load.drain(driver).unwrap();
        load.compare(&rig.scratch.path(id)).unwrap();
    }
}

#[test]
fn disks_that_came_later_are_handed_over() {
    let Some(mut rig) = Rig::start("disks_that_came_later_are_handed_over", &[]) else {
        return;
    };
    rig.add("b", "").is_done();
    let drive = |rig: &Rig, id: &'static str, seed| (id, rig.connect(id), Load::new(seed));
    let mut busy = vec![drive(&rig, "a", 1), drive(&rig, "b", 2)];
    // Who does not know of it is told so, and nothing has happened.
    let mut ignorant = successor(&rig, &["a"]);
    assert_eq!(ignorant.wait(SOON).unwrap().code(), Some(2));
    // What it said may arrive a moment after its end.
    let said = poll(SOON, || ignorant.output().find("1 devices instead of 2"));
    assert!(said.is_some(), "{}", ignorant.output().last(5));
    hand_over(&mut rig, &["a", "b"], &mut busy);
    assert_eq!(rig.ids(), ["a", "b"]);
    // The new process adds and removes as the old one did: the third disk comes
    // to the place of the first, and after the second.
    drop(busy.remove(0));
    assert!(poll(SOON, || (rig.remove("a").code == Some(0)).then_some(())).is_some());
    assert!(!rig.socket("a").exists());
    rig.add("c", "").is_done();
    busy.push(drive(&rig, "c", 3));
    assert_eq!(rig.ids(), ["b", "c"]);
    hand_over(&mut rig, &["b", "c"], &mut busy);
    for (_, driver, _) in &mut busy {
        driver.request(0, &Op::Flush).unwrap();
    }
    rig.serving.signal(Signal::TERM);
    assert_eq!(rig.serving.wait(SOON).unwrap().code(), Some(0));
    assert!(!rig.socket("b").exists() && !rig.socket("c").exists());
}

/// While somebody takes over, nothing comes or goes.
#[test]
fn a_hand_over_and_a_change_exclude_each_other() {
    let test = "a_hand_over_and_a_change_exclude_each_other";
    let Some(rig) = Rig::start(test, &[]) else {
        return;
    };
    let pretender = rig.peer();
    let line = json!({"op": "hand-over", "version": 2});
    assert_eq!(exchange(&pretender, &line, &[])["ok"], true);
    rig.add("b", "").is_refused(1, &["a hand-over goes on"]);
    assert!(!rig.socket("b").exists());
    rig.remove("a").is_refused(1, &["a hand-over goes on"]);
    drop(pretender);
    let added = poll(SOON, || (rig.add("b", "").code == Some(0)).then_some(()));
    assert!(added.is_some(), "{}", rig.told());
    rig.connect("a").request(0, &Op::Flush).unwrap();
}
