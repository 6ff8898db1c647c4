//! File systems on disks of the machine that containers are shown as volumes: each is mounted once,
//! as long as a container has it, and shown as a bind mount.
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
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use pericarp_api::{
    VOLUME_KINDS,
    agent::{FileSystem, Group},
};
use rustix::mount::MountFlags;

use crate::{
    boot::STATE,
    error::{RequestError, trying},
    ownership,
    root::{mount_disk, put_away},
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
    pub(crate) fn show(&self, wanted: &FileSystem) -> Result<PathBuf, RequestError> {
        let options = Options::parse(wanted)?;
        // Held meanwhile: another container may want the same one.
        let mut all = self.lock();
        if let Some(there) = all.get_mut(&wanted.disk) {
            there.users += 1;
            return Ok(there.place.clone());
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
        if !VOLUME_KINDS.contains(&kind.as_str()) {
            return Err(RequestError::Invalid(format!(
                "'{kind}' is no file system for a volume: {} is",
                VOLUME_KINDS.join(", ")
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
            ("nfs", "ro", "'nfs' is no file system for a volume"),
            ("", "ro", "'' is no file system"),
            ("ext4", "a\0b", "an option of a mount has a zero byte"),
            ("ext4", long.as_str(), "the options of a mount have"),
        ] {
            let error = Options::parse(&wanted(kind, &[option])).unwrap_err();
            assert!(error.to_string().starts_with(said), "{error}");
        }
    }

    #[test]
    fn nobody_lets_go_of_what_is_not_there() {
        let volumes = Volumes::default();
        volumes.let_go("disk1").unwrap();
        volumes.put_away().unwrap();
    }
}
