//! The calls of CRI, as the tests make them: the node's own client, with the words that suites use
//! for pods and the calls that the node has no use for. Called by `node` and `pod`, and by tests that
//! want the bare messages.

use std::ops::Deref;
use std::path::Path;

use pericarp_kube::cri;
use protobuf::MessageField;

use super::proto::*;

pub use cri::{CallError, Output};

/// A client of one containerd; each call fails as [`CallError`] has it.
#[derive(Clone, Debug)]
pub struct Client(cri::Client);

type Answer<T> = Result<T, CallError>;

impl Deref for Client {
    type Target = cri::Client;

    fn deref(&self) -> &cri::Client {
        &self.0
    }
}

impl Client {
    /// A connection of its own to containerd.
    pub fn dial(socket: &Path) -> Answer<Self> {
        cri::Client::connect(socket).map(Self)
    }

    /// Starts a pod; its id.
    pub fn run_pod(&self, config: &PodSandboxConfig, handler: &str) -> Answer<String> {
        self.run_sandbox(config, handler)
    }

    /// Ends a pod and all that runs in it, and takes its network down.
    pub fn stop_pod(&self, id: &str) -> Answer<()> {
        self.stop_sandbox(id)
    }

    /// Forgets a pod and its containers.
    pub fn remove_pod(&self, id: &str) -> Answer<()> {
        self.remove_sandbox(id)
    }

    /// What is known of a pod.
    pub fn pod_status(&self, id: &str) -> Answer<PodSandboxStatus> {
        self.sandbox_status(id)
    }

    /// All pods, or those with a label.
    pub fn pods(&self, label: Option<(&str, &str)>) -> Answer<Vec<PodSandbox>> {
        self.sandboxes(label.as_slice())
    }

    /// The containers of a pod.
    pub fn containers(&self, pod: &str) -> Answer<Vec<Container>> {
        let mut question = ListContainersRequest::new();
        question.filter.mut_or_insert_default().pod_sandbox_id = pod.into();
        let answer: ListContainersResponse = self.call("ListContainers", &question)?;
        Ok(answer.containers)
    }

    /// Changes the limits of a container that runs.
    pub fn update(&self, id: &str, resources: LinuxContainerResources) -> Answer<()> {
        let mut question = UpdateContainerResourcesRequest::new();
        question.container_id = id.into();
        question.linux = MessageField::some(resources);
        self.call::<UpdateContainerResourcesResponse>("UpdateContainerResources", &question)
            .map(drop)
    }

    /// Runs a command in a container to its end, or for so many seconds; 0 is for as long as any
    /// call may take.
    pub fn exec_sync(&self, id: &str, command: &[&str], seconds: i64) -> Answer<Output> {
        let mut question = ExecSyncRequest::new();
        question.container_id = id.into();
        question.cmd = words(command);
        question.timeout = seconds;
        let answer: ExecSyncResponse = self.call("ExecSync", &question)?;
        Ok(Output {
            code: answer.exit_code,
            stdout: answer.stdout,
            stderr: answer.stderr,
        })
    }

    /// Where a command's streams can be had.
    pub fn exec(&self, id: &str, command: &[&str], tty: bool) -> Answer<String> {
        self.0
            .exec(id, &words(command), cri::Streams { tty, ..ALL })
    }

    /// Where the streams of a container's own process can be had.
    pub fn attach(&self, id: &str) -> Answer<String> {
        self.0.attach(id, ALL)
    }

    /// What a pod uses, container by container and together.
    pub fn pod_stats(&self, id: &str) -> Answer<PodSandboxStats> {
        let mut question = PodSandboxStatsRequest::new();
        question.pod_sandbox_id = id.into();
        let answer: PodSandboxStatsResponse = self.call("PodSandboxStats", &question)?;
        Ok(answer.stats.unwrap_or_default())
    }
}

/// Of a terminal the client leaves out the second output itself.
const ALL: cri::Streams = cri::Streams {
    stdin: true,
    stdout: true,
    stderr: true,
    tty: false,
};

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|word| (*word).to_owned()).collect()
}
