//! A node with a server, and kubectl.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::cri::node::{STEP, lifetime};
use pericarp_tests::cri::{Handler, Node};
use pericarp_tests::parts::{Part, beside_us, have};
use pericarp_tests::process::{Process, command};
use serde_json::Value;

/// A containerd, a server beside it, and a kubeconfig.
pub(crate) struct Stage {
    pub(crate) node: Node,
    server: Option<Process>,
}

/// A server of a node.
struct Instance {
    name: &'static str,
    node: &'static str,
    listen: &'static str,
    /// Its directory, and its kubeconfig beside that.
    state: &'static str,
    kubeconfig: &'static str,
}

/// What a test of this suite may take: many machines one after the other.
const LIFE: Duration = Duration::from_secs(900);

const FIRST: Instance = Instance {
    name: "test",
    node: "here",
    listen: "127.0.0.1:7443",
    state: "kube",
    kubeconfig: "kubeconfig",
};
const SECOND: Instance = Instance {
    name: "second",
    node: "there",
    listen: "127.0.0.1:7444",
    state: "kube2",
    kubeconfig: "kubeconfig2",
};

/// What pods in machines take besides a node.
pub(crate) const MACHINES: [Part; 7] = [
    Part::Ours("containerd-shim-pericarp-v2"),
    Part::Ours("pericarp-vmm"),
    Part::PERICARP_BLOCK,
    Part::PERICARP_FS,
    Part::PERICARP_NET,
    Part::PERICARP_VSOCK,
    Part::QemuSystem,
];

/// The handler that makes them.
pub(crate) fn machines() -> Handler {
    Handler {
        name: "pericarp".into(),
        runtime_type: "io.containerd.pericarp.v2".into(),
        programs: Some(beside_us()),
        pod_annotations: Vec::new(),
        config: Some(
            "[profiles.pericarp]\naliases = [\"kata-mshv-vm-isolation\"]\n\
             annotations = [\"memory\"]\nboot-timeout = 200\n",
        ),
    }
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self {
            code: output.status.code(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }
}

impl Stage {
    /// Starts all of it; `None` is a skipped test.
    pub(crate) fn start(test: &str, handlers: Vec<Handler>, parts: &[Part]) -> Option<Self> {
        let own = [Part::Kubectl, Part::Ours("pericarp")];
        if !have(test, &own) || !have(test, parts) {
            return None;
        }
        let node = Node::start_for(test, &handlers, lifetime().max(LIFE))?;
        let mut stage = Self { node, server: None };
        stage.serve();
        Some(stage)
    }

    /// Starts the server, and waits until it has made a kubeconfig possible.
    pub(crate) fn serve(&mut self) {
        self.server = Some(self.serve_as(&FIRST));
    }

    /// Starts another beside it, which ends when it is dropped.
    pub(crate) fn serve_another(&self) -> Process {
        self.serve_as(&SECOND)
    }

    fn serve_as(&self, instance: &Instance) -> Process {
        let scratch = self.node.scratch();
        let state = scratch.path(instance.state).display().to_string();
        let mut command = self.node.inside(&beside_us().join("pericarp"));
        command
            .args(["node", "serve", "--name", instance.name])
            .args(["--node-name", instance.node, "--state-dir", &state])
            .arg("--containerd-socket")
            .arg(scratch.path("c.sock"))
            .args(["--cgroup-parent", &format!("/{}", self.node.parent())])
            // Other ports than usual: the node's network is its own.
            .args(["--listen", instance.listen, "--verbose"]);
        let server = Process::start(&mut command, lifetime().max(LIFE)).unwrap();
        let up = poll(STEP, || server.output().find("listens at"));
        assert!(up.is_some(), "{}", server.output().last(60));
        let mut command = command_of_ours();
        let output = command
            .args(["kubeconfig", "--name", instance.name])
            .args(["--state-dir", &state])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        scratch.file(instance.kubeconfig, &output.stdout);
        server
    }

    /// What the other server says.
    pub(crate) fn ask(&self, _other: &Process, arguments: &[&str]) -> Said {
        let mut command = self.kubectl_command(arguments);
        let config = self.node.scratch().path(SECOND.kubeconfig);
        command.env("KUBECONFIG", config).output().unwrap().into()
    }

    /// Kills the server, without a word to it.
    pub(crate) fn kill_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill();
        }
    }

    /// The end of what the server wrote.
    pub(crate) fn words(&self) -> String {
        let server = self.server.as_ref();
        server.map_or_else(String::new, |server| server.output().last(80))
    }

    /// A kubectl that has not been started.
    pub(crate) fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.node.on_its_network(&Part::Kubectl.find().unwrap());
        let scratch = self.node.scratch();
        command
            .args(arguments)
            .env("KUBECONFIG", scratch.path(FIRST.kubeconfig))
            .env("HOME", scratch.dir())
            .env_remove("HTTPS_PROXY")
            .env_remove("https_proxy")
            .stdin(Stdio::null())
            .current_dir(scratch.dir());
        command
    }

    /// What kubectl says.
    pub(crate) fn try_kubectl(&self, arguments: &[&str]) -> Said {
        self.kubectl_command(arguments).output().unwrap().into()
    }

    /// What kubectl says when it succeeds, which it has to.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        let said = self.try_kubectl(arguments);
        if said.code != Some(0) {
            let events = self.try_kubectl(&["get", "events", "-A"]).out;
            let words = self.words();
            panic!("kubectl {arguments:?}: {said:?}\nevents:\n{events}\nserver:\n{words}");
        }
        said.out
    }

    /// The error of a kubectl that has to fail.
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let said = self.try_kubectl(arguments);
        assert_ne!(said.code, Some(0), "kubectl {arguments:?}: {said:?}");
        said.err
    }

    /// Whether kubectl is older than 1.27, as Debian 12's is: it asks nobody to check fields.
    pub(crate) fn is_old(&self) -> bool {
        let said = self.kubectl(&["version", "--client", "-o", "json"]);
        let said: Value = serde_json::from_str(&said).unwrap();
        let minor = said["clientVersion"]["minor"].as_str().unwrap();
        let digits = minor.trim_end_matches(|c: char| !c.is_ascii_digit());
        digits.parse::<u32>().unwrap() < 27
    }

    /// Applies a manifest.
    pub(crate) fn apply(&self, manifest: &str) -> String {
        self.node
            .scratch()
            .file("manifest.yaml", manifest.as_bytes());
        self.kubectl(&["apply", "-f", "manifest.yaml"])
    }

    /// What is said of a manifest.
    pub(crate) fn try_apply(&self, manifest: &str) -> Said {
        self.node
            .scratch()
            .file("manifest.yaml", manifest.as_bytes());
        self.try_kubectl(&["apply", "-f", "manifest.yaml"])
    }

    /// An object as JSON.
    pub(crate) fn get(&self, of: &[&str]) -> Value {
        let mut arguments = vec!["get"];
        arguments.extend(of);
        arguments.extend(["-o", "json"]);
        serde_json::from_str(&self.kubectl(&arguments)).unwrap()
    }

    /// Waits until a pod is ready.
    pub(crate) fn ready(&self, pod: &str) {
        let pod = format!("pod/{pod}");
        self.kubectl(&["wait", "--for=condition=Ready", &pod, "--timeout=60s"]);
    }

    /// Leaves no pod to the next case.
    pub(crate) fn delete_all_pods(&self) {
        self.kubectl(&["delete", "pods", "--all", "--now", "--timeout=60s"]);
    }

    /// Ends, and sees to it that pods have left nothing on the node: no process, mount, namespace,
    /// interface, cgroup, socket or file.
    pub(crate) fn end(mut self) {
        self.kill_server();
        let client = self.node.client();
        assert!(client.pods(None).unwrap().is_empty());
        self.node.assert_clean();
    }
}

/// Our own program, which is not bound to the node.
fn command_of_ours() -> Command {
    command(&beside_us().join("pericarp"))
}

/// A pod that does nothing until it is asked to end, under runc.
pub(crate) fn idle(name: &str) -> String {
    pod(name, "trap 'exit 0' TERM; sleep 100000 & wait")
}

/// A pod with one container that runs a script.
pub(crate) fn pod(name: &str, script: &str) -> String {
    let script = Value::from(script);
    let image = pericarp_tests::cri::config::IMAGE;
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\n\
         spec:\n  terminationGracePeriodSeconds: 5\n  containers:\n  - name: main\n    \
         image: {image}\n    command: [/bin/sh, -c, {script}]\n"
    )
}

/// Waits until this is true, and says what when it is not.
pub(crate) fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let limit = STEP.max(Duration::from_secs(60));
    assert!(poll(limit, || seen().then_some(())).is_some(), "{what}");
}

/// Writes a file for kubectl to read.
pub(crate) fn write(stage: &Stage, name: &str, bytes: &[u8]) -> String {
    let path = stage.node.scratch().path(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}
