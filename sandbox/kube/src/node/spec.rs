//! The part of a Pod that this node acts on, as types. Called by everything in `node`.
//!
//! What a Pod may say at all was checked when it was admitted (`fields` has the list); here are
//! the meanings. Fields that are not here change nothing that a node does.

use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

use super::quantity::Quantity;

/// Text by name, as labels, annotations and data are.
pub(super) type Texts = BTreeMap<String, String>;

macro_rules! part {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Deserialize, PartialEq)]
        #[serde(rename_all = "camelCase", default)]
        pub(super) struct $name { $($(#[$field_doc])* pub(super) $field: $kind,)* }
    };
}

part!(
    /// A Pod.
    Pod {
        metadata: Metadata,
        spec: Spec,
    }
);
part!(Metadata {
    name: String,
    namespace: String,
    uid: String,
    labels: Texts,
    annotations: Texts,
    deletion_timestamp: Option<String>,
    deletion_grace_period_seconds: Option<i64>,
});
part!(Spec {
    containers: Vec<Container>,
    init_containers: Vec<Container>,
    volumes: Vec<Volume>,
    restart_policy: RestartPolicy,
    runtime_class_name: Option<String>,
    overhead: BTreeMap<String, Quantity>,
    termination_grace_period_seconds: Option<i64>,
    active_deadline_seconds: Option<i64>,
    hostname: Option<String>,
    host_aliases: Vec<HostAlias>,
    dns_policy: Option<String>,
    dns_config: Option<DnsConfig>,
    host_network: bool,
    #[serde(rename = "hostPID")]
    host_pid: bool,
    #[serde(rename = "hostIPC")]
    host_ipc: bool,
    share_process_namespace: bool,
    security_context: PodSecurity,
    node_name: Option<String>,
    service_account_name: Option<String>,
    image_pull_secrets: Vec<Reference>,
});

/// What becomes of a container that has ended.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub(super) enum RestartPolicy {
    /// It is started again.
    #[default]
    Always,
    /// It is when it failed.
    OnFailure,
    /// Nothing.
    Never,
}

part!(
    /// The name of another object in the Pod's namespace.
    Reference { name: String, }
);
part!(HostAlias {
    ip: String,
    hostnames: Vec<String>,
});
part!(DnsConfig {
    nameservers: Vec<String>,
    searches: Vec<String>,
    options: Vec<DnsOption>,
});
part!(DnsOption {
    name: String,
    value: Option<String>,
});
part!(PodSecurity {
    run_as_user: Option<i64>,
    run_as_group: Option<i64>,
    run_as_non_root: Option<bool>,
    supplemental_groups: Vec<i64>,
    fs_group: Option<i64>,
    sysctls: Vec<NameValue>,
    seccomp_profile: Option<Profile>,
});
part!(NameValue {
    name: String,
    value: String,
});
part!(Profile {
    #[serde(rename = "type")]
    kind: String,
});
part!(Container {
    name: String,
    image: String,
    image_pull_policy: Option<String>,
    command: Vec<String>,
    args: Vec<String>,
    working_dir: String,
    env: Vec<EnvVar>,
    env_from: Vec<EnvFrom>,
    ports: Vec<Port>,
    resources: Resources,
    volume_mounts: Vec<VolumeMount>,
    security_context: Security,
    restart_policy: Option<String>,
    stdin: bool,
    stdin_once: bool,
    tty: bool,
    termination_message_path: Option<String>,
    termination_message_policy: Option<String>,
    liveness_probe: Option<Probe>,
    readiness_probe: Option<Probe>,
    startup_probe: Option<Probe>,
    lifecycle: Lifecycle,
});
part!(Lifecycle {
    post_start: Option<Handler>,
    pre_stop: Option<Handler>,
});
part!(
    /// One way to ask or tell a container something. One of its fields is there.
    Handler {
        exec: Option<ExecAction>,
        http_get: Option<HttpGet>,
        tcp_socket: Option<TcpSocket>,
        sleep: Option<Sleep>,
    }
);
part!(Sleep { seconds: i64 });
part!(ExecAction { command: Vec<String>, });
part!(HttpGet {
    path: Option<String>,
    port: PortName,
    host: Option<String>,
    scheme: Option<String>,
    http_headers: Vec<NameValue>,
});
part!(TcpSocket {
    port: PortName,
    host: Option<String>,
});

/// A port, by number or by the name that the container gives it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
pub(super) enum PortName {
    /// Its number.
    Number(u16),
    /// Its name; digits are a number, too.
    Name(String),
}

impl Default for PortName {
    fn default() -> Self {
        Self::Number(0)
    }
}

part!(Probe {
    #[serde(flatten)]
    handler: Handler,
    initial_delay_seconds: Option<u32>,
    timeout_seconds: Option<u32>,
    period_seconds: Option<u32>,
    success_threshold: Option<u32>,
    failure_threshold: Option<u32>,
    termination_grace_period_seconds: Option<i64>,
});
part!(Port {
    name: Option<String>,
    container_port: u16,
    host_port: u16,
    #[serde(rename = "hostIP")]
    host_ip: String,
    protocol: Option<String>,
});
part!(Resources {
    limits: BTreeMap<String, Quantity>,
    requests: BTreeMap<String, Quantity>,
});
part!(Security {
    run_as_user: Option<i64>,
    run_as_group: Option<i64>,
    run_as_non_root: Option<bool>,
    privileged: bool,
    read_only_root_filesystem: bool,
    allow_privilege_escalation: Option<bool>,
    capabilities: Capabilities,
    seccomp_profile: Option<Profile>,
});
part!(Capabilities {
    add: Vec<String>,
    drop: Vec<String>,
});
part!(EnvVar {
    name: String,
    value: Option<String>,
    value_from: Option<ValueFrom>,
});
part!(ValueFrom {
    field_ref: Option<FieldRef>,
    resource_field_ref: Option<ResourceFieldRef>,
    config_map_key_ref: Option<KeyRef>,
    secret_key_ref: Option<KeyRef>,
});
part!(FieldRef { field_path: String });
part!(ResourceFieldRef {
    container_name: Option<String>,
    resource: String,
    divisor: Option<Quantity>,
});
part!(KeyRef {
    name: String,
    key: String,
    optional: bool,
});
part!(EnvFrom {
    prefix: String,
    config_map_ref: Option<WholeRef>,
    secret_ref: Option<WholeRef>,
});
part!(WholeRef {
    name: String,
    optional: bool,
});
part!(VolumeMount {
    name: String,
    mount_path: String,
    read_only: bool,
    sub_path: String,
    sub_path_expr: String,
    mount_propagation: Option<String>,
});
part!(
    /// A volume. One of its sources is there; none is an emptyDir.
    Volume {
        name: String,
        empty_dir: Option<EmptyDir>,
        host_path: Option<HostPath>,
        config_map: Option<ConfigMapSource>,
        secret: Option<SecretSource>,
        projected: Option<Projected>,
        #[serde(rename = "downwardAPI")]
        downward_api: Option<DownwardSource>,
    }
);
part!(EmptyDir {
    medium: String,
    size_limit: Option<Quantity>,
});
part!(HostPath {
    path: String,
    #[serde(rename = "type")]
    kind: Option<String>,
});
part!(ConfigMapSource {
    name: String,
    items: Option<Vec<KeyToPath>>,
    default_mode: Option<u32>,
    optional: bool,
});
part!(SecretSource {
    secret_name: String,
    items: Option<Vec<KeyToPath>>,
    default_mode: Option<u32>,
    optional: bool,
});
part!(KeyToPath {
    key: String,
    path: String,
    mode: Option<u32>,
});
part!(DownwardSource {
    items: Vec<DownwardItem>,
    default_mode: Option<u32>,
});
part!(DownwardItem {
    path: String,
    field_ref: Option<FieldRef>,
    resource_field_ref: Option<ResourceFieldRef>,
    mode: Option<u32>,
});
part!(Projected {
    sources: Vec<Projection>,
    default_mode: Option<u32>,
});
part!(Projection {
    config_map: Option<ProjectedMap>,
    secret: Option<ProjectedMap>,
    #[serde(rename = "downwardAPI")]
    downward_api: Option<DownwardSource>,
});
part!(ProjectedMap {
    name: String,
    items: Option<Vec<KeyToPath>>,
    optional: bool,
});

impl Pod {
    /// Reads one. The error names what is not as it has to be.
    pub(super) fn read(pod: &Value) -> Result<Self, serde_json::Error> {
        Self::deserialize(without_nulls(pod.clone()))
    }

    /// How events and messages name it.
    pub(super) fn full_name(&self) -> String {
        let Metadata {
            name,
            namespace,
            uid,
            ..
        } = &self.metadata;
        format!("{name}_{namespace}({uid})")
    }

    /// Its containers with those that come first.
    pub(super) fn all_containers(&self) -> impl Iterator<Item = &Container> {
        let first = self.spec.init_containers.iter();
        first.chain(&self.spec.containers)
    }

    /// How long its containers have when the pod is taken away.
    pub(super) fn grace(&self) -> u32 {
        let said = self.metadata.deletion_grace_period_seconds;
        seconds(said.or(self.spec.termination_grace_period_seconds))
    }
}

/// A null is a field that is not there.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
            fields
                .map(|(name, value)| (name, without_nulls(value)))
                .collect()
        }
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

/// A grace period; 30 seconds where nothing is said.
pub(super) fn seconds(said: Option<i64>) -> u32 {
    let seconds = said.unwrap_or(30).max(0);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

impl Container {
    /// Whether it is one that runs beside the others, of those that come first.
    pub(super) fn is_sidecar(&self) -> bool {
        self.restart_policy.as_deref() == Some("Always")
    }

    /// The number of a port that is given by number or name.
    pub(super) fn port(&self, port: &PortName) -> Option<u16> {
        match port {
            PortName::Number(number) => Some(*number),
            PortName::Name(name) => {
                let named = self.ports.iter();
                named
                    .filter(|one| one.name.as_deref() == Some(name))
                    .map(|one| one.container_port)
                    .next()
                    .or_else(|| name.parse().ok())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_is_read_and_what_is_not_known_is_let_be() {
        let pod = Pod::read(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "namespace": "b", "uid": "c", "labels": {"x": "y"}},
            "spec": {
                "restartPolicy": "OnFailure", "hostPID": true, "more": 1,
                "initContainers": [{"name": "i", "restartPolicy": "Always"}],
                "containers": [{
                    "name": "m", "image": "i",
                    "ports": [{"name": "web", "containerPort": 8080}],
                    "resources": {"limits": {"cpu": 1, "memory": "1Gi"}},
                    "livenessProbe": {"httpGet": {"port": "web"}, "periodSeconds": 3},
                }],
                "volumes": [{"name": "v", "downwardAPI": {"items": []}}],
            },
        }))
        .unwrap();
        assert_eq!(pod.full_name(), "a_b(c)");
        assert_eq!(pod.spec.restart_policy, RestartPolicy::OnFailure);
        assert!(pod.spec.host_pid && pod.spec.init_containers[0].is_sidecar());
        let main = &pod.spec.containers[0];
        let probe = main.liveness_probe.as_ref().unwrap();
        assert_eq!(probe.period_seconds, Some(3));
        let get = probe.handler.http_get.as_ref().unwrap();
        assert_eq!(main.port(&get.port), Some(8080));
        assert_eq!(main.port(&PortName::Name("81".into())), Some(81));
        assert_eq!(main.port(&PortName::Name("none".into())), None);
        assert!(pod.spec.volumes[0].downward_api.is_some());
        assert_eq!(pod.grace(), 30);
        assert!(Pod::read(&json!({"spec": {"restartPolicy": "Sometimes"}})).is_err());
    }
}
