//! What a container is shown of the host: its root and its bind mounts, put where the guest sees
//! them, below the pod's shared directory.

use std::{
    fs::{self, File},
    path::PathBuf,
};

use containerd_shim_protos::api::Mount;
use pericarp_api::agent;

use crate::{
    bundle::Bundle,
    directory::{self, Directory},
    error::{ShimError, during},
    machine::POD_SHARE,
    mounts,
    spec::{Bind, Source},
};

/// The places of one container. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Places {
    path: PathBuf,
    name: String,
    /// In the order in which something was mounted there.
    mounted: Vec<PathBuf>,
}

impl Places {
    /// Makes the places of the container that the guest knows by `name`.
    pub(crate) fn make(directory: &Directory, name: &str) -> Result<Self, ShimError> {
        let path = directory.shared().join(name);
        fs::create_dir(&path).map_err(during(path.display()))?;
        Ok(Self {
            path,
            name: name.to_owned(),
            mounted: Vec::new(),
        })
    }

    /// Puts the root there: what the snapshotter says, or the directory that the bundle names.
    pub(crate) fn root(
        &mut self,
        rootfs: &[Mount],
        bundle: &Bundle,
    ) -> Result<agent::RootFs, ShimError> {
        let place = self.path.join("rootfs");
        fs::create_dir(&place).map_err(during(place.display()))?;
        self.mounted.push(place.clone());
        for mount in rootfs {
            let what = format!("the root ({} of {})", mount.type_, mount.source);
            mounts::snapshot(mount, &place).map_err(during(what))?;
        }
        if rootfs.is_empty() {
            let path = bundle.spec["root"]["path"].as_str().unwrap_or("rootfs");
            let what = Bind {
                path: bundle.path.join(path),
                read_only: false,
                follows: false,
            };
            let name = format!("the root ({})", what.path.display());
            mounts::bind(&what, true, &place).map_err(during(name))?;
        }
        Ok(agent::RootFs {
            source: POD_SHARE.into(),
            fs_type: "virtiofs".into(),
            path: format!("{}/rootfs", self.name),
            ..agent::RootFs::default()
        })
    }

    /// Puts what the mount with this index shows there.
    pub(crate) fn source(
        &mut self,
        index: usize,
        source: &Source,
        recursive: bool,
    ) -> Result<agent::Source, ShimError> {
        let mut told = agent::Source {
            mount: u32::try_from(index).unwrap_or(u32::MAX),
            ..agent::Source::default()
        };
        let Source::Host(bind) = source else {
            told.memory = true;
            return Ok(told);
        };
        let name = format!("mnt-{index}");
        let place = self.path.join(&name);
        let failed = || during(format!("the mount of {}", bind.path.display()));
        if fs::metadata(&bind.path).map_err(failed())?.is_dir() {
            fs::create_dir(&place).map_err(failed())?;
        } else {
            File::create_new(&place).map_err(failed())?;
        }
        self.mounted.push(place.clone());
        mounts::bind(bind, recursive, &place).map_err(failed())?;
        told.tag = POD_SHARE.into();
        told.path = format!("{}/{name}", self.name);
        Ok(told)
    }

    fn remove(&mut self) -> std::io::Result<()> {
        for place in self.mounted.drain(..).rev() {
            mounts::detach(&place)?;
        }
        directory::remove_container(&self.path)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::warn!("'{}' cannot be removed: {error}", self.path.display());
        }
    }
}
