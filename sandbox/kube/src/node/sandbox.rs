//! What containerd is told of a pod as a whole, and the files that its containers share. Called by
//! `worker`. It computes and does nothing.

use std::fmt::Write as _;

use super::labels;
use super::places::Places;
use super::resources;
use super::spec::{Pod, Profile};
use crate::cri::proto::{
    DNSConfig, Int64Value, NamespaceMode, NamespaceOption, PodSandboxConfig, PortMapping, Protocol,
    SecurityProfile, security_profile,
};

/// What a sandbox's configuration is made of beside the pod.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around<'a> {
    /// The node's name.
    pub(super) node: &'a str,
    pub(super) places: &'a Places,
    /// The cgroup that all pods' are in.
    pub(super) cgroup_parent: &'a str,
    /// The node's resolv.conf.
    pub(super) resolv: &'a str,
}

/// The configuration of the how manieth sandbox of a pod.
pub(super) fn config(pod: &Pod, around: &Around<'_>, attempt: u32) -> PodSandboxConfig {
    let mut config = PodSandboxConfig::new();
    let metadata = config.metadata.mut_or_insert_default();
    metadata.name.clone_from(&pod.metadata.name);
    metadata.namespace.clone_from(&pod.metadata.namespace);
    metadata.uid.clone_from(&pod.metadata.uid);
    metadata.attempt = attempt;
    config.hostname = hostname(pod);
    config.log_directory = around.places.logs(pod).display().to_string();
    config.dns_config = dns(pod, around.resolv).into();
    config.port_mappings = ports(pod);
    config.labels = pod.metadata.labels.clone().into_iter().collect();
    config.labels.extend(own_labels(pod, around.node));
    config.annotations = pod.metadata.annotations.clone().into_iter().collect();
    let linux = config.linux.mut_or_insert_default();
    linux.cgroup_parent = cgroup(around.cgroup_parent, &pod.metadata.uid);
    linux.overhead = resources::overhead(&pod.spec.overhead).into();
    linux.resources = Some(resources::of_pod(pod)).into();
    let sysctls = pod.spec.security_context.sysctls.iter();
    linux.sysctls = sysctls
        .map(|one| (one.name.clone(), one.value.clone()))
        .collect();
    let security = linux.security_context.mut_or_insert_default();
    let said = &pod.spec.security_context;
    security.namespace_options = Some(namespaces(pod)).into();
    security.run_as_user = said.run_as_user.map(number).into();
    security.run_as_group = said.run_as_group.map(number).into();
    security.supplemental_groups = groups(pod);
    security.privileged = pod
        .all_containers()
        .any(|one| one.security_context.privileged);
    security.seccomp = seccomp(said.seccomp_profile.as_ref()).into();
    config
}

/// The labels by which all that is a pod's is found again.
pub(super) fn own_labels(pod: &Pod, node: &str) -> [(String, String); 4] {
    let of = &pod.metadata;
    [
        (labels::NODE.into(), node.into()),
        (labels::POD.into(), of.name.clone()),
        (labels::NAMESPACE.into(), of.namespace.clone()),
        (labels::UID.into(), of.uid.clone()),
    ]
}

/// A number that may be missing.
pub(super) fn number(value: i64) -> Int64Value {
    let mut number = Int64Value::new();
    number.value = value;
    number
}

/// The groups of all its processes beside their own.
pub(super) fn groups(pod: &Pod) -> Vec<i64> {
    let said = &pod.spec.security_context;
    let mut groups = said.supplemental_groups.clone();
    groups.extend(said.fs_group);
    groups
}

/// Which namespaces its processes have.
pub(super) fn namespaces(pod: &Pod) -> NamespaceOption {
    let of_node = |yes| {
        if yes {
            NamespaceMode::NODE
        } else {
            NamespaceMode::POD
        }
    };
    let mut options = NamespaceOption::new();
    options.network = of_node(pod.spec.host_network).into();
    options.ipc = of_node(pod.spec.host_ipc).into();
    options.pid = match (pod.spec.host_pid, pod.spec.share_process_namespace) {
        (true, _) => NamespaceMode::NODE,
        (false, true) => NamespaceMode::POD,
        (false, false) => NamespaceMode::CONTAINER,
    }
    .into();
    options
}

/// Which system calls its processes may make. What else there is was refused when it was admitted.
pub(super) fn seccomp(profile: Option<&Profile>) -> Option<SecurityProfile> {
    use security_profile::ProfileType;
    let kind = match profile?.kind.as_str() {
        "RuntimeDefault" => ProfileType::RuntimeDefault,
        _ => ProfileType::Unconfined,
    };
    let mut profile = SecurityProfile::new();
    profile.profile_type = kind.into();
    Some(profile)
}

/// Its cgroup. Systemd's slices carry all names above them in theirs.
pub(super) fn cgroup(parent: &str, uid: &str) -> String {
    match parent.strip_suffix(".slice") {
        Some(stem) => {
            let stem = stem.rsplit('/').next().unwrap_or(stem);
            format!("{stem}-pod{}.slice", uid.replace('-', "_"))
        }
        None => format!("{}/pod{uid}", parent.trim_end_matches('/')),
    }
}

fn hostname(pod: &Pod) -> String {
    // A pod on the node's network has the node's name, which containerd knows.
    if pod.spec.host_network && pod.spec.hostname.is_none() {
        return String::new();
    }
    let name = pod.spec.hostname.as_ref().unwrap_or(&pod.metadata.name);
    // The kernel takes no more, and it may not end between two parts.
    let short: String = name.chars().take(63).collect();
    short.trim_end_matches(['-', '.']).to_owned()
}

fn ports(pod: &Pod) -> Vec<PortMapping> {
    let mut mappings = Vec::new();
    for port in pod.all_containers().flat_map(|one| &one.ports) {
        if port.host_port == 0 || pod.spec.host_network {
            continue;
        }
        let mut mapping = PortMapping::new();
        mapping.protocol = match port.protocol.as_deref() {
            Some("UDP") => Protocol::UDP,
            Some("SCTP") => Protocol::SCTP,
            _ => Protocol::TCP,
        }
        .into();
        mapping.container_port = port.container_port.into();
        mapping.host_port = port.host_port.into();
        mapping.host_ip.clone_from(&port.host_ip);
        mappings.push(mapping);
    }
    mappings
}

/// How its names are resolved; nothing is the node's way. There is no DNS of a cluster.
fn dns(pod: &Pod, resolv: &str) -> Option<DNSConfig> {
    let own = pod.spec.dns_policy.as_deref() == Some("None");
    let said = pod.spec.dns_config.as_ref();
    if said.is_none() && !own {
        return None;
    }
    let mut config = DNSConfig::new();
    for line in resolv.lines().filter(|_| !own) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(Into::into)),
            // The last line counts.
            Some("search") => config.searches = words.map(Into::into).collect(),
            Some("options") => config.options.extend(words.map(Into::into)),
            _ => {}
        }
    }
    if let Some(said) = said {
        add(&mut config.servers, said.nameservers.iter().cloned());
        add(&mut config.searches, said.searches.iter().cloned());
        for option in &said.options {
            let name = &option.name;
            let of = |known: &String| known.split(':').next() == Some(name);
            config.options.retain(|known| !of(known));
            config.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.clone(),
            });
        }
    }
    Some(config)
}

fn add(to: &mut Vec<String>, more: impl Iterator<Item = String>) {
    for one in more {
        if !to.contains(&one) {
            to.push(one);
        }
    }
}

/// What its containers have in /etc/hosts, on top of `node`'s for a pod on the node's network.
pub(super) fn hosts(pod: &Pod, ips: &[String], node: &str) -> String {
    let mut text = if pod.spec.host_network {
        format!("# Kubernetes-managed hosts file (host network).\n{node}")
    } else {
        let mut text = String::from(
            "# Kubernetes-managed hosts file.\n\
             127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\n\
             fe00::0\tip6-mcastprefix\n\
             fe00::1\tip6-allnodes\n\
             fe00::2\tip6-allrouters\n",
        );
        for ip in ips {
            let _ = writeln!(text, "{ip}\t{}", hostname(pod));
        }
        text
    };
    if !pod.spec.host_aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in &pod.spec.host_aliases {
            let _ = writeln!(text, "{}\t{}", alias.ip, alias.hostnames.join("\t"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    fn pod(spec: Value) -> Pod {
        Pod::read(&json!({
            "metadata": {"name": "web", "namespace": "n", "uid": "1-2", "labels": {"app": "x"},
                "annotations": {"io.pericarp/memory": "512M"}},
            "spec": spec,
        }))
        .unwrap()
    }

    fn of(spec: Value) -> PodSandboxConfig {
        let places = Places::new(Path::new("/state"));
        let around = Around {
            node: "node",
            places: &places,
            cgroup_parent: "/pods",
            resolv: "nameserver 10.0.0.1\nsearch a b\noptions ndots:1 edns0\n",
        };
        config(&pod(spec), &around, 2)
    }

    #[test]
    fn a_pod_is_described() {
        let config = of(json!({
            "containers": [{"name": "c", "securityContext": {"privileged": true},
                "ports": [{"containerPort": 80, "hostPort": 8080, "protocol": "UDP"}, {"containerPort": 81}],
                "resources": {"limits": {"cpu": "2", "memory": "1Gi"}}}],
            "overhead": {"memory": "64Mi"},
            "securityContext": {"fsGroup": 7, "supplementalGroups": [8], "runAsUser": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
                "sysctls": [{"name": "net.x", "value": "1"}]},
        }));
        assert_eq!(config.metadata.attempt, 2);
        assert_eq!(config.hostname, "web");
        assert_eq!(config.log_directory, "/state/logs/n_web_1-2");
        assert_eq!(config.labels[labels::UID], "1-2");
        assert_eq!(
            (
                config.labels[labels::NODE].as_str(),
                config.labels["app"].as_str()
            ),
            ("node", "x")
        );
        assert_eq!(config.annotations["io.pericarp/memory"], "512M");
        assert!(config.dns_config.is_none());
        assert_eq!(config.port_mappings.len(), 1);
        assert_eq!(config.port_mappings[0].protocol, Protocol::UDP.into());
        let linux = &config.linux;
        assert_eq!(linux.cgroup_parent, "/pods/pod1-2");
        assert_eq!(linux.resources.cpu_quota, 200_000);
        assert_eq!(linux.overhead.memory_limit_in_bytes, 64 << 20);
        assert_eq!(linux.sysctls["net.x"], "1");
        let security = &linux.security_context;
        assert!(security.privileged);
        assert_eq!(security.supplemental_groups, [8, 7]);
        assert_eq!(security.run_as_user.value, 1000);
        assert_eq!(
            security.namespace_options.pid,
            NamespaceMode::CONTAINER.into()
        );
    }

    #[test]
    fn names_are_resolved_as_said() {
        let own = of(json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"]}}));
        assert_eq!(own.dns_config.servers, ["1.1.1.1"]);
        assert!(own.dns_config.searches.is_empty());
        let more = of(json!({"dnsConfig": {"nameservers": ["1.1.1.1", "10.0.0.1"],
            "searches": ["c"], "options": [{"name": "ndots", "value": "5"}, {"name": "debug"}]}}));
        let dns = &more.dns_config;
        assert_eq!(dns.servers, ["10.0.0.1", "1.1.1.1"]);
        assert_eq!(dns.searches, ["a", "b", "c"]);
        assert_eq!(dns.options, ["edns0", "ndots:5", "debug"]);
    }

    #[test]
    fn hosts_and_cgroups() {
        let aliases = json!({"hostAliases": [{"ip": "10.9.9.9", "hostnames": ["a", "b"]}]});
        let text = hosts(&pod(aliases), &["10.1.0.2".into()], "");
        assert!(text.contains("10.1.0.2\tweb\n"), "{text}");
        assert!(text.ends_with("HostAliases.\n10.9.9.9\ta\tb\n"), "{text}");
        let of_node = hosts(&pod(json!({"hostNetwork": true})), &[], "1.2.3.4 node\n");
        assert!(of_node.ends_with("1.2.3.4 node\n"), "{of_node}");
        assert_eq!(cgroup("/", "u"), "/podu");
        assert_eq!(cgroup("/a.slice/a-b.slice", "1-2"), "a-b-pod1_2.slice");
    }

    #[test]
    fn namespaces_are_shared_as_said() {
        let options = |spec: Value| {
            let options = namespaces(&pod(spec));
            (options.network, options.pid, options.ipc)
        };
        let (pod, own, node) = (
            NamespaceMode::POD.into(),
            NamespaceMode::CONTAINER.into(),
            NamespaceMode::NODE.into(),
        );
        assert_eq!(options(json!({})), (pod, own, pod));
        assert_eq!(
            options(json!({"shareProcessNamespace": true})),
            (pod, pod, pod)
        );
        let all = json!({"hostNetwork": true, "hostPID": true, "hostIPC": true});
        assert_eq!(options(all), (node, node, node));
    }
}
