//! What the fence of a dead process's I/O is worth. A child starts writes, or
//! reads into shared memory, on a throttled disk and is killed. Its I/O goes on
//! in the kernel without it. The child's ring holds a lock, as the rings of
//! `pericarp-vhost` do; whoever waits for it sees nothing land any more, and
//! whoever does not wait sees late bytes: that second half is what shows that
//! the first can fail.
#![expect(unsafe_code)]
// UNSAFETY: reads and writes are unsafe to start, and the shared memory is
// mapped by hand; a killed child has no one else to free it early.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libc::iovec;
use pericarp_uring::{Engine, EngineKind, Transfer};
use rustix::fs::{FlockOperation, flock};

/// Operations in flight, and bytes of each.
const COUNT: usize = 64;
const BLOCK: usize = 64 * 1024;
/// What the disk is throttled to: all of it takes four seconds.
const RATE: usize = COUNT * BLOCK / 4;
/// The child's bytes, and those before them.
const NEW: u8 = 0xee;
const OLD: u8 = 0x11;

/// In the environment of the child: its directory.
const CHILD: &str = "PERICARP_FENCE_CHILD";
/// And its control group.
const GROUP: &str = "PERICARP_FENCE_GROUP";

/// A control group that throttles the disk below `dir`, gone when dropped.
struct Throttle(PathBuf);

impl Throttle {
    /// `None` where control groups cannot be made or have no throttle.
    fn new(dir: &Path, name: &str) -> Option<Self> {
        let device = fs::metadata(dir).unwrap().dev();
        let (major, minor) = (libc::major(device), libc::minor(device));
        // A limit is the whole disk's.
        let sys = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        let disk = if sys.join("partition").exists() {
            sys.parent()?.to_owned()
        } else {
            sys
        };
        let number = fs::read_to_string(disk.join("dev")).ok()?;
        let number = number.trim();
        let name = format!("pericarp-fence-{name}-{}", std::process::id());
        let first = PathBuf::from("/sys/fs/cgroup/blkio").join(&name);
        let second = PathBuf::from("/sys/fs/cgroup").join(&name);
        for (group, files) in [
            (
                first,
                [
                    (
                        "blkio.throttle.write_bps_device",
                        format!("{number} {RATE}"),
                    ),
                    ("blkio.throttle.read_bps_device", format!("{number} {RATE}")),
                ],
            ),
            (
                second,
                [
                    ("io.max", format!("{number} wbps={RATE}")),
                    ("io.max", format!("{number} rbps={RATE}")),
                ],
            ),
        ] {
            if fs::create_dir(&group).is_err() {
                continue;
            }
            let made = Throttle(group);
            if files
                .iter()
                .all(|(file, line)| fs::write(made.0.join(file), line).is_ok())
            {
                return Some(made);
            }
        }
        None
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // The child's I/O may hold it a little longer than the child.
        for _ in 0..1000 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A directory of its own on a disk.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn direct(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

/// `COUNT * BLOCK` bytes of the file `memory`, shared and aligned.
fn map(memory: &File) -> *mut u8 {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            COUNT * BLOCK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            memory.as_raw_fd(),
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    start.cast()
}

/// The child's part: starts everything, says so, and waits to be killed.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let group = PathBuf::from(std::env::var_os(GROUP).unwrap());
    fs::write(group.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    let reads = dir.join("reads").exists();
    let disk = direct(&dir.join("disk"));
    let memory = File::options()
        .read(true)
        .write(true)
        .open(dir.join("memory"))
        .unwrap();
    let start = map(&memory);
    let mut engine = Engine::new(EngineKind::Uring, 2 * COUNT as u32, 4).unwrap();
    engine.start().unwrap();
    let disk = engine.add_file(disk.as_raw_fd()).unwrap();
    {
        let lock = File::open(dir.join("lock")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        engine.add_file(lock.as_raw_fd()).unwrap();
        // From here on only the ring holds it.
    }
    let segments: Vec<[iovec; 1]> = (0..COUNT)
        .map(|n| {
            [iovec {
                // SAFETY: inside the mapping.
                iov_base: unsafe { start.add(n * BLOCK) }.cast(),
                iov_len: BLOCK,
            }]
        })
        .collect();
    for (n, segments) in segments.iter().enumerate() {
        let transfer = Transfer {
            file: disk,
            segments,
            offset: (n * BLOCK) as u64,
            flags: 0,
            token: n as u64,
        };
        // SAFETY: segments and memory stay until this process is killed.
        unsafe {
            if reads {
                engine.read(transfer);
            } else {
                engine.write(transfer);
            }
        }
    }
    engine.submit(false).unwrap();
    println!("\nstarted");
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

/// The blocks that hold the child's bytes by now.
fn landed(dir: &Path, reads: bool) -> usize {
    let file = if reads {
        File::open(dir.join("memory")).unwrap()
    } else {
        // Past the page cache, as the writes go.
        direct(&dir.join("disk"))
    };
    let layout = std::alloc::Layout::from_size_align(4096, 4096).unwrap();
    // SAFETY: the size is not zero.
    let page = unsafe { std::alloc::alloc_zeroed(layout) };
    assert!(!page.is_null());
    // SAFETY: a page of our own, freed below.
    let buffer = unsafe { std::slice::from_raw_parts_mut(page, 4096) };
    let count = (0..COUNT)
        .filter(|n| {
            let at = (n * BLOCK + BLOCK - 4096) as u64;
            file.read_exact_at(buffer, at).unwrap();
            buffer[0] == NEW
        })
        .count();
    // SAFETY: allocated above with this layout.
    unsafe { std::alloc::dealloc(page, layout) };
    count
}

/// Starts the child, kills it, and gives how many blocks landed: before the
/// death was known, when the lock could be had, and two seconds after that.
fn killed(name: &str, reads: bool) -> Option<[usize; 3]> {
    let base = std::env::var_os("PERICARP_TEST_DIR").map_or("/var/tmp".into(), PathBuf::from);
    let scratch = Scratch(base.join(format!("pericarp-fence-{name}-{}", std::process::id())));
    let dir = &scratch.0;
    fs::create_dir(dir).unwrap();
    let Some(throttle) = Throttle::new(dir, name) else {
        let line = format!("SKIPPED {name}: no control group can throttle this disk\n");
        let all = std::env::var_os("PERICARP_REQUIRE_ALL").is_some_and(|value| value == "1");
        assert!(!all, "{line}");
        let _ = std::io::stderr().write_all(line.as_bytes());
        return None;
    };
    let (disk, memory) = if reads { (NEW, OLD) } else { (OLD, NEW) };
    fs::write(dir.join("disk"), vec![disk; COUNT * BLOCK]).unwrap();
    fs::write(dir.join("memory"), vec![memory; COUNT * BLOCK]).unwrap();
    fs::write(dir.join("lock"), b"").unwrap();
    if reads {
        fs::write(dir.join("reads"), b"").unwrap();
    }
    // Writes past cached pages would wait for a kernel thread, and die with the child.
    let cached = File::open(dir.join("disk")).unwrap();
    cached.sync_all().unwrap();
    rustix::fs::fadvise(&cached, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut child: Child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, dir)
        .env(GROUP, &throttle.0)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let started = output.lines().any(|line| line.unwrap() == "started");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(started, "the child started its operations");

    let dead = landed(dir, reads);
    let lock = File::open(dir.join("lock")).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        assert!(Instant::now() < end, "the lock is never released");
        std::thread::sleep(Duration::from_millis(1));
    }
    let locked = landed(dir, reads);
    std::thread::sleep(Duration::from_secs(2));
    let later = landed(dir, reads);
    println!("{name}: {dead} of {COUNT} at its death, {locked} with the lock, {later} later");
    Some([dead, locked, later])
}

#[test]
fn writes_of_a_dead_process_land_late_but_not_after_its_lock() {
    if let Some([dead, locked, later]) = killed("writes", false) {
        assert!(dead < locked, "nothing was late: this proves nothing");
        assert_eq!(locked, later);
    }
}

#[test]
fn reads_of_a_dead_process_land_late_but_not_after_its_lock() {
    if let Some([dead, locked, later]) = killed("reads", true) {
        assert!(dead < locked, "nothing was late: this proves nothing");
        assert_eq!(locked, later);
    }
}
