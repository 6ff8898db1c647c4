//! A pod's directory: sockets, the guest's first file system, and what its containers are shown.
//!
//! ```text
//! /run/pericarp/<namespace>/<pod>/          of root alone
//!     network                               path of the pod's network namespace, to sweep it
//!     group                                 the pod's control group, likewise
//!     initramfs, *.sock, vsock/             of the machine
//!     shared/                               a shared mount, served by pericarp-fs as `pod`
//!     shared/<container>/rootfs             mounts of the host, which appear in the guest
//!     shared/<container>/mnt-<n>
//! ```
//!
//! Everything in it can be found again by whoever comes after a shim that was killed (`cleanup`).

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{
    error::{ShimError, during},
    mounts,
};

const BASE: &str = "/run/pericarp";
/// A socket's path has 107 bytes; ours add so many at most.
const LONGEST: usize = 107 - "/vsock/guest_1024".len();
const SHARED: &str = "shared";
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

    /// What the guest sees of it.
    pub(crate) fn shared(&self) -> PathBuf {
        self.0.join(SHARED)
    }

    /// Makes it, and removes what a dead predecessor has left in it.
    pub(crate) fn create(&self) -> Result<(), ShimError> {
        self.remove()?;
        let failed = || during(self.0.display().to_string());
        let make = |path: &Path, recursive| {
            let mut builder = DirBuilder::new();
            builder.mode(0o700).recursive(recursive).create(path)
        };
        if let Some(parent) = self.0.parent() {
            make(parent, true).map_err(failed())?;
        }
        make(&self.0, false).map_err(failed())?;
        for name in ["vsock", SHARED] {
            make(&self.join(name), false).map_err(failed())?;
        }
        mounts::make_shared(&self.shared()).map_err(failed())
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
        let shared = self.shared();
        for container in entries(&shared).map_err(failed())? {
            remove_container(&container).map_err(failed())?;
        }
        for path in entries(&self.join("vsock")).map_err(failed())? {
            gone(fs::remove_file(path)).map_err(failed())?;
        }
        for path in entries(&self.0).map_err(failed())? {
            let is_directory = fs::symlink_metadata(&path).is_ok_and(|there| there.is_dir());
            let removed = match is_directory {
                true => fs::remove_dir(path),
                false => fs::remove_file(path),
            };
            gone(removed).map_err(failed())?;
        }
        gone(fs::remove_dir(&self.0)).map_err(failed())?;
        // The last pod takes the namespace's directory along.
        if let Some(parent) = self.0.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Removes a container's places, which are empty once nothing is mounted there.
pub(crate) fn remove_container(path: &Path) -> io::Result<()> {
    for place in entries(path)? {
        let is_directory = fs::symlink_metadata(&place).is_ok_and(|there| there.is_dir());
        gone(match is_directory {
            true => fs::remove_dir(&place),
            false => fs::remove_file(&place),
        })?;
    }
    gone(fs::remove_dir(path))
}

fn entries(path: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        other => other?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect(),
    }
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
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
        fs::create_dir_all(base.join("p/shared/web/rootfs")).unwrap();
        fs::write(base.join("p/shared/web/mnt-0"), "").unwrap();
        fs::write(base.join("p/initramfs"), "").unwrap();
        // As if it were somebody's data, still mounted.
        fs::write(base.join("p/shared/web/rootfs/data"), "precious").unwrap();
        assert!(directory.remove().is_err());
        assert!(base.join("p/shared/web/rootfs/data").exists());
        fs::remove_file(base.join("p/shared/web/rootfs/data")).unwrap();
        directory.remove().unwrap();
        assert!(!base.exists());
        directory.remove().unwrap();
    }
}
