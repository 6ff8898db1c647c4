//! Where the records of requests in flight live, and the lock that tells a
//! successor when its predecessor's I/O is over.
//!
//! A killed process leaves I/O behind that goes on in the kernel for seconds,
//! onto the disk and into guest memory. Each io_uring therefore holds, among its
//! registered files, a locked file description of the records' memory: the
//! kernel lets go of a ring's files only once the ring's last operation ended.
//! The synchronous engine needs no more than the open descriptor, which lasts
//! as long as the thread that is inside a system call. A session takes the lock
//! before it looks at a ring.
//!
//! A program makes an [`InflightFile`] and a [`Reopener`] before it confines
//! itself and gives each [`Server`](crate::Server) what is meant for it.
#![expect(unsafe_code)]
// UNSAFETY: F_OFD_SETLK has no safe wrapper.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pericarp_ring::{IDENTITY_BYTES, InflightError, InflightMemory};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;
use thiserror::Error;

/// How long a process that was killed may need to be gone.
const DYING: Duration = Duration::from_secs(2);
/// Where a process finds what it has open.
const DESCRIPTORS: &str = "/proc/self/fd";

/// The lock on the memory of records.
#[derive(Debug)]
pub(crate) struct Fence {
    /// A file description that nobody outside this process has.
    description: OwnedFd,
    held: AtomicBool,
}

impl Fence {
    pub(crate) fn new(description: OwnedFd) -> Self {
        Self {
            description,
            held: AtomicBool::new(false),
        }
    }

    /// Takes the lock if no other description has it.
    pub(crate) fn try_take(&self) -> io::Result<bool> {
        if self.held.load(Ordering::Relaxed) {
            return Ok(true);
        }
        match flock(&self.description, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                self.held.store(true, Ordering::Relaxed);
                Ok(true)
            }
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The description itself. Whoever gets it has the same lock.
    pub(crate) fn description(&self) -> BorrowedFd<'_> {
        self.description.as_fd()
    }

    /// What rings hold on to.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.description.as_raw_fd()
    }
}

/// The records of one device and their lock.
#[derive(Debug, Clone)]
pub struct Records {
    pub(crate) memory: Arc<InflightMemory>,
    pub(crate) fence: Arc<Fence>,
}

impl Records {
    pub(crate) fn new(memory: InflightMemory, fence: Fence) -> Self {
        Self {
            memory: Arc::new(memory),
            fence: Arc::new(fence),
        }
    }
}

/// What a device's sessions have for the case that this process is killed.
#[derive(Debug, Default)]
pub struct CrashSafety {
    /// Lets front ends keep the records; without it that is not offered.
    pub reopener: Option<Arc<Reopener>>,
    /// Used while a front end keeps none.
    pub file: Option<Records>,
}

/// Opens descriptors of this process anew, for a file description of its own:
/// a lock on the one that a front end has too would never be released.
#[derive(Debug)]
pub struct Reopener(OwnedFd);

impl Reopener {
    /// Opens `/proc/self/fd`. Before confinement, which must then be told.
    ///
    /// # Errors
    /// The kernel's refusal, where there is no `/proc`.
    pub fn new() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(openat(CWD, DESCRIPTORS, flags, Mode::empty())?))
    }

    /// Goes through an open `/proc/self/fd`, of a process that is confined.
    pub fn through(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Opens it for reading and writing. The caller has made sure that this
    /// is memory, whose open cannot wait for anybody.
    pub(crate) fn reopen(&self, fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let name = fd.as_raw_fd().to_string();
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        Ok(openat(&self.0, name, flags, Mode::empty())?)
    }
}

impl AsFd for Reopener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why a file cannot keep the records. The text is what an operator reads.
#[derive(Debug, Error)]
pub enum InflightFileError {
    /// It cannot be opened or made.
    #[error("it cannot be opened ({0}): give a file in a directory that exists and is writable")]
    Open(io::Error),
    /// A directory, a device, a link.
    #[error("it is no regular file: give another name")]
    NotAFile,
    /// Another process has it.
    #[error("a live program keeps its records there: stop that program or give another file")]
    Live,
    /// It has contents that are none of ours.
    #[error(
        "it holds something else than the records of these devices: \
         remove it if no virtual machine depends on it, or give another file"
    )]
    Other,
    /// There is no room for it, or no memory.
    #[error("it cannot be used ({0}): give a file on a memory file system such as /run")]
    Use(io::Error),
    /// It cannot be mapped.
    #[error("it cannot be mapped ({0}): give a file on a memory file system such as /run")]
    Map(InflightError),
}

/// A device that has records in the file.
#[derive(Debug, Clone, Copy)]
pub struct RecordOf<'a> {
    /// Its name.
    pub id: &'a str,
    /// What it serves.
    pub store: &'a Path,
    /// Its queues.
    pub queues: u16,
    /// Their largest size.
    pub queue_size: u16,
}

/// A file with the records of all devices of this process.
#[derive(Debug)]
pub struct InflightFile {
    /// Dropped first: the file goes while its lock is held.
    made: Made,
    /// Locked as long as this process lives.
    owner: File,
    devices: Vec<Records>,
}

impl InflightFile {
    /// Opens the file, and makes it if it is not there.
    ///
    /// # Errors
    /// [`InflightFileError`]; a file that exists is unchanged then, and none is made.
    pub fn open(path: &Path, devices: &[RecordOf<'_>]) -> Result<Self, InflightFileError> {
        let total: u64 = devices.iter().map(bytes).sum();
        let (owner, mut made) = own_file(path, total)?;
        let found = owner.metadata().map_err(InflightFileError::Open)?;
        // Memory that faults for want of room would be the end of us.
        let all = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&owner, all, 0, total) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(InflightFileError::Use(errno.into())),
        }
        let fence = opening(path).open(path).map_err(InflightFileError::Open)?;
        let again = fence.metadata().map_err(InflightFileError::Open)?;
        if (again.dev(), again.ino()) != (found.dev(), found.ino()) {
            // What is there now is somebody else's.
            made.keep();
            return Err(InflightFileError::Open(Errno::STALE.into()));
        }
        let mut file = Self::map(owner, fence.into(), devices)?;
        file.made = made;
        Ok(file)
    }

    /// The file stays for a successor from now on, also if it was made just now.
    pub fn keep(&mut self) {
        self.made.keep();
    }

    /// Goes on with the file of a predecessor that lives: with its lock, and
    /// with the lock that its rings held, so that nobody else gets in between.
    ///
    /// # Errors
    /// [`InflightFileError`]; the file is unchanged then.
    pub fn inherit(
        path: &Path,
        (owner, fence): (OwnedFd, OwnedFd),
        devices: &[RecordOf<'_>],
    ) -> Result<Self, InflightFileError> {
        let total: u64 = devices.iter().map(bytes).sum();
        Self::map(inherit_file(path, owner, total)?, fence, devices)
    }

    /// What a successor needs to go on with it: the descriptors of
    /// [`inherit`](Self::inherit).
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn estate(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        let first = self.devices.first().ok_or(io::ErrorKind::NotFound)?;
        let fence = first.fence.description().try_clone_to_owned()?;
        Ok((self.owner.as_fd().try_clone_to_owned()?, fence))
    }

    fn map(
        owner: File,
        fence: OwnedFd,
        devices: &[RecordOf<'_>],
    ) -> Result<Self, InflightFileError> {
        let sizes = devices.iter().map(bytes);
        let fence = Arc::new(Fence::new(fence));
        let mut records = Vec::with_capacity(devices.len());
        let mut offset = 0;
        for (device, size) in devices.iter().zip(sizes) {
            let file = owner.try_clone().map_err(InflightFileError::Open)?;
            let (queues, queue_size) = (device.queues, device.queue_size);
            let memory = InflightMemory::open(file, offset, queues, queue_size, identity(device));
            let memory = memory.map_err(|e| match e {
                InflightError::Foreign | InflightError::Mismatch => InflightFileError::Other,
                other => InflightFileError::Map(other),
            })?;
            records.push(Records {
                memory: Arc::new(memory),
                fence: Arc::clone(&fence),
            });
            offset += size;
        }
        Ok(Self {
            owner,
            devices: records,
            made: Made::default(),
        })
    }

    /// The records of the device with this index.
    pub fn device(&self, index: usize) -> Option<Records> {
        self.devices.get(index).cloned()
    }
}

fn opening(path: &Path) -> OpenOptions {
    let mut options = OpenOptions::new();
    // Nothing that could wait, and no link that somebody laid there: the kernel's to a descriptor of
    // our own is as good as that, such as one of memory without a name.
    let flags = match path.parent() == Some(Path::new(DESCRIPTORS)) {
        true => libc::O_NONBLOCK,
        false => libc::O_NONBLOCK | libc::O_NOFOLLOW,
    };
    options.read(true).write(true).custom_flags(flags);
    options
}

/// A file that this process has made, and that goes with it unless it comes to use it.
#[derive(Debug, Default)]
pub struct Made(Option<PathBuf>);

impl Made {
    /// It is there for a successor from now on.
    pub fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // What counts is why it was not used.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Opens a file that outlives the process, for this process alone as long as it
/// lives: makes it where it is not there, `total` bytes long, with mode 0600.
///
/// # Errors
/// [`InflightFileError`]; a file that exists is unchanged then, and none is made.
pub fn own_file(path: &Path, total: u64) -> Result<(File, Made), InflightFileError> {
    let new = opening(path).create_new(true).mode(0o600).open(path);
    let (owner, made) = match new {
        Ok(owner) => (Ok(owner), Made(Some(path.to_owned()))),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let options = opening(path).create(true).mode(0o600).open(path);
            (options, Made::default())
        }
        Err(e) => (Err(e), Made::default()),
    };
    let owner = owner.map_err(|e| match e.raw_os_error() {
        Some(libc::EISDIR | libc::ELOOP | libc::ENXIO) => InflightFileError::NotAFile,
        _ => InflightFileError::Open(e),
    })?;
    // Dropped before the owner is: the file goes while its lock is held.
    let mut made = made;
    let found = owner.metadata().map_err(InflightFileError::Open)?;
    if !found.is_file() {
        return Err(InflightFileError::NotAFile);
    }
    if !owned(&owner)? {
        // Somebody was quicker to use it.
        made.keep();
        return Err(InflightFileError::Live);
    }
    // As it is now that nobody else can be making it.
    let found = owner.metadata().map_err(InflightFileError::Open)?;
    match found.len() {
        0 => owner.set_len(total).map_err(InflightFileError::Use)?,
        len if len == total => {}
        _ => return Err(InflightFileError::Other),
    }
    Ok((owner, made))
}

/// Goes on with such a file of a predecessor that lives, and with its lock.
///
/// # Errors
/// [`InflightFileError`] where it is another file or has another length.
pub fn inherit_file(path: &Path, owner: OwnedFd, total: u64) -> Result<File, InflightFileError> {
    let owner = File::from(owner);
    let have = std::fs::metadata(path).map_err(InflightFileError::Open)?;
    let found = owner.metadata().map_err(InflightFileError::Open)?;
    let same = (have.dev(), have.ino()) == (found.dev(), found.ino());
    match same && found.len() == total {
        true => Ok(owner),
        false => Err(InflightFileError::Other),
    }
}

/// Takes the lock that ends with the process, not with its I/O. Whoever was
/// killed a moment ago may still have it.
fn owned(file: &File) -> Result<bool, InflightFileError> {
    let begin = Instant::now();
    loop {
        // SAFETY: all zero is a valid lock description.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_WRLCK as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        // SAFETY: the description outlives the call, the descriptor is open.
        let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        if taken == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) if begin.elapsed() > DYING => return Ok(false),
            Some(libc::EAGAIN | libc::EACCES | libc::EINTR) => {}
            _ => return Err(InflightFileError::Use(error)),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes of the file that a device takes.
fn bytes(device: &RecordOf<'_>) -> u64 {
    InflightMemory::bytes(device.queues, device.queue_size).next_multiple_of(4096)
}

fn identity(device: &RecordOf<'_>) -> [u8; IDENTITY_BYTES] {
    identity_of(device.id, device.store)
}

/// What tells a device from others, in a file that outlives the process: its
/// store and its name.
pub fn identity_of(id: &str, store: &Path) -> [u8; IDENTITY_BYTES] {
    let store = std::fs::canonicalize(store).unwrap_or_else(|_| store.to_owned());
    // FNV-1a: the same in every build.
    let hash = store
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
    let mut identity = [0; IDENTITY_BYTES];
    let (first, rest) = identity.split_at_mut(8);
    first.copy_from_slice(&hash.to_le_bytes());
    for (to, from) in rest.iter_mut().zip(id.bytes()) {
        *to = from;
    }
    identity
}
