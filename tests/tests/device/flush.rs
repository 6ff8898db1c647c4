//! Flushes and the write cache, on a file system that counts and delays syncs.

use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::Duration;

use pericarp_tests::frontend::{Driver, Op, STATUS};
use pericarp_tests::fuse::{self, Behaviour, Fuse};
use pericarp_tests::peer::{Backend, Cache, Kind};
use pericarp_tests::scratch::Scratch;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::{F_CONFIG_WCE, F_FLUSH, IOERR, MIB, OK, connect, connect_with, options, start, status};

const LIMIT: Duration = Duration::from_secs(20);

struct Rig {
    // In this order: the backend lets go of the file first.
    backend: Backend,
    mount: Fuse,
    _scratch: Scratch,
}

impl Rig {
    fn new(test: &str, queues: u16) -> Option<Self> {
        if !Kind::Pericarp.usable(test) || !fuse::usable(test) {
            return None;
        }
        let scratch = Scratch::new();
        let mount = Fuse::mount(&scratch.path("mnt"), vec![1; MIB as usize]).unwrap();
        let mut options = options(Cache::Buffered, "auto");
        options.num_queues = queues;
        options.extra.push("--workers=1".into());
        let backend = start(&scratch, &mount.file(), &options);
        Some(Rig {
            backend,
            mount,
            _scratch: scratch,
        })
    }

    fn behaviour(&self) -> &Behaviour {
        &self.mount.behaviour
    }

    fn syncs(&self) -> u64 {
        self.behaviour().syncs.load(SeqCst)
    }

    fn durable(&self) -> u64 {
        self.behaviour().durable_writes.load(SeqCst)
    }

    /// Waits until the file system has seen so many syncs begin.
    fn sync_begun(&self, count: u64) {
        let begun = pericarp_tests::bounded::poll(LIMIT, || (self.syncs() >= count).then_some(()));
        assert!(begun.is_some(), "no sync");
    }
}

/// Offers requests in these slots at once.
fn offer(driver: &mut Driver, queue: usize, op: &Op, slots: std::ops::Range<u64>) {
    for slot in slots {
        let chain = driver.prepare(slot, op).unwrap();
        let head = (slot % 32) as u16 * 4;
        driver.place(queue, head, &chain);
        driver.rings[queue].queue(head);
    }
    driver.rings[queue].publish();
    driver.rings[queue].notify();
}

#[test]
fn flushes_share_a_sync() {
    let Some(rig) = Rig::new("flushes_share_a_sync", 1) else {
        return;
    };
    let mut driver = connect(&rig.backend);
    rig.behaviour().sync_ms.store(200, SeqCst);
    offer(&mut driver, 0, &Op::Flush, 0..32);
    driver.rings[0].wait(32, LIMIT).unwrap();
    assert!((0..32).all(|slot| status(&driver, slot) == OK));
    assert_eq!(rig.syncs(), 1, "for 32 flushes offered at once");
}

/// A flush that comes while a sync runs is not served by that one.
#[test]
fn a_flush_waits_for_the_next_sync() {
    let Some(rig) = Rig::new("a_flush_waits_for_the_next_sync", 1) else {
        return;
    };
    let mut driver = connect(&rig.backend);
    rig.behaviour().sync_ms.store(500, SeqCst);
    offer(&mut driver, 0, &Op::Flush, 0..1);
    rig.sync_begun(1);
    offer(&mut driver, 0, &Op::Flush, 1..32);
    driver.rings[0].wait(32, LIMIT).unwrap();
    assert_eq!(
        rig.syncs(),
        2,
        "one that ran, one for the 31 that came then"
    );
}

#[test]
fn flushes_of_several_queues_share_a_sync() {
    let Some(rig) = Rig::new("flushes_of_several_queues_share_a_sync", 4) else {
        return;
    };
    let mut driver = connect_with(&rig.backend, |setup| setup.queues = 4);
    rig.behaviour().sync_ms.store(500, SeqCst);
    offer(&mut driver, 0, &Op::Flush, 0..1);
    rig.sync_begun(1);
    for queue in 1..4 {
        let first = queue as u64 * 8;
        offer(&mut driver, queue, &Op::Flush, first..first + 8);
    }
    for queue in 1..4 {
        driver.rings[queue].wait(8, LIMIT).unwrap();
    }
    assert_eq!(rig.syncs(), 2);
}

#[test]
fn a_failed_sync_fails_every_flush_that_waits() {
    let Some(rig) = Rig::new("a_failed_sync_fails_every_flush_that_waits", 1) else {
        return;
    };
    let mut driver = connect(&rig.backend);
    rig.behaviour().sync_ms.store(100, SeqCst);
    rig.behaviour().sync_error.store(5, SeqCst);
    offer(&mut driver, 0, &Op::Flush, 0..32);
    driver.rings[0].wait(32, LIMIT).unwrap();
    assert!((0..32).all(|slot| status(&driver, slot) == IOERR));
    rig.behaviour().sync_error.store(0, SeqCst);
    assert_eq!(driver.request(0, &Op::Flush).unwrap().status, OK);
}

#[test]
fn reads_do_not_wait_for_a_sync() {
    let Some(rig) = Rig::new("reads_do_not_wait_for_a_sync", 1) else {
        return;
    };
    let mut driver = connect(&rig.backend);
    rig.behaviour().sync_ms.store(3000, SeqCst);
    offer(&mut driver, 0, &Op::Flush, 0..16);
    rig.sync_begun(1);
    let (sector, len) = (0, 4096);
    offer(&mut driver, 0, &Op::Read { sector, len }, 16..32);
    let first = driver.rings[0].wait(16, LIMIT).unwrap();
    let reads: Vec<_> = first.iter().map(|used| used.head / 4).collect();
    assert!(reads.iter().all(|slot| *slot >= 16), "{reads:?}");
    assert_eq!(driver.peek(STATUS(0), 1).unwrap(), [0xee]);
    driver.rings[0].wait(16, LIMIT).unwrap();
    assert_eq!(status(&driver, 0), OK);
}

fn set_cache(driver: &mut Driver, on: u8) {
    let flags = VhostUserConfigFlags::WRITABLE;
    driver.frontend.set_config(32, flags, &[on]).unwrap();
}

fn write(sector: u64) -> Op {
    let data = vec![7; 512];
    Op::Write { sector, data }
}

/// How many of 16 writes are durable when they end: the file system is told by
/// RWF_DSYNC.
fn durable_writes(rig: &Rig, driver: &mut Driver) -> u64 {
    let before = rig.durable();
    for sector in 0..16 {
        assert_eq!(driver.request(0, &write(sector)).unwrap().status, OK);
    }
    rig.durable() - before
}

#[test]
fn the_write_cache_can_be_turned_off_and_on() {
    let Some(rig) = Rig::new("the_write_cache_can_be_turned_off_and_on", 1) else {
        return;
    };
    let mut driver = connect(&rig.backend);
    assert_ne!(driver.features & F_CONFIG_WCE, 0);
    for (on, durable) in [(1, 0), (0, 16), (1, 0), (0, 16)] {
        set_cache(&mut driver, on);
        assert_eq!(driver.config(60).unwrap()[32], on);
        assert_eq!(durable_writes(&rig, &mut driver), durable, "cache {on}");
    }
}

#[test]
fn the_write_cache_follows_what_the_driver_took() {
    let Some(rig) = Rig::new("the_write_cache_follows_what_the_driver_took", 1) else {
        return;
    };
    // No way to flush: every write must be durable at once.
    for (without, durable) in [(F_FLUSH | F_CONFIG_WCE, 16), (F_CONFIG_WCE, 0), (0, 0)] {
        let mut driver = connect_with(&rig.backend, |setup| setup.without = without);
        assert_eq!(driver.features & without, 0);
        assert_eq!(durable_writes(&rig, &mut driver), durable, "{without:#x}");
    }
}

/// What is written after the answer to SET_CONFIG is written through, however
/// much else is going on.
#[test]
fn the_write_cache_changes_under_load() {
    let Some(rig) = Rig::new("the_write_cache_changes_under_load", 2) else {
        return;
    };
    let mut driver = connect_with(&rig.backend, |setup| setup.queues = 2);
    for round in 0..20u8 {
        offer(&mut driver, 1, &write(100), 0..16);
        set_cache(&mut driver, round % 2);
        let before = rig.durable();
        assert_eq!(driver.request(0, &write(1)).unwrap().status, OK);
        if round % 2 == 0 {
            assert!(rig.durable() > before, "round {round}");
        }
        driver.rings[1].wait(16, LIMIT).unwrap();
    }
    // Nothing is left of the load: the last round turned the cache on.
    sleep(Duration::from_millis(50));
    assert_eq!(durable_writes(&rig, &mut driver), 0);
}
