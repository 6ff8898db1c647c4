//! Files whose reads make the kernel wait, and whose writes fail.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pericarp_tests::frontend::Op;
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::peer::{Cache, Kind};
use pericarp_tests::scratch::Scratch;

use super::{IOERR, MIB, OK, WRITE_ZEROES, connect_with, options, ranges, start, status};

/// Four workers a CPU is the kernel's own limit, 8 on two CPUs.
#[test]
fn sixty_four_slow_reads_go_on_at_a_time() {
    let test = "sixty_four_slow_reads_go_on_at_a_time";
    if !Kind::Pericarp.usable(test) || !fuse::usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let mount = Fuse::mount(&scratch.path("mnt"), vec![9; MIB as usize]).unwrap();
    mount.behaviour.read_ms.store(400, SeqCst);
    let backend = start(&scratch, &mount.file(), &options(Cache::Buffered, "uring"));
    let mut driver = connect_with(&backend, |setup| setup.queue_size = 256);
    for slot in 0..64 {
        let sector = slot * 8;
        let chain = driver.prepare(slot, &Op::Read { sector, len: 4096 });
        driver.place(0, slot as u16 * 4, &chain.unwrap());
        driver.rings[0].queue(slot as u16 * 4);
    }
    driver.rings[0].publish();
    driver.rings[0].notify();
    driver.rings[0].wait(64, Duration::from_secs(30)).unwrap();
    assert!((0..64).all(|slot| status(&driver, slot) == OK));
    let most = mount.behaviour.most_reading.load(SeqCst);
    eprintln!("{test}: {most} at a time");
    assert!(most >= 48, "{most} reads at a time");
}

#[test]
fn a_full_disk_is_an_error_and_not_the_end() {
    const ENOSPC: i32 = 28;
    let test = "a_full_disk_is_an_error_and_not_the_end";
    if !Kind::Pericarp.usable(test) || !fuse::usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let mount = Fuse::mount(&scratch.path("mnt"), vec![9; MIB as usize]).unwrap();
    for engine in ["uring", "sync"] {
        let backend = start(&scratch, &mount.file(), &options(Cache::Buffered, engine));
        let mut driver = connect_with(&backend, |_| {});
        let op = Op::Write {
            sector: 8,
            data: vec![1; 4096],
        };
        for (errno, want) in [(ENOSPC, IOERR), (0, OK)] {
            mount.behaviour.write_error.store(errno, SeqCst);
            assert_eq!(driver.request(0, &op).unwrap().status, want, "{engine}");
            // Zeroes have to be written here, too.
            let status = ranges(&mut driver, WRITE_ZEROES, &[(64, 8, 0)]);
            assert_eq!(status, want, "{engine}");
        }
    }
}
