//! What a container is shown of the host: its root and its bind mounts, put where the guest sees
//! them, below the pod's shared directory; and its disks, which the machine gets.

use std::{fs, path::PathBuf, sync::Arc};

use containerd_shim_protos::api::Mount;
use pericarp_api::agent;
use protobuf::MessageField;

use crate::{
    blocks::{Block, Blocks, Place, Purpose, Wanted},
    bundle::Bundle,
    devices::Node,
    direct::Direct,
    directory::{CONTAINERS, Directory},
    error::{ShimError, during},
    machine::{Booted, POD_SHARE},
    mounts,
    spec::{Bind, Source},
    volumes::{Volume, Volumes},
};

/// The places of one container. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Places {
    /// What lies behind the place of its root, and the place.
    root: (PathBuf, PathBuf),
    name: String,
    volumes: Vec<Volume>,
    disks: Vec<Block>,
}

/// What the containers of a pod share of what they are shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OfPod<'a> {
    pub(crate) volumes: &'a Arc<Volumes>,
    pub(crate) blocks: &'a Arc<Blocks>,
    pub(crate) booted: &'a Booted,
}

impl Places {
    /// Makes the place of the container that the guest knows by `name`.
    pub(crate) fn make(directory: &Directory, name: &str) -> Result<Self, ShimError> {
        let at = |top: PathBuf| top.join(CONTAINERS).join(name);
        let root = (at(directory.behind()), at(directory.shared()));
        fs::create_dir(&root.0).map_err(during(root.0.display()))?;
        Ok(Self {
            root,
            name: name.to_owned(),
            volumes: Vec::new(),
            disks: Vec::new(),
        })
    }

    /// Puts the root there: what the snapshotter says, or the directory that the bundle names.
    pub(crate) fn root(
        &mut self,
        rootfs: &[Mount],
        bundle: &Bundle,
    ) -> Result<agent::RootFs, ShimError> {
        let (_, place) = &self.root;
        for mount in rootfs {
            let what = format!("the root ({} of {})", mount.type_, mount.source);
            mounts::snapshot(mount, place).map_err(during(what))?;
        }
        if rootfs.is_empty() {
            let path = bundle.spec["root"]["path"].as_str().unwrap_or("rootfs");
            let what = Bind {
                path: bundle.path.join(path),
                read_only: false,
                follows: false,
            };
            let failed = || during(format!("the root ({})", what.path.display()));
            let source = mounts::open(&what.path).map_err(failed())?;
            source.bind(&what, true, place).map_err(failed())?;
        }
        Ok(agent::RootFs {
            source: POD_SHARE.into(),
            fs_type: "virtiofs".into(),
            path: format!("{CONTAINERS}/{}", self.name),
            ..agent::RootFs::default()
        })
    }

    /// Shows what the mount with this index does.
    pub(crate) fn source(
        &mut self,
        index: usize,
        source: &Source,
        pod: OfPod<'_>,
    ) -> Result<agent::Source, ShimError> {
        let mut told = agent::Source {
            mount: u32::try_from(index).unwrap_or(u32::MAX),
            ..agent::Source::default()
        };
        match source {
            Source::Memory => told.memory = true,
            Source::Host(bind, recursive) => {
                let volume = pod.volumes.show(bind, *recursive)?;
                told.tag = POD_SHARE.into();
                told.path = volume.path();
                self.volumes.push(volume);
            }
            Source::Direct(direct) => {
                let file_system = self.file_system(direct, pod)?;
                told.file_system = MessageField::some(file_system);
            }
        }
        Ok(told)
    }

    /// Has the machine have the disk of a volume that the guest mounts.
    fn file_system(
        &mut self,
        direct: &Direct,
        pod: OfPod<'_>,
    ) -> Result<agent::FileSystem, ShimError> {
        let wanted = Wanted {
            field: &format!("{}: device", direct.file.display()),
            place: Place::Path(direct.device.clone()),
            read_only: direct.read_only(),
            purpose: Purpose::FileSystem,
        };
        let disk = pod.blocks.attach(&wanted, pod.booted)?;
        let group = direct.group.map(|(id, only_on_mismatch)| agent::Group {
            id,
            only_on_mismatch,
            ..agent::Group::default()
        });
        let told = agent::FileSystem {
            disk: disk.id().to_owned(),
            type_: direct.kind.clone(),
            options: direct.options.clone(),
            group: group.into(),
            ..agent::FileSystem::default()
        };
        self.disks.push(disk);
        Ok(told)
    }

    /// Has the machine have a block device of the container.
    pub(crate) fn node(&mut self, node: &Node, pod: OfPod<'_>) -> Result<agent::Device, ShimError> {
        let wanted = Wanted {
            field: &node.field(),
            place: Place::Number(node.major, node.minor),
            read_only: node.read_only,
            purpose: Purpose::Device,
        };
        let disk = pod.blocks.attach(&wanted, pod.booted)?;
        let told = agent::Device {
            disk: disk.id().to_owned(),
            path: node.path.clone(),
            read_only: node.read_only,
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            ..agent::Device::default()
        };
        self.disks.push(disk);
        Ok(told)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let (behind, place) = &self.root;
        let removed = mounts::detach(place).and_then(|()| mounts::remove_place(behind));
        if let Err(error) = removed {
            log::warn!("'{}' cannot be removed: {error}", place.display());
        }
    }
}
