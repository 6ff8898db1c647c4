//! The read-only root disk of an image, made once and kept.
//!
//! Called by `pericarp run` before it starts a virtual machine. The disk is an EROFS file system:
//! uncompressed in blocks of 4 KiB, so that the guest's page cache is filled by plain reads, and
//! always the same for the same image, byte for byte.
//!
//! The caller runs `mkfs.erofs`, because only it knows how to end a program when the user wants
//! to stop:
//!
//! ```no_run
//! # use pericarp_oci::{disk::{Cache, DiskError, Found}, image::Image, rootfs::{Limits, Rights}};
//! # fn disk(image: &Image, stop: &dyn Fn() -> bool) -> Result<std::path::PathBuf, DiskError> {
//! let cache = Cache::open("/var/cache/pericarp".as_ref(), Rights::of_this_process())?;
//! Ok(match cache.look_up(image, stop)? {
//!     Found::Ready(path) => path,
//!     Found::Missing(mut making) => {
//!         making.unpack(image, &Limits::default(), stop)?;
//!         let status = making.command()?.status();
//! #       let _ = status;
//!         making.finish()?
//!     }
//! })
//! # }
//! ```
//!
//! [`Found::Missing`] holds the lock on that image: a second run waits in `look_up` and finds the
//! disk ready. Dropping it removes what is unfinished; what a killed run left behind is removed by
//! the next one that looks up anything.

mod erofs;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, OFlags, flock},
    io::Errno,
};
use thiserror::Error;

use crate::{
    image::Image,
    rootfs::{self, Limits, Report, Rights, RootfsError},
};

/// Part of the names: to be raised when the same image would give another disk.
const FORM: &str = "1";
/// How often a run that waits for another asks whether it should stop.
const PATIENCE: Duration = Duration::from_millis(50);
/// Of what we make; a block backend reads whole blocks past its own page cache.
const BLOCK: u64 = 4096;

/// A disk that could not be made.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The cache directory or something in it.
    #[error("'{path}' cannot be used to keep disks in: {source}", path = path.display())]
    Cache {
        /// What was used.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody else could put a disk there.
    #[error(
        "'{path}' belongs to another user or may be written to by others, so disks in it cannot be \
         trusted; `chmod go-w` it or name another directory", path = path.display()
    )]
    Open {
        /// The directory.
        path: PathBuf,
    },
    /// The layers.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A program that is not there.
    #[error("mkfs.erofs is not installed; Debian's package is erofs-utils")]
    NoProgram,
    /// A program that said it succeeded and did not.
    #[error("mkfs.erofs left no whole file system at '{path}'", path = path.display())]
    NotWhole {
        /// The file.
        path: PathBuf,
    },
    /// The caller does not want to wait any longer.
    #[error("stopped while waiting for another run that makes the same disk")]
    Stopped,
}

/// A directory with disks.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
    rights: Rights,
}

/// What there was.
#[derive(Debug)]
pub enum Found {
    /// The disk, from an earlier run.
    Ready(PathBuf),
    /// Nothing yet, and we are the one to make it.
    Missing(Making),
}

/// A disk in the making, and the lock on its name.
#[derive(Debug)]
pub struct Making {
    work: PathBuf,
    finished: PathBuf,
    uuid: [u8; 16],
    rights: Rights,
    report: Report,
    _lock: File,
}

impl Cache {
    /// Makes the directory where it is missing. Disks made by root and by a plain user differ in
    /// owners, so each has its own names.
    pub fn open(directory: &Path, rights: Rights) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Cache {
            path: directory.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
        let directory = directory.canonicalize().map_err(failed)?;
        let meta = fs::metadata(&directory).map_err(failed)?;
        let is_ours = [0, rustix::process::geteuid().as_raw()].contains(&meta.uid());
        if meta.mode() & 0o022 != 0 || !is_ours {
            return Err(DiskError::Open { path: directory });
        }
        Ok(Self { directory, rights })
    }

    /// The disk of an image, or the right to make it. Waits while another run makes it.
    pub fn look_up(
        &self,
        image: &Image,
        should_stop: &dyn Fn() -> bool,
    ) -> Result<Found, DiskError> {
        let owners = match self.rights {
            Rights::Root => "",
            Rights::User => "-user",
        };
        let name = format!("{}-{FORM}{owners}", image.digest().hex());
        let finished = self.directory.join(format!("{name}.erofs"));
        let uuid = uuid(image, self.rights);
        // No lock for what most runs find: files get their final name when they are whole.
        if is_whole(&finished, uuid) {
            return Ok(Found::Ready(finished));
        }
        let lock = self.lock(&name, should_stop)?;
        self.sweep();
        if is_whole(&finished, uuid) {
            return Ok(Found::Ready(finished));
        }
        let work = self.directory.join(format!("{name}{UNFINISHED}"));
        let failed = |source| DiskError::Cache {
            path: work.clone(),
            source,
        };
        clear(&work).map_err(failed)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&work)
            .map_err(failed)?;
        Ok(Found::Missing(Making {
            work,
            finished,
            uuid,
            rights: self.rights,
            report: Report::default(),
            _lock: lock,
        }))
    }

    fn lock(&self, name: &str, should_stop: &dyn Fn() -> bool) -> Result<File, DiskError> {
        let path = self.directory.join(format!("{name}{LOCK}"));
        let failed = |source| DiskError::Cache {
            path: path.clone(),
            source,
        };
        let file = open_lock(&path).map_err(failed)?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            if should_stop() {
                return Err(DiskError::Stopped);
            }
            thread::sleep(PATIENCE);
        }
    }

    /// Removes what dead runs left of other images. What cannot be removed now stays for later.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return;
        };
        for entry in entries.flatten() {
            let file_name = entry.file_name();
            let Some(name) = file_name
                .to_str()
                .and_then(|it| it.strip_suffix(UNFINISHED))
            else {
                continue;
            };
            let Ok(lock) = open_lock(&self.directory.join(format!("{name}{LOCK}"))) else {
                continue;
            };
            // A lock that is held, by us too, is of a run that lives.
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = clear(&entry.path());
            }
        }
    }
}

const UNFINISHED: &str = ".unfinished";
/// Never removed: two runs could otherwise hold locks on two files of one name.
const LOCK: &str = ".lock";

impl Making {
    /// Unpacks the layers.
    pub fn unpack(
        &mut self,
        image: &Image,
        limits: &Limits,
        should_stop: &dyn Fn() -> bool,
    ) -> Result<Report, DiskError> {
        self.report = rootfs::unpack(image, &self.tree(), self.rights, limits, should_stop)?;
        Ok(self.report)
    }

    /// The program that makes the file system of what was unpacked.
    pub fn command(&self) -> Result<Command, DiskError> {
        let program = ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"]
            .iter()
            .map(|directory| Path::new(directory).join("mkfs.erofs"))
            .find(|path| path.exists())
            .ok_or(DiskError::NoProgram)?;
        let mut command = Command::new(program);
        command
            .arg("--quiet")
            .arg(format!("-U{}", erofs::uuid_text(self.uuid)))
            // Times up to this one are kept; with -T this version would flatten them all to one.
            .env("SOURCE_DATE_EPOCH", (self.report.newest + 1).to_string())
            .stdin(std::process::Stdio::null());
        if self.rights == Rights::User {
            // All files are the user's own here, which means nothing inside.
            command.arg("--all-root");
        }
        command.arg(self.disk()).arg(self.tree());
        Ok(command)
    }

    /// Checks what the program made and gives it its name.
    pub fn finish(self) -> Result<PathBuf, DiskError> {
        let made = self.disk();
        let failed = |source| DiskError::Cache {
            path: made.clone(),
            source,
        };
        let not_whole = || DiskError::NotWhole { path: made.clone() };
        let file = match OpenOptions::new().write(true).open(&made) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_whole()),
            Err(error) => return Err(failed(error)),
        };
        let size = file.metadata().map_err(failed)?.len();
        file.set_len(size.next_multiple_of(BLOCK)).map_err(failed)?;
        // After a power cut a name must not stand for a file with holes.
        file.sync_all().map_err(failed)?;
        if !is_whole(&made, self.uuid) {
            return Err(not_whole());
        }
        fs::rename(&made, &self.finished).map_err(failed)?;
        if let Some(directory) = self.finished.parent() {
            File::open(directory)
                .and_then(|directory| directory.sync_all())
                .map_err(failed)?;
        }
        Ok(self.finished.clone())
    }

    fn tree(&self) -> PathBuf {
        self.work.join("root")
    }

    fn disk(&self) -> PathBuf {
        self.work.join("disk.erofs")
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // Nothing to be done about a failure here; the next run tries again.
        let _ = clear(&self.work);
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

fn clear(path: &Path) -> io::Result<()> {
    match rootfs::remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Different content has a different identity: who made it is part of it.
fn uuid(image: &Image, rights: Rights) -> [u8; 16] {
    let text = format!("{} {FORM} {rights:?}", image.digest());
    let mut uuid = crate::digest::Digest::of(text.as_bytes()).half();
    // Version 8, made by a rule of one's own (RFC 9562).
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Whether this is a file of ours, whole, and made for this image.
fn is_whole(path: &Path, uuid: [u8; 16]) -> bool {
    let open = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path);
    let Ok(file) = open else {
        return false;
    };
    let Ok(meta) = file.metadata() else {
        return false;
    };
    let own = rustix::process::geteuid().as_raw();
    meta.is_file()
        && (meta.uid() == own || meta.uid() == 0)
        && meta.mode() & 0o022 == 0
        && meta.len() % BLOCK == 0
        && erofs::is_file_system(&file, meta.len(), uuid)
}

#[cfg(test)]
mod tests;
