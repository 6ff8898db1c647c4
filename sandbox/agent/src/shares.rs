//! Directories of the host: virtio-fs devices, each mounted once and shown to containers as bind
//! mounts, or as their root.
//!
//! Called by `container` and `root` when a container is created and by `pod` at power-off. A share stays mounted while
//! the machine runs, since the next container may be shown it, too. Whether it may be changed is
//! the host's server's decision; what is mounted read-only here says so earlier.
//!
//! ```text
//! /run/pericarp/shares/<tag>   the share with this tag
//! ```

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::{
    agent::Share,
    share::{MAX_SHARES, check_place, is_tag},
};
use rustix::{
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::{
    boot::STATE,
    error::{RequestError, trying},
    root::put_away,
};

/// Name of the file system.
pub(crate) const KIND: &str = "virtiofs";
/// How long a device may take to appear.
const LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// The shares that are mounted.
#[derive(Debug, Default)]
pub(crate) struct Shares(Mutex<BTreeMap<String, Mounted>>);

#[derive(Debug)]
struct Mounted {
    place: PathBuf,
    read_only: bool,
}

/// Checks what a container is to be shown, before anything is mounted.
pub(crate) fn check(shares: &[Share]) -> Result<(), RequestError> {
    if shares.len() > MAX_SHARES {
        return Err(RequestError::Invalid(format!(
            "a container is shown {MAX_SHARES} shares at most"
        )));
    }
    for (index, share) in shares.iter().enumerate() {
        let path = &share.path;
        if !is_tag(&share.tag) {
            return Err(RequestError::Invalid(format!(
                "'{}' is no tag of a share",
                share.tag
            )));
        }
        check_place(path).map_err(|error| {
            RequestError::Invalid(format!("'{path}' is no place for a share: it {error}"))
        })?;
        if shares[..index].iter().any(|earlier| earlier.path == *path) {
            return Err(RequestError::Invalid(format!(
                "'{path}' is no place for a share: there is another"
            )));
        }
    }
    Ok(())
}

impl Shares {
    /// Mounts the share with this checked tag unless it is mounted; returns where.
    pub(crate) fn mount(&self, tag: &str, read_only: bool) -> Result<PathBuf, RequestError> {
        // Held meanwhile: another container may want the same one.
        let mut mounted = self.lock();
        if let Some(there) = mounted.get(tag) {
            if there.read_only != read_only {
                return Err(RequestError::Invalid(format!(
                    "the share '{tag}' is shown to another container with other access"
                )));
            }
            return Ok(there.place.clone());
        }
        let place = Path::new(STATE).join("shares").join(tag);
        fs::create_dir_all(&place).map_err(trying(place.display().to_string()))?;
        // A set-user-id program is as good as one in the image.
        let mut flags = MountFlags::NODEV;
        if read_only {
            flags |= MountFlags::RDONLY;
        }
        let end = Instant::now() + LIMIT;
        loop {
            match mount(tag, &place, KIND, flags, None) {
                Ok(()) => break,
                // There is no device with this tag, virtio_fs_get_tree.
                Err(Errno::INVAL) if Instant::now() < end => thread::sleep(PAUSE),
                Err(Errno::INVAL) => {
                    return Err(RequestError::NotFound(format!(
                        "the share '{tag}' did not appear; the machine has no device with that tag"
                    )));
                }
                Err(Errno::NODEV) => {
                    return Err(RequestError::State(format!(
                        "the guest's kernel knows no {KIND}; its module must be loaded"
                    )));
                }
                Err(error) => {
                    return Err(trying(format!("the share '{tag}' cannot be mounted"))(
                        error,
                    ));
                }
            }
        }
        let there = Mounted {
            place: place.clone(),
            read_only,
        };
        mounted.insert(tag.to_owned(), there);
        Ok(place)
    }

    /// Unmounts everything. Goes on after an error, and gives the first.
    ///
    /// Nothing is written back: what the processes wrote went to the host when they closed or
    /// unmapped their files, fuse_flush and fuse_vma_close. A syncfs(2) here would have the host
    /// write back a whole file system of its own, which no plain container does at its end.
    pub(crate) fn put_away(&self) -> Result<(), RequestError> {
        let mounted = std::mem::take(&mut *self.lock());
        let mut outcome = Ok(());
        for share in mounted.values() {
            outcome = outcome.and(put_away(&share.place, false));
        }
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Mounted>> {
        // A panic ends this program, so nobody sees a state left half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(tag: &str, path: &str) -> Share {
        Share {
            tag: tag.into(),
            path: path.into(),
            ..Share::default()
        }
    }

    #[test]
    fn what_a_container_may_be_shown_is_checked() {
        check(&[share("a", "/a"), share("b", "/a/b"), share("a", "/c")]).unwrap();
        let many: Vec<Share> = (0..=MAX_SHARES)
            .map(|number| share("a", &format!("/{number}")))
            .collect();
        check(&many[1..]).unwrap();
        for (bad, message) in [
            (vec![share("../a", "/a")], "'../a' is no tag of a share"),
            (vec![share("", "/a")], "'' is no tag of a share"),
            (
                vec![share("a", "/a/../proc")],
                "'/a/../proc' is no place for a share: it has an empty part, '.', '..' or a slash \
                 at its end",
            ),
            (
                vec![share("a", "/sys/x")],
                "'/sys/x' is no place for a share: it lies in the container's own /sys",
            ),
            (
                vec![share("a", "/a"), share("b", "/a")],
                "'/a' is no place for a share: there is another",
            ),
            (many, "a container is shown 16 shares at most"),
        ] {
            assert_eq!(check(&bad).unwrap_err().to_string(), message);
        }
    }
}
