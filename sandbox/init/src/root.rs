//! The root file system: mounted from its disk, furnished, entered, and flushed at the end.
//!
//! Called by `main`. The initramfs cannot be the source of `pivot_root`, so the root disk is moved
//! over `/` and entered with `chroot`, as `switch_root` does.

use std::{fs, io, path::Path};

use pericarp_protocol::RunSpec;
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, mount_move, mount_remount, unmount},
};

use crate::{
    disks::Disks,
    error::{InitError, during},
};

const NEW_ROOT: &str = "/root-disk";

/// A file system the command finds mounted.
struct Furniture {
    kind: &'static str,
    at: &'static str,
    flags: MountFlags,
    data: Option<&'static std::ffi::CStr>,
    /// Without it programs do not work, so its absence is an error.
    essential: bool,
}

const FURNITURE: [Furniture; 8] = [
    Furniture {
        kind: "proc",
        at: "/proc",
        flags: TIGHT,
        data: None,
        essential: true,
    },
    Furniture {
        kind: "sysfs",
        at: "/sys",
        flags: TIGHT,
        data: None,
        essential: true,
    },
    Furniture {
        kind: "devtmpfs",
        at: "/dev",
        flags: MountFlags::NOSUID,
        data: None,
        essential: true,
    },
    Furniture {
        kind: "devpts",
        at: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: Some(c"gid=5,mode=620,ptmxmode=666"),
        essential: true,
    },
    Furniture {
        kind: "tmpfs",
        at: "/dev/shm",
        flags: LOOSE,
        data: Some(c"mode=1777"),
        essential: true,
    },
    Furniture {
        kind: "cgroup2",
        at: "/sys/fs/cgroup",
        flags: TIGHT,
        data: None,
        essential: true,
    },
    Furniture {
        kind: "tmpfs",
        at: "/tmp",
        flags: LOOSE,
        data: Some(c"mode=1777"),
        essential: false,
    },
    Furniture {
        kind: "tmpfs",
        at: "/run",
        flags: LOOSE,
        data: Some(c"mode=755"),
        essential: false,
    },
];

const LOOSE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const TIGHT: MountFlags = LOOSE.union(MountFlags::NOEXEC);

/// Mounts the root disk and makes it this process's root.
pub(crate) fn enter(spec: &RunSpec, disks: &Disks) -> Result<(), InitError> {
    let device = format!("/dev/{}", disks[&spec.root.id]);
    fs::create_dir_all(NEW_ROOT).map_err(during(NEW_ROOT))?;
    let flags = if spec.root.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    match mount(&device, NEW_ROOT, "ext4", flags, None) {
        Ok(()) => {}
        Err(Errno::ROFS) if spec.root.read_only => return Err(InitError::RootNeedsRecovery),
        Err(error) => return Err(InitError::Root(error.into())),
    }
    for item in &FURNITURE {
        furnish(item)?;
    }
    standard_links().map_err(during("the links in /dev"))?;
    rustix::process::chdir(NEW_ROOT).map_err(during(NEW_ROOT))?;
    mount_move(".", "/").map_err(during("moving the root disk to /"))?;
    rustix::process::chroot(".").map_err(during("entering the root disk"))?;
    rustix::process::chdir("/").map_err(during("entering the root disk"))
}

fn furnish(item: &Furniture) -> Result<(), InitError> {
    let target = format!("{NEW_ROOT}{}", item.at);
    if !Path::new(&target).is_dir() {
        match fs::create_dir(&target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                if item.essential {
                    return Err(InitError::NoDirectory(item.at.into()));
                }
                return Ok(());
            }
            Err(error) => return Err(during(format!("mkdir {}", item.at))(error)),
        }
    }
    mount(item.kind, &target, item.kind, item.flags, item.data)
        .map_err(during(format!("mount {}", item.at)))
}

fn standard_links() -> io::Result<()> {
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        match std::os::unix::fs::symlink(target, format!("{NEW_ROOT}/dev/{name}")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Brings what was written to the disks. Nothing else may be running any more.
pub(crate) fn flush(spec: &RunSpec) -> Result<(), InitError> {
    // What the command mounted from further disks, the latest first.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for at in device_mounts(&mounts).into_iter().rev() {
        if at != "/" {
            let path = Path::new(&at);
            // Before the unmount, because only this reports an error of the disk.
            if let Ok(directory) = fs::File::open(path) {
                rustix::fs::syncfs(&directory).map_err(|e| InitError::Flush {
                    disk: at.clone(),
                    source: e.into(),
                })?;
            }
            // One that is busy has been synced all the same.
            let _ = unmount(path, UnmountFlags::empty());
        }
    }
    if !spec.root.read_only {
        let failed = |error: Errno| InitError::Flush {
            disk: "root".into(),
            source: error.into(),
        };
        let root = fs::File::open("/").map_err(during("/"))?;
        rustix::fs::syncfs(&root).map_err(failed)?;
        drop(root);
        // The journal is emptied, so that the image mounts read-only the next time.
        mount_remount("/", MountFlags::RDONLY, "").map_err(failed)?;
    }
    Ok(())
}

/// Where block devices are mounted, in the order of mounting.
fn device_mounts(mounts: &str) -> Vec<String> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (source, at) = (fields.next()?, fields.next()?);
            source.starts_with("/dev/").then(|| unescape(at))
        })
        .collect()
}

/// Undoes the octal escapes that `/proc/self/mounts` uses for blanks and backslashes.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let code = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_disks_are_found_in_order() {
        let text = "/dev/vda / ext4 rw 0 0\nproc /proc proc rw 0 0\n/dev/vdb /mnt/a\\040b\\134 \
                    ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n";
        assert_eq!(device_mounts(text), ["/", "/mnt/a b\\"]);
        assert_eq!(unescape("a\\x\\04"), "a\\x\\04");
    }
}
