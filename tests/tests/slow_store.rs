//! The file system with injected latency that benches use as a share: whether
//! its operations really overlap, and whether its counts are true.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;

const MIB: usize = 1 << 20;
const PAUSE: Duration = Duration::from_millis(100);
/// What opening the file takes: LOOKUP, OPEN, and GETATTR if the kernel asks.
const TO_OPEN: u64 = 3;

/// `count` threads that each read once, all at a time, from a store whose
/// operations take `PAUSE`.
#[test]
fn operations_overlap_and_are_counted() {
    if !fuse::usable("operations_overlap_and_are_counted") {
        return;
    }
    let scratch = Scratch::new();
    let store = Fuse::mount_share(&scratch.path("mnt"), vec![7; MIB]).unwrap();
    let file = File::open(store.file()).unwrap();
    let behaviour = &store.behaviour;
    assert_eq!(behaviour.in_flight(), 0);
    behaviour.delay(PAUSE, PAUSE);
    for count in [1, 48] {
        behaviour.most_in_flight.store(0, SeqCst);
        let before = behaviour.operations.load(SeqCst);
        let start = Instant::now();
        thread::scope(|scope| {
            for reader in 0..count {
                let file = &file;
                scope.spawn(move || {
                    let mut block = [0; 4096];
                    file.read_exact_at(&mut block, reader * 4096).unwrap();
                    assert_eq!(block, [7; 4096]);
                });
            }
        });
        let took = start.elapsed();
        let operations = behaviour.operations.load(SeqCst) - before;
        let most = behaviour.most_in_flight.load(SeqCst);
        eprintln!("{count} reads: {operations} operations, {most} at a time, {took:?}");
        assert!(took >= PAUSE, "{took:?}");
        assert!(
            (count..count + TO_OPEN).contains(&operations),
            "{operations}"
        );
        assert!(most as u64 <= operations, "{most}");
        assert_eq!(most as u64, count, "all of them at a time");
        assert_eq!(behaviour.in_flight(), 0);
        // One after the other they would take 4.8 s.
        assert!(took < PAUSE * 24, "{took:?}");
    }
}

/// Whatever is drawn lies between the limits, and not always at the same place.
#[test]
fn latencies_are_those_asked_for() {
    if !fuse::usable("latencies_are_those_asked_for") {
        return;
    }
    let scratch = Scratch::new();
    let store = Fuse::mount_share(&scratch.path("mnt"), vec![7; MIB]).unwrap();
    let file = File::open(store.file()).unwrap();
    let (least, most) = (Duration::from_millis(1), Duration::from_millis(40));
    store.behaviour.delay(least, most);
    let mut block = [0; 4096];
    let mut times: Vec<Duration> = (0..32)
        .map(|_| {
            let start = Instant::now();
            file.read_exact_at(&mut block, 0).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    assert!(times[0] >= least, "{times:?}");
    // A quarter of the draws lies below 11 ms and a quarter above 30 ms.
    assert!(times[24] >= Duration::from_millis(25), "{times:?}");
    assert!(times[4] < Duration::from_millis(25), "{times:?}");
    // Writes and syncs wait as well.
    let file = File::options().write(true).open(store.file()).unwrap();
    store.behaviour.delay(PAUSE, PAUSE);
    for act in [
        |file: &File| file.write_all_at(&[1; 512], 0).unwrap(),
        |file: &File| file.sync_data().unwrap(),
    ] {
        let start = Instant::now();
        act(&file);
        assert!(start.elapsed() >= PAUSE);
    }
    assert_eq!(store.behaviour.content()[..512], [1; 512]);
}

/// One process with asynchronous direct reads has all of its depth in flight.
#[test]
fn a_share_takes_asynchronous_direct_reads() {
    let test = "a_share_takes_asynchronous_direct_reads";
    if !fuse::usable(test) || !have(test, &[Part::Fio]) {
        return;
    }
    let scratch = Scratch::new();
    let store = Fuse::mount_share(&scratch.path("mnt"), vec![7; 16 * MIB]).unwrap();
    let file = store.file();
    store.behaviour.delay(PAUSE, PAUSE);
    let job = include_str!("../../fio-profiles/azurefiles-randread-4k-qd64.fio");
    let mut fio = command(&Part::Fio.find().unwrap());
    fio.arg(scratch.file("job.fio", job.as_bytes()))
        .env("FIO_FILE", file)
        .env("FIO_SECONDS", "1");
    let mut fio = Process::start(&mut fio, Duration::from_secs(60)).unwrap();
    let ended = fio.wait(Duration::from_secs(50)).unwrap();
    fio.kill();
    assert!(ended.success(), "{}", fio.output().last(20));
    let most = store.behaviour.most_in_flight.load(SeqCst);
    assert!((48..=72).contains(&most), "{most} at a time");
}
