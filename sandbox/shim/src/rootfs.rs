//! What a container is shown of the host: its root and its bind mounts, put where the guest sees
//! them, below the pod's shared directory; and its disks, which the machine gets.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim_protos::api::Mount;
use pericarp_api::{ROOT_KINDS, agent};
use pericarp_config::Rootfs;
use protobuf::MessageField;

use crate::{
    blocks::{Block, Blocks, Place, Purpose, Wanted},
    bundle::{Bundle, refused},
    devices::Node,
    directory::{CONTAINERS, Directory},
    empty_dir::{self, Held},
    error::{ShimError, during},
    lanes::limits,
    machine::{Booted, POD_SHARE},
    mounts,
    named::{self, Kind, Named},
    spec::{Bind, Source},
    subpath,
    volumes::{Volume, Volumes},
    watched::{self, Watch, Watched},
};

/// What asks for a root that is a disk.
/// What the disk of a root is called among volumes.
const ROOT: &str = "root";
const ROOT_DISK: &str = "the root (rootfs = \"block\")";

/// The places of one container. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Places {
    /// What lies behind the place of its root, and the place.
    root: (PathBuf, PathBuf),
    name: String,
    watches: Vec<Watch>,
    volumes: Vec<Volume>,
    disks: Vec<Block>,
}

/// What the containers of a pod share of what they are shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OfPod<'a> {
    pub(crate) volumes: &'a Arc<Volumes>,
    pub(crate) blocks: &'a Arc<Blocks>,
    pub(crate) watched: &'a Watched,
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
            watches: Vec::new(),
            volumes: Vec::new(),
            disks: Vec::new(),
        })
    }

    /// Puts the root there: what the snapshotter says, or the directory that the bundle names.
    pub(crate) fn root(
        &mut self,
        rootfs: &[Mount],
        bundle: &Bundle,
        pod: OfPod<'_>,
    ) -> Result<agent::RootFs, ShimError> {
        if pod.booted.about.pod.settings.rootfs == Rootfs::Block {
            return self.root_disk(rootfs, pod);
        }
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

    /// Has the guest mount the disk that the snapshotter made.
    fn root_disk(&mut self, rootfs: &[Mount], pod: OfPod<'_>) -> Result<agent::RootFs, ShimError> {
        let disk = one_disk(rootfs)?;
        let read_only = disk.options.iter().any(|option| option == "ro");
        // Of a program on the host.
        let options = disk.options.iter().filter(|option| *option != "loop");
        let file_system = FileSystem {
            field: &format!("{ROOT_DISK}: {}", disk.source),
            device: Path::new(&disk.source),
            kind: &disk.type_,
            options: options.cloned().collect(),
            read_only: read_only || disk.type_ == "erofs",
            group: None,
            named: None,
        };
        Ok(agent::RootFs {
            file_system: MessageField::some(self.file_system(file_system, pod)?),
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
            Source::Host(bind, recursive) => self.host(bind, *recursive, pod, &mut told)?,
            Source::Direct(direct) => {
                let named = named::volume(&direct.volume);
                pod.booted.about.saw(&named.name);
                size_limit(&named, pod)?;
                let file_system = FileSystem {
                    field: &format!("{}: device", direct.file.display()),
                    device: &direct.device,
                    kind: &direct.kind,
                    options: direct.options.clone(),
                    read_only: direct.read_only(),
                    group: direct.group,
                    named: Some(&named),
                };
                told.file_system = MessageField::some(self.file_system(file_system, pod)?);
                told.path.clone_from(&direct.inside);
            }
        }
        Ok(told)
    }

    /// Shows a file or directory of the host.
    fn host(
        &mut self,
        bind: &Bind,
        recursive: bool,
        pod: OfPod<'_>,
        told: &mut agent::Source,
    ) -> Result<(), ShimError> {
        let named = named::volume(&bind.path);
        let about = &pod.booted.about;
        // A path of the host's own has a name by chance, and never a size.
        if named.kind != Kind::Path || about.pod.volume(&named.name).is_slowed() {
            about.saw(&named.name);
        }
        if let Some((field, limit)) = size_limit(&named, pod)? {
            let (volume, inside) = directory_of(&field, &named, bind)?;
            if let Held::Image(image) = empty_dir::hold(&field, &volume, limit)? {
                let file_system = FileSystem {
                    field: &field,
                    device: &image,
                    kind: "ext4",
                    // What is deleted is the host's again.
                    options: vec!["discard".into()],
                    read_only: false,
                    group: None,
                    named: Some(&named),
                };
                told.file_system = MessageField::some(self.file_system(file_system, pod)?);
                told.path = inside;
                return Ok(());
            }
        }
        // A container may make any other directory look like one, to have it looked at or to be rid of
        // its limits.
        let written_by_kubelet = bind.read_only
            && named.kind == Kind::Settings
            && watched::version(&bind.path).is_some();
        let limited = (!written_by_kubelet).then_some(&named);
        let volume = pod.volumes.show(bind, recursive, &about.lanes, limited)?;
        (told.tag, told.path) = volume.part();
        self.volumes.push(volume);
        if written_by_kubelet {
            // Before it is looked at: no change is missed.
            let part = (told.tag.as_str(), told.path.as_str());
            let watch = pod.watched.watch(&bind.path, part, &pod.booted.guest);
            if let (Some(watch), Some(version)) = (watch, watched::version(&bind.path)) {
                told.copied_from = version;
                self.watches.push(watch);
            }
        }
        Ok(())
    }

    /// Has the machine have a disk that the guest mounts.
    fn file_system(
        &mut self,
        said: FileSystem<'_>,
        pod: OfPod<'_>,
    ) -> Result<agent::FileSystem, ShimError> {
        let about = &pod.booted.about;
        let wanted = Wanted {
            field: said.field,
            volume: said.named.map_or(ROOT, |named| &named.name),
            place: Place::Path(said.device.to_owned()),
            read_only: said.read_only,
            purpose: Purpose::FileSystem,
            limits: said
                .named
                .map(|named| limits(&about.pod, &named.name))
                .unwrap_or_default(),
        };
        let disk = pod.blocks.attach(&wanted, pod.booted)?;
        let id = disk.id().to_owned();
        self.disks.push(disk);
        let mut modules = Vec::new();
        if said.kind == "xfs" {
            for path in &about.xfs {
                let bind = Bind {
                    path: path.clone(),
                    read_only: true,
                    follows: false,
                };
                let volume = pod.volumes.show(&bind, false, &[], None)?;
                let (tag, path) = volume.part();
                modules.push(agent::Part {
                    tag,
                    path,
                    ..agent::Part::default()
                });
                self.volumes.push(volume);
            }
        }
        let group = said.group.map(|(id, only_on_mismatch)| agent::Group {
            id,
            only_on_mismatch,
            ..agent::Group::default()
        });
        Ok(agent::FileSystem {
            disk: id,
            type_: said.kind.to_owned(),
            options: said.options,
            group: group.into(),
            modules,
            ..agent::FileSystem::default()
        })
    }

    /// Has the machine have a block device of the container.
    pub(crate) fn node(&mut self, node: &Node, pod: OfPod<'_>) -> Result<agent::Device, ShimError> {
        pod.booted.about.saw(node.name());
        let wanted = Wanted {
            field: &node.field(),
            volume: node.name(),
            place: Place::Number(node.major, node.minor),
            read_only: node.read_only,
            purpose: Purpose::Device,
            limits: limits(&pod.booted.about.pod, node.name()),
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

/// The disk that the snapshotter made, as far as a guest can mount it.
fn one_disk(rootfs: &[Mount]) -> Result<&Mount, ShimError> {
    match rootfs {
        [disk] if ROOT_KINDS.contains(&disk.type_.as_str()) => Ok(disk),
        _ => {
            let kinds: Vec<&str> = rootfs.iter().map(|mount| mount.type_.as_str()).collect();
            let rule = format!(
                "the snapshotter makes it of '{}', and not of one disk with {}: have containerd use \
                 blockfile or devmapper for this handler, or set rootfs to fs",
                kinds.join(", "),
                ROOT_KINDS.join(", ")
            );
            Err(refused(ROOT_DISK, &rule))
        }
    }
}

/// A file system on a disk, as it is asked for.
struct FileSystem<'a> {
    /// What asks for it.
    field: &'a str,
    device: &'a Path,
    kind: &'a str,
    options: Vec<String>,
    read_only: bool,
    group: Option<(u32, bool)>,
    /// None for a root, which no volume's limits are about.
    named: Option<&'a Named>,
}

/// How much an emptyDir may hold, and what says so.
fn size_limit(named: &Named, pod: OfPod<'_>) -> Result<Option<(String, u64)>, ShimError> {
    let Some(limit) = pod.booted.about.pod.volume(&named.name).size else {
        return Ok(None);
    };
    let field = format!("io.pericarp/volume.{}.size-limit", named.name);
    match named.kind {
        Kind::EmptyDir | Kind::Part => Ok(Some((field, limit))),
        Kind::Settings | Kind::Other => Err(no_empty_dir(&field)),
        Kind::Path => Ok(None),
    }
}

fn no_empty_dir(field: &str) -> ShimError {
    let rule = "that volume is no emptyDir, which alone can have one";
    refused(field, rule)
}

/// The directory of the emptyDir that is mounted, or of which a part is, and that part's path.
fn directory_of(field: &str, named: &Named, bind: &Bind) -> Result<(PathBuf, String), ShimError> {
    if named.kind == Kind::EmptyDir {
        return Ok((bind.path.clone(), String::new()));
    }
    let part = subpath::of(&bind.path);
    let part = part.filter(|part| named::volume(&part.volume).kind == Kind::EmptyDir);
    let part = part.ok_or_else(|| no_empty_dir(field))?;
    Ok((part.volume, part.inside))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_disk_is_one_that_the_guest_knows() {
        let mount = |kind: &str| Mount {
            type_: kind.into(),
            ..Mount::default()
        };
        for kind in ROOT_KINDS {
            assert_eq!(one_disk(&[mount(kind)]).unwrap().type_, kind);
        }
        for (mounts, kinds) in [
            (vec![mount("overlay")], "'overlay'"),
            (vec![mount("bind")], "'bind'"),
            (vec![mount("erofs"), mount("overlay")], "'erofs, overlay'"),
            (vec![], "''"),
        ] {
            let error = one_disk(&mounts).unwrap_err().to_string();
            let said =
                format!("the root (rootfs = \"block\"): the snapshotter makes it of {kinds}");
            assert!(error.starts_with(&said), "{error}");
        }
    }
}
