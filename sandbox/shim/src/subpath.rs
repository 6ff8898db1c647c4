//! Parts of volumes (subPath), which a kubelet mounts somewhere else on the host: of which volume one
//! is, and what in it. Of a volume that the guest mounts, what the kubelet has found on the host is not
//! what the container is to have.
//!
//! Asked by `spec` and `rootfs`. The kernel's table of mounts says where a mount comes from.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::mounts::unescaped;

/// A part of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// The volume's own directory.
    pub(crate) volume: PathBuf,
    /// The path in it.
    pub(crate) inside: String,
}

/// Which one this directory or file is, if it is one.
pub(crate) fn of(path: &Path) -> Option<Part> {
    let (pod, name) = split(path)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let plugins = fs::read_dir(pod.join("volumes")).ok()?.flatten();
    let volumes = plugins.flat_map(|plugin| {
        let volume = plugin.path().join(&name);
        // A storage driver's is one deeper.
        [volume.join("mount"), volume]
    });
    find(&mounts, path, volumes.filter(|volume| volume.is_dir()))
}

/// The directory of the pod, and the name of the volume.
fn split(path: &Path) -> Option<(PathBuf, PathBuf)> {
    // <pod>/volume-subpaths/<name>/<container>/<n>
    let volume = path.parent()?.parent()?;
    let all = volume.parent()?;
    let name = volume.file_name()?.into();
    let pod = all.parent()?.to_owned();
    all.ends_with("volume-subpaths").then_some((pod, name))
}

fn find(mounts: &str, path: &Path, volumes: impl Iterator<Item = PathBuf>) -> Option<Part> {
    let (device, there) = location(mounts, path)?;
    volumes
        .filter_map(|volume| {
            let (of_volume, top) = location(mounts, &volume)?;
            let inside = there.strip_prefix(&top).ok()?.to_str()?.to_owned();
            (of_volume == device).then_some(Part { volume, inside })
        })
        .min_by_key(|part| part.inside.len())
}

/// The number of the file system that this path is on, and the path there.
fn location<'a>(mounts: &'a str, path: &Path) -> Option<(&'a str, PathBuf)> {
    let mut found: Option<(usize, &str, PathBuf)> = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(2);
        let (Some(device), Some(root), Some(point)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (root, point) = (unescaped(root), unescaped(point));
        let Ok(below) = path.strip_prefix(&point) else {
            continue;
        };
        let depth = point.components().count();
        // Of two at one place the later lies on top.
        if found.as_ref().is_none_or(|(other, ..)| *other <= depth) {
            found = Some((
                depth,
                device,
                root.components().chain(below.components()).collect(),
            ));
        }
    }
    found.map(|(_, device, there)| (device, there))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
        20 1 8:1 / / rw - ext4 /dev/sda rw\n\
        30 20 8:1 /kubelet /var/lib/kubelet rw - ext4 /dev/sda rw\n\
        31 30 0:50 / /var/lib/kubelet/pods/u/volumes/k~csi/pv/mount rw - cifs //share rw\n\
        32 30 8:1 /kubelet/pods/u/volumes/k~empty-dir/data/sub\\040one \
        /var/lib/kubelet/pods/u/volume-subpaths/data/web/0 rw - ext4 /dev/sda rw\n\
        33 30 0:50 /a /var/lib/kubelet/pods/u/volume-subpaths/pv/web/1 rw - cifs //share rw\n";

    #[test]
    fn a_part_is_found_in_its_volume() {
        let pod = Path::new("/var/lib/kubelet/pods/u");
        let volumes = || {
            ["k~empty-dir/data", "k~csi/pv", "k~csi/pv/mount"]
                .into_iter()
                .map(|volume| pod.join("volumes").join(volume))
        };
        for (path, volume, inside) in [
            ("data/web/0", "k~empty-dir/data", "sub one"),
            ("pv/web/1", "k~csi/pv/mount", "a"),
        ] {
            let path = pod.join("volume-subpaths").join(path);
            let part = Part {
                volume: pod.join("volumes").join(volume),
                inside: inside.into(),
            };
            assert_eq!(find(MOUNTS, &path, volumes()), Some(part));
        }
        assert_eq!(find(MOUNTS, Path::new("/srv/x"), volumes()), None);
    }

    #[test]
    fn only_a_kubelets_parts_are_parts() {
        let path = Path::new("/k/pods/u/volume-subpaths/data/web/0");
        let expected = (PathBuf::from("/k/pods/u"), PathBuf::from("data"));
        assert_eq!(split(path), Some(expected));
        for other in ["/k/pods/u/volumes/a/b/c", "/a/b", "/"] {
            assert_eq!(split(Path::new(other)), None, "{other}");
            assert_eq!(of(Path::new(other)), None, "{other}");
        }
    }
}
