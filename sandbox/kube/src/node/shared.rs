//! What all workers of a node have in common. Called by them.

use std::sync::Arc;

use serde_json::Value;

use super::causes::Chronicle;
use super::events::Events;
use super::places::Places;
use super::quantity::Quantity;
use super::seen::Sandbox;
use super::sources::Facts;
use super::spec::Pod;
use crate::cri::Client;
use crate::store::{Kind, Store, StoreError};

/// The node, as its workers know it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Store,
    pub(super) client: Client,
    pub(super) places: Places,
    pub(super) events: Events,
    /// What goes wrong in machines.
    pub(super) chronicle: Arc<dyn Chronicle>,
    /// Its name.
    pub(super) name: String,
    /// Its address.
    pub(super) address: String,
    /// The cgroup that all pods' are in.
    pub(super) cgroup_parent: String,
    pub(super) cpu: Quantity,
    pub(super) memory: Quantity,
}

impl Shared {
    /// Finds a ConfigMap or a Secret for a pod.
    pub(super) fn find(&self, pod: &Pod) -> impl Fn(Kind, &str) -> Option<Arc<Value>> {
        let (store, namespace) = (self.store.clone(), pod.metadata.namespace.clone());
        move |kind, name| store.get(kind, &namespace, name)
    }

    /// What its containers may be told.
    pub(super) fn facts(&self, pod: &Pod, sandbox: Option<&Sandbox>) -> Facts {
        let pod_ips = match (pod.spec.host_network, sandbox) {
            (true, _) => vec![self.address.clone()],
            (false, Some(sandbox)) => sandbox.ips.clone(),
            (false, None) => Vec::new(),
        };
        Facts {
            node: self.name.clone(),
            host_ip: self.address.clone(),
            pod_ips,
            cpu: self.cpu,
            memory: self.memory,
        }
    }

    /// The address at which the pod is asked.
    pub(super) fn ip_of(&self, pod: &Pod, sandbox: &Sandbox) -> String {
        if pod.spec.host_network {
            return self.address.clone();
        }
        sandbox.ips.first().cloned().unwrap_or_default()
    }

    /// Takes a pod out of the store, unless another has its name by now.
    pub(super) fn forget(&self, object: &Value) {
        let of = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
        let (namespace, name) = (of("namespace"), of("name"));
        let conflict = || StoreError::Conflict {
            kind: Kind::Pod,
            name: name.to_owned(),
        };
        let same = |found: &Value| found["metadata"]["uid"] == object["metadata"]["uid"];
        let mut check = |found: &Value| same(found).then_some(()).ok_or_else(conflict);
        match self.store.remove_if(Kind::Pod, namespace, name, &mut check) {
            Ok(_) | Err(StoreError::NotFound { .. } | StoreError::Conflict { .. }) => {}
            Err(error) => log::error!("pod {namespace}/{name} stays in the store: {error}"),
        }
    }

    /// Changes a pod in the store, unless another has its name by now.
    pub(super) fn set_status(&self, object: &Value, status: &Value) {
        let of = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
        let (namespace, name) = (of("namespace"), of("name"));
        let done = self.store.update(Kind::Pod, namespace, name, &mut |found| {
            if found["metadata"]["uid"] != object["metadata"]["uid"] {
                return Err(StoreError::Conflict {
                    kind: Kind::Pod,
                    name: name.to_owned(),
                });
            }
            found["status"] = status.clone();
            Ok(())
        });
        match done {
            Ok(_) | Err(StoreError::NotFound { .. } | StoreError::Conflict { .. }) => {}
            Err(error) => log::error!("the status of pod {namespace}/{name} is lost: {error}"),
        }
    }
}
