//! What the containers of a pod are shown of the host besides their roots: each file or directory
//! once, however many of them have it.
//!
//! Made by `pod`, asked by `rootfs`. The guest's kernel takes what is reached through two mounts for
//! two files: a socket in one is not found through the other, and locks do not meet. So containers
//! that are to have the same volume are shown the same mount.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    directory::Directory,
    error::{ShimError, during},
    mounts::{self, Key},
    spec::Bind,
};

/// Where they are, below what the guest sees.
pub(crate) const VOLUMES: &str = "volumes";

/// All of a pod's.
#[derive(Debug)]
pub(crate) struct Volumes {
    directory: Directory,
    shown: Mutex<Shown>,
}

#[derive(Debug, Default)]
struct Shown {
    next: u64,
    /// With the number of its users.
    shared: HashMap<Key, (u64, usize)>,
}

/// One, as long as a container has it.
#[derive(Debug)]
pub(crate) struct Volume {
    volumes: Arc<Volumes>,
    number: u64,
    /// None: nobody else can have it.
    key: Option<Key>,
}

impl Volumes {
    pub(crate) fn new(directory: Directory) -> Arc<Self> {
        Arc::new(Self {
            directory,
            shown: Mutex::default(),
        })
    }

    /// Shows what this mount does, unless that is shown already.
    pub(crate) fn show(
        self: &Arc<Self>,
        bind: &Bind,
        recursive: bool,
    ) -> Result<Volume, ShimError> {
        let failed = || during(format!("the mount of {}", bind.path.display()));
        // Before the lock: a dead server may let us wait.
        let source = mounts::open(&bind.path).map_err(failed())?;
        let key = source.key(bind, recursive).map_err(failed())?;
        let mut shown = self.shown();
        if let Some(key) = &key
            && let Some((number, users)) = shown.shared.get_mut(key)
        {
            *users += 1;
            return Ok(self.volume(*number, Some(key.clone())));
        }
        let number = shown.next;
        shown.next += 1;
        let (behind, place) = self.places(number);
        let made = match source.is_directory() {
            true => fs::create_dir(&behind),
            false => File::create_new(&behind).map(drop),
        };
        if let Err(error) = made.and_then(|()| source.bind(bind, recursive, &place)) {
            let _ = mounts::remove_place(&behind);
            return Err(failed()(error));
        }
        if let Some(key) = &key {
            shown.shared.insert(key.clone(), (number, 1));
        }
        Ok(self.volume(number, key))
    }

    /// What lies behind a place, and the place.
    fn places(&self, number: u64) -> (PathBuf, PathBuf) {
        let at = |top: PathBuf| top.join(VOLUMES).join(number.to_string());
        (at(self.directory.behind()), at(self.directory.shared()))
    }

    fn volume(self: &Arc<Self>, number: u64, key: Option<Key>) -> Volume {
        Volume {
            volumes: Arc::clone(self),
            number,
            key,
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volume {
    /// Its path in the pod's share.
    pub(crate) fn path(&self) -> String {
        format!("{VOLUMES}/{}", self.number)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Held to the end: who wants the same one waits until it is gone, and has a new one.
        let mut shown = self.volumes.shown();
        if let Some(key) = &self.key
            && let Some((_, users)) = shown.shared.get_mut(key)
        {
            *users -= 1;
            if *users > 0 {
                return;
            }
            shown.shared.remove(key);
        }
        let (behind, place) = self.volumes.places(self.number);
        let removed = mounts::detach(&place).and_then(|()| mounts::remove_place(&behind));
        if let Err(error) = removed {
            log::warn!("'{}' cannot be removed: {error}", place.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn bind(path: &Path, read_only: bool) -> Bind {
        Bind {
            path: path.into(),
            read_only,
            follows: false,
        }
    }

    #[test]
    fn one_volume_has_one_place_as_long_as_somebody_has_it() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let namespace = format!("pericarp-volumes-{}", std::process::id());
        let directory = Directory::of(&namespace, "p");
        directory.create().unwrap();
        let outer = std::env::temp_dir().join(&namespace);
        fs::create_dir_all(outer.join("a")).unwrap();
        fs::write(outer.join("file"), "x").unwrap();
        let volumes = Volumes::new(directory.clone());
        let show = |path: &str, read_only| {
            volumes
                .show(&bind(&outer.join(path), read_only), true)
                .unwrap()
        };
        let (first, second) = (show("a", false), show("a", false));
        assert_eq!(first.path(), second.path());
        assert_ne!(show("a", true).path(), first.path());
        let file = show("file", true);
        let seen = fs::read_to_string(directory.shared().join(file.path()));
        assert_eq!(seen.unwrap(), "x");
        let place = directory.shared().join(first.path());
        drop(first);
        fs::write(place.join("new"), "y").unwrap();
        assert!(outer.join("a/new").exists());
        drop(second);
        assert!(!place.exists());
        // What has something mounted below it now may have something else later.
        rustix::mount::mount_bind(outer.join("a"), outer.join("a")).unwrap();
        assert_ne!(show("", false).path(), show("", false).path());
        mounts::detach(&outer.join("a")).unwrap();
        drop(file);
        directory.remove().unwrap();
        assert!(!directory.path().exists());
        fs::remove_dir_all(outer).unwrap();
    }
}
