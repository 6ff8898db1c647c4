//! A container's configuration as the guest gets it: without what is the host's, and with its bind
//! mounts named, so that `rootfs` can put what they show where the guest sees it.
//!
//! Text in, text out; nothing here touches the system but for a look at the sources of mounts and
//! at what is said of them (`direct`).

use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::{Component, Path, PathBuf},
};

use serde_json::{Map, Value, json};

use crate::{
    bundle::{Bundle, Kind, SANDBOX, refused},
    devices::{self, Node},
    direct::{self, Direct},
    error::{ShimError, during},
};

/// Where a bind mount of the configuration comes from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The host; with what is mounted below it, or without.
    Host(Bind, bool),
    /// Memory of the guest's that all containers share.
    Memory,
    /// A file system that the guest mounts.
    Direct(Direct),
}

/// What a bind mount shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    /// What is mounted there later is shown, too.
    pub(crate) follows: bool,
}

/// A configuration for the guest.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) spec: Value,
    /// With the index of the mount.
    pub(crate) sources: Vec<(usize, Source)>,
    /// Block devices that it has.
    pub(crate) nodes: Vec<Node>,
    /// It shares the processes of its pod.
    pub(crate) shared_processes: bool,
}

/// What containerd names where a pod names none.
const DEFAULT_PROFILES: [&str; 3] = ["", "unconfined", "cri-containerd.apparmor.d"];
/// Kernel parameters that belong to namespaces which a container without a pod has of its own.
const OF_NAMESPACES: [&str; 5] = [
    "fs.mqueue.",
    "kernel.domainname",
    "kernel.msg",
    "kernel.sem",
    "kernel.shm",
];
/// Where the guest has what the host's kernel shows on a host.
const KERNELS: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Of the runtime specification: what the guest's crun reads. containerd's is of 1.1 from 1.7 on, and what
/// that has beside this is refused below, or of no use in a guest.
const OCI_VERSION: &str = "1.0.2";

pub(crate) fn prepare(bundle: &Bundle) -> Result<Prepared, ShimError> {
    let mut spec = bundle.spec.clone();
    let Some(top) = spec.as_object_mut() else {
        return Err(refused("config.json", "is no object"));
    };
    if let Some(hooks) = top.remove("hooks")
        && hooks.as_object().is_some_and(|hooks| !hooks.is_empty())
    {
        return Err(refused(
            "hooks",
            "are programs of the host, which no guest runs",
        ));
    }
    top.insert("ociVersion".into(), json!(OCI_VERSION));
    // crun takes orders from annotations.
    top.remove("annotations");
    top.remove("domainname");
    let owns_names = matches!(bundle.namespace("uts"), Some(None));
    if !owns_names || bundle.kind() != Kind::Single {
        // The machine's: a pod's containers have one host name.
        top.remove("hostname");
    }
    let own = top.get_mut("process");
    process(own.ok_or_else(|| refused("process", "is missing"))?)?;
    let sources = mounts(bundle, top.entry("mounts").or_insert_with(|| json!([])))?;
    let namespaces = namespaces(bundle);
    let linux = top.entry("linux").or_insert_with(|| json!({}));
    let Some(linux) = linux.as_object_mut() else {
        return Err(refused("linux", "is no object"));
    };
    let nodes = linux_part(bundle, linux, namespaces)?;
    Ok(Prepared {
        spec,
        sources,
        nodes,
        shared_processes: matches!(bundle.namespace("pid"), Some(Some(_))),
    })
}

/// Kernel parameters of the pod, which are the machine's.
pub(crate) fn sysctls(bundle: &Bundle) -> impl Iterator<Item = (String, String)> {
    let all = bundle.spec["linux"]["sysctl"].as_object();
    all.into_iter()
        .flatten()
        .filter(|(name, _)| !is_of_container(bundle, name))
        .filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
}

/// Whether a kernel parameter is set in the container's own namespaces.
fn is_of_container(bundle: &Bundle, name: &str) -> bool {
    let own = |part: &&str| name.starts_with(part);
    bundle.kind() == Kind::Single && OF_NAMESPACES.iter().any(own)
}

/// A process object, of a container or further one.
pub(crate) fn process(process: &mut Value) -> Result<(), ShimError> {
    let Some(process) = process.as_object_mut() else {
        return Err(refused("process", "is no object"));
    };
    // The guest knows neither. Whoever wants one by name is told that it does not hold there.
    let profile = process.remove("apparmorProfile");
    if let Some(name) = profile.as_ref().and_then(Value::as_str)
        && !DEFAULT_PROFILES.contains(&name)
    {
        log::warn!("apparmorProfile '{name}' does not hold in a guest, which has no AppArmor");
    }
    process.remove("selinuxLabel");
    // Less likely to be killed than the agent, no container is.
    if process.get("oomScoreAdj").and_then(Value::as_i64) < Some(0) {
        process.remove("oomScoreAdj");
    }
    Ok(())
}

fn is_bind(mount: &Value) -> bool {
    mount["type"] == "bind" || options(mount).any(|one| matches!(one, "bind" | "rbind"))
}

fn options(mount: &Value) -> impl Iterator<Item = &str> {
    let all = mount["options"].as_array();
    all.into_iter().flatten().filter_map(Value::as_str)
}

fn mounts(bundle: &Bundle, mounts: &mut Value) -> Result<Vec<(usize, Source)>, ShimError> {
    if mounts.is_null() {
        *mounts = json!([]);
    }
    let mut sources = Vec::new();
    let all = mounts.as_array_mut();
    for (index, mount) in all.into_iter().flatten().enumerate() {
        if !is_bind(mount) {
            continue;
        }
        let field = |rule: &str| {
            let (at, source) = (&mount["destination"], &mount["source"]);
            refused(&format!("mounts: {source} at {at}"), rule)
        };
        // A relative one is the bundle's.
        let source = bundle
            .path
            .join(mount["source"].as_str().unwrap_or_default());
        let (mut kept, mut recursive) = (Vec::new(), false);
        let mut bind = Bind {
            path: source.clone(),
            read_only: false,
            follows: false,
        };
        for option in options(mount) {
            match option {
                "shared" | "rshared" => {
                    return Err(field(
                        "a guest cannot mount for the host (mountPropagation Bidirectional)",
                    ));
                }
                "slave" | "rslave" => bind.follows = true,
                "private" | "rprivate" | "bind" => {}
                "rbind" => recursive = true,
                other => {
                    bind.read_only |= matches!(other, "ro" | "rro");
                    kept.push(other.to_owned());
                }
            }
        }
        if mount.get("uidMappings").is_some() || mount.get("gidMappings").is_some() {
            return Err(field("its users cannot be mapped"));
        }
        let ours = if is_memory_of_pod(bundle, mount["destination"].as_str(), &source) {
            Some(Source::Memory)
        } else if lies_in_kernel(&source) {
            None
        } else if let Some(direct) = direct::find(&source)? {
            Some(Source::Direct(direct))
        } else {
            let what = || format!("mounts: {}", source.display());
            let there = fs::metadata(&source).map_err(during(what()))?;
            let kind = there.file_type();
            if kind.is_block_device() || kind.is_char_device() {
                return Err(field("is a device of the host, which no guest can have"));
            }
            Some(Source::Host(bind, recursive))
        };
        kept.push(if recursive { "rbind" } else { "bind" }.into());
        kept.push("rprivate".into());
        mount["type"] = json!("bind");
        mount["options"] = json!(kept);
        if let Some(source) = ours {
            // The agent knows where it is.
            mount["source"] = json!("");
            sources.push((index, source));
        }
    }
    Ok(sources)
}

fn lies_in_kernel(path: &Path) -> bool {
    let leads_up = path.components().any(|part| part == Component::ParentDir);
    !leads_up && KERNELS.iter().any(|top| path.starts_with(top))
}

/// Whether this is what containerd mounts for the memory that a pod's containers share, for which
/// the guest has some of its own. A volume that somebody wants there is a volume.
fn is_memory_of_pod(bundle: &Bundle, destination: Option<&str>, source: &Path) -> bool {
    let of_pod = Path::new(bundle.annotation(SANDBOX).unwrap_or_default()).join("shm");
    destination == Some("/dev/shm") && bundle.kind() == Kind::Member && source.ends_with(of_pod)
}

/// What a container has of its own in the guest. What belongs to the pod is the machine's.
fn namespaces(bundle: &Bundle) -> Value {
    let mut kinds = vec!["mount", "cgroup"];
    for kind in ["pid", "ipc", "uts"] {
        let own = bundle.namespace(kind) == Some(None);
        // A host name of its own needs a namespace; without one in the configuration it is the pod's.
        if own && !(kind == "uts" && bundle.kind() != Kind::Single) {
            kinds.push(kind);
        }
    }
    kinds
        .into_iter()
        .map(|kind| json!({"type": kind}))
        .collect()
}

fn linux_part(
    bundle: &Bundle,
    linux: &mut Map<String, Value>,
    namespaces: Value,
) -> Result<Vec<Node>, ShimError> {
    for field in ["uidMappings", "gidMappings"] {
        if let Some(list) = linux.remove(field)
            && list.as_array().is_some_and(|list| !list.is_empty())
        {
            let rule = "user namespaces (hostUsers: false) are not there in a guest";
            return Err(refused(&format!("linux.{field}"), rule));
        }
    }
    let resources = linux.remove("resources").unwrap_or_default();
    let devices = linux.remove("devices").unwrap_or_default();
    let nodes = devices::nodes(&devices, &resources["devices"])?;
    let privileged = devices::is_privileged(&resources["devices"]);
    for field in [
        "cgroupsPath",
        "intelRdt",
        "mountLabel",
        "personality",
        "rootfsPropagation",
        "timeOffsets",
    ] {
        linux.remove(field);
    }
    if let Some(sysctl) = linux.get_mut("sysctl").and_then(Value::as_object_mut) {
        sysctl.retain(|name, _| is_of_container(bundle, name));
    }
    if let Some(seccomp) = linux.get_mut("seccomp").and_then(Value::as_object_mut) {
        // Of a program on the host.
        seccomp.remove("listenerPath");
        seccomp.remove("listenerMetadata");
    }
    let mut limits = limits(&resources)?;
    limits["devices"] = match privileged {
        true => json!([{"allow": true, "access": "rwm"}]),
        false => json!([{"allow": false, "access": "rwm"}]),
    };
    linux.insert("resources".into(), limits);
    linux.insert("namespaces".into(), namespaces);
    Ok(nodes)
}

/// What a guest can hold a container to, of `linux.resources`. Negative ones are none, which an
/// update may ask for. CPUs by number are the host's, and devices of blocks are, too.
pub(crate) fn limits(resources: &Value) -> Result<Value, ShimError> {
    let set = |value: &Value| value.as_i64().filter(|number| *number != 0);
    let mut limits = json!({});
    for name in ["shares", "quota", "period"] {
        if let Some(number) = set(&resources["cpu"][name]) {
            limits["cpu"][name] = json!(number);
        }
    }
    if let Some(bytes) = set(&resources["memory"]["limit"]) {
        // Swap included; a guest has none.
        limits["memory"] = json!({"limit": bytes, "swap": bytes});
    }
    if let Some(bytes) = set(&resources["memory"]["reservation"]) {
        limits["memory"]["reservation"] = json!(bytes);
    }
    if let Some(most) = set(&resources["pids"]["limit"]) {
        limits["pids"] = json!({"limit": most});
    }
    let pages = resources["hugepageLimits"].as_array();
    if let Some(page) = pages.into_iter().flatten().find(|page| page["limit"] != 0) {
        let rule = format!(
            "{} of {} are not there in a guest",
            page["limit"], page["pageSize"]
        );
        return Err(refused("linux.resources.hugepageLimits", &rule));
    }
    for (file, value) in resources["unified"].as_object().into_iter().flatten() {
        if !["cpu.", "memory.", "pids."]
            .iter()
            .any(|part| file.starts_with(part))
        {
            let rule = "is no limit that a guest knows: cpu.*, memory.* and pids.* are";
            return Err(refused(&format!("linux.resources.unified: {file}"), rule));
        }
        limits["unified"][file] = value.clone();
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(spec: Value) -> Bundle {
        Bundle {
            path: "/b".into(),
            spec,
        }
    }

    fn member(mut spec: Value) -> Bundle {
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "p",
            "run.oci.handler": "wasm",
        });
        bundle(spec)
    }

    #[test]
    fn what_is_the_hosts_does_not_reach_the_guest() {
        let prepared = prepare(&member(json!({
            "hostname": "h",
            "process": {"args": ["sh"], "apparmorProfile": "x", "oomScoreAdj": -998},
            "linux": {
                "cgroupsPath": "/kubepods/x",
                "sysctl": {"net.core.somaxconn": "5"},
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                    {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "mount"},
                    {"type": "network", "path": "/proc/7/ns/net"},
                ],
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "listenerPath": "/x"},
                "resources": {
                    "devices": [{"allow": false, "access": "rwm"}],
                    "cpu": {"shares": 102, "quota": 50000, "period": 100000, "cpus": "0-3"},
                    "memory": {"limit": 1000}, "pids": {"limit": 5},
                    "hugepageLimits": [],
                },
            },
        })))
        .unwrap();
        assert_eq!(
            prepared.spec,
            json!({
                "ociVersion": "1.0.2",
                "process": {"args": ["sh"]},
                "mounts": [],
                "linux": {
                    "sysctl": {},
                    "namespaces": [{"type": "mount"}, {"type": "cgroup"}, {"type": "pid"}],
                    "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                    "resources": {
                        "cpu": {"shares": 102, "quota": 50000, "period": 100000},
                        "memory": {"limit": 1000, "swap": 1000},
                        "pids": {"limit": 5},
                        "devices": [{"allow": false, "access": "rwm"}],
                    },
                },
            })
        );
    }

    #[test]
    fn bind_mounts_are_named_and_keep_their_places() {
        let here = std::env::temp_dir();
        let prepared = prepare(&member(json!({
            "process": {},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/a", "source": here, "options": ["rbind", "rslave", "ro"]},
                {"destination": "/dev/shm", "type": "bind", "source": "/gone/p/shm", "options": ["rw"]},
                {"destination": "/s", "type": "bind", "source": "/sys/fs", "options": ["bind"]},
            ],
        })))
        .unwrap();
        let bind = Bind {
            path: here.clone(),
            read_only: true,
            follows: true,
        };
        let sources = [(1, Source::Host(bind, true)), (2, Source::Memory)];
        assert_eq!(prepared.sources, sources);
        let mounts = &prepared.spec["mounts"];
        assert_eq!(mounts[0]["source"], "proc");
        assert_eq!(mounts[1]["type"], "bind");
        assert_eq!(mounts[1]["options"], json!(["ro", "rbind", "rprivate"]));
        assert_eq!(mounts[3]["source"], "/sys/fs");

        // Somebody's volume there, and one that is named from the bundle.
        let mut named = member(json!({
            "process": {},
            "mounts": [
                {"destination": "/dev/shm", "type": "bind", "source": here, "options": ["bind"]},
                {"destination": "/r", "type": "bind", "source": "../dev/../tmp", "options": ["bind"]},
            ],
        }));
        named.path = "/usr".into();
        let prepared = prepare(&named).unwrap();
        let path = |index: usize| match &prepared.sources[index].1 {
            Source::Host(bind, false) => bind.path.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(path(0), here);
        assert_eq!(path(1), Path::new("/usr/../dev/../tmp"));
    }

    #[test]
    fn what_no_guest_can_have_is_refused_by_name() {
        for (spec, said) in [
            (
                json!({"process": {}, "hooks": {"prestart": []}}),
                "hooks: are programs of the host",
            ),
            (
                json!({"process": {}, "linux": {"devices": [{"path": "/dev/sda"}]}}),
                "linux.devices: \"/dev/sda\" is the host's",
            ),
            (
                json!({"process": {}, "linux": {"resources": {"hugepageLimits": [
                    {"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 4_194_304},
                ]}}}),
                "linux.resources.hugepageLimits: 4194304 of \"2MB\"",
            ),
            (
                json!({"process": {}, "linux": {"resources": {"unified": {"io.max": "1"}}}}),
                "linux.resources.unified: io.max: is no limit",
            ),
            (json!({}), "process: is missing"),
            (
                json!({"process": {}, "linux": {"uidMappings": [{}]}}),
                "linux.uidMappings: user namespaces",
            ),
            (
                json!({"process": {}, "mounts": [
                    {"destination": "/a", "source": "/tmp", "options": ["rbind", "rshared"]},
                ]}),
                "mounts: \"/tmp\" at \"/a\": a guest cannot mount for the host",
            ),
            (
                json!({"process": {}, "mounts": [
                    {"destination": "/a", "source": "/no/where", "options": ["bind"]},
                ]}),
                "mounts: /no/where: No such file",
            ),
        ] {
            let error = prepare(&bundle(spec)).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }

    #[test]
    fn a_privileged_container_is_so_in_its_guest() {
        let prepared = prepare(&bundle(json!({
            "process": {},
            "hostname": "own",
            "linux": {
                "namespaces": [{"type": "uts"}],
                "devices": [
                    {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                    {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                ],
                "resources": {"devices": [{"allow": true, "access": "rwm"}]},
            },
        })))
        .unwrap();
        let linux = &prepared.spec["linux"];
        assert!(linux.get("devices").is_none());
        assert_eq!(prepared.nodes, []);
        assert_eq!(linux["resources"]["devices"][0]["allow"], true);
        assert_eq!(prepared.spec["hostname"], "own");
        assert_eq!(linux["namespaces"][2], json!({"type": "uts"}));
    }
}
