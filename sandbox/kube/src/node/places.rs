//! Where things of pods are below the state directory. Called by everything in `node` that has
//! files, and by `streams` for logs. The names are a kubelet's, which shims and tools know.
//!
//! ```text
//! pods/UID/volumes/kubernetes.io~KIND/NAME    a volume
//! pods/UID/volume-subpaths/NAME/CONTAINER/N   a part of one, mounted
//! pods/UID/containers/NAME/ATTEMPT            what it has to say at its end
//! pods/UID/etc-hosts                          /etc/hosts
//! logs/NAMESPACE_NAME_UID/CONTAINER/N.log     its output
//! ```

use std::path::{Path, PathBuf};

use super::spec::Pod;

/// The places of all pods.
#[derive(Clone, Debug)]
pub(super) struct Places(PathBuf);

impl Places {
    pub(super) fn new(state: &Path) -> Self {
        Self(state.to_owned())
    }

    /// Where pods have their files.
    pub(super) fn pods(&self) -> PathBuf {
        self.0.join("pods")
    }

    /// All files of a pod but its logs.
    pub(super) fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    /// A volume of a pod.
    pub(super) fn volume(&self, uid: &str, kind: &str, name: &str) -> PathBuf {
        let volumes = self.pod(uid).join("volumes");
        volumes.join(format!("kubernetes.io~{kind}")).join(name)
    }

    /// Where parts of a pod's volumes are mounted.
    pub(super) fn sub_paths(&self, uid: &str) -> PathBuf {
        self.pod(uid).join("volume-subpaths")
    }

    /// What a container says at its end.
    pub(super) fn termination(&self, uid: &str, container: &str, attempt: u32) -> PathBuf {
        let containers = self.pod(uid).join("containers");
        containers.join(container).join(attempt.to_string())
    }

    /// The file of names that a pod's containers share.
    pub(super) fn hosts(&self, uid: &str) -> PathBuf {
        self.pod(uid).join("etc-hosts")
    }

    /// Where all logs are.
    pub(super) fn all_logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// The logs of a pod.
    pub(super) fn logs(&self, pod: &Pod) -> PathBuf {
        let of = &pod.metadata;
        let name = format!("{}_{}_{}", of.namespace, of.name, of.uid);
        self.all_logs().join(name)
    }

    /// The log of a container, below the pod's logs.
    pub(super) fn log_of(container: &str, attempt: u32) -> String {
        format!("{container}/{attempt}.log")
    }
}
