//! How the volume is called that a path of the host is, or lies in: what a pod's annotations name.
//!
//! Asked by `rootfs`. CRI says no names; the directories that a kubelet makes for a pod have them.
//!
//! ```text
//! <kubelet>/pods/<uid>/volumes/<plugin>/<name>                     a volume
//! <kubelet>/pods/<uid>/volumes/<plugin>/<name>/mount               one of a storage driver
//! <kubelet>/pods/<uid>/volume-subpaths/<name>/<container>/<n>      a part of one (subPath)
//! ```

use std::path::{Component, Path, PathBuf};

const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// The plugins whose volumes a kubelet fills by itself.
const SETTINGS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// What is known of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    /// That of the pod; of a persistent volume its own; the last part of any other path.
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    EmptyDir,
    /// One that the kubelet fills: a ConfigMap, a Secret, a token, what the pod is.
    Settings,
    /// A directory or file in a volume, whichever kind that has.
    Part,
    /// Another that a kubelet has made a directory for.
    Other,
    /// None that a kubelet knows: a hostPath, or what containerd mounts by itself.
    Path,
}

impl Named {
    /// What is the same for all that is of one volume.
    pub(crate) fn identity(&self, path: &Path) -> PathBuf {
        match self.kind {
            Kind::Path => path.to_owned(),
            // No path is relative.
            _ => self.name.clone().into(),
        }
    }
}

/// The volume at this path, or in which it lies.
pub(crate) fn volume(path: &Path) -> Named {
    let parts: Vec<&str> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(part) => part.to_str(),
            _ => None,
        })
        .collect();
    let named = |name: &str, kind| Named {
        name: name.to_owned(),
        kind,
    };
    // Its last five names are those of the volume, and nothing that leads up again.
    let mut last = path.components().rev().take(5);
    let climbs = last.any(|part| part == Component::ParentDir);
    for (index, part) in parts.iter().enumerate() {
        if *part != "pods" {
            continue;
        }
        match parts[index + 1..] {
            [_, "volumes", EMPTY_DIR, name] => return named(name, Kind::EmptyDir),
            [_, "volumes", plugin, name] if SETTINGS.contains(&plugin) && !climbs => {
                return named(name, Kind::Settings);
            }
            [_, "volumes", _, name, ..] => return named(name, Kind::Other),
            [_, "volume-subpaths", name, _, ..] => return named(name, Kind::Part),
            _ => {}
        }
    }
    named(parts.last().copied().unwrap_or_default(), Kind::Path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_called_what_its_directory_is() {
        for (path, name, kind) in [
            (
                "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache",
                "cache",
                Kind::EmptyDir,
            ),
            (
                "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache/sub",
                "cache",
                Kind::Other,
            ),
            (
                "/var/lib/kubelet/pods/u/volumes/kubernetes.io~projected/kube-api-access-x",
                "kube-api-access-x",
                Kind::Settings,
            ),
            (
                "/state/pods/u/volumes/kubernetes.io~configmap/settings",
                "settings",
                Kind::Settings,
            ),
            (
                "/state/pods/u/volumes/kubernetes.io~configmap/settings/part",
                "settings",
                Kind::Other,
            ),
            (
                "/state/pods/u/volumes/kubernetes.io~secret/../x",
                "x",
                Kind::Other,
            ),
            (
                "/pods/u/volumes/kubernetes.io~nfs/n/pods/u/volumes/kubernetes.io~secret/s",
                "n",
                Kind::Other,
            ),
            (
                "/data/pods/u/volumes/kubernetes.io~csi/pvc-1/mount",
                "pvc-1",
                Kind::Other,
            ),
            (
                "/pods/pods/u/volume-subpaths/data/web/0",
                "data",
                Kind::Part,
            ),
            ("/srv/files", "files", Kind::Path),
            ("/srv/pods/files", "files", Kind::Path),
            ("/srv/../x/", "x", Kind::Path),
            ("/", "", Kind::Path),
        ] {
            let expected = Named {
                name: name.into(),
                kind,
            };
            assert_eq!(volume(Path::new(path)), expected, "{path}");
        }
        let identity = |path: &str| volume(Path::new(path)).identity(Path::new(path));
        assert_eq!(identity("/srv/a"), Path::new("/srv/a"));
        let parts = ["0", "1"].map(|part| identity(&format!("/pods/u/volume-subpaths/d/c/{part}")));
        assert_eq!(parts[0], parts[1]);
    }
}
