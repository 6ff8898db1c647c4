//! DISCARD and WRITE_ZEROES: what becomes of the data, and of the host's disk
//! space.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pericarp_tests::frontend::Op;
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::model::{Model, SECTOR, Sequence};
use pericarp_tests::peer::{Cache, Kind};
use pericarp_tests::scratch::Scratch;

use super::{
    DISCARD, F_DISCARD, F_WRITE_ZEROES, IOERR, MIB, OK, WRITE_ZEROES, connect, options, ranges,
    start,
};

const SIZE: u64 = 8 * MIB;
const VARIANTS: [(Cache, &str); 4] = [
    (Cache::Direct, "uring"),
    (Cache::Direct, "sync"),
    (Cache::Buffered, "uring"),
    (Cache::Buffered, "sync"),
];

/// A disk without a zero byte, and what it must hold.
fn full(scratch: &Scratch, name: &str) -> (std::path::PathBuf, Model) {
    let path = scratch.file(name, &vec![0x5a; SIZE as usize]);
    File::open(&path).unwrap().sync_all().unwrap();
    let mut model = Model::zeroed(SIZE);
    model.write(0, &vec![0x5a; SIZE as usize]);
    (path, model)
}

/// Bytes that a file takes of its file system.
fn taken(path: &Path) -> u64 {
    File::open(path).unwrap().sync_all().unwrap();
    path.metadata().unwrap().blocks() * 512
}

fn zeroed(model: &mut Model, sector: u64, sectors: u64) {
    model.write(sector * SECTOR, &vec![0; (sectors * SECTOR) as usize]);
}

#[test]
fn a_discard_gives_the_hosts_blocks_back() {
    if !Kind::Pericarp.usable("a_discard_gives_the_hosts_blocks_back") {
        return;
    }
    let scratch = Scratch::new();
    for (n, (cache, engine)) in VARIANTS.into_iter().enumerate() {
        let (disk, mut model) = full(&scratch, &format!("disk{n}"));
        let before = taken(&disk);
        let backend = start(&scratch, &disk, &options(cache, engine));
        let mut driver = connect(&backend);
        assert_ne!(driver.features & F_DISCARD, 0, "{engine}");
        // Two of one request, one of 4 KiB.
        let list = [(2048, 2048, 0), (8192, 4096, 0), (0, 8, 0)];
        assert_eq!(ranges(&mut driver, DISCARD, &list), OK, "{engine}");
        for (sector, count, _) in list {
            zeroed(&mut model, sector, count.into());
        }
        let read = Op::Read {
            sector: 8192,
            len: 4096,
        };
        assert_eq!(driver.request(0, &read).unwrap().data, [0; 4096]);
        let after = taken(&disk);
        assert!(after + 3 * MIB <= before, "{engine}: {before} -> {after}");
        assert_eq!(model.differs(&disk), None, "{engine}");
        assert_eq!(disk.metadata().unwrap().len(), SIZE);
    }
}

#[test]
fn write_zeroes_keeps_blocks_unless_they_may_go() {
    if !Kind::Pericarp.usable("write_zeroes_keeps_blocks_unless_they_may_go") {
        return;
    }
    let scratch = Scratch::new();
    for (n, (cache, engine)) in VARIANTS.into_iter().enumerate() {
        let (disk, mut model) = full(&scratch, &format!("disk{n}"));
        let before = taken(&disk);
        let backend = start(&scratch, &disk, &options(cache, engine));
        let mut driver = connect(&backend);
        assert_ne!(driver.features & F_WRITE_ZEROES, 0);
        // Not on the file system's blocks either.
        let list = [(2048, 2048, 0), (9, 1, 0)];
        assert_eq!(ranges(&mut driver, WRITE_ZEROES, &list), OK, "{engine}");
        zeroed(&mut model, 2048, 2048);
        zeroed(&mut model, 9, 1);
        assert_eq!(model.differs(&disk), None, "{engine}");
        let kept = taken(&disk);
        assert!(kept + 65536 >= before, "{engine}: {before} -> {kept}");
        assert_eq!(ranges(&mut driver, WRITE_ZEROES, &[(4096, 4096, 1)]), OK);
        zeroed(&mut model, 4096, 4096);
        assert_eq!(model.differs(&disk), None, "{engine}");
        let after = taken(&disk);
        assert!(after + 2 * MIB <= kept, "{engine}: {kept} -> {after}");
    }
}

#[test]
fn as_many_ranges_as_offered_are_done_and_one_more_is_refused() {
    if !Kind::Pericarp.usable("as_many_ranges_as_offered_are_done_and_one_more_is_refused") {
        return;
    }
    let scratch = Scratch::new();
    let (disk, mut model) = full(&scratch, "disk");
    let backend = start(&scratch, &disk, &options(Cache::Direct, "auto"));
    let mut driver = connect(&backend);
    let config = driver.config(60).unwrap();
    let most = u32::from_le_bytes(config[40..44].try_into().unwrap());
    assert_eq!(most, 256);
    let every_other = |count: u32| -> Vec<_> {
        (0..u64::from(count))
            .map(|n| (n * 16 % 16_384, 8, 0))
            .collect()
    };
    assert_eq!(ranges(&mut driver, DISCARD, &every_other(most + 1)), IOERR);
    assert_eq!(model.differs(&disk), None);
    assert_eq!(ranges(&mut driver, DISCARD, &every_other(most)), OK);
    for (sector, count, _) in every_other(most) {
        zeroed(&mut model, sector, count.into());
    }
    assert_eq!(model.differs(&disk), None);
}

#[test]
fn one_bad_range_and_nothing_is_done() {
    if !Kind::Pericarp.usable("one_bad_range_and_nothing_is_done") {
        return;
    }
    let scratch = Scratch::new();
    let (disk, model) = full(&scratch, "disk");
    let backend = start(&scratch, &disk, &options(Cache::Direct, "auto"));
    let mut driver = connect(&backend);
    let end = SIZE / SECTOR;
    for kind in [DISCARD, WRITE_ZEROES] {
        for bad in [
            (end - 4, 8, 0),
            (u64::MAX, 8, 0),
            (u64::MAX / SECTOR, 8, 0),
            (0, 1 << 23, 0),
            (0, 0, 0),
            (0, 8, 2),
        ] {
            let status = ranges(&mut driver, kind, &[(0, 64, 0), bad]);
            assert_ne!(status, OK, "{kind} {bad:?}");
            assert_eq!(model.differs(&disk), None, "{kind} {bad:?}");
        }
    }
}

/// Writes, discards and zeroes in any order leave what a model holds.
#[test]
fn random_work_with_discards_matches_the_model() {
    if !Kind::Pericarp.usable("random_work_with_discards_matches_the_model") {
        return;
    }
    let scratch = Scratch::new();
    for (n, (cache, engine)) in VARIANTS.into_iter().enumerate() {
        let (disk, mut model) = full(&scratch, &format!("disk{n}"));
        let backend = start(&scratch, &disk, &options(cache, engine));
        let mut driver = connect(&backend);
        let mut sequence = Sequence::new(n as u64);
        for step in 0..600 {
            let sectors = 1 + sequence.below(96);
            let sector = sequence.below(SIZE / SECTOR - sectors);
            let (count, len) = (sectors as u32, sectors as u32 * 512);
            match sequence.below(5) {
                0 => {
                    let data = sequence.bytes(len as usize);
                    model.write(sector * SECTOR, &data);
                    let answer = driver.request(0, &Op::Write { sector, data });
                    assert_eq!(answer.unwrap().status, OK);
                }
                1 => {
                    assert_eq!(ranges(&mut driver, DISCARD, &[(sector, count, 0)]), OK);
                    zeroed(&mut model, sector, sectors);
                }
                unmap @ 2..4 => {
                    let list = [(sector, count, unmap as u32 - 2)];
                    assert_eq!(ranges(&mut driver, WRITE_ZEROES, &list), OK);
                    zeroed(&mut model, sector, sectors);
                }
                _ => {
                    let answer = driver.request(0, &Op::Read { sector, len }).unwrap();
                    let want = model.read(sector * SECTOR, len as usize);
                    assert!(answer.data == want, "{cache:?} {engine}: step {step}");
                }
            }
        }
        assert_eq!(model.differs(&disk), None, "{cache:?} {engine}");
    }
}

/// Where a file system knows no fallocate, zeroes are written, and DISCARD is
/// not offered.
#[test]
fn zeroes_are_written_where_there_is_no_fallocate() {
    let test = "zeroes_are_written_where_there_is_no_fallocate";
    if !Kind::Pericarp.usable(test) || !fuse::usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let mount = Fuse::mount(&scratch.path("mnt"), vec![0x5a; MIB as usize]).unwrap();
    for engine in ["uring", "sync"] {
        let backend = start(&scratch, &mount.file(), &options(Cache::Buffered, engine));
        let mut driver = connect(&backend);
        assert_eq!(driver.features & F_DISCARD, 0, "{engine}");
        for flags in [0, 1] {
            let list = [(512, 1000, flags), (3, 5, flags)];
            assert_eq!(ranges(&mut driver, WRITE_ZEROES, &list), OK);
        }
        let bytes = mount.behaviour.content();
        let zero = |n: usize| (3..8).contains(&(n / 512)) || (512..1512).contains(&(n / 512));
        let wrong = (0..bytes.len()).find(|&n| (bytes[n] == 0) != zero(n));
        assert_eq!(wrong, None, "{engine}");
        mount.behaviour.fill(0x5a);
    }
}
