//! The calls of CRI. Called by `node`, and by `streams` for the addresses of streams.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use protobuf::{Message, MessageField};

use super::channel::{CallError, Channel};
use super::proto::*;

/// As long as a kubelet gives a call.
const LIMIT: Duration = Duration::from_secs(120);
/// A pod's start has twice as long.
const START: Duration = Duration::from_secs(240);
/// A pull has as long as slow networks need.
const PULL: Duration = Duration::from_secs(1800);
/// What a call takes beyond the seconds that it is told to wait itself.
const BEYOND: Duration = Duration::from_secs(30);

/// A client of one containerd; copies share a connection. Every call blocks its thread and fails
/// as [`CallError`] has it.
#[derive(Clone, Debug)]
pub struct Client(Arc<Channel>);

/// What a command wrote, and its code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// The standard output as text, without the last newline.
    pub fn text(&self) -> String {
        text(&self.stdout)
    }

    /// The same of the standard error.
    pub fn error(&self) -> String {
        text(&self.stderr)
    }
}

fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.strip_suffix('\n').unwrap_or(&text).to_owned()
}

/// Which streams of a command or a container are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// Its standard input.
    pub stdin: bool,
    /// Its standard output.
    pub stdout: bool,
    /// Its standard error; never with a terminal, which has one output.
    pub stderr: bool,
    /// A terminal.
    pub tty: bool,
}

type Answer<T> = Result<T, CallError>;

impl Client {
    /// A client for this socket. Nobody needs to listen there yet; each call connects when there is
    /// no connection.
    ///
    /// # Errors
    /// When this process cannot have a thread or an event queue.
    pub fn connect(socket: &Path) -> Answer<Self> {
        Channel::new(socket).map(|channel| Self(Arc::new(channel)))
    }

    /// Any call of the service `RuntimeService`; the common ones have methods of their own.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn call<A: Message>(&self, name: &str, question: &impl Message) -> Answer<A> {
        let method = format!("RuntimeService/{name}");
        self.0.call(&method, question, LIMIT)
    }

    /// Who it is.
    ///
    /// # Errors
    /// See [`CallError`], as for all calls.
    pub fn version(&self) -> Answer<VersionResponse> {
        self.call("Version", &VersionRequest::new())
    }

    /// Whether it is ready, condition by condition.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn status(&self) -> Answer<Vec<RuntimeCondition>> {
        let status: StatusResponse = self.call("Status", &StatusRequest::new())?;
        Ok(status.status.unwrap_or_default().conditions)
    }

    /// An image, if it has it.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn image(&self, name: &str) -> Answer<Option<Image>> {
        let mut question = ImageStatusRequest::new();
        question.image.mut_or_insert_default().image = name.into();
        let answer: ImageStatusResponse =
            self.0.call("ImageService/ImageStatus", &question, LIMIT)?;
        Ok(answer.image.into_option())
    }

    /// All its images.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn images(&self) -> Answer<Vec<Image>> {
        let question = ListImagesRequest::new();
        let answer: ListImagesResponse =
            self.0.call("ImageService/ListImages", &question, LIMIT)?;
        Ok(answer.images)
    }

    /// Has it fetch an image; what it calls it.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn pull(&self, name: &str, auth: Option<AuthConfig>) -> Answer<String> {
        let mut question = PullImageRequest::new();
        question.image.mut_or_insert_default().image = name.into();
        question.auth = auth.into();
        let answer: PullImageResponse = self.0.call("ImageService/PullImage", &question, PULL)?;
        Ok(answer.image_ref)
    }

    /// Starts a pod's sandbox; its id.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn run_sandbox(&self, config: &PodSandboxConfig, handler: &str) -> Answer<String> {
        let mut question = RunPodSandboxRequest::new();
        question.config = MessageField::some(config.clone());
        question.runtime_handler = handler.into();
        let method = "RuntimeService/RunPodSandbox";
        let answer: RunPodSandboxResponse = self.0.call(method, &question, START)?;
        Ok(answer.pod_sandbox_id)
    }

    /// Ends a sandbox and all that runs in it, and takes its network down.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn stop_sandbox(&self, id: &str) -> Answer<()> {
        let mut question = StopPodSandboxRequest::new();
        question.pod_sandbox_id = id.into();
        self.call::<StopPodSandboxResponse>("StopPodSandbox", &question)
            .map(drop)
    }

    /// Forgets a sandbox and its containers.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn remove_sandbox(&self, id: &str) -> Answer<()> {
        let mut question = RemovePodSandboxRequest::new();
        question.pod_sandbox_id = id.into();
        self.call::<RemovePodSandboxResponse>("RemovePodSandbox", &question)
            .map(drop)
    }

    /// What is known of a sandbox.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn sandbox_status(&self, id: &str) -> Answer<PodSandboxStatus> {
        let mut question = PodSandboxStatusRequest::new();
        question.pod_sandbox_id = id.into();
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", &question)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// All sandboxes that have these labels.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn sandboxes(&self, labels: &[(&str, &str)]) -> Answer<Vec<PodSandbox>> {
        let mut question = ListPodSandboxRequest::new();
        let filter = question.filter.mut_or_insert_default();
        filter.label_selector = pairs(labels);
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", &question)?;
        Ok(answer.items)
    }

    /// Makes a container in a sandbox; its id.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn create(
        &self,
        sandbox: &str,
        config: &ContainerConfig,
        of: &PodSandboxConfig,
    ) -> Answer<String> {
        let mut question = CreateContainerRequest::new();
        question.pod_sandbox_id = sandbox.into();
        question.config = MessageField::some(config.clone());
        question.sandbox_config = MessageField::some(of.clone());
        let answer: CreateContainerResponse = self.call("CreateContainer", &question)?;
        Ok(answer.container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn start(&self, id: &str) -> Answer<()> {
        let mut question = StartContainerRequest::new();
        question.container_id = id.into();
        self.call::<StartContainerResponse>("StartContainer", &question)
            .map(drop)
    }

    /// Asks a container to end, and kills it after so many seconds.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn stop(&self, id: &str, seconds: u32) -> Answer<()> {
        let mut question = StopContainerRequest::new();
        question.container_id = id.into();
        question.timeout = i64::from(seconds);
        let limit = LIMIT + Duration::from_secs(u64::from(seconds));
        let method = "RuntimeService/StopContainer";
        self.0
            .call::<StopContainerResponse>(method, &question, limit)
            .map(drop)
    }

    /// Forgets a container, and kills it when it runs.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn remove(&self, id: &str) -> Answer<()> {
        let mut question = RemoveContainerRequest::new();
        question.container_id = id.into();
        self.call::<RemoveContainerResponse>("RemoveContainer", &question)
            .map(drop)
    }

    /// What is known of a container.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn container_status(&self, id: &str) -> Answer<ContainerStatus> {
        let mut question = ContainerStatusRequest::new();
        question.container_id = id.into();
        let answer: ContainerStatusResponse = self.call("ContainerStatus", &question)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// All containers that have these labels.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn containers(&self, labels: &[(&str, &str)]) -> Answer<Vec<Container>> {
        let mut question = ListContainersRequest::new();
        question.filter.mut_or_insert_default().label_selector = pairs(labels);
        let answer: ListContainersResponse = self.call("ListContainers", &question)?;
        Ok(answer.containers)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn container_stats(&self, id: &str) -> Answer<ContainerStats> {
        let mut question = ContainerStatsRequest::new();
        question.container_id = id.into();
        let answer: ContainerStatsResponse = self.call("ContainerStats", &question)?;
        Ok(answer.stats.unwrap_or_default())
    }

    /// Has it write to a new file where the container's log was, after that was moved away.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn reopen_log(&self, id: &str) -> Answer<()> {
        let mut question = ReopenContainerLogRequest::new();
        question.container_id = id.into();
        self.call::<ReopenContainerLogResponse>("ReopenContainerLog", &question)
            .map(drop)
    }

    /// Runs a command in a container to its end, or for so many seconds; 0 is for ever.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn exec_sync(&self, id: &str, command: &[String], seconds: u32) -> Answer<Output> {
        let mut question = ExecSyncRequest::new();
        question.container_id = id.into();
        question.cmd = command.to_vec();
        question.timeout = i64::from(seconds);
        let limit = match seconds {
            0 => PULL,
            seconds => BEYOND + Duration::from_secs(u64::from(seconds)),
        };
        let answer: ExecSyncResponse = self.0.call("RuntimeService/ExecSync", &question, limit)?;
        Ok(Output {
            code: answer.exit_code,
            stdout: answer.stdout,
            stderr: answer.stderr,
        })
    }

    /// Where the streams of a new command can be had.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn exec(&self, id: &str, command: &[String], streams: Streams) -> Answer<String> {
        let mut question = ExecRequest::new();
        question.container_id = id.into();
        question.cmd = command.to_vec();
        question.tty = streams.tty;
        question.stdin = streams.stdin;
        question.stdout = streams.stdout;
        question.stderr = streams.stderr && !streams.tty;
        let answer: ExecResponse = self.call("Exec", &question)?;
        Ok(answer.url)
    }

    /// Where the streams of a container can be had.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn attach(&self, id: &str, streams: Streams) -> Answer<String> {
        let mut question = AttachRequest::new();
        question.container_id = id.into();
        question.tty = streams.tty;
        question.stdin = streams.stdin;
        question.stdout = streams.stdout;
        question.stderr = streams.stderr && !streams.tty;
        let answer: AttachResponse = self.call("Attach", &question)?;
        Ok(answer.url)
    }

    /// Where connections to ports of a sandbox can be had.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn port_forward(&self, sandbox: &str, ports: &[u16]) -> Answer<String> {
        let mut question = PortForwardRequest::new();
        question.pod_sandbox_id = sandbox.into();
        question.port = ports.iter().map(|port| i32::from(*port)).collect();
        let answer: PortForwardResponse = self.call("PortForward", &question)?;
        Ok(answer.url)
    }
}

fn pairs(labels: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
    let labels = labels.iter();
    labels
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}
