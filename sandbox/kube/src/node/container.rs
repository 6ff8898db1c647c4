//! What containerd is told of a container. Called by `worker`. It computes and does nothing.

use std::path::Path;

use super::environment::Environment;
use super::labels;
use super::places::Places;
use super::quantity::Quantity;
use super::resources;
use super::sandbox::{groups, namespaces, number, own_labels, seccomp};
use super::spec::{Container, Pod, VolumeMount};
use crate::cri::proto::{
    ContainerConfig, Image, KeyValue, LinuxContainerSecurityContext, Mount, MountPropagation,
};

/// Where a container leaves its last words unless it says otherwise.
const LAST_WORDS: &str = "/dev/termination-log";
/// What of /proc and /sys containers do not see, and may not change, as a kubelet has it.
const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What a container's configuration is made of beside its manifest.
pub(super) struct Around<'a> {
    /// The node's name.
    pub(super) node: &'a str,
    pub(super) memory: Quantity,
    pub(super) places: &'a Places,
    /// What containerd calls the image.
    pub(super) image: &'a str,
    pub(super) environment: &'a Environment,
    /// What of its volumes is mounted where.
    pub(super) mounts: Vec<Mount>,
}

/// The configuration of the how manieth container of its name.
pub(super) fn config(
    pod: &Pod,
    container: &Container,
    around: Around<'_>,
    attempt: u32,
) -> ContainerConfig {
    let mut config = ContainerConfig::new();
    let metadata = config.metadata.mut_or_insert_default();
    metadata.name.clone_from(&container.name);
    metadata.attempt = attempt;
    config.image.mut_or_insert_default().image = around.image.into();
    let expanded = |words: &[String]| {
        let words = words.iter();
        words.map(|word| around.environment.expand(word)).collect()
    };
    config.command = expanded(&container.command);
    config.args = expanded(&container.args);
    config.working_dir.clone_from(&container.working_dir);
    for (name, value) in around.environment.pairs() {
        let mut pair = KeyValue::new();
        pair.key.clone_from(name);
        pair.value.clone_from(value);
        config.envs.push(pair);
    }
    let uid = &pod.metadata.uid;
    config.mounts = around.mounts;
    // A volume there is the manifest's own way.
    if !config
        .mounts
        .iter()
        .any(|one| one.container_path == "/etc/hosts")
    {
        let hosts = around.places.hosts(uid);
        config.mounts.push(mount(&hosts, "/etc/hosts", false));
    }
    let words = around.places.termination(uid, &container.name, attempt);
    let place = last_words(container);
    config.mounts.push(mount(&words, place, false));
    config.labels.extend(own_labels(pod, around.node));
    let name = container.name.clone();
    config.labels.insert(labels::CONTAINER.into(), name);
    config.annotations.insert(
        "io.kubernetes.container.restartCount".into(),
        attempt.to_string(),
    );
    config.log_path = Places::log_of(&container.name, attempt);
    config.stdin = container.stdin;
    config.stdin_once = container.stdin_once;
    config.tty = container.tty;
    let linux = config.linux.mut_or_insert_default();
    linux.resources = Some(resources::linux(pod, container, around.memory)).into();
    linux.security_context = Some(security(pod, container)).into();
    config
}

/// Where in the container its last words are.
fn last_words(container: &Container) -> &str {
    let said = container.termination_message_path.as_deref();
    said.filter(|path| !path.is_empty()).unwrap_or(LAST_WORDS)
}

fn mount(from: &Path, to: &str, read_only: bool) -> Mount {
    let mut mount = Mount::new();
    mount.host_path = from.display().to_string();
    mount.container_path = to.into();
    mount.readonly = read_only;
    mount
}

/// A volume, or a part of one, in a container.
pub(super) fn volume(from: &Path, said: &VolumeMount, read_only: bool) -> Mount {
    // Kubernetes has it relative to the root, too.
    let to = match said.mount_path.strip_prefix('/') {
        Some(_) => said.mount_path.clone(),
        None => format!("/{}", said.mount_path),
    };
    let mut mount = mount(from, &to, read_only || said.read_only);
    mount.propagation = match said.mount_propagation.as_deref() {
        Some("HostToContainer") => MountPropagation::PROPAGATION_HOST_TO_CONTAINER,
        Some("Bidirectional") => MountPropagation::PROPAGATION_BIDIRECTIONAL,
        _ => MountPropagation::PROPAGATION_PRIVATE,
    }
    .into();
    mount
}

/// The part of a volume that a mount names; empty for all of it.
pub(super) fn sub_path(said: &VolumeMount, environment: &Environment) -> String {
    if said.sub_path_expr.is_empty() {
        said.sub_path.clone()
    } else {
        environment.expand(&said.sub_path_expr)
    }
}

fn security(pod: &Pod, container: &Container) -> LinuxContainerSecurityContext {
    let (all, own) = (&pod.spec.security_context, &container.security_context);
    let mut security = LinuxContainerSecurityContext::new();
    security.privileged = own.privileged;
    security.namespace_options = Some(namespaces(pod)).into();
    security.run_as_user = own.run_as_user.or(all.run_as_user).map(number).into();
    security.run_as_group = own.run_as_group.or(all.run_as_group).map(number).into();
    security.supplemental_groups = groups(pod);
    security.readonly_rootfs = own.read_only_root_filesystem;
    security.no_new_privs = own.allow_privilege_escalation == Some(false);
    let capabilities = security.capabilities.mut_or_insert_default();
    capabilities.add_capabilities = own.capabilities.add.clone();
    capabilities.drop_capabilities = own.capabilities.drop.clone();
    let profile = own
        .seccomp_profile
        .as_ref()
        .or(all.seccomp_profile.as_ref());
    security.seccomp = seccomp(profile).into();
    if !own.privileged {
        security.masked_paths = MASKED.map(Into::into).to_vec();
        security.readonly_paths = READ_ONLY.map(Into::into).to_vec();
    }
    security
}

/// Refuses a container that is to run as somebody but root, and would run as root. In the words
/// of a kubelet.
pub(super) fn check_user(pod: &Pod, container: &Container, image: &Image) -> Result<(), String> {
    let (all, own) = (&pod.spec.security_context, &container.security_context);
    if own.run_as_non_root.or(all.run_as_non_root) != Some(true) {
        return Ok(());
    }
    match own.run_as_user.or(all.run_as_user) {
        Some(0) => Err("container's runAsUser breaks non-root policy".into()),
        Some(_) => Ok(()),
        None => match image.uid.as_ref() {
            Some(uid) if uid.value != 0 => Ok(()),
            None if !image.username.is_empty() => Err(format!(
                "container has runAsNonRoot and image has non-numeric user ({}), cannot verify \
                 user is non-root",
                image.username
            )),
            _ => Err("container has runAsNonRoot and image will run as root".into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(container: Value) -> Pod {
        Pod::read(&json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"containers": [container], "securityContext": {"runAsUser": 5, "runAsNonRoot": true}},
        }))
        .unwrap()
    }

    fn of(container: Value) -> ContainerConfig {
        let pod = pod(container);
        let container = &pod.spec.containers[0];
        let places = Places::new(Path::new("/state"));
        let find = |_, _: &str| None;
        let facts = crate::node::sources::Facts::default();
        let environment =
            crate::node::environment::environment(&pod, container, &facts, &find).unwrap();
        let around = Around {
            node: "node",
            memory: Quantity::whole(1 << 30),
            places: &places,
            image: "sha256:1",
            environment: &environment,
            mounts: Vec::new(),
        };
        config(&pod, container, around, 3)
    }

    #[test]
    fn a_container_is_described() {
        let config = of(json!({
            "name": "c", "command": ["/bin/$(A)"], "args": ["$$(A)", "$(B)"], "tty": true,
            "env": [{"name": "A", "value": "sh"}],
            "resources": {"limits": {"memory": "64Mi"}},
            "securityContext": {"runAsUser": 7, "readOnlyRootFilesystem": true,
                "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
        }));
        assert_eq!(config.command, ["/bin/sh"]);
        assert_eq!(config.args, ["$(A)", "$(B)"]);
        assert_eq!(
            (config.envs[0].key.as_str(), config.envs[0].value.as_str()),
            ("A", "sh")
        );
        assert_eq!(config.log_path, "c/3.log");
        assert_eq!(config.labels[labels::CONTAINER], "c");
        assert_eq!(config.image.image, "sha256:1");
        let mounts: Vec<_> = config
            .mounts
            .iter()
            .map(|one| one.host_path.as_str())
            .collect();
        assert_eq!(
            mounts,
            ["/state/pods/u/etc-hosts", "/state/pods/u/containers/c/3"]
        );
        let security = &config.linux.security_context;
        assert_eq!(security.run_as_user.value, 7);
        assert!(security.readonly_rootfs && security.no_new_privs && config.tty);
        assert_eq!(security.capabilities.drop_capabilities, ["ALL"]);
        assert_eq!(security.masked_paths.len(), MASKED.len());
        assert_eq!(config.linux.resources.memory_limit_in_bytes, 64 << 20);
    }

    #[test]
    fn privileged_containers_see_everything() {
        let config = of(json!({"name": "c", "securityContext": {"privileged": true}}));
        let security = &config.linux.security_context;
        assert!(security.privileged && security.masked_paths.is_empty());
        assert_eq!(security.run_as_user.value, 5);
    }

    #[test]
    fn who_must_not_be_root_is_not() {
        let check = |user: Value, uid: Option<i64>, name: &str| {
            let mut pod = pod(json!({"name": "c", "securityContext": {"runAsUser": user}}));
            pod.spec.security_context.run_as_user = None;
            let mut image = Image::new();
            image.uid = uid.map(number).into();
            image.username = name.into();
            check_user(&pod, &pod.spec.containers[0], &image)
        };
        assert!(check(json!(1), None, "").is_ok());
        assert!(check(json!(0), Some(5), "").is_err());
        assert!(check(json!(null), Some(5), "").is_ok());
        assert!(
            check(json!(null), Some(0), "")
                .unwrap_err()
                .ends_with("run as root")
        );
        assert!(check(json!(null), None, "").is_err());
        assert!(
            check(json!(null), None, "ada")
                .unwrap_err()
                .contains("non-numeric user (ada)")
        );
    }

    #[test]
    fn parts_of_volumes_are_named() {
        let environment = Environment::default();
        let mut said = VolumeMount {
            mount_path: "data".into(),
            sub_path: "a".into(),
            read_only: true,
            ..VolumeMount::default()
        };
        assert_eq!(sub_path(&said, &environment), "a");
        said.sub_path_expr = "$(X)/b".into();
        assert_eq!(sub_path(&said, &environment), "$(X)/b");
        let mount = volume(Path::new("/v"), &said, false);
        assert_eq!(
            (mount.container_path.as_str(), mount.readonly),
            ("/data", true)
        );
    }
}
