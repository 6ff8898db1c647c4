//! What containerd has of a pod at one moment. Called by `plan`, `status` and `worker`.

use crate::cri::proto::{
    ContainerState, ContainerStatus, PodSandbox, PodSandboxState, PodSandboxStatus,
};
use crate::cri::{CallError, Client};

use super::labels;

/// A sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sandbox {
    pub(super) id: String,
    /// How many there were before it.
    pub(super) attempt: u32,
    pub(super) ready: bool,
    /// In nanoseconds since 1970, as all times here.
    pub(super) created: i64,
    pub(super) ips: Vec<String>,
}

/// What a container is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    /// It was made and not started.
    #[default]
    Created,
    Running,
    Exited,
    /// Containerd does not know.
    Unknown,
}

/// A container; there may be several of one name, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Instance {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) sandbox: String,
    /// How many of its name there were before it.
    pub(super) attempt: u32,
    pub(super) state: State,
    pub(super) created: i64,
    pub(super) started: i64,
    pub(super) finished: i64,
    pub(super) exit_code: i32,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) image: String,
    pub(super) image_ref: String,
}

/// All of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The latest is first.
    pub(super) sandboxes: Vec<Sandbox>,
    pub(super) containers: Vec<Instance>,
}

impl Seen {
    /// The sandbox that counts.
    pub(super) fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first()
    }

    /// The sandbox that counts, when containers can run in it.
    pub(super) fn ready(&self) -> Option<&Sandbox> {
        self.sandbox().filter(|sandbox| sandbox.ready)
    }

    /// The latest container of a name.
    pub(super) fn latest(&self, name: &str) -> Option<&Instance> {
        let named = self.containers.iter().filter(|one| one.name == name);
        named.max_by_key(|one| (one.attempt, one.created))
    }

    /// The one before the latest, if it is kept.
    pub(super) fn previous(&self, name: &str) -> Option<&Instance> {
        let latest = self.latest(name)?;
        let named = self.containers.iter().filter(|one| one.name == name);
        let others = named.filter(|one| one.id != latest.id);
        others.max_by_key(|one| (one.attempt, one.created))
    }

    /// The latest container of a name if it is in the sandbox that counts.
    pub(super) fn current(&self, name: &str) -> Option<&Instance> {
        let sandbox = self.ready()?;
        self.latest(name).filter(|one| one.sandbox == sandbox.id)
    }

    /// What runs, or may.
    pub(super) fn alive(&self) -> impl Iterator<Item = &Instance> {
        let all = self.containers.iter();
        all.filter(|one| matches!(one.state, State::Running | State::Unknown))
    }

    /// Looks at a pod's.
    pub(super) fn look(client: &Client, node: &str, uid: &str) -> Result<Self, CallError> {
        let of = [(labels::NODE, node), (labels::UID, uid)];
        let mut sandboxes = Vec::new();
        for one in client.sandboxes(&of)? {
            sandboxes.push(sandbox(client, one)?);
        }
        sandboxes.sort_by_key(|one| std::cmp::Reverse((one.attempt, one.created)));
        let mut containers = Vec::new();
        for one in client.containers(&of)? {
            match client.container_status(&one.id) {
                Ok(status) => containers.push(instance(status, one.pod_sandbox_id)),
                // It went meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            sandboxes,
            containers,
        })
    }
}

fn sandbox(client: &Client, listed: PodSandbox) -> Result<Sandbox, CallError> {
    let ready = |state| state == PodSandboxState::SANDBOX_READY.into();
    let mut sandbox = Sandbox {
        attempt: listed.metadata.attempt,
        ready: ready(listed.state),
        created: listed.created_at,
        ips: Vec::new(),
        id: listed.id,
    };
    if sandbox.ready {
        match client.sandbox_status(&sandbox.id) {
            Ok(status) => {
                sandbox.ready = ready(status.state);
                sandbox.ips = ips(&status);
            }
            Err(error) if error.is_not_found() => sandbox.ready = false,
            Err(error) => return Err(error),
        }
    }
    Ok(sandbox)
}

/// The addresses of a sandbox; none when it has the node's network.
pub(super) fn ips(status: &PodSandboxStatus) -> Vec<String> {
    let network = &status.network;
    let more = network.additional_ips.iter().map(|one| one.ip.clone());
    let all = std::iter::once(network.ip.clone()).chain(more);
    all.filter(|ip| !ip.is_empty()).collect()
}

fn instance(status: ContainerStatus, sandbox: String) -> Instance {
    let state = match status.state.enum_value() {
        Ok(ContainerState::CONTAINER_CREATED) => State::Created,
        Ok(ContainerState::CONTAINER_RUNNING) => State::Running,
        Ok(ContainerState::CONTAINER_EXITED) => State::Exited,
        _ => State::Unknown,
    };
    let label = |name: &str| status.labels.get(name).cloned().unwrap_or_default();
    Instance {
        name: label(labels::CONTAINER),
        sandbox,
        attempt: status.metadata.attempt,
        state,
        created: status.created_at,
        started: status.started_at,
        finished: status.finished_at,
        exit_code: status.exit_code,
        image: status.image.image.clone(),
        id: status.id,
        reason: status.reason,
        message: status.message,
        image_ref: status.image_ref,
    }
}
