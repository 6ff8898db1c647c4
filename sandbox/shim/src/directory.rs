//! A pod's directory: sockets, the guest's first file system, and what its containers are shown.
//!
//! ```text
//! /run/pericarp/<namespace>/<pod>/          of root alone
//!     pod.json                              what there is to know of it (`pericarp_pod::record`)
//!     network                               path of the pod's network namespace, to sweep it
//!     group                                 the pod's control group, likewise
//!     initramfs, *.sock, vsock/             of the machine
//!     places/{containers,volumes}/          what the mounts below lie on, for the shim to make
//!     shared/                               a shared mount of it, served by pericarp-fs as `pod`;
//!                                           nothing can be changed through it
//!     shared/containers/<container>         mounts of the host, which appear in the guest
//!     shared/volumes/<n>
//!     limited/<k>/{places,shared}/          the same for volumes with limits, served as `volume<k+1>`
//! ```
//!
//! Everything in it can be found again by whoever comes after a shim that was killed (`cleanup`).

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use pericarp_pod::record::BASE;
use sha2::{Digest, Sha256};

use crate::{
    error::{ShimError, during},
    mounts,
    volumes::VOLUMES,
};

/// A socket's path has 107 bytes; ours add so many at most.
const LONGEST: usize = 107 - "/vsock/guest_1024".len();
const BEHIND: &str = "places";
const SHARED: &str = "shared";
/// Where the containers' roots are, below what the guest sees.
pub(crate) const CONTAINERS: &str = "containers";
const LIMITED: &str = "limited";
const NETWORK: &str = "network";
const GROUP: &str = "group";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    /// The directory of this pod, whether or not it is there.
    pub(crate) fn of(namespace: &str, pod: &str) -> Self {
        let path = Path::new(BASE).join(namespace).join(pod);
        if path.as_os_str().len() <= LONGEST {
            return Self(path);
        }
        let digest = Sha256::digest(format!("{namespace}/{pod}"));
        let name: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
        Self(Path::new(BASE).join("long").join(name))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What lies behind that which the guest sees.
    pub(crate) fn behind(&self) -> PathBuf {
        self.0.join(BEHIND)
    }

    /// What the guest sees of it.
    pub(crate) fn shared(&self) -> PathBuf {
        self.0.join(SHARED)
    }

    /// The same for a share of its own for volumes, by its number.
    pub(crate) fn behind_lane(&self, lane: usize) -> PathBuf {
        self.0.join(LIMITED).join(lane.to_string()).join(BEHIND)
    }

    pub(crate) fn shared_lane(&self, lane: usize) -> PathBuf {
        self.0.join(LIMITED).join(lane.to_string()).join(SHARED)
    }

    /// Makes so many of them.
    pub(crate) fn create_lanes(&self, lanes: usize) -> Result<(), ShimError> {
        for lane in 0..lanes {
            let (behind, shared) = (self.behind_lane(lane), self.shared_lane(lane));
            let failed = || during(shared.display().to_string());
            for path in [&behind, &shared] {
                let mut builder = DirBuilder::new();
                builder
                    .mode(0o700)
                    .recursive(true)
                    .create(path)
                    .map_err(failed())?;
            }
            mounts::make_shared(&behind, &shared).map_err(failed())?;
        }
        Ok(())
    }

    /// Makes it, and removes what a dead predecessor has left in it.
    pub(crate) fn create(&self) -> Result<(), ShimError> {
        self.remove()?;
        let failed = || during(self.0.display().to_string());
        let make = |path: &Path, recursive| {
            let mut builder = DirBuilder::new();
            builder.mode(0o700).recursive(recursive).create(path)
        };
        // Another pod that was the last of the namespace may take the parent along meanwhile.
        let made = make(&self.0, true).or_else(|_| make(&self.0, true));
        made.map_err(failed())?;
        let behind = self.behind();
        let places = [CONTAINERS, VOLUMES].map(|name| behind.join(name));
        for path in [self.join("vsock"), self.shared(), behind.clone()]
            .into_iter()
            .chain(places)
        {
            make(&path, false).map_err(failed())?;
        }
        mounts::make_shared(&behind, &self.shared()).map_err(failed())
    }

    /// Writes down whose network is swept should we not come to it.
    pub(crate) fn remember_network(&self, path: &Path) -> Result<(), ShimError> {
        self.remember(NETWORK, path)
    }

    pub(crate) fn network(&self) -> Option<PathBuf> {
        self.remembered(NETWORK)
    }

    /// Writes down which control group is removed should we not come to it.
    pub(crate) fn remember_group(&self, group: &Path) -> Result<(), ShimError> {
        self.remember(GROUP, group)
    }

    pub(crate) fn group(&self) -> Option<PathBuf> {
        self.remembered(GROUP)
    }

    fn remember(&self, name: &str, path: &Path) -> Result<(), ShimError> {
        let text = path.as_os_str().as_encoded_bytes();
        fs::write(self.join(name), text).map_err(during("the pod's directory"))
    }

    fn remembered(&self, name: &str) -> Option<PathBuf> {
        fs::read_to_string(self.join(name)).ok().map(PathBuf::from)
    }

    /// Removes it with all mounts in it. One that is not there is no error.
    ///
    /// What the host has mounted there is never entered: a directory that is not empty stays.
    pub(crate) fn remove(&self) -> Result<(), ShimError> {
        let failed = || during(self.0.display().to_string());
        mounts::unmount_below(&self.0).map_err(failed())?;
        let behind = self.behind();
        let limited = self.join(LIMITED);
        let lanes = entries(&limited).map_err(failed())?;
        let lanes = lanes.into_iter().flat_map(|lane| [lane.join(BEHIND), lane]);
        let of_pod = [
            behind.join(CONTAINERS),
            behind.join(VOLUMES),
            behind,
            self.join("vsock"),
        ];
        let all = lanes.chain([limited]).chain(of_pod).chain([self.0.clone()]);
        for directory in all {
            for place in entries(&directory).map_err(failed())? {
                mounts::remove_place(&place).map_err(failed())?;
            }
        }
        mounts::remove_place(&self.0).map_err(failed())?;
        // The last pod takes the namespace's directory along.
        if let Some(parent) = self.0.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

fn entries(path: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        other => other?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_short_enough_for_sockets() {
        let id = "a".repeat(64);
        let path = Directory::of("k8s.io", &id);
        assert_eq!(
            path.path(),
            Path::new(&format!("/run/pericarp/k8s.io/{id}"))
        );
        let long = Directory::of(&"n".repeat(76), &id);
        assert!(long.path().starts_with("/run/pericarp/long"));
        assert!(long.join("vsock/guest_1024").as_os_str().len() <= 107);
        assert_ne!(long, Directory::of(&"n".repeat(75), &id));
    }

    #[test]
    fn what_is_not_ours_stays() {
        let base = std::env::temp_dir().join(format!("pericarp-pod-{}", std::process::id()));
        let directory = Directory(base.join("p"));
        fs::create_dir_all(base.join("p/places/containers/web")).unwrap();
        fs::create_dir_all(base.join("p/places/volumes")).unwrap();
        fs::write(base.join("p/places/volumes/0"), "").unwrap();
        fs::write(base.join("p/initramfs"), "").unwrap();
        fs::create_dir_all(base.join("p/limited/0/places/0")).unwrap();
        fs::create_dir_all(base.join("p/limited/0/shared")).unwrap();
        // As if it were somebody's data, still mounted.
        let data = base.join("p/places/containers/web/data");
        fs::write(&data, "precious").unwrap();
        assert!(directory.remove().is_err());
        assert!(data.exists());
        fs::remove_file(&data).unwrap();
        directory.remove().unwrap();
        assert!(!base.exists());
        directory.remove().unwrap();
    }
}
