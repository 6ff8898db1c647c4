//! A pod and its containers as a test holds them. They do not end with these values but with
//! their node: what a test leaves is what it looks for.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::client::CallError;
use super::client::Output;
use super::exec::Exec;
use super::log::{self, Line};
use super::node::{Node, STEP};
use super::proto::{ContainerConfig, ContainerState, ContainerStatus, PodSandboxConfig};
use crate::bounded::poll;

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod<'n> {
    /// The node that it is on.
    pub node: &'n Node,
    /// What containerd calls it.
    pub id: String,
    /// What was asked for.
    pub config: PodSandboxConfig,
}

impl<'n> Pod<'n> {
    pub(super) fn run(
        node: &'n Node,
        config: PodSandboxConfig,
        handler: &str,
    ) -> Result<Self, CallError> {
        let id = node.client().run_pod(&config, handler)?;
        Ok(Self { node, id, config })
    }

    /// Makes a container in it.
    ///
    /// # Errors
    /// When containerd does not want it.
    pub fn create(&self, config: &ContainerConfig) -> Result<Container<'n>, CallError> {
        let client = self.node.client();
        let id = client.create(&self.id, config, &self.config)?;
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        Ok(Container {
            node: self.node,
            id,
            log,
        })
    }

    /// Makes one and starts it.
    ///
    /// # Errors
    /// When it cannot be made or started.
    pub fn start(&self, config: &ContainerConfig) -> Result<Container<'n>, CallError> {
        let container = self.create(config)?;
        container.start()?;
        Ok(container)
    }

    /// Its address.
    ///
    /// # Errors
    /// When containerd does not know it.
    pub fn address(&self) -> Result<String, CallError> {
        let status = self.node.client().pod_status(&self.id)?;
        Ok(status.network.unwrap_or_default().ip)
    }

    /// Stops it and takes it away.
    ///
    /// # Errors
    /// When either fails.
    pub fn remove(&self) -> Result<(), CallError> {
        self.node.client().stop_pod(&self.id)?;
        self.node.client().remove_pod(&self.id)
    }
}

/// A container of a pod.
#[derive(Clone, Debug)]
pub struct Container<'n> {
    node: &'n Node,
    /// What containerd calls it.
    pub id: String,
    log: PathBuf,
}

impl Container<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// When its command cannot be started.
    pub fn start(&self) -> Result<(), CallError> {
        self.node.client().start(&self.id)
    }

    /// What is known of it.
    ///
    /// # Errors
    /// When it is not.
    pub fn status(&self) -> Result<ContainerStatus, CallError> {
        self.node.client().container_status(&self.id)
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// When it does not.
    pub fn ended(&self) -> ContainerStatus {
        let ended = poll(STEP, || {
            let status = self.status().ok()?;
            (status.state == ContainerState::CONTAINER_EXITED.into()).then_some(status)
        });
        ended.unwrap_or_else(|| panic!("it does not end: {:?}", self.status()))
    }

    /// Runs a command in it.
    ///
    /// # Errors
    /// When it cannot be started, or takes too long.
    pub fn exec(&self, command: &[&str]) -> Result<Output, CallError> {
        self.node.client().exec_sync(&self.id, command, 30)
    }

    /// Runs a script in it that has to succeed, and has nothing to complain of; what it wrote.
    ///
    /// # Panics
    /// When it does not.
    pub fn shell(&self, script: &str) -> String {
        let output = self.exec(&["/bin/sh", "-c", script]);
        let output = output.unwrap_or_else(|error| panic!("{script}: {error:?}"));
        let said = (output.code, output.error());
        assert_eq!(said, (0, String::new()), "{script}: {}", output.text());
        output.text()
    }

    /// Starts a command in it with streams, and a terminal if wanted.
    ///
    /// # Panics
    /// When that cannot be done.
    pub fn stream(&self, command: &[&str], terminal: bool) -> Exec {
        let url = self.node.client().exec(&self.id, command, terminal);
        self.streams(&url.expect("containerd has an address for it"))
    }

    /// The streams of its own process.
    ///
    /// # Panics
    /// When they cannot be had.
    pub fn attach(&self) -> Exec {
        let url = self.node.client().attach(&self.id);
        self.streams(&url.expect("containerd has an address for it"))
    }

    fn streams(&self, url: &str) -> Exec {
        let rest = url.strip_prefix("http://").unwrap_or_default();
        let (host, path) = rest.split_once('/').unwrap_or_default();
        let to: SocketAddr = host.parse().unwrap_or_else(|_| panic!("no address: {url}"));
        let stream = self
            .node
            .connect(to)
            .expect("containerd serves its streams");
        Exec::start(stream, &format!("/{path}")).expect("the streams are there")
    }

    /// What is in its log by now.
    ///
    /// # Panics
    /// When a line is none.
    pub fn log(&self) -> Vec<Line> {
        let text = fs::read_to_string(&self.log);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", self.log.display()));
        // The last line may be one that is being written.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        log::parse(&text[..whole]).expect("all lines are of a log")
    }

    /// Waits until its log is as wanted.
    ///
    /// # Panics
    /// When it does not come to that.
    pub fn log_until(&self, wanted: impl Fn(&[Line]) -> bool) -> Vec<Line> {
        let log = poll(STEP, || Some(self.log()).filter(|log| wanted(log)));
        log.unwrap_or_else(|| panic!("{:?}", self.log()))
    }

    /// Asks it to end, and kills it after so many seconds.
    ///
    /// # Errors
    /// When containerd cannot.
    pub fn stop(&self, seconds: u32) -> Result<(), CallError> {
        self.node.client().stop(&self.id, seconds)
    }

    /// Takes it away.
    ///
    /// # Errors
    /// When containerd cannot.
    pub fn remove(&self) -> Result<(), CallError> {
        self.node.client().remove(&self.id)
    }
}
