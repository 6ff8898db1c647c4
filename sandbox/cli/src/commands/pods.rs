//! Pods of containerd's as commands find them: by name or id, among those that run in machines and
//! those that do not.

use std::{
    fs,
    path::{Path, PathBuf},
};

use pericarp_pod::record::{self, BASE, NotOne, PodRecord};
use serde_json::Value;

use crate::{commands::Refusal, input::problem::Problem};

/// Where containerd keeps the bundles of what runs, by its namespaces.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task";

/// One in a machine of its own.
pub(crate) struct Pod {
    pub(crate) directory: PathBuf,
    pub(crate) record: PodRecord,
}

/// One without.
pub(crate) struct Plain {
    pub(crate) name: String,
    pub(crate) id: String,
    /// Its first process on this host.
    pub(crate) pid: Option<u32>,
}

/// All that run in machines.
pub(crate) fn in_machines() -> Vec<Pod> {
    let all = record::all(Path::new(BASE)).into_iter();
    all.map(|(directory, record)| Pod { directory, record })
        .collect()
}

/// The one that is meant; None if there is none of that name.
pub(crate) fn in_a_machine(wanted: &str) -> Result<Option<Pod>, Refusal> {
    let all = in_machines();
    let names = |pod: &Pod| (pod.record.name.clone(), pod.record.id.clone());
    let named: Vec<(String, String)> = all.iter().map(names).collect();
    let Some(meant) = pick(&named, wanted)? else {
        return Ok(None);
    };
    Ok(all.into_iter().nth(meant))
}

/// Which of these is meant, by its place.
pub(crate) fn pick(named: &[(String, String)], wanted: &str) -> Result<Option<usize>, Refusal> {
    let numbered: Vec<(usize, &(String, String))> = named.iter().enumerate().collect();
    let meant = record::pick(&numbered, wanted, |(_, (name, id))| {
        (name.as_str(), id.as_str())
    });
    match meant {
        Ok((index, _)) => Ok(Some(*index)),
        Err(NotOne::None) => Ok(None),
        Err(NotOne::Several) => {
            let rule = "may be one of several pods";
            let cure = "write NAMESPACE/NAME, or more of the id";
            Err(Problem::new("POD", wanted.to_owned(), rule, cure).into())
        }
    }
}

/// The one that is meant, among containerd's pods that no machine of ours has.
pub(crate) fn plain(wanted: &str) -> Result<Option<Plain>, Refusal> {
    let mut all = plain_in(Path::new(BUNDLES));
    let names = |one: &Plain| (one.name.clone(), one.id.clone());
    let named: Vec<(String, String)> = all.iter().map(names).collect();
    let meant = pick(&named, wanted)?;
    Ok(meant.map(|index| all.swap_remove(index)))
}

fn plain_in(bundles: &Path) -> Vec<Plain> {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let all = entries(bundles).flat_map(|namespace| entries(&namespace.path()));
    all.filter_map(|entry| {
        let bundle = entry.path();
        let text = fs::read(bundle.join("config.json")).ok()?;
        let spec: Value = serde_json::from_slice(&text).ok()?;
        let said = |key: &str| spec["annotations"][format!("io.kubernetes.cri.{key}")].as_str();
        if said("container-type") == Some("container") {
            return None;
        }
        let id = entry.file_name().into_string().ok()?;
        let name = match (said("sandbox-namespace"), said("sandbox-name")) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => id.clone(),
        };
        let pid = fs::read_to_string(bundle.join("init.pid")).ok();
        let pid = pid.and_then(|text| text.trim().parse().ok());
        Some(Plain { name, id, pid })
    })
    .collect()
}

/// There is no such pod.
pub(crate) fn unknown(wanted: &str) -> Refusal {
    let rule = "there is no such pod on this node";
    let cure = "`crictl pods` lists those there are; as root";
    Problem::new("POD", wanted.to_owned(), rule, cure).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_without_machines_are_found_by_their_bundles() {
        let base = std::env::temp_dir().join(format!("pericarp-bundles-{}", std::process::id()));
        let write = |id: &str, text: &str| {
            let bundle = base.join("k8s.io").join(id);
            fs::create_dir_all(&bundle).unwrap();
            fs::write(bundle.join("config.json"), text).unwrap();
            fs::write(bundle.join("init.pid"), "7").unwrap();
        };
        let kind = |kind: &str| {
            format!(
                "{{\"annotations\":{{\"io.kubernetes.cri.container-type\":\"{kind}\",\
                 \"io.kubernetes.cri.sandbox-namespace\":\"default\",\
                 \"io.kubernetes.cri.sandbox-name\":\"web\"}}}}"
            )
        };
        write("aa", &kind("sandbox"));
        write("bb", &kind("container"));
        write("cc", "{}");
        let mut all = plain_in(&base);
        fs::remove_dir_all(&base).unwrap();
        all.sort_by(|one, other| one.id.cmp(&other.id));
        let names: Vec<_> = all.iter().map(|one| (one.name.as_str(), one.pid)).collect();
        assert_eq!(names, [("default/web", Some(7)), ("cc", Some(7))]);
    }
}
