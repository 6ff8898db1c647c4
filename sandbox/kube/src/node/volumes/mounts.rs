//! Mounts below a pod's directory. Called by `volumes`.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

/// Whether something is mounted there.
pub(super) fn is_mounted(path: &Path) -> io::Result<bool> {
    let above = path.parent().unwrap_or(path);
    Ok(fs::metadata(path)?.dev() != fs::metadata(above)?.dev())
}

/// Mounts memory, of so many bytes at most.
pub(super) fn memory(path: &Path, size: Option<u64>) -> io::Result<()> {
    let options = match size {
        Some(size) => format!("mode=755,size={size}"),
        None => "mode=755".into(),
    };
    let options = CString::new(options)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("tmpfs", path, "tmpfs", flags, options.as_c_str())?;
    Ok(())
}

/// Unmounts what is mounted at `path` itself, if anything is.
pub(super) fn unmount(path: &Path) -> io::Result<()> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    // It may be reached through a link; the kernel knows one name.
    let path = match fs::canonicalize(above) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        above => above?.join(name),
    };
    for place in mounted()?.iter().rev().filter(|place| **place == path) {
        detach(place)?;
    }
    Ok(())
}

/// Unmounts all that is mounted below `dir`, the last mount first.
pub(super) fn unmount_below(dir: &Path) -> io::Result<()> {
    // It may be reached through a link; the kernel knows one name.
    let dir = match fs::canonicalize(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        dir => dir?,
    };
    let below = |place: &&PathBuf| place.starts_with(&dir) && **place != dir;
    for place in mounted()?.iter().rev().filter(below) {
        detach(place)?;
    }
    Ok(())
}

fn detach(place: &Path) -> io::Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    Ok(rustix::mount::unmount(place, flags)?)
}

/// Where something is mounted, in the order of the mounts.
fn mounted() -> io::Result<Vec<PathBuf>> {
    let mounts = fs::read("/proc/self/mountinfo")?;
    let lines = mounts.split(|byte| *byte == b'\n');
    // See proc_pid_mountinfo(5): the fifth field.
    let places = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    Ok(places.map(plain).collect())
}

/// Spaces and the like are in octal.
fn plain(escaped: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) if byte == b'\\' => {
                bytes.push(value);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// The name of what a descriptor is of, for calls that take names.
pub(super) fn by_descriptor(fd: &impl std::os::fd::AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Mounts one place at another.
pub(super) fn bind(from: &Path, to: &Path) -> io::Result<()> {
    Ok(rustix::mount::mount_bind(from, to)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unescaped() {
        assert_eq!(plain(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(plain(b"/a\\04"), Path::new("/a\\04"));
    }

    #[test]
    fn mounts_are_listed_and_known() {
        assert!(mounted().unwrap().contains(&PathBuf::from("/proc")));
        assert!(is_mounted(Path::new("/proc")).unwrap());
        assert!(!is_mounted(Path::new("/proc/self")).unwrap());
    }
}
