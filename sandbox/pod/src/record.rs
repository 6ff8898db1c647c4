//! What is known of a running pod of containerd's: written by its shim into the pod's directory,
//! read by whoever looks at a node's pods. `pericarp run` writes the same of its machine.
//!
//! One file, replaced whole. It is its writer's alone and names nothing that the guest has said. A shim
//! that was killed leaves it until containerd has cleaned up, so a reader asks whether the shim is
//! there (`is_alive`).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::sidecar::{BLOCK, FS, NET};

/// Where pods have their directories: `<namespace>/<pod>` of containerd's.
pub const BASE: &str = "/run/pericarp";
/// Its name in the pod's directory.
pub const FILE: &str = "pod.json";

/// A process of a pod's on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// What it is: `machine`, or the sidecar's program.
    pub role: String,
    /// Its number.
    pub pid: u32,
    /// The device that it serves, where there is one such process for each; else empty.
    #[serde(default)]
    pub device: String,
}

/// What a device is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Blocks.
    #[default]
    Disk,
    /// Files.
    Share,
    /// Packets.
    Card,
}

impl DeviceKind {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Share => "share",
            Self::Card => "card",
        }
    }

    /// The program that serves it.
    #[must_use]
    pub fn server(self) -> &'static str {
        match self {
            Self::Disk => BLOCK,
            Self::Share => FS,
            Self::Card => NET,
        }
    }
}

/// A device of a pod's machine, and who counts what is done with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its name in the machine, and that by which its sidecar knows it.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// The pod's volume, `root` for a container's root, or [`ALL`]; empty where it has no such name.
    pub volume: String,
    /// The sidecar's control socket, a name in the pod's directory.
    pub control: String,
}

/// The volume of a share that has all roots and volumes without a device of their own.
pub const ALL: &str = "all";

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Of containerd's.
    pub namespace: String,
    /// What containerd calls it.
    pub id: String,
    /// What Kubernetes calls it, `namespace/name`; the id where nobody has said it.
    pub name: String,
    /// Kubernetes' number of it, where it has been said.
    #[serde(default)]
    pub uid: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The process of its shim.
    pub shim: u32,
    /// What runs its machine, and why that.
    pub hypervisor: String,
    /// Virtual CPUs of the machine.
    pub vcpus: u32,
    /// Its bytes.
    pub memory: u64,
    /// Where the guest's kernel and agent were taken from.
    pub assets: PathBuf,
    /// The version that this was, if it was one of a store.
    pub assets_version: Option<String>,
    /// The machine's kernel, as far as the assets say it.
    pub kernel: Option<String>,
    /// Bytes that its processes may take of the host beside the guest's memory: its profile's key
    /// `overhead`, or what is usual. Its RuntimeClass is not read. 0 where nobody says.
    #[serde(default)]
    pub overhead: u64,
    /// The machine and its sidecars; none yet while it is being made.
    pub processes: Vec<ProcessRecord>,
    /// What the machine has that is counted.
    #[serde(default)]
    pub devices: Vec<DeviceRecord>,
}

impl PodRecord {
    /// Writes it, in the place of an earlier one.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let unfinished = directory.join(format!("{FILE}.new"));
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::rename(unfinished, directory.join(FILE))
    }

    /// Reads the one of a pod's directory.
    #[must_use]
    pub fn read(directory: &Path) -> Option<Self> {
        let bytes = fs::read(directory.join(FILE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Whether its shim is there: a process of that number which is the shim of this pod.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let line = fs::read(format!("/proc/{}/cmdline", self.shim)).unwrap_or_default();
        line.split(|byte| *byte == 0)
            .any(|word| word == self.id.as_bytes())
    }

    /// The machine's process.
    #[must_use]
    pub fn machine(&self) -> Option<u32> {
        let machine = self.processes.iter().find(|one| one.role == MACHINE);
        machine.map(|one| one.pid)
    }
}

/// The role of the machine's process.
pub const MACHINE: &str = "machine";

/// All pods below `base` whose shims are there, the oldest first, each with its directory.
#[must_use]
pub fn all(base: &Path) -> Vec<(PathBuf, PodRecord)> {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let pods = entries(base).flat_map(|namespace| entries(&namespace.path()));
    let mut all: Vec<_> = pods
        .filter_map(|pod| Some((pod.path(), PodRecord::read(&pod.path())?)))
        .filter(|(_, record)| record.is_alive())
        .collect();
    all.sort_by(|(_, one), (_, other)| (one.created, &one.id).cmp(&(other.created, &other.id)));
    all
}

/// Why no single pod is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotOne {
    /// There is none.
    None,
    /// There are several.
    Several,
}

/// The pod that `wanted` names: by `namespace/name`, by its name alone or by its id or the beginning
/// of that, if only one is meant.
///
/// # Errors
///
/// None is meant, or several are.
pub fn pick<'a, T>(
    all: &'a [T],
    wanted: &str,
    names: impl Fn(&T) -> (&str, &str),
) -> Result<&'a T, NotOne> {
    let short = |name: &str| name.rsplit('/').next().unwrap_or_default() == wanted;
    let ways: [&dyn Fn(&T) -> bool; 3] = [
        &|one| names(one).0 == wanted || names(one).1 == wanted,
        &|one| short(names(one).0),
        &|one| !wanted.is_empty() && names(one).1.starts_with(wanted),
    ];
    for way in ways {
        let mut meant = all.iter().filter(|one| way(one));
        match (meant.next(), meant.next()) {
            (Some(one), None) => return Ok(one),
            (Some(_), Some(_)) => return Err(NotOne::Several),
            (None, _) => {}
        }
    }
    Err(NotOne::None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_found_by_its_names() {
        let all = [
            ("default/web", "aa11"),
            ("test/web", "aa22"),
            ("test/db", "bb33"),
        ];
        let pick = |wanted| pick(&all, wanted, |one| *one).map(|one| one.1);
        assert_eq!(pick("default/web"), Ok("aa11"));
        assert_eq!(pick("db"), Ok("bb33"));
        assert_eq!(pick("bb"), Ok("bb33"));
        assert_eq!(pick("aa22"), Ok("aa22"));
        assert_eq!(pick("web"), Err(NotOne::Several));
        assert_eq!(pick("aa"), Err(NotOne::Several));
        assert_eq!(pick(""), Err(NotOne::None));
        assert_eq!(pick("default"), Err(NotOne::None));
    }

    #[test]
    fn only_pods_whose_shims_are_there_are_listed() {
        let base = std::env::temp_dir().join(format!("pericarp-records-{}", std::process::id()));
        let own = fs::read("/proc/self/cmdline").unwrap();
        let word = own.split(|byte| *byte == 0).next().unwrap();
        let id = String::from_utf8_lossy(word).into_owned();
        for (name, id, shim) in [
            ("one", id.as_str(), std::process::id()),
            ("two", "no argument of ours", std::process::id()),
            ("three", id.as_str(), u32::MAX),
        ] {
            let directory = base.join("k8s.io").join(name);
            fs::create_dir_all(&directory).unwrap();
            let record = PodRecord {
                id: id.to_owned(),
                name: name.into(),
                shim,
                ..PodRecord::default()
            };
            record.write(&directory).unwrap();
            assert_eq!(PodRecord::read(&directory), Some(record));
        }
        fs::create_dir_all(base.join("k8s.io/four")).unwrap();
        fs::write(base.join("k8s.io/four").join(FILE), "{").unwrap();
        let all = all(&base);
        fs::remove_dir_all(&base).unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].1.name, "one");
    }
}
