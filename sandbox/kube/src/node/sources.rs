//! What containers are told of their pod, and of ConfigMaps and Secrets. Called by `environment`
//! and `volumes`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;

use super::base64;
use super::quantity::Quantity;
use super::spec::{Container, Pod, ResourceFieldRef, Texts};
use crate::store::Kind;

/// Why something that a container is to be told is not known. In the words of a kubelet, since
/// people search for them.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(super) enum SourceError {
    /// The object is not there.
    #[error("{kind} \"{name}\" not found")]
    NotFound { kind: &'static str, name: String },
    /// The object does not have this key.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    NoKey {
        key: String,
        kind: &'static str,
        namespace: String,
        name: String,
    },
    /// A volume wants a key that is not there.
    #[error("{kind} references non-existent key: {key}")]
    NoItem { key: String, kind: &'static str },
    /// What the pod does not have, or does not have there.
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    /// A resource that is none of a container's.
    #[error("unsupported container resource: {0}")]
    Resource(String),
    /// The container that a resource is of.
    #[error("container {0} not found")]
    Container(String),
}

/// Finds a ConfigMap or a Secret in the pod's namespace.
pub(super) type Lookup<'a> = dyn Fn(Kind, &str) -> Option<Arc<Value>> + 'a;

/// What is known of where the pod runs.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// The node's name.
    pub(super) node: String,
    /// The node's address.
    pub(super) host_ip: String,
    /// The pod's addresses, none before it has its network.
    pub(super) pod_ips: Vec<String>,
    /// The node's CPUs, the limit of a container that has none.
    pub(super) cpu: Quantity,
    /// The same of memory.
    pub(super) memory: Quantity,
}

/// What a ConfigMap or a Secret has, by key.
pub(super) type Data = BTreeMap<String, Vec<u8>>;

/// What a ConfigMap has.
pub(super) fn config_map(find: &Lookup<'_>, name: &str) -> Result<Data, SourceError> {
    let kind = "configmap";
    let object = object(find, Kind::ConfigMap, kind, name)?;
    let mut data = Data::new();
    for (key, value) in entries(&object, "data") {
        data.insert(key.clone(), value.as_bytes().to_vec());
    }
    decoded(&object, "binaryData", &mut data);
    Ok(data)
}

/// What a Secret has.
pub(super) fn secret(find: &Lookup<'_>, name: &str) -> Result<Data, SourceError> {
    let object = object(find, Kind::Secret, "secret", name)?;
    let mut data = Data::new();
    decoded(&object, "data", &mut data);
    Ok(data)
}

fn object(
    find: &Lookup<'_>,
    of: Kind,
    kind: &'static str,
    name: &str,
) -> Result<Arc<Value>, SourceError> {
    let name = name.to_owned();
    find(of, &name).ok_or(SourceError::NotFound { kind, name })
}

fn entries<'o>(object: &'o Value, field: &str) -> impl Iterator<Item = (&'o String, &'o str)> {
    let entries = object.get(field).and_then(Value::as_object);
    entries
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key, value.as_str()?)))
}

fn decoded(object: &Value, field: &str, data: &mut Data) {
    for (key, value) in entries(object, field) {
        // What is no such text was refused when it was admitted.
        data.insert(key.clone(), base64::decode(value).unwrap_or_default());
    }
}

/// What the pod says in this field, as an environment variable or a file has it.
pub(super) fn field(pod: &Pod, facts: &Facts, path: &str) -> Result<String, SourceError> {
    let metadata = &pod.metadata;
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => &metadata.labels,
            "metadata.annotations" => &metadata.annotations,
            _ => return Err(SourceError::Field(path.into())),
        };
        return Ok(map.get(key).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => metadata.name.clone(),
        "metadata.namespace" => metadata.namespace.clone(),
        "metadata.uid" => metadata.uid.clone(),
        "metadata.labels" => lines(&metadata.labels),
        "metadata.annotations" => lines(&metadata.annotations),
        "spec.nodeName" => facts.node.clone(),
        "spec.serviceAccountName" => {
            let name = pod.spec.service_account_name.clone();
            name.unwrap_or_else(|| "default".into())
        }
        "status.hostIP" | "status.hostIPs" => facts.host_ip.clone(),
        "status.podIP" => facts.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => facts.pod_ips.join(","),
        _ => return Err(SourceError::Field(path.into())),
    })
}

/// `metadata.labels['key']`, taken apart.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, key) = path.split_once('[')?;
    let key = key.strip_suffix(']')?;
    let quoted = |quote: char| key.strip_prefix(quote)?.strip_suffix(quote);
    Some((map, quoted('\'').or_else(|| quoted('"'))?))
}

/// One line for each, with the value as a string of Go's.
fn lines(texts: &Texts) -> String {
    let mut lines = String::new();
    for (key, value) in texts {
        // The two languages write strings alike but for what is not printable.
        let _ = writeln!(lines, "{key}={value:?}");
    }
    lines.pop();
    lines
}

/// What a container may use, or asks for, in units of the divisor.
pub(super) fn resource(
    pod: &Pod,
    container: &Container,
    facts: &Facts,
    of: &ResourceFieldRef,
) -> Result<String, SourceError> {
    let container = match of.container_name.as_deref() {
        None | Some("") => container,
        Some(name) => {
            let mut all = pod.all_containers();
            let found = all.find(|one| one.name == name);
            found.ok_or_else(|| SourceError::Container(name.into()))?
        }
    };
    let unknown = || SourceError::Resource(of.resource.clone());
    let (kind, name) = of.resource.split_once('.').ok_or_else(unknown)?;
    let most = match name {
        "cpu" => facts.cpu,
        "memory" => facts.memory,
        "ephemeral-storage" => Quantity::default(),
        _ => return Err(unknown()),
    };
    let limit = container.resources.limits.get(name).copied();
    let amount = match kind {
        "limits" => limit.unwrap_or(most),
        // A container that says its limit only asks for that.
        "requests" => {
            let asked = container.resources.requests.get(name).copied();
            asked.or(limit).unwrap_or_default()
        }
        _ => return Err(unknown()),
    };
    let divisor = of.divisor.filter(|divisor| !divisor.is_zero());
    let parts = amount.divided(divisor.unwrap_or(Quantity::whole(1)));
    Ok(parts.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod() -> Pod {
        Pod::read(&json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u",
                "labels": {"app": "x", "b": "two\nlines"}, "annotations": {"a/b": "c"}},
            "spec": {"containers": [{"name": "c", "resources": {
                "limits": {"memory": "64Mi", "cpu": "1500m"}, "requests": {"cpu": "250m"}}}]},
        }))
        .unwrap()
    }

    #[test]
    fn fields_of_the_pod() {
        let facts = Facts {
            node: "node".into(),
            host_ip: "10.0.0.1".into(),
            pod_ips: vec!["10.1.0.2".into(), "fd00::2".into()],
            ..Facts::default()
        };
        let field = |path: &str| field(&pod(), &facts, path);
        assert_eq!(field("metadata.name").unwrap(), "p");
        assert_eq!(field("metadata.labels['app']").unwrap(), "x");
        assert_eq!(field("metadata.annotations['a/b']").unwrap(), "c");
        assert_eq!(field("metadata.labels['none']").unwrap(), "");
        assert_eq!(
            field("metadata.labels").unwrap(),
            "app=\"x\"\nb=\"two\\nlines\""
        );
        assert_eq!(field("spec.nodeName").unwrap(), "node");
        assert_eq!(field("spec.serviceAccountName").unwrap(), "default");
        assert_eq!(field("status.podIP").unwrap(), "10.1.0.2");
        assert_eq!(field("status.podIPs").unwrap(), "10.1.0.2,fd00::2");
        assert_eq!(
            field("status.phase"),
            Err(SourceError::Field("status.phase".into()))
        );
    }

    #[test]
    fn resources_of_a_container() {
        let facts = Facts {
            cpu: Quantity::whole(4),
            memory: Quantity::whole(1 << 30),
            ..Facts::default()
        };
        let pod = pod();
        let resource = |resource: &str, divisor: Option<&str>| {
            let of = ResourceFieldRef {
                resource: resource.into(),
                divisor: divisor.map(|text| text.parse().unwrap()),
                ..ResourceFieldRef::default()
            };
            super::resource(&pod, &pod.spec.containers[0], &facts, &of)
        };
        assert_eq!(resource("limits.cpu", None).unwrap(), "2");
        assert_eq!(resource("limits.cpu", Some("1m")).unwrap(), "1500");
        assert_eq!(resource("requests.cpu", Some("1m")).unwrap(), "250");
        assert_eq!(resource("limits.memory", Some("1Mi")).unwrap(), "64");
        assert_eq!(resource("requests.memory", Some("1Mi")).unwrap(), "64");
        assert!(resource("limits.gpu", None).is_err());
    }

    #[test]
    fn data_of_maps_and_secrets() {
        let find = |kind: Kind, name: &str| -> Option<Arc<Value>> {
            (name == "there").then(|| {
                Arc::new(match kind {
                    Kind::Secret => json!({"data": {"k": "dg=="}}),
                    _ => json!({"data": {"k": "v"}, "binaryData": {"b": "//8="}}),
                })
            })
        };
        assert_eq!(secret(&find, "there").unwrap()["k"], b"v");
        assert_eq!(config_map(&find, "there").unwrap()["b"], [0xff, 0xff]);
        let error = secret(&find, "none").unwrap_err();
        assert_eq!(error.to_string(), "secret \"none\" not found");
    }
}
