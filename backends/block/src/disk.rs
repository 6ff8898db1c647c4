//! The file behind a disk: opened once, measured once.
//!
//! `main` opens every disk before the program confines itself; the device asks
//! it for sizes and alignments while it serves.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, SeekFrom, StatxFlags, statx};
use thiserror::Error;

mod given;
mod polling;
mod topology;

pub use polling::NoPolling;
pub use topology::{Abilities, MEASURING};
pub(crate) use topology::{DiscardBy, Topology};

/// Bytes of a virtio-blk sector, whatever the disk's own block size.
pub(crate) const SECTOR: u64 = 512;

/// What the host's page cache has to do with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// O_DIRECT: none.
    #[default]
    Direct,
    /// Reads and writes go through it.
    Buffered,
    /// Through it, and dropped from it when done (RWF_DONTCACHE).
    DontCache,
}

/// How to open a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The image file or block device.
    pub file: PathBuf,
    /// Never write to it.
    pub read_only: bool,
    /// Use of the page cache.
    pub cache: CacheMode,
    /// Look at its device for completions instead of taking interrupts.
    pub iopoll: bool,
}

/// Why a file cannot be a disk. The text is what an operator reads: the rule
/// that is broken and the cure.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Nothing there.
    #[error("no such file: give the path of an existing image or block device")]
    Missing,
    /// Not a regular file and not a block device.
    #[error("it is a {0}: give an image file or a block device")]
    WrongKind(&'static str),
    /// Nothing in it.
    #[error("it is empty: a disk has at least one 512-byte sector; make it larger with truncate")]
    Empty,
    /// A part of a block at the end.
    #[error(
        "its size {size} is not a multiple of {block} bytes: \
         a disk has whole blocks; extend it with truncate -s {rounded}"
    )]
    PartialBlock {
        /// Size of the file.
        size: u64,
        /// Block size of the disk.
        block: u32,
        /// The next size that is allowed.
        rounded: u64,
    },
    /// It exists and cannot be opened.
    #[error("it cannot be opened for {wanted} ({source}): {cure}")]
    Open {
        /// Reading, or reading and writing.
        wanted: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// What to do.
        cure: &'static str,
    },
    /// The file system knows no O_DIRECT.
    #[error("its file system has no direct I/O: use cache mode buffered")]
    NoDirect,
    /// The file system or kernel knows no RWF_DONTCACHE.
    #[error("its file system or this kernel has no uncached buffered I/O: use cache mode buffered")]
    NoDontCache,
    /// Its device cannot be polled.
    #[error(transparent)]
    NoPolling(#[from] NoPolling),
    /// A descriptor that was opened otherwise than the device needs it.
    #[error("{0}")]
    Opened(&'static str),
    /// Its size or geometry could not be read.
    #[error("it cannot be measured ({0}): give an image file or a block device")]
    Measure(io::Error),
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    pub(crate) file: OwnedFd,
    pub(crate) geometry: Geometry,
    /// Reads can be told not to wait.
    nowait: bool,
    /// Its device is looked at for completions.
    iopoll: bool,
    pub(crate) size: u64,
}

/// What a device has to know of its disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) read_only: bool,
    pub(crate) cache: CacheMode,
    /// Smallest unit of a transfer, reported as the logical block size.
    pub(crate) logical_block: u32,
    /// Unit that the medium prefers.
    pub(crate) physical_block: u32,
    /// What a buffer's address must be a multiple of.
    pub(crate) memory_align: u32,
    pub(crate) topology: Topology,
}

impl Disk {
    /// Opens and measures a disk. Nothing of what it holds is changed.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        check_kind(&options.file)?;
        let file = open(options)?;
        Self::on(file, options, None)
    }

    /// A disk that somebody else has opened, as [`open`](Self::open) would. Of
    /// a block device the confined program cannot learn all; what it can do has
    /// to be told.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn given(
        file: OwnedFd,
        options: &DiskOptions,
        abilities: Abilities,
    ) -> Result<Self, DiskError> {
        given::check(file.as_fd(), options)?;
        Self::on(file.into(), options, Some(abilities))
    }

    fn on(
        file: File,
        options: &DiskOptions,
        abilities: Option<Abilities>,
    ) -> Result<Self, DiskError> {
        let geometry = measure(&file, options, abilities).map_err(DiskError::Measure)?;
        let size = geometry.size_of(&file)?;
        if geometry.cache == CacheMode::DontCache {
            probe_dontcache(&file)?;
        }
        if options.iopoll {
            polling::probe(&file, geometry.logical_block)?;
        }
        Ok(Self {
            nowait: topology::reads_without_waiting(&file, geometry.logical_block),
            file: file.into(),
            iopoll: options.iopoll,
            geometry,
            size,
        })
    }

    /// A ring needs a thread of the kernel's for every read of this disk: its
    /// file system knows no NOWAIT, as FUSE, memory and network ones.
    pub fn needs_threads(&self) -> bool {
        !self.nowait
    }

    /// Its device is looked at for completions of reads and writes.
    pub fn is_polled(&self) -> bool {
        self.iopoll
    }

    /// Discards go to a block device by a command of its own.
    pub fn discards_by_command(&self) -> bool {
        self.geometry.topology.discard == DiscardBy::Command
    }

    /// What [`given`](Self::given) has to be told of it.
    pub fn abilities(&self) -> Abilities {
        let topology = &self.geometry.topology;
        Abilities {
            discard_granularity: if self.discards_by_command() {
                topology.granularity
            } else {
                0
            },
            unmap_zeroes: topology.unmap_zeroes,
        }
    }

    /// The open file.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Geometry {
    /// Measures the file, which is open and may have another size than before.
    pub(crate) fn size_of(&self, file: impl AsFd) -> Result<u64, DiskError> {
        // A seek, because it serves files and block devices alike and passes
        // the filter of a confined program. Nothing uses the file's position.
        let size = rustix::fs::seek(file, SeekFrom::End(0))
            .map_err(|errno| DiskError::Measure(errno.into()))?;
        let block = u64::from(self.logical_block);
        if size == 0 {
            return Err(DiskError::Empty);
        }
        if !size.is_multiple_of(block) {
            return Err(DiskError::PartialBlock {
                size,
                block: self.logical_block,
                rounded: size.next_multiple_of(block),
            });
        }
        Ok(size)
    }
}

/// Refuses what must not even be opened: opening a fifo would hang.
fn check_kind(path: &Path) -> Result<(), DiskError> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(DiskError::Missing),
        Err(source) => {
            return Err(DiskError::Open {
                wanted: "reading",
                source,
                cure: "give a path that this user can reach",
            });
        }
    };
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    Err(DiskError::WrongKind(match kind {
        k if k.is_dir() => "directory",
        k if k.is_fifo() => "fifo",
        k if k.is_socket() => "socket",
        k if k.is_char_device() => "character device",
        _ => "special file",
    }))
}

fn open(options: &DiskOptions) -> Result<File, DiskError> {
    let direct = options.cache == CacheMode::Direct;
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let result = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(&options.file);
    result.map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) if direct => DiskError::NoDirect,
        _ if options.read_only => DiskError::Open {
            wanted: "reading",
            source,
            cure: "give a file that this user may read",
        },
        _ => DiskError::Open {
            wanted: "reading and writing",
            source,
            cure: "give a file that this user may write, or serve it read-only",
        },
    })
}

fn measure(
    file: &File,
    options: &DiskOptions,
    abilities: Option<Abilities>,
) -> io::Result<Geometry> {
    let metadata = file.metadata()?;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN;
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, wanted)?;
    let known = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN)
        && stat.stx_dio_offset_align != 0;
    let is_device = metadata.file_type().is_block_device();
    let (mut logical, physical) = if is_device {
        (
            rustix::fs::ioctl_blksszget(file)?,
            rustix::fs::ioctl_blkpbszget(file)?,
        )
    } else {
        (SECTOR as u32, stat.stx_blksize.clamp(512, 64 * 1024))
    };
    let mut memory_align = 1;
    if options.cache == CacheMode::Direct {
        // Kernels before 6.1 do not say: a page satisfies them all.
        memory_align = if known { stat.stx_dio_mem_align } else { 4096 };
        if known {
            logical = logical.max(stat.stx_dio_offset_align);
        }
    }
    let logical = logical.next_power_of_two();
    let physical = physical.next_power_of_two().max(logical);
    let topology = if is_device {
        let abilities = match abilities {
            _ if options.read_only => Abilities::default(),
            Some(told) => told,
            None => Abilities::of_device(file, logical)?,
        };
        topology::of_device(file, logical, physical, abilities)
    } else {
        topology::of_file(file, metadata.len(), physical, options.read_only)
    };
    Ok(Geometry {
        read_only: options.read_only,
        cache: options.cache,
        logical_block: logical,
        physical_block: physical,
        memory_align: memory_align.next_power_of_two(),
        topology,
    })
}

fn probe_dontcache(file: &File) -> Result<(), DiskError> {
    let mut byte = [0u8; 1];
    let mut slices = [io::IoSliceMut::new(&mut byte)];
    let flags = rustix::io::ReadWriteFlags::from_bits_retain(crate::device::RWF_DONTCACHE as u32);
    match rustix::io::preadv2(file, &mut slices, 0, flags) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => Err(DiskError::NoDontCache),
        Err(errno) => Err(DiskError::Measure(errno.into())),
    }
}
