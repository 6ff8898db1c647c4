//! What the device says of its disk, on loop devices with other block sizes,
//! and transfers larger than the kernel takes at once.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::frontend::{Chain, DATA, HEADER, Op, REGION, STATUS};
use pericarp_tests::model::Sequence;
use pericarp_tests::parts::absent;
use pericarp_tests::peer::{Cache, Kind};
use pericarp_tests::scratch::Scratch;

use super::{
    DISCARD, F_DISCARD, IOERR, MIB, OK, WRITE_ZEROES, connect, connect_with, options, ranges,
    start, status,
};

/// A loop device with this block size on a scratch file.
pub(crate) struct Loop(PathBuf);

impl Loop {
    pub(crate) fn new(test: &str, file: &Path, block: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", &format!("--sector-size={block}")])
            .arg(file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                Some(Loop(PathBuf::from(name)))
            }
            _ => {
                absent(test, "no loop device can be had (losetup, as root)");
                None
            }
        }
    }
}

impl Loop {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

fn word(config: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(config[at..at + 4].try_into().unwrap())
}

#[test]
fn a_disk_with_blocks_of_4096_bytes_says_so_and_takes_no_less() {
    let test = "a_disk_with_blocks_of_4096_bytes_says_so_and_takes_no_less";
    if !Kind::Pericarp.usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let content = Sequence::new(8).bytes(4 * MIB as usize);
    let file = scratch.file("image", &content);
    let Some(disk) = Loop::new(test, &file, 4096) else {
        return;
    };
    for (cache, engine) in [(Cache::Direct, "uring"), (Cache::Buffered, "sync")] {
        let backend = start(&scratch, &disk.0, &options(cache, engine));
        let mut driver = connect(&backend);
        let config = driver.config(60).unwrap();
        assert_eq!(word(&config, 20), 4096, "logical block");
        assert_eq!(
            driver.sectors().unwrap(),
            4 * MIB / 512,
            "in sectors of 512"
        );
        for (sector, len) in [(0, 512), (1, 4096), (8, 4608)] {
            let read = driver.request(0, &Op::Read { sector, len }).unwrap();
            assert_eq!(read.status, IOERR, "{len} bytes at {sector}");
            let data = vec![1; len as usize];
            let write = driver.request(0, &Op::Write { sector, data }).unwrap();
            assert_eq!(write.status, IOERR, "{len} bytes at {sector}");
        }
        let (sector, len) = (16, 8192);
        let read = driver.request(0, &Op::Read { sector, len }).unwrap();
        assert_eq!(read.status, OK);
        assert!(read.data == content[8192..16384]);
        // Memory that O_DIRECT cannot take as it is: a byte off, in odd pieces.
        driver.head(0, 0, 16).unwrap();
        let chain = Chain::new()
            .read(HEADER(0), 16)
            .write(DATA(0) + 1, 3952)
            .write(DATA(0) + 8001, 4240)
            .write(STATUS(0), 1);
        driver.play(0, &chain).unwrap();
        assert_eq!(status(&driver, 0), OK);
        let first = driver.peek(DATA(0) + 1, 3952).unwrap();
        let second = driver.peek(DATA(0) + 8001, 4240).unwrap();
        assert!([first, second].concat() == content[8192..16384]);
    }
}

#[test]
fn a_block_device_discards_and_zeroes() {
    let test = "a_block_device_discards_and_zeroes";
    if !Kind::Pericarp.usable(test) {
        return;
    }
    let scratch = Scratch::new();
    for engine in ["uring", "sync"] {
        let file = scratch.file("image", &vec![0x5a; 4 * MIB as usize]);
        File::open(&file).unwrap().sync_all().unwrap();
        let Some(disk) = Loop::new(test, &file, 512) else {
            return;
        };
        let backend = start(&scratch, &disk.0, &options(Cache::Direct, engine));
        let mut driver = connect(&backend);
        if driver.features & F_DISCARD == 0 {
            absent(test, "this kernel discards by no ring command (6.12)");
            return;
        }
        let before = file.metadata().unwrap().blocks();
        assert_eq!(
            ranges(&mut driver, DISCARD, &[(0, 2048, 0)]),
            OK,
            "{engine}"
        );
        let after = file.metadata().unwrap().blocks();
        assert!(after + 2000 <= before, "{engine}: {before} -> {after}");
        let list = [(2048, 1024, 0), (3072, 8, 0)];
        assert_eq!(ranges(&mut driver, WRITE_ZEROES, &list), OK);
        assert_eq!(ranges(&mut driver, WRITE_ZEROES, &[(4096, 1024, 1)]), OK);
        for (sector, byte) in [(2048, 0), (3072, 0), (3080, 0x5a), (4096, 0), (5120, 0x5a)] {
            let read = driver.request(0, &Op::Read { sector, len: 512 }).unwrap();
            assert_eq!(read.data, [byte; 512], "{engine}: sector {sector}");
        }
    }
}

/// The kernel moves 2 GiB less a page in one call.
#[test]
fn three_gib_in_one_request_go_in_pieces() {
    let test = "three_gib_in_one_request_go_in_pieces";
    if !Kind::Pericarp.usable(test) {
        return;
    }
    const PIECES: u32 = 190;
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", 4 << 30);
    for (cache, engine) in [(Cache::Direct, "uring"), (Cache::Buffered, "sync")] {
        let backend = start(&scratch, &disk, &options(cache, engine));
        let mut driver = connect_with(&backend, |setup| {
            setup.queue_size = 256;
            setup.limit = Duration::from_secs(60);
        });
        driver.head(0, 0, 8).unwrap();
        let mut chain = Chain::new().read(HEADER(0), 16);
        // The second region again and again; it holds nothing of ours.
        for _ in 0..PIECES {
            chain = chain.write(REGION, REGION as u32);
        }
        let used = driver.play(0, &chain.write(STATUS(0), 1)).unwrap();
        assert_eq!(status(&driver, 0), OK, "{engine}");
        assert_eq!(used.len, PIECES * REGION as u32 + 1, "{engine}");
    }
}
