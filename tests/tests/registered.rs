//! `--register-memory`: guest memory is pinned while a queue lives in it and no
//! longer, whatever becomes of the table, and where the kernel refuses the disk
//! is served without. What is pinned is seen from outside, in `/proc`.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{ADJACENT, Chain, Driver, FAR, HEADER, Op, REGION, STATUS, Setup};
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::model::{SECTOR, Sequence};
use pericarp_tests::parts::{absent, search_path};
use pericarp_tests::peer::{Backend, Cache, Kind, Options, connect};
use pericarp_tests::process::Process;
use pericarp_tests::scratch::Scratch;
use rustix::fs::{MemfdFlags, fcntl_get_seals, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;

const MIB: u64 = 1 << 20;
/// What the rig's guest has, in KiB.
const GUEST: u64 = 2 * REGION / 1024 + 1024;
const LIMIT: Duration = Duration::from_secs(20);
const REFUSED: &str = "its memory is not registered";

fn options(cache: Cache) -> Options {
    Options {
        cache,
        extra: vec!["--register-memory".into()],
        ..Options::default()
    }
}

fn driver(backend: &Backend) -> Driver {
    Driver::connect(backend.socket(), &Setup::default()).unwrap()
}

/// KiB that the process has pinned.
fn pinned(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPin:"));
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

fn comes_to(pid: i32, kib: u64) {
    let there = poll(LIMIT, || (pinned(pid) == kib).then_some(()));
    assert!(there.is_some(), "{} KiB pinned, not {kib}", pinned(pid));
}

fn reads(driver: &mut Driver) -> u8 {
    let op = Op::Read {
        sector: 0,
        len: 4096,
    };
    driver.request(0, &op).unwrap().status
}

/// Reads from sector 0 on into one segment at `at`; gives the status.
fn read_to(driver: &mut Driver, at: u64, len: u32) -> u8 {
    driver.head(0, 0, 0).unwrap();
    let chain = Chain::new().read(HEADER(0), 16).write(at, len);
    driver.play(0, &chain.write(STATUS(0), 1)).unwrap();
    driver.peek(STATUS(0), 1).unwrap()[0]
}

#[test]
fn memory_is_pinned_while_a_queue_lives_in_it() {
    if !Kind::Pericarp.usable("memory_is_pinned_while_a_queue_lives_in_it") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", MIB);
    let backend = Backend::start(Kind::Pericarp, &scratch, &disk, &options(Cache::Direct)).unwrap();
    let pid = backend.pid();
    assert_eq!(pinned(pid), 0);
    for _ in 0..3 {
        let mut driver = driver(&backend);
        comes_to(pid, GUEST);
        assert_eq!(reads(&mut driver), 0);
        driver.stop(0).unwrap();
        assert_eq!(pinned(pid), 0, "no queue lives in it");
        driver.configure(0).unwrap();
        comes_to(pid, GUEST);
        assert_eq!(reads(&mut driver), 0);
        drop(driver);
        comes_to(pid, 0);
    }
    assert!(backend.stderr().is_empty(), "{}", backend.stderr());
    assert!(backend.stop().unwrap().success());
}

/// Two devices on one worker: what one pod does with its memory is nothing to
/// the other.
#[test]
fn each_device_has_memory_of_its_own() {
    if !Kind::Pericarp.usable("each_device_has_memory_of_its_own") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", MIB);
    let second = scratch.path("second.sock");
    let program = Kind::Pericarp.part().find().unwrap();
    let first = scratch.path("first.sock");
    let mut command = pericarp_tests::process::command(&program);
    command.args(["--register-memory", "--workers=1"]);
    for (id, socket) in [("a", &first), ("b", &second)] {
        let keys = format!(
            "id={id},socket={},file={}",
            socket.display(),
            disk.display()
        );
        command.arg("--device").arg(keys);
    }
    let process = Process::start(&mut command, Duration::from_secs(60)).unwrap();
    let pid = process.pid();
    poll(LIMIT, || second.exists().then_some(())).unwrap();
    let mut a = Driver::connect(&first, &Setup::default()).unwrap();
    let mut b = Driver::connect(&second, &Setup::default()).unwrap();
    comes_to(pid, 2 * GUEST);
    for _ in 0..5 {
        a.send_memory().unwrap();
        assert_eq!((reads(&mut a), reads(&mut b)), (0, 0));
    }
    comes_to(pid, 2 * GUEST);
    drop(a);
    comes_to(pid, GUEST);
    assert_eq!(reads(&mut b), 0);
    drop(b);
    comes_to(pid, 0);
}

/// Reads that take a while go into the region that is removed: when the
/// removal is answered they are done, and the region is neither pinned nor
/// mapped any more.
#[test]
fn a_region_is_let_go_before_its_removal_is_answered() {
    let test = "a_region_is_let_go_before_its_removal_is_answered";
    if !Kind::Pericarp.usable(test) || !fuse::usable(test) {
        return;
    }
    let scratch = Scratch::new();
    let content = Sequence::new(5).bytes(MIB as usize);
    let mount = Fuse::mount(&scratch.path("mnt"), content.clone()).unwrap();
    mount.behaviour.read_ms.store(150, SeqCst);
    let backend = Backend::start(
        Kind::Pericarp,
        &scratch,
        &mount.file(),
        &options(Cache::Buffered),
    )
    .unwrap();
    let pid = backend.pid();
    let mut driver = driver(&backend);
    comes_to(pid, GUEST);
    let region = driver.guest.table()[2];
    for round in 0..4u64 {
        // Eight reads of content that differs from round to round.
        let sector = |slot: u64| (round * 8 + slot) * 8;
        for slot in 0..8 {
            driver.head(slot, 0, sector(slot)).unwrap();
            let chain = Chain::new().read(HEADER(slot), 16);
            let chain = chain.write(FAR + slot * 4096, 4096).write(STATUS(slot), 1);
            driver.place(0, slot as u16 * 3, &chain);
            driver.rings[0].queue(slot as u16 * 3);
        }
        driver.rings[0].publish();
        driver.rings[0].notify();
        std::thread::sleep(Duration::from_millis(20));
        driver.frontend.remove_mem_region(&region).unwrap();
        let now = pinned(pid);
        assert!(now <= GUEST - 1024, "{now} KiB are still pinned");
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let mapped = maps.matches("memfd:guest").count();
        assert_eq!(mapped, 2, "the region is still mapped");
        driver.rings[0].watch(8, LIMIT).unwrap();
        let mut got = vec![0; 8 * 4096];
        driver.guest.files[2].read_exact_at(&mut got, 0).unwrap();
        let from = (sector(0) * SECTOR) as usize;
        assert!(got == content[from..][..8 * 4096], "round {round}");
        let _ = driver.rings[0].called();
        assert_ne!(read_to(&mut driver, FAR, 4096), 0, "it is gone");
        driver.frontend.add_mem_region(&region).unwrap();
        comes_to(pid, GUEST);
    }
}

#[test]
fn a_table_of_many_regions_and_one_of_several_pieces() {
    if !Kind::Pericarp.usable("a_table_of_many_regions_and_one_of_several_pieces") {
        return;
    }
    const BIG: u64 = 129 * MIB;
    let scratch = Scratch::new();
    let content = Sequence::new(6).bytes(4 * MIB as usize);
    let disk = scratch.file("disk", &content);
    let backend = Backend::start(Kind::Pericarp, &scratch, &disk, &options(Cache::Direct)).unwrap();
    let pid = backend.pid();
    let mut driver = driver(&backend);
    // 29 more, which makes 32; all but the last of one page.
    let mut regions = Vec::new();
    for n in 0..29u64 {
        let size = if n == 28 { BIG } else { 4096 };
        let file = File::from(memfd_create("more", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        let at = (2 << 30) + n * 8192;
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: at,
            memory_size: size,
            // Any address will do that no other region has.
            userspace_addr: at,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        driver.frontend.add_mem_region(&info).unwrap();
        regions.push((info, file));
    }
    comes_to(pid, GUEST + 28 * 4 + BIG / 1024);
    let check = |driver: &mut Driver, index: usize, offset: u64, len: u32| {
        let (info, file): &(VhostUserMemoryRegionInfo, File) = &regions[index];
        assert_eq!(read_to(driver, info.guest_phys_addr + offset, len), 0);
        let mut got = vec![0; len as usize];
        file.read_exact_at(&mut got, offset).unwrap();
        assert!(
            got == content[..len as usize],
            "region {index} at {offset:#x}"
        );
    };
    for index in 0..28 {
        check(&mut driver, index, 0, 4096);
    }
    // At the edges of pieces of any likely size, across them, and at the end.
    for edge in [32, 64, 128].map(|edge| edge * MIB) {
        for (from, len) in [(edge - 8192, 8192), (edge, 8192), (edge - 4096, 8192)] {
            check(&mut driver, 28, from, len);
        }
    }
    check(&mut driver, 28, 126 * MIB, 3 * MIB as u32);
    driver.send_memory().unwrap();
    comes_to(pid, GUEST);
    assert_eq!(reads(&mut driver), 0);
    assert!(backend.stderr().is_empty(), "{}", backend.stderr());
}

/// As any user but root: the limit counts.
#[test]
fn a_limit_of_locked_memory_is_one_line() {
    let test = "a_limit_of_locked_memory_is_one_line";
    let tools = [search_path("setpriv"), search_path("prlimit")];
    let ([Some(setpriv), Some(prlimit)], true) = (tools, Kind::Pericarp.usable(test)) else {
        absent(test, "setpriv or prlimit is missing");
        return;
    };
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", MIB);
    let socket = scratch.path("disk.sock");
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL"]);
    if rustix::process::geteuid().is_root() {
        command.arg("--bounding-set=-ipc_lock");
    }
    // Less than the guest has, and than the limit is anywhere.
    command.arg(prlimit).arg("--memlock=4194304:4194304");
    command.arg(Kind::Pericarp.part().find().unwrap());
    command.arg("--register-memory").arg("--workers=1");
    command.args([
        Path::new("--socket-path"),
        &socket,
        Path::new("--blk-file"),
        &disk,
    ]);
    let process = Process::start(&mut command, Duration::from_secs(60)).unwrap();
    poll(LIMIT, || socket.exists().then_some(())).unwrap();
    drop(connect(&socket));
    for round in 0..3 {
        let mut driver = Driver::connect(&socket, &Setup::default()).unwrap();
        for at in [ADJACENT, FAR] {
            assert_eq!(read_to(&mut driver, at, 4096), 0);
        }
        let line = poll(LIMIT, || process.output().find(REFUSED)).unwrap();
        assert!(line.contains("RLIMIT_MEMLOCK"), "{line}");
        comes_to(process.pid(), 0);
        assert_eq!(reads(&mut driver), 0, "round {round}");
    }
    let said = process.output().lines();
    let count = said.iter().filter(|line| line.contains(REFUSED)).count();
    assert_eq!(count, 1, "{said:?}");
}

#[test]
fn memory_on_a_file_system_is_not_pinned() {
    if !Kind::Pericarp.usable("memory_on_a_file_system_is_not_pinned") {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.sparse("memory", MIB);
    let file = File::options().read(true).write(true).open(path).unwrap();
    if fcntl_get_seals(&file).is_ok() {
        absent(
            "memory_on_a_file_system_is_not_pinned",
            "the scratch directory is in memory",
        );
        return;
    }
    let content = Sequence::new(7).bytes(MIB as usize);
    let disk = scratch.file("disk", &content);
    let backend = Backend::start(Kind::Pericarp, &scratch, &disk, &options(Cache::Direct)).unwrap();
    let mut driver = driver(&backend);
    comes_to(backend.pid(), GUEST);
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: 2 << 30,
        memory_size: MIB,
        userspace_addr: 2 << 30,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    driver.frontend.add_mem_region(&info).unwrap();
    assert_eq!(read_to(&mut driver, 2 << 30, 4096), 0);
    let mut got = [0; 4096];
    file.read_exact_at(&mut got, 0).unwrap();
    assert!(got == content[..4096]);
    comes_to(backend.pid(), 0);
    // What it said of that may be on its way yet.
    let said = poll(LIMIT, || {
        let said = backend.stderr();
        said.contains(REFUSED).then_some(said)
    });
    let said = said.unwrap_or_else(|| backend.stderr());
    assert_eq!(said.matches(REFUSED).count(), 1, "{said}");
    // Without it all goes on as before.
    driver.frontend.remove_mem_region(&info).unwrap();
    comes_to(backend.pid(), GUEST);
    assert_eq!(reads(&mut driver), 0);
}

#[test]
fn the_sync_engine_has_nothing_to_register_with() {
    let test = "the_sync_engine_has_nothing_to_register_with";
    if !Kind::Pericarp.usable(test) {
        return;
    }
    let program = Kind::Pericarp.part().find().unwrap();
    let output = Command::new(program)
        .args(["--socket-path", "/nowhere/s", "--blk-file", "/nowhere/d"])
        .args(["--io-engine=sync", "--register-memory"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("--register-memory"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}
