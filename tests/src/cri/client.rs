//! The calls of CRI. Called by `node` and `pod`, and by tests that want the bare messages.

use std::path::Path;
use std::time::Duration;

use protobuf::{Message, MessageField};

use super::grpc::{CallError, Channel};
use super::proto::*;

/// As long as a kubelet gives a call, longer than any takes here on a slow machine.
const LIMIT: Duration = Duration::from_secs(120);
/// A pod's start has twice as long.
const START: Duration = Duration::from_secs(240);

/// A client of one containerd. Its calls fail as [`Channel::call`] does.
#[derive(Debug)]
pub struct Client(Channel);

/// What a command wrote, and its code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// The output as text, without the last newline.
    pub fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.stdout);
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }

    /// The same of the error output.
    pub fn error(&self) -> String {
        let text = String::from_utf8_lossy(&self.stderr);
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }
}

type Answer<T> = Result<T, CallError>;

impl Client {
    /// Connects to containerd.
    pub fn dial(socket: &Path) -> Answer<Self> {
        Channel::dial(socket).map(Self)
    }

    fn call<A: Message>(&self, name: &str, question: &impl Message) -> Answer<A> {
        let method = format!("RuntimeService/{name}");
        self.0.call(&method, question, LIMIT)
    }

    /// Who it is.
    pub fn version(&self) -> Answer<VersionResponse> {
        self.call("Version", &VersionRequest::new())
    }

    /// Whether it is ready, condition by condition.
    pub fn status(&self) -> Answer<Vec<RuntimeCondition>> {
        let status: StatusResponse = self.call("Status", &StatusRequest::new())?;
        Ok(status.status.unwrap_or_default().conditions)
    }

    /// An image, if it has it.
    pub fn image(&self, name: &str) -> Answer<Option<Image>> {
        let mut question = ImageStatusRequest::new();
        question.image.mut_or_insert_default().image = name.into();
        let answer: ImageStatusResponse =
            self.0.call("ImageService/ImageStatus", &question, LIMIT)?;
        Ok(answer.image.into_option())
    }

    /// Starts a pod; its id.
    pub fn run_pod(&self, config: &PodSandboxConfig, handler: &str) -> Answer<String> {
        let mut question = RunPodSandboxRequest::new();
        question.config = MessageField::some(config.clone());
        question.runtime_handler = handler.into();
        let method = "RuntimeService/RunPodSandbox";
        let answer: RunPodSandboxResponse = self.0.call(method, &question, START)?;
        Ok(answer.pod_sandbox_id)
    }

    /// Ends a pod and all that runs in it, and takes its network down.
    pub fn stop_pod(&self, id: &str) -> Answer<()> {
        let mut question = StopPodSandboxRequest::new();
        question.pod_sandbox_id = id.into();
        self.call::<StopPodSandboxResponse>("StopPodSandbox", &question)
            .map(drop)
    }

    /// Forgets a pod and its containers.
    pub fn remove_pod(&self, id: &str) -> Answer<()> {
        let mut question = RemovePodSandboxRequest::new();
        question.pod_sandbox_id = id.into();
        self.call::<RemovePodSandboxResponse>("RemovePodSandbox", &question)
            .map(drop)
    }

    /// What is known of a pod.
    pub fn pod_status(&self, id: &str) -> Answer<PodSandboxStatus> {
        let mut question = PodSandboxStatusRequest::new();
        question.pod_sandbox_id = id.into();
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", &question)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// All pods, or those with a label.
    pub fn pods(&self, label: Option<(&str, &str)>) -> Answer<Vec<PodSandbox>> {
        let mut question = ListPodSandboxRequest::new();
        let filter = question.filter.mut_or_insert_default();
        filter.label_selector = label
            .map(|(key, value)| (key.into(), value.into()))
            .into_iter()
            .collect();
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", &question)?;
        Ok(answer.items)
    }

    /// Makes a container in a pod; its id.
    pub fn create(
        &self,
        pod: &str,
        config: &ContainerConfig,
        of: &PodSandboxConfig,
    ) -> Answer<String> {
        let mut question = CreateContainerRequest::new();
        question.pod_sandbox_id = pod.into();
        question.config = MessageField::some(config.clone());
        question.sandbox_config = MessageField::some(of.clone());
        let answer: CreateContainerResponse = self.call("CreateContainer", &question)?;
        Ok(answer.container_id)
    }

    /// Starts it.
    pub fn start(&self, id: &str) -> Answer<()> {
        let mut question = StartContainerRequest::new();
        question.container_id = id.into();
        self.call::<StartContainerResponse>("StartContainer", &question)
            .map(drop)
    }

    /// Asks it to end, and kills it after so many seconds.
    pub fn stop(&self, id: &str, seconds: i64) -> Answer<()> {
        let mut question = StopContainerRequest::new();
        question.container_id = id.into();
        question.timeout = seconds;
        self.call::<StopContainerResponse>("StopContainer", &question)
            .map(drop)
    }

    /// Forgets it, and kills it when it runs.
    pub fn remove(&self, id: &str) -> Answer<()> {
        let mut question = RemoveContainerRequest::new();
        question.container_id = id.into();
        self.call::<RemoveContainerResponse>("RemoveContainer", &question)
            .map(drop)
    }

    /// What is known of a container.
    pub fn container_status(&self, id: &str) -> Answer<ContainerStatus> {
        let mut question = ContainerStatusRequest::new();
        question.container_id = id.into();
        let answer: ContainerStatusResponse = self.call("ContainerStatus", &question)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// The containers of a pod.
    pub fn containers(&self, pod: &str) -> Answer<Vec<super::proto::Container>> {
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

    /// Runs a command in a container to its end, or for so many seconds; 0 is for ever.
    pub fn exec_sync(&self, id: &str, command: &[&str], seconds: i64) -> Answer<Output> {
        let mut question = ExecSyncRequest::new();
        question.container_id = id.into();
        question.cmd = command.iter().map(|word| (*word).to_owned()).collect();
        question.timeout = seconds;
        let answer: ExecSyncResponse = self.call("ExecSync", &question)?;
        Ok(Output {
            code: answer.exit_code,
            stdout: answer.stdout,
            stderr: answer.stderr,
        })
    }

    /// Where a command's streams can be had.
    pub fn exec(&self, id: &str, command: &[&str], terminal: bool) -> Answer<String> {
        let mut question = ExecRequest::new();
        question.container_id = id.into();
        question.cmd = command.iter().map(|word| (*word).to_owned()).collect();
        question.tty = terminal;
        question.stdin = true;
        question.stdout = true;
        // A terminal has one output.
        question.stderr = !terminal;
        let answer: ExecResponse = self.call("Exec", &question)?;
        Ok(answer.url)
    }

    /// Where the streams of a container's own process can be had.
    pub fn attach(&self, id: &str) -> Answer<String> {
        let mut question = AttachRequest::new();
        question.container_id = id.into();
        question.stdin = true;
        question.stdout = true;
        question.stderr = true;
        let answer: AttachResponse = self.call("Attach", &question)?;
        Ok(answer.url)
    }

    /// What a container uses.
    pub fn container_stats(&self, id: &str) -> Answer<ContainerStats> {
        let mut question = ContainerStatsRequest::new();
        question.container_id = id.into();
        let answer: ContainerStatsResponse = self.call("ContainerStats", &question)?;
        Ok(answer.stats.unwrap_or_default())
    }

    /// What a pod uses, container by container and together.
    pub fn pod_stats(&self, id: &str) -> Answer<PodSandboxStats> {
        let mut question = PodSandboxStatsRequest::new();
        question.pod_sandbox_id = id.into();
        let answer: PodSandboxStatsResponse = self.call("PodSandboxStats", &question)?;
        Ok(answer.stats.unwrap_or_default())
    }
}
