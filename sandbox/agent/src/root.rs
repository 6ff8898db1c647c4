//! A container's root: its disk or share, and the writable layer over it.
//!
//! Mounted before the container is made and unmounted when it is removed, or at power-off. Called
//! by `container` and `pod`.
//!
//! ```text
//! /run/pericarp/scratch                    the scratch disk, mounted once
//! /run/pericarp/scratch/<n>/{upper,work}   a container's writable layer on it
//! /run/pericarp/containers/<id>/config.json
//! /run/pericarp/containers/<id>/disk       the disk, when a layer lies over it
//! /run/pericarp/shares/<tag>               the share, mounted once for all containers
//! /run/pericarp/containers/<id>/layer      a tmpfs that takes the layer when there is no scratch
//! /run/pericarp/containers/<id>/rootfs     what the container sees
//! /run/pericarp/containers/<id>/mounts/<n> where its bind mount n comes from
//! /run/pericarp/containers/<id>/mounts/node<n>   the node of a disk that it has outside /dev
//! ```

use std::{
    ffi::CStr,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::{
    agent::{Device, RootFs, Source},
    share::{is_part, is_tag},
};
use rustix::{
    fs::{CWD, FileType, Gid, Mode, Uid, chmod, chown, mknodat},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount},
};

use crate::{
    boot::STATE,
    config::node_mode,
    copies::Copies,
    disks::{self, Disk},
    error::{RequestError, trying},
    shares::{self, Shares},
    trash,
    volumes::{self, Volumes},
};

/// Mounts of a dead container hold a file system for a moment.
const BUSY_LIMIT: Duration = Duration::from_secs(3);
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// The disk that takes what containers write.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Mounts the ext4 file system on the disk with this serial.
    pub(crate) fn mount(serial: &str) -> Result<Self, RequestError> {
        let place = Path::new(STATE).join("scratch");
        mount_disk(serial, "ext4", &place, MountFlags::NODEV, None)?;
        Ok(Self(place))
    }

    /// Writes everything back and unmounts.
    pub(crate) fn put_away(self) -> Result<(), RequestError> {
        put_away(&self.0, true)
    }
}

/// A mounted root.
#[derive(Debug)]
pub(crate) struct Root {
    directory: PathBuf,
    /// In the order of mounting, with whether writes must reach a disk.
    mounts: Vec<(PathBuf, bool)>,
    /// Where the scratch disk is mounted, and the name of the layer there.
    layer: Option<(PathBuf, String)>,
    /// Parts of shares, by tag and path.
    parts: Vec<(String, String)>,
    /// File systems on disks, by their serials.
    volumes: Vec<String>,
    /// Parts of shares of which there is a copy, by tag and path.
    copies: Vec<(String, String)>,
}

/// What a container's mounts come from, of the machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sources<'a> {
    pub(crate) shares: &'a Shares,
    pub(crate) volumes: &'a Volumes,
    pub(crate) copies: &'a Copies,
}

impl Root {
    /// Mounts the root of the container with this checked id. On failure nothing stays mounted.
    pub(crate) fn mount(
        id: &str,
        wanted: &RootFs,
        scratch: Option<&Scratch>,
        from: Sources<'_>,
    ) -> Result<Self, RequestError> {
        check(wanted)?;
        let directory = Path::new(STATE).join("containers").join(id);
        let mut root = Self {
            directory,
            mounts: Vec::new(),
            layer: None,
            parts: Vec::new(),
            volumes: Vec::new(),
            copies: Vec::new(),
        };
        match root.mount_all(wanted, scratch, from) {
            Ok(()) => Ok(root),
            Err(error) => {
                // The first error is the one to tell.
                let _ = root.remove(from);
                Err(error)
            }
        }
    }

    fn mount_all(
        &mut self,
        wanted: &RootFs,
        scratch: Option<&Scratch>,
        from: Sources<'_>,
    ) -> Result<(), RequestError> {
        let shares = from.shares;
        if let Some(file_system) = wanted.file_system.as_ref() {
            let place = from.volumes.show(shares, file_system)?;
            self.volumes.push(file_system.disk.clone());
            let rootfs = self.rootfs();
            fs::create_dir_all(&rootfs).map_err(trying("the root"))?;
            mount_bind(place, &rootfs).map_err(trying("the root"))?;
            self.mounts.push((rootfs, false));
            return Ok(());
        }
        if !wanted.path.is_empty() {
            let place = self.rootfs();
            return self.show(shares, (&wanted.source, &wanted.path), place);
        }
        if wanted.fs_type == shares::KIND {
            // Stays mounted, as every share does.
            let lower = shares.mount(&wanted.source, true)?;
            return self.cover(&lower, scratch);
        }
        let mut flags = MountFlags::NODEV;
        if wanted.read_only {
            flags |= MountFlags::RDONLY;
        }
        let place = if wanted.writable_layer {
            self.directory.join("disk")
        } else {
            self.rootfs()
        };
        mount_disk(&wanted.source, &wanted.fs_type, &place, flags, None)?;
        self.mounts.push((place.clone(), !wanted.read_only));
        if wanted.writable_layer {
            self.cover(&place, scratch)?;
        }
        Ok(())
    }

    /// Puts a writable layer over what is mounted at `lower`.
    fn cover(&mut self, lower: &Path, scratch: Option<&Scratch>) -> Result<(), RequestError> {
        let layer = match scratch {
            Some(Scratch(place)) => {
                let name = new_layer(place).map_err(trying("the writable layer"))?;
                let layer = place.join(&name);
                self.layer = Some((place.clone(), name));
                layer
            }
            None => {
                let layer = self.directory.join("layer");
                fs::create_dir_all(&layer).map_err(trying("the writable layer"))?;
                mount("tmpfs", &layer, "tmpfs", MountFlags::NODEV, c"mode=755")
                    .map_err(trying("the writable layer"))?;
                self.mounts.push((layer.clone(), false));
                layer
            }
        };
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        for part in [&upper, &work] {
            fs::create_dir_all(part).map_err(trying("the writable layer"))?;
        }
        // The root directory's own owner and mode are the layer's.
        copy_owner_and_mode(lower, &upper).map_err(trying("the writable layer"))?;
        let rootfs = self.rootfs();
        fs::create_dir_all(&rootfs).map_err(trying("the writable layer"))?;
        // Neither an id nor a tag has commas or colons.
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        mount(
            "overlay",
            &rootfs,
            "overlay",
            MountFlags::NODEV,
            Some(&*std::ffi::CString::new(options).unwrap_or_default()),
        )
        .map_err(trying("the writable layer cannot be put over the root"))?;
        self.mounts.push((rootfs, false));
        Ok(())
    }

    fn show(
        &mut self,
        shares: &Shares,
        (tag, path): (&str, &str),
        place: PathBuf,
    ) -> Result<(), RequestError> {
        shares.show(tag, path, &place)?;
        self.parts.push((tag.to_owned(), path.to_owned()));
        self.mounts.push((place, false));
        Ok(())
    }

    /// Where a bind mount really comes from.
    pub(crate) fn add_source(
        &mut self,
        source: &Source,
        from: Sources<'_>,
    ) -> Result<PathBuf, RequestError> {
        if let Some(file_system) = source.file_system.as_ref() {
            let place = from.volumes.show(from.shares, file_system)?;
            self.volumes.push(file_system.disk.clone());
            if source.path.is_empty() {
                return Ok(place);
            }
            let part = self.directory.join(format!("mounts/{}", source.mount));
            volumes::show_part(&place, &source.path, &part)?;
            self.mounts.push((part.clone(), false));
            return Ok(part);
        }
        if !source.copied_from.is_empty() {
            let part = (source.tag.as_str(), source.path.as_str());
            let place = from.copies.show(from.shares, part, &source.copied_from)?;
            self.copies.push((source.tag.clone(), source.path.clone()));
            return Ok(place);
        }
        let place = self.directory.join(format!("mounts/{}", source.mount));
        if source.memory {
            from.shares.show_memory(&place)?;
            self.mounts.push((place.clone(), false));
        } else {
            self.show(from.shares, (&source.tag, &source.path), place.clone())?;
        }
        Ok(place)
    }

    /// Makes the node of a disk that the container has outside its `/dev`; returns where. It goes
    /// with the container's directory.
    pub(crate) fn add_node(
        &mut self,
        device: &Device,
        disk: &Disk,
    ) -> Result<PathBuf, RequestError> {
        let places = self.directory.join("mounts");
        let place = places.join(format!("node{}-{}", disk.major, disk.minor));
        let make = || -> io::Result<()> {
            fs::create_dir_all(&places)?;
            let number = rustix::fs::makedev(disk.major, disk.minor);
            let made = mknodat(CWD, &place, FileType::BlockDevice, Mode::empty(), number);
            // The container has the same disk twice, with one node.
            if made == Err(Errno::EXIST) {
                return Ok(());
            }
            made?;
            let (user, group) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
            chown(&place, Some(user), Some(group))?;
            Ok(chmod(&place, Mode::from_raw_mode(node_mode(device)))?)
        };
        make().map_err(trying(format!("the node of '{}'", device.path)))?;
        Ok(place)
    }

    /// crun's bundle.
    pub(crate) fn bundle(&self) -> &Path {
        &self.directory
    }

    /// What the container sees as `/`.
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// Writes everything back and undoes the mounts; what was written to the layer is gone.
    /// Nothing of the container may be running any more.
    pub(crate) fn remove(&mut self, from: Sources<'_>) -> Result<(), RequestError> {
        self.put_away()?;
        for (tag, path) in self.parts.drain(..) {
            from.shares.let_go(&tag, &path);
        }
        for (tag, path) in self.copies.drain(..) {
            from.copies.let_go(from.shares, &tag, &path);
        }
        while let Some(disk) = self.volumes.pop() {
            from.volumes.let_go(&disk)?;
        }
        if let Some((place, name)) = &self.layer {
            trash::remove(place, name).map_err(trying("what a container wrote"))?;
            self.layer = None;
        }
        let gone = |outcome: io::Result<()>| match outcome {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(trying("a container's directory")(error))
            }
            _ => Ok(()),
        };
        gone(fs::remove_file(self.directory.join("config.json")))?;
        // One by one: should something still be mounted there, it is none of these calls' to
        // remove.
        if let Ok(places) = fs::read_dir(self.directory.join("mounts")) {
            for place in places.flatten().map(|entry| entry.path()) {
                gone(fs::remove_dir(&place).or_else(|_| fs::remove_file(&place)))?;
            }
        }
        for part in ["rootfs", "disk", "layer", "mounts", ""] {
            gone(fs::remove_dir(self.directory.join(part)))?;
        }
        Ok(())
    }

    /// Writes everything back and undoes the mounts.
    pub(crate) fn put_away(&mut self) -> Result<(), RequestError> {
        let mut outcome = Ok(());
        while let Some((place, written)) = self.mounts.pop() {
            outcome = outcome.and(put_away(&place, written));
        }
        outcome
    }
}

/// What makes no sense, whatever the machine has.
fn check(wanted: &RootFs) -> Result<(), RequestError> {
    if wanted.file_system.is_some() {
        let others = RootFs {
            file_system: None.into(),
            ..wanted.clone()
        };
        return match others == RootFs::default() {
            true => Ok(()),
            false => Err(RequestError::Invalid(
                "a root that is the file system on a disk is nothing else".into(),
            )),
        };
    }
    let share = wanted.fs_type == shares::KIND;
    if !share && !["erofs", "ext4"].contains(&wanted.fs_type.as_str()) {
        return Err(RequestError::Invalid(format!(
            "'{}' is no file system for a root: erofs, ext4 and {} are",
            wanted.fs_type,
            shares::KIND
        )));
    }
    if wanted.writable_layer && !wanted.read_only {
        return Err(RequestError::Invalid(
            "a root with a writable layer is mounted read-only".into(),
        ));
    }
    let part = !wanted.path.is_empty();
    if part && !(share && is_part(&wanted.path)) {
        return Err(RequestError::Invalid(format!(
            "'{}' is no part of a share",
            wanted.path
        )));
    }
    if part && wanted.writable_layer {
        return Err(RequestError::Invalid(
            "a part of a share is a root without a layer".into(),
        ));
    }
    if share && !part && !wanted.writable_layer {
        return Err(RequestError::Invalid(
            "a share is a root below a writable layer only".into(),
        ));
    }
    if share && !is_tag(&wanted.source) {
        return Err(RequestError::Invalid(format!(
            "'{}' is no tag of a share",
            wanted.source
        )));
    }
    Ok(())
}

fn copy_owner_and_mode(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::metadata(from)?;
    let (user, group) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
    chown(to, Some(user), Some(group))?;
    chmod(to, Mode::from_raw_mode(metadata.mode()))?;
    Ok(())
}

/// Mounts the file system on the disk with this serial at `place`, which is made. Used by `volumes`,
/// too.
pub(crate) fn mount_disk(
    serial: &str,
    kind: &str,
    place: &Path,
    flags: MountFlags,
    data: Option<&CStr>,
) -> Result<(), RequestError> {
    let disk = disks::find(serial)?;
    fs::create_dir_all(place).map_err(trying(place.display().to_string()))?;
    match mount(&disk.node, place, kind, flags, data) {
        Ok(()) => Ok(()),
        Err(Errno::ROFS) => Err(RequestError::Invalid(format!(
            "the disk '{serial}' is read-only, and its {kind} is to be written or was not \
             unmounted cleanly"
        ))),
        Err(Errno::NODEV) => Err(RequestError::Invalid(format!(
            "the guest's kernel knows no {kind}, for the disk '{serial}'"
        ))),
        Err(Errno::INVAL | Errno::UCLEAN) => Err(RequestError::Invalid(format!(
            "the disk '{serial}' holds no {kind} file system that can be mounted so"
        ))),
        Err(error) => Err(trying(format!("the disk '{serial}' cannot be mounted"))(
            error,
        )),
    }
}

/// Makes a directory for a layer. A number: what was left of an earlier layer, by a container of
/// the same name or before the last boot, is in nobody's way.
fn new_layer(place: &Path) -> io::Result<String> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let name = NEXT.fetch_add(1, Ordering::Relaxed).to_string();
        match fs::create_dir(place.join(&name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|()| name),
        }
    }
}

/// Unmounts `place`. One that was written to is brought to its disk before: only syncfs(2)
/// reports an error of the disk, and only a remount empties the journal for certain, whoever else
/// still holds the file system. Used by `shares`, too.
pub(crate) fn put_away(place: &Path, written: bool) -> Result<(), RequestError> {
    let mut outcome = Ok(());
    if written {
        let failed = || format!("what was written to {} may be lost", place.display());
        outcome = fs::File::open(place)
            .and_then(|directory| Ok(rustix::fs::syncfs(&directory)?))
            .map_err(trying(failed()));
        let emptied = patiently(|| mount_remount(place, MountFlags::RDONLY, c""));
        outcome = outcome.and(emptied.map_err(trying(failed())));
    }
    let unmounted = match patiently(|| unmount(place, UnmountFlags::empty())) {
        // Out of the way at least; it goes with its last user.
        Err(Errno::BUSY) => unmount(place, UnmountFlags::DETACH),
        other => other,
    };
    outcome.and(unmounted.map_err(trying(format!("unmounting {}", place.display()))))
}

fn patiently(mut act: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    let end = Instant::now() + BUSY_LIMIT;
    loop {
        match act() {
            Err(Errno::BUSY) if Instant::now() < end => thread::sleep(BUSY_PAUSE),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use pericarp_api::agent::FileSystem;

    use super::*;

    #[test]
    fn what_a_root_is_made_of_is_checked() {
        let root = |source: &str, fs_type: &str, read_only, writable_layer| RootFs {
            source: source.into(),
            fs_type: fs_type.into(),
            read_only,
            writable_layer,
            ..RootFs::default()
        };
        check(&root("root", "virtiofs", true, true)).unwrap();
        check(&root("root", "erofs", true, true)).unwrap();
        check(&root("root", "ext4", false, false)).unwrap();
        let part = |fs_type: &str, path: &str, writable_layer| RootFs {
            path: path.into(),
            ..root("pod", fs_type, writable_layer, writable_layer)
        };
        check(&part("virtiofs", "web/rootfs", false)).unwrap();
        let on_disk = || RootFs {
            file_system: Some(FileSystem::default()).into(),
            ..RootFs::default()
        };
        check(&on_disk()).unwrap();
        for (bad, message) in [
            (
                RootFs {
                    path: "web".into(),
                    ..on_disk()
                },
                "a root that is the file system on a disk is nothing else",
            ),
            (
                part("virtiofs", "../rootfs", false),
                "'../rootfs' is no part of a share",
            ),
            (
                part("ext4", "rootfs", false),
                "'rootfs' is no part of a share",
            ),
            (
                part("virtiofs", "web", true),
                "a part of a share is a root without a layer",
            ),
            (
                root("root", "nfs", true, true),
                "'nfs' is no file system for a root: erofs, ext4 and virtiofs are",
            ),
            (
                root("root", "ext4", false, true),
                "a root with a writable layer is mounted read-only",
            ),
            (
                root("root", "virtiofs", false, false),
                "a share is a root below a writable layer only",
            ),
            (
                root("root", "virtiofs", true, false),
                "a share is a root below a writable layer only",
            ),
            (
                root("../root", "virtiofs", true, true),
                "'../root' is no tag of a share",
            ),
            (root("", "virtiofs", true, true), "'' is no tag of a share"),
        ] {
            assert_eq!(check(&bad).unwrap_err().to_string(), message);
        }
    }
}
