//! Kernels that were unpacked before, by the digest of the file they came from.
//!
//! A directory of the user's own: see [`directory`]. An unpacked kernel is `<sha256 of the bzImage>.elf`. The digest of
//! a file of 12 MB takes longer than all else before the guest runs, so a link
//! named after the file's device, inode, size and times leads to it: whoever can
//! make a file with the same of all these can write the kernel itself.
//!
//! Nothing here is needed: where the directory cannot be written, kernels are
//! unpacked each time. Called by the monitor before it confines itself, and before QEMU is
//! started.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use log::{debug, info};
use rustix::fs::MemfdFlags;
use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest, Sha256};

use crate::{Image, KernelError, is_elf, payload};

/// Where root's kernels are kept, unless said otherwise.
pub const DIRECTORY: &str = "/var/cache/pericarp/kernels";

/// A plain kernel.
#[derive(Debug)]
pub enum Plain {
    /// A file: what was given, or what was kept.
    Kept(PathBuf),
    /// A file without a name, for this once.
    Memory(File),
}

/// Where this user's kernels are kept, unless said otherwise: root's in [`DIRECTORY`], others' in
/// `$XDG_CACHE_HOME` or `~/.cache`; `None` where neither is known.
#[must_use]
pub fn directory() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(DIRECTORY.into());
    }
    let variable = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    variable("XDG_CACHE_HOME")
        .or_else(|| Some(variable("HOME")?.join(".cache")))
        .map(|cache| cache.join("pericarp/kernels"))
        // QEMU is given it as text.
        .filter(|path| path.to_str().is_some())
}

/// Opens a kernel in the form in which it is loaded. One that is to choose its
/// own address (`kaslr`) is left to unpack itself.
///
/// # Errors
/// It cannot be read, is none, is damaged, or has no choice.
pub fn open(path: &Path, cache: Option<&Path>, kaslr: bool) -> Result<Image, KernelError> {
    if kaslr {
        let file = File::open(path)?;
        if is_elf(&file)? {
            return Err(KernelError::Placed);
        }
        payload::find(&file)?;
        return Ok(Image::BzImage(file));
    }
    Ok(match plain(path, cache)? {
        Some(Plain::Kept(kept)) => Image::Elf(File::open(kept)?),
        Some(Plain::Memory(file)) => Image::Elf(file),
        None => Image::BzImage(File::open(path)?),
    })
}

/// The plain kernel in this file, which is kept for the next time if it has to be unpacked.
/// `None` where that cannot be done here: the kernel then unpacks itself.
///
/// # Errors
/// It cannot be read, is none, or is damaged.
pub fn plain(path: &Path, cache: Option<&Path>) -> Result<Option<Plain>, KernelError> {
    let file = File::open(path)?;
    if is_elf(&file)? {
        return Ok(Some(Plain::Kept(path.to_owned())));
    }
    let Some(place) = payload::find(&file)? else {
        return Ok(None);
    };
    let cache = cache.and_then(|dir| match Cache::open(dir) {
        Ok(cache) => Some(cache),
        Err(e) => {
            debug!("kernels are not kept in {}: {e}", dir.display());
            None
        }
    });
    let known = cache.as_ref().and_then(|cache| cache.known(&file));
    if let Some(kept) = known {
        return Ok(Some(Plain::Kept(kept)));
    }
    let Some(kernel) = payload::unpack(&file, place)? else {
        return Ok(None);
    };
    if let Some(cache) = cache {
        match cache.keep(&file, &kernel) {
            Ok(kept) => {
                info!("{} is unpacked and kept", path.display());
                return Ok(Some(Plain::Kept(kept)));
            }
            Err(e) => debug!("{} is not kept: {e}", path.display()),
        }
    }
    // As a file all the same: it is read in pieces, and its pages can be swapped out.
    let made = rustix::fs::memfd_create("kernel", MemfdFlags::CLOEXEC).map_err(io::Error::from);
    let filled = made.map(File::from).and_then(|mut file| {
        file.write_all(&kernel)?;
        Ok(file)
    });
    match filled {
        Ok(file) => Ok(Some(Plain::Memory(file))),
        Err(e) => {
            info!(
                "{} unpacks itself, there is no room for it: {e}",
                path.display()
            );
            Ok(None)
        }
    }
}

struct Cache(PathBuf);

impl Cache {
    /// The directory, made if it is missing. Others' directories are not used,
    /// nor those that others may write to.
    fn open(dir: &Path) -> io::Result<Self> {
        // Whatever the umask: one that the group may write to would never be used.
        let mut make = fs::DirBuilder::new();
        make.recursive(true).mode(0o755).create(dir)?;
        let meta = fs::symlink_metadata(dir)?;
        let own = meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw();
        if !own {
            return Err(io::Error::other("it is not a directory of this user"));
        }
        if meta.permissions().mode() & 0o022 != 0 {
            return Err(io::Error::other("others may write to it"));
        }
        Ok(Self(dir.to_owned()))
    }

    /// The name of the link to what came of this very file.
    fn link(&self, file: &File) -> io::Result<PathBuf> {
        let meta = file.metadata()?;
        Ok(self.0.join(format!(
            "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec()
        )))
    }

    fn known(&self, file: &File) -> Option<PathBuf> {
        let name = fs::read_link(self.link(file).ok()?).ok()?;
        // The link leads to a name beside it and nowhere else.
        let path = self.0.join(name.file_name()?);
        let kernel = File::open(&path).ok()?;
        is_elf(&kernel).ok()?.then_some(path)
    }

    fn keep(&self, file: &File, kernel: &[u8]) -> io::Result<PathBuf> {
        let mut digest = Sha256::new();
        let mut source = file.try_clone()?;
        io::Seek::rewind(&mut source)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match io::Read::read(&mut source, &mut buffer)? {
                0 => break,
                count => digest.update(&buffer[..count]),
            }
        }
        let hex: String = digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let name = format!("{hex}.elf");
        let path = self.0.join(&name);
        // Under another name first: who looks finds all of it or nothing.
        // A process's number comes again, and what it left may be there still.
        let now = clock_gettime(ClockId::Monotonic);
        let unique = format!("{}.{}-{}", std::process::id(), now.tv_sec, now.tv_nsec);
        let part = self.0.join(format!("{name}.{unique}"));
        let mut out = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        // On the disk before it has its name: nobody looks at all of it later.
        let written = out.write_all(kernel).and_then(|()| out.sync_data());
        // Who was quicker is not replaced: a QEMU that starts just now may open that very file and
        // no other.
        let is_kernel = || File::open(&path).is_ok_and(|file| is_elf(&file).unwrap_or(false));
        let placed = written.and_then(|()| match fs::hard_link(&part, &path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && is_kernel() => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => fs::rename(&part, &path),
            other => other,
        });
        let _ = fs::remove_file(&part);
        placed?;
        let link = self.link(file)?;
        if let Err(e) = std::os::unix::fs::symlink(&name, &link)
            && e.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(e);
        }
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use pericarp_tests::scratch::Scratch;

    use super::*;

    /// A bzImage around this kernel.
    fn bzimage(kernel: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let payload = ruzstd::encoding::compress_to_vec(kernel, level);
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    fn content(image: Image) -> Vec<u8> {
        let Image::Elf(mut file) = image else {
            panic!("it was not unpacked");
        };
        let mut bytes = Vec::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_kernel_is_unpacked_once_and_again_when_it_changes() {
        let scratch = Scratch::new();
        let (kernel, cache) = (scratch.path("vmlinuz"), scratch.path("a/b"));
        fs::write(&kernel, bzimage(b"\x7fELF one")).unwrap();
        let opened = open(&kernel, Some(&cache), false).unwrap();
        assert_eq!(content(opened), b"\x7fELF one");
        // The second time it comes from the cache: what is there is what counts.
        let kept = fs::read_dir(&cache).unwrap();
        let kept = kept.map(|entry| entry.unwrap().path());
        let kept = kept.filter(|path| path.extension().is_some_and(|e| e == "elf"));
        let kept: Vec<_> = kept.collect();
        assert_eq!(kept.len(), 1);
        fs::write(&kept[0], b"\x7fELF kept").unwrap();
        let opened = open(&kernel, Some(&cache), false).unwrap();
        assert_eq!(content(opened), b"\x7fELF kept");
        fs::write(&kernel, bzimage(b"\x7fELF another")).unwrap();
        let opened = open(&kernel, Some(&cache), false).unwrap();
        assert_eq!(content(opened), b"\x7fELF another");
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_not_used() {
        let scratch = Scratch::new();
        let (kernel, cache) = (scratch.path("vmlinuz"), scratch.path("cache"));
        fs::write(&kernel, bzimage(b"\x7fELF one")).unwrap();
        fs::create_dir(&cache).unwrap();
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(
            content(open(&kernel, Some(&cache), false).unwrap()),
            b"\x7fELF one"
        );
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
        assert_eq!(content(open(&kernel, None, false).unwrap()), b"\x7fELF one");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let scratch = Scratch::new();
        let file = scratch.path("file");
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096]] {
            fs::write(&file, bytes).unwrap();
            assert!(matches!(
                open(&file, None, false),
                Err(KernelError::Unknown)
            ));
        }
    }
}
