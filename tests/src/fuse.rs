//! A file system of one file that does as it is told: slow operations, slow or
//! failing syncs, no fallocate unless asked for, and whatever [`Faults`] plan. It counts what reaches it, so a test sees which
//! operations a backend really made, and how many of them at a time. Used by
//! `tests/device.rs` and other suites, and by `bench-compare` as a share on a
//! network: each operation takes milliseconds, and hundreds go on at a time.
//!
//! It speaks the kernel's protocol on /dev/fuse itself (linux/fuse.h, 7.31) and
//! is mounted in a mount namespace of the calling thread: nothing of it is left
//! when the test ends, however it ends.
#![expect(unsafe_code)]
// UNSAFETY: a thread leaves the process's mount namespace.

mod faults;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use crate::parts::absent;
pub use faults::{Faults, Operation, Wrong};

/// Largest write; also the room for one request.
const MAX_WRITE: u32 = 128 * 1024;
const ROOT: u64 = 1;
const DISK: u64 = 2;
const HEADER: usize = 40;
/// Opcodes that something is done about before their answer is due.
const READ: u64 = Operation::Read as u64;
const WRITE: u64 = Operation::Write as u64;
const FSYNC: u64 = Operation::Sync as u64;
const FALLOCATE: u64 = Operation::Allocate as u64;
const INIT: u64 = 26;
/// FORGET, INTERRUPT and BATCH_FORGET have no answer.
const UNANSWERED: [u64; 3] = [2, 36, 42];
/// FUSE_ASYNC_READ and FUSE_BIG_WRITES.
const COMMON_FLAGS: u32 = 1 | 1 << 5;
/// FUSE_ASYNC_DIO.
const ASYNC_DIRECT: u32 = 1 << 15;

/// What the file holds, how it behaves and what it saw.
#[derive(Debug, Default)]
pub struct Behaviour {
    bytes: Mutex<Vec<u8>>,
    /// The shortest and the longest that an operation of any kind takes, in
    /// microseconds; each takes a time between them, drawn from a fixed sequence.
    pub operation_us: (AtomicU64, AtomicU64),
    /// Operations seen.
    pub operations: AtomicU64,
    in_flight: AtomicUsize,
    /// The most operations at a time.
    pub most_in_flight: AtomicUsize,
    /// Milliseconds that a read takes on top.
    pub read_ms: AtomicU64,
    /// Milliseconds that a sync takes on top.
    pub sync_ms: AtomicU64,
    /// The errno that syncs end with, 0 for none.
    pub sync_error: AtomicI32,
    /// The errno that writes end with, 0 for none.
    pub write_error: AtomicI32,
    /// It knows fallocate: holes and zeroes.
    pub allocates: AtomicBool,
    /// What goes wrong besides.
    pub faults: Faults,
    /// Syncs seen.
    pub syncs: AtomicU64,
    /// Writes that had to be durable before they ended.
    pub durable_writes: AtomicU64,
    reading: AtomicUsize,
    /// The most reads at a time.
    pub most_reading: AtomicUsize,
}

impl Behaviour {
    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes every byte this one.
    pub fn fill(&self, byte: u8) {
        self.bytes().fill(byte);
    }

    /// What the file holds now.
    pub fn content(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    /// How many operations wait for their answer now.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Has every operation take between `least` and `most` from now on.
    pub fn delay(&self, least: Duration, most: Duration) {
        let microseconds = |time: Duration| time.as_micros() as u64;
        self.operation_us
            .0
            .store(microseconds(least), Ordering::SeqCst);
        self.operation_us
            .1
            .store(microseconds(most), Ordering::SeqCst);
    }

    /// Counts an operation in; how long it is to take.
    fn begin(&self, opcode: u64) -> Duration {
        // The kernel has nobody else wait for this one.
        if opcode == INIT {
            return Duration::ZERO;
        }
        let number = self.operations.fetch_add(1, Ordering::SeqCst);
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_in_flight.fetch_max(now, Ordering::SeqCst);
        let milliseconds = match opcode {
            READ => {
                let now = self.reading.fetch_add(1, Ordering::SeqCst) + 1;
                self.most_reading.fetch_max(now, Ordering::SeqCst);
                self.read_ms.load(Ordering::SeqCst)
            }
            FSYNC => {
                self.syncs.fetch_add(1, Ordering::SeqCst);
                self.sync_ms.load(Ordering::SeqCst)
            }
            _ => 0,
        };
        let least = self.operation_us.0.load(Ordering::SeqCst);
        let spread = self
            .operation_us
            .1
            .load(Ordering::SeqCst)
            .saturating_sub(least);
        // Weyl's sequence: spread evenly, the same in every run.
        let drawn = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let drawn = (drawn * (spread + 1)) >> 32;
        Duration::from_millis(milliseconds) + Duration::from_micros(least + drawn)
    }

    /// Counts an operation out, before whoever waits for it can know.
    fn end(&self, opcode: u64) {
        if opcode == INIT {
            return;
        }
        if opcode == READ {
            self.reading.fetch_sub(1, Ordering::SeqCst);
        }
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The mounted file system.
#[derive(Debug)]
pub struct Fuse {
    dir: PathBuf,
    /// How it behaves.
    pub behaviour: Arc<Behaviour>,
    server: Option<JoinHandle<()>>,
}

/// True when this machine lets us mount one.
pub fn usable(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        return absent(test, "mounting a file system needs root (run as root)");
    }
    Path::new("/dev/fuse").exists() || absent(test, "/dev/fuse is missing")
}

impl Fuse {
    /// Mounts it on `dir` with a file `disk` that holds `bytes`. The calling
    /// thread and the processes it starts see the mount.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount(dir: &Path, bytes: Vec<u8>) -> io::Result<Self> {
        Self::mount_with(dir, bytes, COMMON_FLAGS)
    }

    /// As [`Fuse::mount`], but direct reads and writes need not wait for each
    /// other, as with the kernel's clients of network shares.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount_share(dir: &Path, bytes: Vec<u8>) -> io::Result<Self> {
        Self::mount_with(dir, bytes, COMMON_FLAGS | ASYNC_DIRECT)
    }

    fn mount_with(dir: &Path, bytes: Vec<u8>, flags: u32) -> io::Result<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        // SAFETY: only this thread leaves, and its descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private)?;
        std::fs::create_dir_all(dir)?;
        let fd = device.as_raw_fd();
        let data = format!("fd={fd},rootmode=40000,user_id=0,group_id=0\0");
        let data =
            std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).map_err(io::Error::other)?;
        rustix::mount::mount("test", dir, "fuse", MountFlags::NOSUID, Some(data))?;
        let behaviour = Arc::new(Behaviour::default());
        *behaviour.bytes() = bytes;
        let shared = Arc::clone(&behaviour);
        let server = spawn(move || serve(&Arc::new(device), &shared, flags));
        Ok(Fuse {
            dir: dir.to_owned(),
            behaviour,
            server: Some(server),
        })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.dir.join("disk")
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let gone = rustix::mount::unmount(&self.dir, UnmountFlags::DETACH).is_ok();
        if let Some(server) = self.server.take()
            && gone
        {
            let _ = server.join();
        }
    }
}

/// A number out of a request.
fn number<const N: usize>(request: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..N].copy_from_slice(&request[at..at + N]);
    u64::from_le_bytes(bytes)
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// struct fuse_attr.
fn attributes(node: u64, size: u64) -> Vec<u8> {
    let mode = if node == ROOT { 0o40755 } else { 0o100_644 };
    let mut bytes = longs(&[node, size, size / 512, 0, 0, 0]);
    bytes.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]));
    bytes
}

/// Reads the kernel's requests until it is unmounted.
fn serve(device: &Arc<File>, behaviour: &Arc<Behaviour>, flags: u32) {
    let (later, due) = channel();
    let clock = {
        let (device, behaviour) = (Arc::clone(device), Arc::clone(behaviour));
        spawn(move || answer_when_due(&device, &behaviour, &due, flags))
    };
    let mut room = vec![0; MAX_WRITE as usize + 4096];
    loop {
        match (&**device).read(&mut room) {
            Ok(len) if len >= HEADER => {
                let request = &room[..len];
                let opcode = number::<4>(request, 4);
                if UNANSWERED.contains(&opcode) {
                    continue;
                }
                let pause = behaviour.begin(opcode);
                if pause.is_zero() {
                    answer(device, behaviour, request, flags);
                } else {
                    let _ = later.send((Instant::now() + pause, request.to_vec()));
                }
            }
            Ok(_) => break,
            Err(error) if matches!(error.raw_os_error(), Some(2 | 4 | 11)) => {}
            // Unmounted.
            Err(_) => break,
        }
    }
    drop(later);
    let _ = clock.join();
}

/// Answers each request at its time. One thread, whatever is in flight: a share
/// that took a CPU of its own would be measured along with its users.
fn answer_when_due(
    device: &File,
    behaviour: &Behaviour,
    requests: &Receiver<(Instant, Vec<u8>)>,
    flags: u32,
) {
    let mut waiting: BinaryHeap<Reverse<(Instant, Vec<u8>)>> = BinaryHeap::new();
    loop {
        let now = Instant::now();
        while let Some(Reverse((due, _))) = waiting.peek()
            && *due <= now
            && let Some(Reverse((_, request))) = waiting.pop()
        {
            answer(device, behaviour, &request, flags);
        }
        let next = match waiting.peek() {
            Some(Reverse((due, _))) => {
                requests.recv_timeout(due.saturating_duration_since(Instant::now()))
            }
            None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match next {
            Ok(request) => waiting.push(Reverse(request)),
            Err(RecvTimeoutError::Timeout) => {}
            // Unmounted: nobody waits any more.
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn answer(device: &File, behaviour: &Behaviour, request: &[u8], flags: u32) {
    const ENOENT: i32 = 2;
    const ENOSYS: i32 = 38;
    const O_DSYNC: u64 = 0o10000;
    let node = number::<8>(request, 16);
    let size = behaviour.bytes().len() as u64;
    let opcode = number::<4>(request, 4);
    let (error, most) = behaviour.faults.strike(opcode, extent(opcode, request));
    let body = match opcode {
        _ if error != 0 => Err(error),
        // LOOKUP
        1 if &request[HEADER..] == b"disk\0" => {
            let mut entry = longs(&[DISK, 1, 3600, 3600, 0]);
            entry.extend(attributes(DISK, size));
            Ok(entry)
        }
        1 => Err(ENOENT),
        // GETATTR, SETATTR
        3 | 4 => {
            let mut answer = longs(&[3600, 0]);
            answer.extend(attributes(node, size));
            Ok(answer)
        }
        // OPEN: past the page cache, so that every read and write comes here.
        14 => Ok([longs(&[0]), words(&[1, 0])].concat()),
        READ => {
            let mut bytes = read(behaviour, request);
            bytes.truncate(most);
            Ok(bytes)
        }
        WRITE if behaviour.write_error.load(Ordering::SeqCst) != 0 => {
            Err(behaviour.write_error.load(Ordering::SeqCst))
        }
        WRITE => {
            let at = number::<8>(request, HEADER + 8) as usize;
            let data = &request[HEADER + 40..];
            let data = &data[..data.len().min(most)];
            behaviour.bytes()[at..at + data.len()].copy_from_slice(data);
            if number::<4>(request, HEADER + 32) & O_DSYNC != 0 {
                behaviour.durable_writes.fetch_add(1, Ordering::SeqCst);
            }
            Ok(words(&[data.len() as u32, 0]))
        }
        // STATFS
        17 => Ok(vec![0; 80]),
        // RELEASE, FLUSH
        18 | 25 => Ok(Vec::new()),
        FSYNC => match behaviour.sync_error.load(Ordering::SeqCst) {
            0 => Ok(Vec::new()),
            errno => Err(errno),
        },
        FALLOCATE if behaviour.allocates.load(Ordering::SeqCst) => {
            zero(behaviour, request);
            Ok(Vec::new())
        }
        // Reads side by side, 256 at a time. FUSE_ASYNC_DIO only if asked for:
        // with most file systems whoever reads waits.
        INIT => {
            let mut answer = words(&[7, 31, 0, flags, 256 | 256 << 16, MAX_WRITE, 1, 32]);
            answer.resize(64, 0);
            Ok(answer)
        }
        _ => Err(ENOSYS),
    };
    let (error, body) = match body {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let mut bytes = words(&[16 + body.len() as u32, error.cast_unsigned()]);
    bytes.extend_from_slice(&request[8..16]);
    bytes.extend(body);
    behaviour.end(opcode);
    // One that was aborted has nobody waiting.
    let _ = (&*device).write(&bytes);
}

/// The part of the file that an operation is about; all of it where it names none.
fn extent(opcode: u64, request: &[u8]) -> Range<u64> {
    let at = || number::<8>(request, HEADER + 8);
    match opcode {
        READ | WRITE => at()..at() + number::<4>(request, HEADER + 16),
        FALLOCATE => at()..at() + number::<8>(request, HEADER + 16),
        _ => 0..u64::MAX,
    }
}

/// FALLOCATE: with a hole or zeroes in its mode the range reads as zeroes.
fn zero(behaviour: &Behaviour, request: &[u8]) {
    const PUNCH_HOLE: u64 = 2;
    const ZERO_RANGE: u64 = 16;
    let extent = extent(FALLOCATE, request);
    let mode = number::<4>(request, HEADER + 24);
    let mut bytes = behaviour.bytes();
    let clamp = |at: u64| (at as usize).min(bytes.len());
    let range = clamp(extent.start)..clamp(extent.end);
    if mode & (PUNCH_HOLE | ZERO_RANGE) != 0 {
        bytes[range].fill(0);
    }
}

fn read(behaviour: &Behaviour, request: &[u8]) -> Vec<u8> {
    let at = number::<8>(request, HEADER + 8) as usize;
    let len = number::<4>(request, HEADER + 16) as usize;
    let bytes = behaviour.bytes();
    bytes[at.min(bytes.len())..(at + len).min(bytes.len())].to_vec()
}
