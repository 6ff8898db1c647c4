//! File systems on disks of the machine that containers are shown as volumes or have as their root:
//! each is mounted once, as long as a container has it, and shown as a bind mount.
//!
//! Called by `root` when a container is created and removed, and by `pod` at power-off. Nobody but
//! this kernel has the file system mounted: the host has given its disk away.
//!
//! ```text
//! /run/pericarp/disks/<serial>   the file system on that disk
//! ```

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use pericarp_api::{
    ROOT_KINDS,
    agent::{FileSystem, Group, Part},
    share::is_part,
};
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat2},
    io::Errno,
    mount::MountFlags,
};

use crate::{
    boot::STATE,
    error::{RequestError, trying},
    ownership,
    root::{mount_disk, put_away},
    shares::{self, Shares},
};

/// What mount(2) takes of options is a page.
const MAX_OPTIONS: usize = 4000;

/// Those that are mounted, by the serials of their disks.
#[derive(Debug, Default)]
pub(crate) struct Volumes(Mutex<BTreeMap<String, Mounted>>);

#[derive(Debug)]
struct Mounted {
    place: PathBuf,
    read_only: bool,
    /// Containers that are shown it.
    users: usize,
}

impl Volumes {
    /// Mounts what a container is to be shown unless it is mounted; returns where. To be let go of.
    pub(crate) fn show(
        &self,
        shares: &Shares,
        wanted: &FileSystem,
    ) -> Result<PathBuf, RequestError> {
        let options = Options::parse(wanted)?;
        // Held meanwhile: another container may want the same one.
        let mut all = self.lock();
        if let Some(there) = all.get_mut(&wanted.disk) {
            there.users += 1;
            return Ok(there.place.clone());
        }
        for module in &wanted.modules {
            load(shares, module)?;
        }
        let place = Path::new(STATE).join("disks").join(&wanted.disk);
        let read_only = options.flags.contains(MountFlags::RDONLY);
        mount_disk(
            &wanted.disk,
            &wanted.type_,
            &place,
            options.flags | MountFlags::NODEV,
            Some(options.data.as_c_str()),
        )?;
        if let Some(group) = wanted.group.as_ref()
            && let Err(error) = own(&place, group, read_only)
        {
            // The first error is the one to tell.
            let _ = put_away(&place, !read_only);
            return Err(error);
        }
        let mounted = Mounted {
            place: place.clone(),
            read_only,
            users: 1,
        };
        all.insert(wanted.disk.clone(), mounted);
        Ok(place)
    }

    /// A container is done with it. The last one has everything written back and unmounted.
    pub(crate) fn let_go(&self, disk: &str) -> Result<(), RequestError> {
        let mut all = self.lock();
        let Some(there) = all.get_mut(disk) else {
            return Ok(());
        };
        there.users -= 1;
        if there.users > 0 {
            return Ok(());
        }
        let outcome = put_away(&there.place, !there.read_only);
        if outcome.is_ok() {
            let _ = fs::remove_dir(&there.place);
        }
        all.remove(disk);
        outcome
    }

    /// Writes everything back and unmounts it. Goes on after an error, and gives the first.
    pub(crate) fn put_away(&self) -> Result<(), RequestError> {
        let all = std::mem::take(&mut *self.lock());
        let mut outcome = Ok(());
        for there in all.values() {
            outcome = outcome.and(put_away(&there.place, !there.read_only));
        }
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Mounted>> {
        // A panic ends this program, so nobody sees a state left half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shows a file or directory of the file system mounted at `top` at `place`, which is made. What is
/// missing of the path is made, too, as a kubelet makes it (subPath): with the mode of the top.
pub(crate) fn show_part(top: &Path, path: &str, place: &Path) -> Result<(), RequestError> {
    if !is_part(path) {
        return Err(RequestError::Invalid(format!(
            "'{path}' is no part of a volume"
        )));
    }
    open_part(top, path)
        .and_then(|(part, is_directory)| shares::show(&part, is_directory, place))
        .map_err(trying(format!("'{path}' of a volume")))
}

/// Opens it by its place, and says whether it is a directory. No link is followed: a container has
/// written what lies there.
fn open_part(top: &Path, path: &str) -> io::Result<(OwnedFd, bool)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let mut part = rustix::fs::open(top, flags | OFlags::DIRECTORY, Mode::empty())?;
    let mode = Mode::from_raw_mode(fstat(&part)?.st_mode & 0o7777);
    for name in path.split('/') {
        let open = || openat2(&part, name, flags, Mode::empty(), how);
        let next = match open() {
            Err(Errno::NOENT) => {
                mkdirat(&part, name, mode)?;
                let made = open()?;
                // Beyond what the mask of new files lets through.
                fs::set_permissions(
                    format!("/proc/self/fd/{}", made.as_raw_fd()),
                    fs::Permissions::from_mode(mode.bits()),
                )?;
                made
            }
            other => other?,
        };
        part = next;
    }
    let kind = FileType::from_raw_mode(fstat(&part)?.st_mode);
    match kind {
        FileType::Directory => Ok((part, true)),
        FileType::RegularFile => Ok((part, false)),
        _ => Err(io::Error::other("it is neither a directory nor a file")),
    }
}

/// Loads a module of the kernel that the host shows. One that is loaded is no error.
fn load(shares: &Shares, module: &Part) -> Result<(), RequestError> {
    let file = shares.open(&module.tag, &module.path)?;
    let load = || -> io::Result<()> {
        // It was opened by its place alone.
        let file = fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    load().map_err(trying(format!("the kernel's module '{}'", module.path)))
}

fn own(place: &Path, group: &Group, read_only: bool) -> Result<(), RequestError> {
    if read_only {
        return Ok(());
    }
    ownership::give(place, group.id, group.only_on_mismatch)
        .map_err(trying(format!("the group {} of a volume", group.id)))
}

/// How it is mounted.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    /// What the file system itself reads.
    data: CString,
}

impl Options {
    fn parse(wanted: &FileSystem) -> Result<Self, RequestError> {
        let kind = &wanted.type_;
        if !ROOT_KINDS.contains(&kind.as_str()) {
            return Err(RequestError::Invalid(format!(
                "'{kind}' is no file system for a disk: {} are",
                ROOT_KINDS.join(", ")
            )));
        }
        let (mut flags, mut data) = (MountFlags::empty(), Vec::new());
        for option in &wanted.options {
            let flag = match option.as_str() {
                "ro" => MountFlags::RDONLY,
                "nosuid" => MountFlags::NOSUID,
                "nodev" => MountFlags::NODEV,
                "noexec" => MountFlags::NOEXEC,
                "noatime" => MountFlags::NOATIME,
                "nodiratime" => MountFlags::NODIRATIME,
                "relatime" => MountFlags::RELATIME,
                "strictatime" => MountFlags::STRICTATIME,
                "lazytime" => MountFlags::LAZYTIME,
                "sync" => MountFlags::SYNCHRONOUS,
                "dirsync" => MountFlags::DIRSYNC,
                "rw" | "defaults" | "suid" | "exec" | "atime" | "diratime" | "async" => continue,
                other => {
                    data.push(other);
                    continue;
                }
            };
            flags |= flag;
        }
        let data = data.join(",");
        if data.len() > MAX_OPTIONS {
            return Err(RequestError::Invalid(format!(
                "the options of a mount have {MAX_OPTIONS} bytes at most"
            )));
        }
        let data = CString::new(data)
            .map_err(|_| RequestError::Invalid("an option of a mount has a zero byte".into()))?;
        Ok(Self { flags, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(kind: &str, options: &[&str]) -> FileSystem {
        FileSystem {
            type_: kind.into(),
            options: options.iter().map(|one| (*one).to_owned()).collect(),
            ..FileSystem::default()
        }
    }

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let options = ["rw", "noatime", "data=ordered", "nosuid", "discard"];
        let parsed = Options::parse(&wanted("ext4", &options)).unwrap();
        assert_eq!(parsed.flags, MountFlags::NOATIME | MountFlags::NOSUID);
        assert_eq!(parsed.data.as_c_str(), c"data=ordered,discard");
        let parsed = Options::parse(&wanted("ext4", &["ro"])).unwrap();
        assert_eq!(parsed.flags, MountFlags::RDONLY);
    }

    #[test]
    fn what_cannot_be_mounted_is_refused() {
        let long = "x".repeat(MAX_OPTIONS + 1);
        for (kind, option, said) in [
            ("nfs", "ro", "'nfs' is no file system for a disk"),
            ("", "ro", "'' is no file system"),
            ("ext4", "a\0b", "an option of a mount has a zero byte"),
            ("ext4", long.as_str(), "the options of a mount have"),
        ] {
            let error = Options::parse(&wanted(kind, &[option])).unwrap_err();
            assert!(error.to_string().starts_with(said), "{error}");
        }
    }

    #[test]
    fn parts_are_made_and_lead_nowhere_else() {
        let top = std::env::temp_dir().join(format!("pericarp-parts-{}", std::process::id()));
        fs::create_dir_all(top.join("there")).unwrap();
        fs::write(top.join("there/file"), "x").unwrap();
        fs::set_permissions(&top, fs::Permissions::from_mode(0o2777)).unwrap();
        std::os::unix::fs::symlink("/etc", top.join("link")).unwrap();
        assert!(!open_part(&top, "there/file").unwrap().1);
        assert!(open_part(&top, "new/deep").unwrap().1);
        let mode = fs::metadata(top.join("new/deep")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o7777, 0o2777);
        for wrong in ["link", "link/passwd", "there/file/x"] {
            assert!(open_part(&top, wrong).is_err(), "{wrong}");
        }
        assert!(show_part(&top, "../x", &top).is_err());
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn nobody_lets_go_of_what_is_not_there() {
        let volumes = Volumes::default();
        volumes.let_go("disk1").unwrap();
        volumes.put_away().unwrap();
    }
}
