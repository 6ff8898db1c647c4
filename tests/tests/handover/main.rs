//! `pericarp-block` hands its front ends over to new processes under verified
//! load: no disconnect, no error, no request lost or done twice. And whatever
//! fails on the way leaves the old process serving.
//! `PERICARP_HANDOVERS` makes more of them, and then judges the pauses, too.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod failures;
mod front_ends;
mod qemu;
mod rig;
mod steps;
mod uml;

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::verified::Load;
use rig::Rig;
use rustix::process::Signal;
use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

/// The pause that is promised.
const PROMISE: Duration = Duration::from_millis(100);

/// How many, and whether the pauses are judged.
fn count(default: usize) -> (usize, bool) {
    let named = std::env::var("PERICARP_HANDOVERS").ok();
    match named.and_then(|n| n.parse().ok()) {
        Some(count) => (count, true),
        None => (default, false),
    }
}

/// Median and longest.
fn summary(mut pauses: Vec<Duration>) -> (Duration, Duration) {
    pauses.sort();
    (
        pauses[pauses.len() / 2],
        pauses.last().copied().unwrap_or_default(),
    )
}

fn handed_over_under_load(test: &str, inflight: bool, extra: &[&str]) {
    let Some(mut rig) = Rig::start(test, extra) else {
        return;
    };
    let (count, judged) = count(5);
    let mut driver = rig.connect(inflight);
    let mut load = Load::new(5);
    let before = std::fs::metadata(rig.socket()).unwrap().ino();
    let mut seen = Vec::new();
    let mut felt = Vec::new();
    for round in 0..count {
        let over = AtomicBool::new(false);
        load.longest = Duration::ZERO;
        let pause = std::thread::scope(|scope| {
            let driving = scope.spawn(|| {
                // A good while after the end: what comes late is seen, too.
                let mut extra = 3;
                while extra > 0 {
                    extra -= i32::from(over.load(Ordering::Relaxed));
                    load.run(&mut driver, Duration::from_millis(20))?;
                }
                Ok::<_, String>(())
            });
            std::thread::sleep(Duration::from_millis(30));
            let (pause, _) = rig.hand_over();
            over.store(true, Ordering::Relaxed);
            let ran = driving.join().unwrap();
            ran.unwrap_or_else(|e| panic!("hand-over {round}: {e}\n{}", rig.told()));
            pause.unwrap()
        });
        seen.push(pause);
        felt.push(load.longest);
        // The driver's connection is the one it had.
        driver.sectors().unwrap();
    }
    let drained = load.drain(&mut driver);
    drained.unwrap_or_else(|e| panic!("{e}\n{}", rig.told()));
    assert_eq!(std::fs::metadata(rig.socket()).unwrap().ino(), before);
    let ((middle, longest), (gap, longest_gap)) = (summary(seen), summary(felt));
    eprintln!(
        "{test}: {count} hand-overs, {} requests; queues stood still for {middle:?}, at most \
         {longest:?}; the driver saw no completion for {gap:?}, at most {longest_gap:?}",
        load.done
    );
    if judged {
        assert!(longest < PROMISE, "{longest:?}");
    }
    // The record of requests in flight came along, with its locks.
    load.run(&mut driver, Duration::from_millis(100)).unwrap();
    rig.serving.kill();
    rig.fresh();
    reconnect(&mut driver, &rig);
    let ran = load.run(&mut driver, Duration::from_millis(100));
    ran.unwrap_or_else(|e| panic!("after the kill: {e}\n{}", rig.told()));
    load.drain(&mut driver).unwrap();
    load.compare(&rig.scratch.path("disk")).unwrap();
    // And who took over ends as anybody does.
    rig.hand_over();
    rig.serving.signal(Signal::TERM);
    assert_eq!(rig.serving.wait(rig::SOON).unwrap().code(), Some(0));
    assert!(!rig.socket().exists() && !rig.control().exists());
}

fn reconnect(driver: &mut Driver, rig: &Rig) {
    let mut last = String::new();
    let connected = pericarp_tests::bounded::poll(rig::SOON, || {
        let tried = driver.reconnect(&rig.socket());
        tried.map_err(|e| last = e.to_string()).ok()
    });
    assert!(connected.is_some(), "{last}\n{}", rig.told());
}

#[test]
fn handed_over_with_a_record_of_the_front_ends() {
    let test = "handed_over_with_a_record_of_the_front_ends";
    handed_over_under_load(test, true, &[]);
}

#[test]
fn handed_over_with_a_record_in_a_file() {
    let test = "handed_over_with_a_record_in_a_file";
    handed_over_under_load(test, false, &["--inflight-file=@/record"]);
}

#[test]
fn handed_over_by_the_synchronous_engine() {
    let test = "handed_over_by_the_synchronous_engine";
    handed_over_under_load(test, true, &["--io-engine=sync", "--cache=buffered"]);
}

/// VIRTIO_BLK_F_CONFIG_WCE.
const CONFIG_WCE: u64 = 1 << 11;

/// What was set while the old process ran is set in the new one.
#[test]
fn what_was_set_stays_set() {
    let Some(mut rig) = Rig::start("what_was_set_stays_set", &["--num-queues=2"]) else {
        return;
    };
    let setup = Setup {
        queues: 2,
        extra: CONFIG_WCE,
        ..Setup::default()
    };
    let mut driver = Driver::connect(&rig.socket(), &setup).unwrap();
    assert_eq!(driver.config(60).unwrap()[32], 1, "on at first");
    let writable = VhostUserConfigFlags::WRITABLE;
    driver.frontend.set_config(32, writable, &[0]).unwrap();
    let limits = json!({"op": "limits", "iops": 5000, "bandwidth": 1_000_000});
    let limits = rig.ask(&limits)["limits"].clone();
    driver.enable(1, false).unwrap();
    for _ in 0..2 {
        rig.hand_over();
        assert_eq!(driver.config(60).unwrap()[32], 0, "off");
        assert_eq!(rig.ask(&json!({"op": "limits"}))["limits"], limits);
        driver.request(0, &Op::Flush).unwrap();
        // The disabled queue is disabled, and starts where it was.
        driver.enable(1, true).unwrap();
        driver.request(1, &Op::Flush).unwrap();
        driver.enable(1, false).unwrap();
    }
    assert_eq!(driver.stop(0).unwrap(), driver.rings[0].used_idx());
}

/// Devices without a front end, and front ends that come later.
#[test]
fn idle_devices_are_handed_over() {
    let Some(mut rig) = Rig::start("idle_devices_are_handed_over", &[]) else {
        return;
    };
    assert_eq!(rig.hand_over().0, None);
    let mut driver = rig.connect(true);
    driver.request(0, &Op::Flush).unwrap();
    assert!(rig.hand_over().0.is_some());
    driver.request(0, &Op::Flush).unwrap();
    drop(driver);
    rig.connect(true).request(0, &Op::Flush).unwrap();
}
