//! What containerd is told: its own configuration, and the smallest of a pod's and a container's,
//! which tests add to. Called by `node` and by tests.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use protobuf::MessageField;
use serde_json::json;

use super::proto::{ContainerConfig, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig};
use crate::parts::{Part, beside_us};

/// The image that containers run: busybox, and the user ada.
pub const IMAGE: &str = "localhost/tools:1";
/// The name that the article's manifests have for theirs. It is the same image.
pub const ARTICLES_IMAGE: &str = "mcr.microsoft.com/aks/fundamental/base-ubuntu:v0.0.11";
/// The image of the container that holds a pod's namespaces.
pub const PAUSE: &str = "localhost/pause:1";
/// The annotation that has a pod's machine be small.
pub const SMALL: (&str, &str) = ("io.pericarp/memory", "256M");
/// The network's name, which the directory of its addresses has, too.
pub const NETWORK: &str = "pods";
/// The node's own address on it.
pub const GATEWAY: &str = "10.88.0.1";

/// What runs pods whose runtime class names it.
#[derive(Clone, Debug)]
pub struct Handler {
    /// What a pod names it by.
    pub name: String,
    /// From which containerd makes the name of the shim's program.
    pub runtime_type: String,
    /// Where that program is, where it is not in the system's directories.
    pub programs: Option<PathBuf>,
    /// Patterns of the annotations of pods that the shim gets to see.
    pub pod_annotations: Vec<String>,
    /// The shim's own configuration, where it reads one.
    pub config: Option<&'static str>,
}

impl Handler {
    /// Debian's runc, under this name.
    pub fn runc(name: &str) -> Self {
        Self {
            name: name.into(),
            runtime_type: "io.containerd.runc.v2".into(),
            programs: None,
            pod_annotations: Vec::new(),
            config: None,
        }
    }

    /// Ours, with the programs that are beside the one that runs.
    pub fn pericarp() -> Self {
        Self {
            name: "pericarp".into(),
            runtime_type: "io.containerd.pericarp.v2".into(),
            programs: Some(beside_us()),
            pod_annotations: Vec::new(),
            config: Some(
                "[profiles.pericarp]\nannotations = [\"memory\", \"vcpus\", \"volume-iops\", \
                 \"volume-bandwidth\", \"volume-size-limit\"]\n\
                 # On an emulated CPU, and many at once.\nboot-timeout = 200\n",
            ),
        }
    }

    /// What [`Handler::pericarp`] takes besides a node.
    pub const PARTS: [Part; 7] = [
        Part::Ours("containerd-shim-pericarp-v2"),
        Part::Ours("pericarp-vmm"),
        Part::PERICARP_BLOCK,
        Part::PERICARP_FS,
        Part::PERICARP_NET,
        Part::PERICARP_VSOCK,
        Part::QemuSystem,
    ];

    /// Where its configuration is on a node that keeps everything in `dir`.
    pub(super) fn config_file(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.toml", self.name))
    }
}

/// The configuration of a containerd that keeps everything in `dir`, or in `/run`.
pub(super) fn containerd(dir: &Path, snapshotter: &str, handlers: &[Handler]) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    let (root, socket, opt, cni) = (path("root"), path("c.sock"), path("opt"), path("cni"));
    let mut text = format!(
        r#"version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{opt}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# Without CAP_SYS_RESOURCE nobody may lower the score of an out-of-memory kill.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{cni}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
"#
    );
    // Ours is added as an operator adds it.
    for handler in handlers.iter().filter(|one| one.config.is_none()) {
        // The form of a JSON array of strings is TOML's.
        let _ = write!(
            text,
            r#"[plugins."io.containerd.grpc.v1.cri".containerd.runtimes."{}"]
runtime_type = "{}"
pod_annotations = {}
"#,
            handler.name,
            handler.runtime_type,
            json!(handler.pod_annotations)
        );
    }
    text
}

/// The network of pods: a pair of interfaces for each, and the node as their router.
pub(super) fn network(dir: &Path) -> String {
    let ipam = json!({
        "type": "host-local",
        "dataDir": dir.join("addresses"),
        "ranges": [[{"subnet": "10.88.0.0/24", "gateway": GATEWAY}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    });
    let plugins = json!([{"type": "ptp", "mtu": 1400, "ipam": ipam}]);
    json!({"cniVersion": "0.4.0", "name": NETWORK, "plugins": plugins}).to_string()
}

/// A pod of this name. [`super::Node::run_pod`] adds where its logs and its cgroups are.
pub fn pod(name: &str) -> PodSandboxConfig {
    let mut config = PodSandboxConfig::new();
    let metadata = config.metadata.mut_or_insert_default();
    metadata.name = name.into();
    metadata.namespace = "default".into();
    metadata.uid = format!("{name}-uid");
    config.hostname = name.into();
    config.labels.insert("app".into(), name.into());
    // A handler that makes machines has room for more of them so.
    config.annotations.insert(SMALL.0.into(), SMALL.1.into());
    // Else containerd would copy the machine's own.
    let dns = config.dns_config.mut_or_insert_default();
    dns.servers = vec![GATEWAY.into()];
    dns.searches = vec!["pods.test".into()];
    let linux = config.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    own_processes(&mut security.namespace_options);
    config
}

/// A container of this name that runs a command of the image.
pub fn container(name: &str, command: &[&str]) -> ContainerConfig {
    let mut config = ContainerConfig::new();
    config.metadata.mut_or_insert_default().name = name.into();
    config.image.mut_or_insert_default().image = IMAGE.into();
    config.command = command.iter().map(|word| (*word).to_owned()).collect();
    config.log_path = format!("{name}-0.log");
    let linux = config.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    own_processes(&mut security.namespace_options);
    config
}

/// A directory or file of the host's that a container has at this path.
pub fn mount(from: &Path, to: &str, readonly: bool) -> Mount {
    let mut mount = Mount::new();
    mount.host_path = from.display().to_string();
    mount.container_path = to.into();
    mount.readonly = readonly;
    mount
}

/// What a kubelet asks for unless the pod has `shareProcessNamespace`; CRI's own default is that.
fn own_processes(options: &mut MessageField<NamespaceOption>) {
    options.mut_or_insert_default().pid = NamespaceMode::CONTAINER.into();
}
