//! A container's bundle: its OCI runtime configuration, and what that says of the pod.
//!
//! Read by `start`, to find the pod's shim, and by `service`, to make the container. What no guest
//! can have of the host is refused here, each in one line that names the field.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::error::{ShimError, during};

const TYPE: &str = "io.kubernetes.cri.container-type";
pub(crate) const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const POD_NAME: &str = "io.kubernetes.cri.sandbox-name";
const POD_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The pod itself: its machine. What containerd calls the pause container is not run.
    Sandbox,
    /// One of a pod.
    Member,
    /// Both: nobody has said that it belongs to a pod.
    Single,
}

#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) path: PathBuf,
    pub(crate) spec: Value,
}

impl Bundle {
    pub(crate) fn read(path: &Path) -> Result<Self, ShimError> {
        let file = path.join("config.json");
        let text = fs::read(&file).map_err(during(file.display()))?;
        let spec: Value = serde_json::from_slice(&text).map_err(|error| {
            ShimError::Invalid(format!("{}: is no configuration: {error}", file.display()))
        })?;
        Ok(Self {
            path: path.to_owned(),
            spec,
        })
    }

    pub(crate) fn annotation(&self, key: &str) -> Option<&str> {
        self.spec["annotations"][key].as_str()
    }

    pub(crate) fn kind(&self) -> Kind {
        match (self.annotation(TYPE), self.annotation(SANDBOX)) {
            (Some("sandbox"), _) => Kind::Sandbox,
            (Some("container"), Some(_)) => Kind::Member,
            _ => Kind::Single,
        }
    }

    /// The pod of the container with this id.
    pub(crate) fn pod_id(&self, id: &str) -> String {
        match (self.kind(), self.annotation(SANDBOX)) {
            (Kind::Member, Some(pod)) => pod.to_owned(),
            _ => id.to_owned(),
        }
    }

    /// What Kubernetes calls the pod of the container with this id, `namespace/name`; the id where
    /// nobody says it.
    pub(crate) fn pod_name(&self, id: &str) -> String {
        match (self.annotation(POD_NAMESPACE), self.annotation(POD_NAME)) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => self.pod_id(id),
        }
    }

    /// Kubernetes' number of the pod; empty where nobody says it.
    pub(crate) fn pod_uid(&self) -> &str {
        self.annotation(POD_UID).unwrap_or_default()
    }

    /// A namespace of the configuration: none at all, one of its own, or the one at a path.
    pub(crate) fn namespace(&self, kind: &str) -> Option<Option<&str>> {
        let all = self.spec["linux"]["namespaces"].as_array()?;
        let found = all.iter().find(|one| one["type"] == kind)?;
        Some(found["path"].as_str().filter(|path| !path.is_empty()))
    }

    /// Where the pod's network is; none for one with a loopback interface alone.
    pub(crate) fn network(&self) -> Result<Option<PathBuf>, ShimError> {
        match self.namespace("network") {
            None => Err(refused(
                "linux.namespaces",
                "has no network, so that the host's is asked for (hostNetwork), which no guest \
                 can have",
            )),
            Some(path) => Ok(path.map(PathBuf::from)),
        }
    }

    /// Its control group on the host, as it is named there.
    pub(crate) fn cgroup(&self) -> &str {
        self.spec["linux"]["cgroupsPath"]
            .as_str()
            .unwrap_or_default()
    }

    /// Refuses what a pod cannot have of the host.
    pub(crate) fn check_pod(&self) -> Result<(), ShimError> {
        for (kind, field) in [("pid", "hostPID"), ("ipc", "hostIPC")] {
            if self.namespace(kind).is_none() {
                let rule = format!(
                    "has no {kind}, so that the host's is asked for ({field}), which no guest can \
                     have"
                );
                return Err(refused("linux.namespaces", &rule));
            }
        }
        Ok(())
    }
}

/// One line for what no guest can have.
pub(crate) fn refused(field: &str, rule: &str) -> ShimError {
    ShimError::Invalid(format!("{field}: {rule}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bundle(spec: Value) -> Bundle {
        Bundle {
            path: "/b".into(),
            spec,
        }
    }

    #[test]
    fn annotations_say_what_a_container_is() {
        let with = |annotations: Value| bundle(json!({ "annotations": annotations }));
        let sandbox = with(json!({TYPE: "sandbox", SANDBOX: "p"}));
        assert_eq!(
            (sandbox.kind(), sandbox.pod_id("p")),
            (Kind::Sandbox, "p".into())
        );
        let member = with(json!({TYPE: "container", SANDBOX: "p"}));
        assert_eq!(
            (member.kind(), member.pod_id("c")),
            (Kind::Member, "p".into())
        );
        let single = bundle(json!({}));
        assert_eq!(
            (single.kind(), single.pod_id("c")),
            (Kind::Single, "c".into())
        );
        assert_eq!(single.pod_name("c"), "c");
        let named = with(json!({POD_NAMESPACE: "default", POD_NAME: "web"}));
        assert_eq!(named.pod_name("c"), "default/web");
    }

    #[test]
    fn what_is_the_hosts_is_refused_by_name() {
        let with = |namespaces: Value| bundle(json!({"linux": {"namespaces": namespaces}}));
        let all = with(json!([{"type": "pid"}, {"type": "ipc"},
            {"type": "network", "path": "/run/netns/a"}]));
        all.check_pod().unwrap();
        assert_eq!(all.network().unwrap().unwrap(), Path::new("/run/netns/a"));
        assert_eq!(with(json!([{"type": "network"}])).network().unwrap(), None);
        let none = with(json!([{"type": "ipc"}]));
        assert!(
            none.network()
                .unwrap_err()
                .to_string()
                .contains("(hostNetwork)")
        );
        assert!(
            none.check_pod()
                .unwrap_err()
                .to_string()
                .contains("(hostPID)")
        );
        let no_ipc = with(json!([{"type": "pid"}]));
        assert!(
            no_ipc
                .check_pod()
                .unwrap_err()
                .to_string()
                .contains("(hostIPC)")
        );
    }
}
