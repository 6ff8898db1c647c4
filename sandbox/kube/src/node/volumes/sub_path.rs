//! A part of a volume, mounted by itself. Called by `worker` before a container starts.
//!
//! Containers of the pod may change the volume at any moment, to links out of it, too: the part is
//! opened by the kernel's own rules for what is inside, and what was opened is what is mounted,
//! never a name that is looked up again. Kubernetes had CVE-2017-1002101 and CVE-2021-25741 here.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    CWD, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, openat, openat2,
};
use rustix::io::Errno;

use super::atomic::is_inside;
use super::mounts;

/// Mounts the part `sub` of the volume at `root` on `target`, and makes it a directory when it is
/// not there.
pub(in crate::node) fn mount(root: &Path, sub: &str, target: &Path) -> io::Result<()> {
    if !is_inside(sub) {
        let text = format!("'{sub}' is no place inside a volume");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let part = open(root, Path::new(sub))?;
    // The last container's may be of another file by now.
    mounts::unmount(target)?;
    if let Some(above) = target.parent() {
        fs::create_dir_all(above)?;
    }
    let directory = FileType::from_raw_mode(fstat(&part)?.st_mode) == FileType::Directory;
    // A place to mount on is empty. Were anything still mounted there, to remove what it holds would
    // be to remove what is in the volume.
    match fs::remove_dir(target) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(target)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        done => done?,
    }
    if directory {
        fs::create_dir(target)?;
    } else {
        File::create_new(target)?;
    }
    mounts::bind(&mounts::by_descriptor(&part), target)
}

fn open(root: &Path, sub: &Path) -> io::Result<OwnedFd> {
    let top = openat(
        CWD,
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mode = Mode::from_raw_mode(fstat(&top)?.st_mode & 0o2777);
    let mut at = PathBuf::new();
    let mut found = None;
    for part in sub.components() {
        let above = at.clone();
        at.push(part);
        found = Some(match inside(&top, &at) {
            Err(Errno::NOENT) => {
                let above = if above.as_os_str().is_empty() {
                    inside(&top, Path::new("."))?
                } else {
                    inside(&top, &above)?
                };
                match mkdirat(&above, part.as_os_str(), mode) {
                    Err(Errno::EXIST) => {}
                    made => {
                        made?;
                        // The umask is not the volume's. What was swapped meanwhile is no link.
                        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                        let new = openat(&above, part.as_os_str(), flags, Mode::empty())?;
                        fchmod(&new, mode)?;
                    }
                }
                inside(&top, &at)?
            }
            opened => opened?,
        });
    }
    found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

fn inside(top: &impl AsFd, at: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    openat2(top, at, flags, Mode::empty(), within)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_part_is_inside_or_refused() {
        let scratch = Scratch::new();
        let root = scratch.path().join("volume");
        fs::create_dir_all(root.join("..2026/d")).unwrap();
        fs::write(root.join("..2026/d/f"), "x").unwrap();
        symlink("..2026", root.join("..data")).unwrap();
        symlink("..data/d", root.join("d")).unwrap();
        symlink("/etc", root.join("out")).unwrap();
        symlink("../..", root.join("up")).unwrap();
        // Links that stay inside are followed.
        open(&root, Path::new("d/f")).unwrap();
        open(&root, Path::new("new/deep")).unwrap();
        assert!(root.join("new/deep").is_dir());
        use std::os::unix::fs::PermissionsExt as _;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o2777)).unwrap();
        open(&root, Path::new("as/it")).unwrap();
        assert_eq!(mode(&root.join("as/it")) & 0o7777, 0o2777);
        for out in ["out", "out/passwd", "up/x", "out/new"] {
            assert!(open(&root, Path::new(out)).is_err(), "{out}");
        }
        for wrong in ["..", "/etc", "a/../..", ""] {
            assert!(mount(&root, wrong, &scratch.path().join("t")).is_err());
        }
    }
}
