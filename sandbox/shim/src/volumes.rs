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
    lanes::{self, Lane, Taken},
    machine::POD_SHARE,
    mounts::{self, Key},
    named::Named,
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
    shared: HashMap<(Key, Option<usize>), (u64, usize)>,
    taken: Taken,
}

/// One, as long as a container has it.
#[derive(Debug)]
pub(crate) struct Volume {
    volumes: Arc<Volumes>,
    number: u64,
    /// The share of its own that it is in.
    lane: Option<usize>,
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

    /// Shows what this mount does, unless that is shown already; of this volume, if it is one that may
    /// have limits.
    pub(crate) fn show(
        self: &Arc<Self>,
        bind: &Bind,
        recursive: bool,
        lanes: &[Lane],
        named: Option<&Named>,
    ) -> Result<Volume, ShimError> {
        let failed = || during(format!("the mount of {}", bind.path.display()));
        // Before the lock: a dead server may let us wait.
        let source = mounts::open(&bind.path).map_err(failed())?;
        let key = source.key(bind, recursive).map_err(failed())?;
        let mut shown = self.shown();
        let lane = match named.filter(|_| source.is_directory()) {
            Some(named) => {
                let identity = named.identity(&bind.path);
                shown.taken.take(lanes, &named.name, &identity)?
            }
            None => None,
        };
        if let Some(key) = &key
            && let Some((number, users)) = shown.shared.get_mut(&(key.clone(), lane))
        {
            *users += 1;
            let number = *number;
            return Ok(self.volume(number, lane, Some(key.clone())));
        }
        let number = shown.next;
        shown.next += 1;
        let (behind, place) = self.places(number, lane);
        let made = match source.is_directory() {
            true => fs::create_dir(&behind),
            false => File::create_new(&behind).map(drop),
        };
        if let Err(error) = made.and_then(|()| source.bind(bind, recursive, &place)) {
            let _ = mounts::remove_place(&behind);
            if let Some(lane) = lane {
                shown.taken.give_back(lane);
            }
            return Err(failed()(error));
        }
        if let Some(key) = &key {
            shown.shared.insert((key.clone(), lane), (number, 1));
        }
        Ok(self.volume(number, lane, key))
    }

    /// What lies behind a place, and the place.
    fn places(&self, number: u64, lane: Option<usize>) -> (PathBuf, PathBuf) {
        let at = |top: PathBuf| top.join(number.to_string());
        match lane {
            None => (
                at(self.directory.behind().join(VOLUMES)),
                at(self.directory.shared().join(VOLUMES)),
            ),
            Some(lane) => (
                at(self.directory.behind_lane(lane)),
                at(self.directory.shared_lane(lane)),
            ),
        }
    }

    fn volume(self: &Arc<Self>, number: u64, lane: Option<usize>, key: Option<Key>) -> Volume {
        Volume {
            volumes: Arc::clone(self),
            number,
            lane,
            key,
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volume {
    /// The tag of its share, and its path there.
    pub(crate) fn part(&self) -> (String, String) {
        match self.lane {
            None => (POD_SHARE.into(), format!("{VOLUMES}/{}", self.number)),
            Some(lane) => (lanes::tag(lane), self.number.to_string()),
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Held to the end: who wants the same one waits until it is gone, and has a new one.
        let mut shown = self.volumes.shown();
        if let Some(lane) = self.lane {
            shown.taken.give_back(lane);
        }
        if let Some(key) = self.key.take().map(|key| (key, self.lane))
            && let Some((_, users)) = shown.shared.get_mut(&key)
        {
            *users -= 1;
            if *users > 0 {
                return;
            }
            shown.shared.remove(&key);
        }
        let (behind, place) = self.volumes.places(self.number, self.lane);
        let removed = mounts::detach(&place).and_then(|()| mounts::remove_place(&behind));
        if let Err(error) = removed {
            log::warn!("'{}' cannot be removed: {error}", place.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pericarp_pod::sidecar::Limits;

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
                .show(&bind(&outer.join(path), read_only), true, &[], None)
                .unwrap()
        };
        let (first, second) = (show("a", false), show("a", false));
        assert_eq!(first.part(), second.part());
        assert_ne!(show("a", true).part(), first.part());
        let file = show("file", true);
        let seen = fs::read_to_string(directory.shared().join(file.part().1));
        assert_eq!(seen.unwrap(), "x");
        let place = directory.shared().join(first.part().1);
        drop(first);
        fs::write(place.join("new"), "y").unwrap();
        assert!(outer.join("a/new").exists());
        drop(second);
        assert!(!place.exists());
        // What has something mounted below it now may have something else later.
        rustix::mount::mount_bind(outer.join("a"), outer.join("a")).unwrap();
        assert_ne!(show("", false).part(), show("", false).part());
        mounts::detach(&outer.join("a")).unwrap();
        drop(file);

        // One with limits is in a share of its own, and in it once.
        directory.create_lanes(1).unwrap();
        let lane = Lane {
            name: Some("a".into()),
            limits: Limits::default(),
        };
        let show = |named| {
            let a = bind(&outer.join("a"), false);
            volumes.show(&a, true, std::slice::from_ref(&lane), named)
        };
        let named = crate::named::volume(&outer.join("a"));
        let limited = (show(Some(&named)).unwrap(), show(Some(&named)).unwrap());
        let (tag, path) = limited.0.part();
        assert_eq!(
            (tag.as_str(), limited.1.part().1),
            ("volume1", path.clone())
        );
        let place = directory.shared_lane(0).join(path);
        assert!(place.join("new").exists());
        let (tag, other) = show(None).unwrap().part();
        assert_eq!(tag, "pod");
        assert!(!directory.shared().join(other).exists());
        drop(limited);
        assert!(!place.exists());
        directory.remove().unwrap();
        assert!(!directory.path().exists());
        fs::remove_dir_all(outer).unwrap();
    }
}
