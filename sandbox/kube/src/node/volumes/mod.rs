//! A pod's volumes on the node: directories, memory, and files of ConfigMaps, Secrets and the pod
//! itself. Called by `worker`, before containers start, and again whenever an object changed.
//!
//! ```text
//! projection  which files a volume has
//! atomic      files that change all at once
//! sub_path    a part of a volume, without what is beside it
//! size        how much a container has put into one
//! remove      what containers left
//! ```

mod atomic;
mod mounts;
mod projection;
pub(super) mod remove;
pub(super) mod size;
mod sub_path;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use thiserror::Error;

use self::atomic::Files;
use self::projection::From;
use super::places::Places;
use super::quantity::Quantity;
use super::sources::{Facts, Lookup, SourceError};
use super::spec::{EmptyDir, HostPath, Pod, Volume};

pub(super) use self::sub_path::mount as mount_sub_path;

/// Why a volume is not there.
#[derive(Debug, Error)]
pub(super) enum VolumeError {
    /// What it is made of is not there.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// The node's own path is not what the manifest says.
    #[error("hostPath type check failed: {0} is not {1}")]
    HostPath(String, &'static str),
    /// The node cannot make it.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A volume that is not there, and why.
#[derive(Debug, Error)]
#[error("MountVolume.SetUp failed for volume \"{volume}\" : {why}")]
pub(super) struct Failed {
    pub(super) volume: String,
    pub(super) why: VolumeError,
}

/// Where a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    /// Containers may not change it, whatever they ask for.
    pub(super) read_only: bool,
}

/// The places of a pod's volumes, by name.
pub(super) type Ready = BTreeMap<String, Place>;

/// Makes all volumes of a pod be there and up to date. It may be called at any time; what is there
/// stays.
pub(super) fn set_up(
    pod: &Pod,
    places: &Places,
    facts: &Facts,
    find: &Lookup<'_>,
) -> Result<Ready, Failed> {
    let mut ready = Ready::new();
    for volume in &pod.spec.volumes {
        let place = one(pod, volume, places, &From { pod, facts, find });
        let failed = |why| Failed {
            volume: volume.name.clone(),
            why,
        };
        ready.insert(volume.name.clone(), place.map_err(failed)?);
    }
    Ok(ready)
}

fn one(pod: &Pod, volume: &Volume, places: &Places, from: &From<'_>) -> Result<Place, VolumeError> {
    let group = group(pod);
    let at = |kind: &str| places.volume(&pod.metadata.uid, kind, &volume.name);
    let (path, files, memory) = if let Some(of) = &volume.host_path {
        host_path(of)?;
        let path = PathBuf::from(&of.path);
        return Ok(Place {
            path,
            read_only: false,
        });
    } else if let Some(of) = &volume.config_map {
        (at("configmap"), from.config_map(of)?, false)
    } else if let Some(of) = &volume.secret {
        (at("secret"), from.secret(of)?, true)
    } else if let Some(of) = &volume.projected {
        (at("projected"), from.projected(of)?, true)
    } else if let Some(of) = &volume.downward_api {
        (at("downward-api"), from.downward(of, None)?, false)
    } else {
        let path = at("empty-dir");
        let of = volume.empty_dir.clone().unwrap_or_default();
        empty_dir(&path, &of, pod, from.facts.memory, group)?;
        return Ok(Place {
            path,
            read_only: false,
        });
    };
    files_of(&path, &files, memory, group)?;
    Ok(Place {
        path,
        read_only: true,
    })
}

/// The group that the pod's files belong to.
fn group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.security_context.fs_group?;
    u32::try_from(group).ok()
}

/// Secrets are in memory, so that no disk has them after the pod.
fn files_of(path: &Path, files: &Files, memory: bool, group: Option<u32>) -> io::Result<()> {
    fs::create_dir_all(path)?;
    if memory && !mounts::is_mounted(path)? {
        mounts::memory(path, None)?;
    }
    let mode = if group.is_some() { 0o2755 } else { 0o755 };
    if group.is_some() {
        chown(path, None, group)?;
    }
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    atomic::write(path, files, group).map(drop)
}

fn empty_dir(
    path: &Path,
    of: &EmptyDir,
    pod: &Pod,
    node: Quantity,
    group: Option<u32>,
) -> io::Result<()> {
    let new = !path.exists();
    fs::create_dir_all(path)?;
    let in_memory = of.medium == "Memory";
    let mount = in_memory && !mounts::is_mounted(path)?;
    if mount {
        mounts::memory(path, Some(memory_size(of, pod, node)))?;
    }
    // Later it is the containers' to say who may do what.
    if new || mount {
        let mut mode = 0o777;
        if group.is_some() {
            chown(path, None, group)?;
            mode |= 0o2000;
        }
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// How large a volume in memory may get: as it says, but no larger than the pod's limit of memory,
/// which it counts for, or the node's memory.
fn memory_size(of: &EmptyDir, pod: &Pod, node: Quantity) -> u64 {
    let limits = pod.spec.containers.iter().map(|one| {
        let limit = one.resources.limits.get("memory").copied();
        limit.filter(|limit| !limit.is_zero())
    });
    // One container without a limit is a pod without one.
    let together: Option<Vec<Quantity>> = limits.collect();
    let together = together.map(|all| all.into_iter().sum());
    let said = of.size_limit.filter(|said| !said.is_zero());
    let least = [said, together].into_iter().flatten().fold(node, Ord::min);
    u64::try_from(least.value()).unwrap_or_default()
}

/// Sees to it that the node's own path is what the manifest says, and makes it if it says so.
fn host_path(of: &HostPath) -> Result<(), VolumeError> {
    let path = Path::new(&of.path);
    let kind = of.kind.as_deref().unwrap_or_default();
    let is = |what: &dyn Fn(&fs::FileType) -> bool| {
        fs::metadata(path).is_ok_and(|data| what(&data.file_type()))
    };
    let wrong = |what| Err(VolumeError::HostPath(of.path.clone(), what));
    match kind {
        "DirectoryOrCreate" if !path.exists() => {
            fs::create_dir_all(path)?;
            fs::set_permissions(path, Permissions::from_mode(0o755))?;
        }
        "FileOrCreate" if !path.exists() => {
            let mut options = OpenOptions::new();
            options
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(path)?;
        }
        "Directory" | "DirectoryOrCreate" if !is(&|kind| kind.is_dir()) => {
            return wrong("a directory");
        }
        "File" | "FileOrCreate" if !is(&|kind| kind.is_file()) => return wrong("a file"),
        "Socket" if !is(&|kind| kind.is_socket()) => return wrong("a socket file"),
        "CharDevice" if !is(&|kind| kind.is_char_device()) => {
            return wrong("a character device");
        }
        "BlockDevice" if !is(&|kind| kind.is_block_device()) => return wrong("a block device"),
        _ => {}
    }
    Ok(())
}

/// The volumes whose size is watched, with their limits. Those in memory cannot grow beyond theirs.
pub(super) fn limited(pod: &Pod, places: &Places) -> Vec<(String, PathBuf, Quantity)> {
    let volumes = pod.spec.volumes.iter();
    let limited = volumes.filter_map(|volume| {
        let of = volume.empty_dir.as_ref()?;
        let limit = of.size_limit.filter(|limit| !limit.is_zero())?;
        let path = places.volume(&pod.metadata.uid, "empty-dir", &volume.name);
        (of.medium != "Memory").then(|| (volume.name.clone(), path, limit))
    });
    limited.collect()
}

/// Removes all that a pod had below `dir`, when nothing of it runs any more.
pub(super) fn tear_down(dir: &Path) -> io::Result<()> {
    mounts::unmount_below(dir)?;
    remove::tree(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;
    use serde_json::json;

    #[test]
    fn memory_has_the_least_of_the_limits() {
        let size = |limit: Option<&str>, memory: Option<&str>| {
            let resources = memory.map(|memory| json!({"limits": {"memory": memory}}));
            let pod = json!({"spec": {"containers": [{"name": "c", "resources": resources}]}});
            let pod = Pod::read(&pod).unwrap();
            let of = EmptyDir {
                medium: "Memory".into(),
                size_limit: limit.map(|text| text.parse().unwrap()),
            };
            memory_size(&of, &pod, Quantity::whole(1 << 30)) >> 20
        };
        assert_eq!(size(None, None), 1024);
        assert_eq!(size(Some("64Mi"), None), 64);
        assert_eq!(size(Some("64Mi"), Some("32Mi")), 32);
        assert_eq!(size(None, Some("128Mi")), 128);
        assert_eq!(size(Some("2Gi"), None), 1024);
    }

    #[test]
    fn the_nodes_own_paths_are_checked() {
        let scratch = Scratch::new();
        let check = |name: &str, kind: &str| {
            let path = scratch.path().join(name).display().to_string();
            let kind = Some(kind.to_owned());
            host_path(&HostPath { path, kind }).map_err(|error| error.to_string())
        };
        assert!(check("none", "").is_ok());
        assert!(
            check("none", "Directory")
                .unwrap_err()
                .ends_with("is not a directory")
        );
        check("made/d", "DirectoryOrCreate").unwrap();
        check("made/d", "Directory").unwrap();
        check("made/f", "FileOrCreate").unwrap();
        check("made/f", "File").unwrap();
        assert!(check("made/f", "DirectoryOrCreate").is_err());
        assert!(
            check("made/f", "Socket")
                .unwrap_err()
                .ends_with("is not a socket file")
        );
    }

    #[test]
    fn volumes_of_files_and_directories_come_and_go() {
        let scratch = Scratch::new();
        let places = Places::new(scratch.path());
        let pod = Pod::read(&json!({
            "metadata": {"name": "p", "uid": "u", "labels": {"a": "b"}},
            "spec": {"containers": [], "volumes": [
                {"name": "e"},
                {"name": "d", "downwardAPI": {"items": [
                    {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
                {"name": "l", "emptyDir": {"sizeLimit": "1Mi"}},
                {"name": "m", "emptyDir": {"sizeLimit": "1Mi", "medium": "None"}},
            ]},
        }))
        .unwrap();
        let set_up = || set_up(&pod, &places, &Facts::default(), &|_, _| None).unwrap();
        let ready = set_up();
        assert!(ready["d"].read_only && !ready["e"].read_only);
        let labels = fs::read_to_string(ready["d"].path.join("labels")).unwrap();
        assert_eq!(labels, "a=\"b\"");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&ready["e"].path), 0o777);
        // What is a container's stays as it is.
        fs::set_permissions(&ready["e"].path, Permissions::from_mode(0o700)).unwrap();
        assert_eq!(set_up(), ready);
        assert_eq!(mode(&ready["e"].path), 0o700);
        assert_eq!(limited(&pod, &places)[0].0, "l");
        tear_down(&places.pod("u")).unwrap();
        assert!(!places.pod("u").exists());
        tear_down(&places.pod("u")).unwrap();
    }

    #[test]
    fn a_volume_whose_source_is_missing_says_so() {
        let scratch = Scratch::new();
        let volume = json!({"name": "v", "configMap": {"name": "none"}});
        let pod = Pod::read(&json!({"spec": {"volumes": [volume]}})).unwrap();
        let places = Places::new(scratch.path());
        let failed = set_up(&pod, &places, &Facts::default(), &|_, _| None).unwrap_err();
        let text = "MountVolume.SetUp failed for volume \"v\" : configmap \"none\" not found";
        assert_eq!(failed.to_string(), text);
    }
}
