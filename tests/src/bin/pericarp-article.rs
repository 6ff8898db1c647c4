//! `pericarp-article`: the commands of Microsoft's article on pod sandboxing, typed
//! with kubectl on a node without a cluster, one pod under runc and one in a machine of its own,
//! each command and its output as they come. `cargo xtask demo` builds and starts this, as root.
//!
//! The node is a containerd in namespaces of its own with `pericarp node serve` beside it, as the
//! tests have it; nothing of it is left at the end. The article's image is not asked for from a
//! registry: a small one with busybox has its name.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::cri::node::{STEP, lifetime};
use pericarp_tests::cri::{Handler, Node};
use pericarp_tests::parts::{Part, beside_us, missing};
use pericarp_tests::process::{Process, command};

/// What pods in machines take. The rest is containerd's.
const PARTS: [Part; 9] = [
    Part::Kubectl,
    Part::Ours("pericarp"),
    Part::Ours("containerd-shim-pericarp-v2"),
    Part::Ours("pericarp-vmm"),
    Part::PERICARP_BLOCK,
    Part::PERICARP_FS,
    Part::PERICARP_NET,
    Part::PERICARP_VSOCK,
    Part::QemuSystem,
];

/// The operator's configuration: the article's sizes, and time for an emulated CPU.
const CONFIG: &str = "\
[profiles.pericarp]
aliases = [\"kata-mshv-vm-isolation\"]
boot-timeout = 200
";

/// The article's two manifests.
const TRUSTED: &str = r#"kind: Pod
apiVersion: v1
metadata:
  name: trusted
spec:
  containers:
  - name: trusted
    image: mcr.microsoft.com/aks/fundamental/base-ubuntu:v0.0.11
    command: ["/bin/sh", "-ec", "while :; do echo '.'; sleep 5 ; done"]
"#;
const UNTRUSTED: &str = r#"kind: Pod
apiVersion: v1
metadata:
  name: untrusted
spec:
  runtimeClassName: kata-mshv-vm-isolation
  containers:
  - name: untrusted
    image: mcr.microsoft.com/aks/fundamental/base-ubuntu:v0.0.11
    command: ["/bin/sh", "-ec", "while :; do echo '.'; sleep 5 ; done"]
"#;

type Outcome<T> = Result<T, String>;

fn main() -> ExitCode {
    if std::env::args_os().len() > 1 {
        eprintln!("pericarp-article: takes no arguments");
        return ExitCode::from(2);
    }
    match play() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pericarp-article: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A node on which somebody types.
struct Stage {
    node: Node,
    server: Process,
    kubectl: PathBuf,
}

fn play() -> Outcome<()> {
    if let Some(part) = missing(&PARTS) {
        return Err(part);
    }
    let stage = Stage::start()?;
    let begun = Instant::now();
    stage.kubectl("apply -f trusted-app.yaml")?;
    stage.kubectl("apply -f untrusted-app.yaml")?;
    stage.kubectl("wait --for=condition=Ready pod/trusted pod/untrusted --timeout=240s")?;
    println!(
        "(both are ready after {:.1} s)",
        begun.elapsed().as_secs_f64()
    );
    stage.kubectl("get pods --all-namespaces")?;
    let sandboxed = stage.exec("untrusted")?;
    let shared = stage.exec("trusted")?;
    std::thread::sleep(Duration::from_secs(6));
    stage.kubectl("logs untrusted")?;
    stage.kubectl("delete pod trusted untrusted --now")?;
    if sandboxed == shared {
        return Err(format!("both pods have the kernel {}", shared.trim()));
    }
    println!(
        "Two kernels: {} in the machine of its own, {} under runc, which is this machine's.",
        sandboxed.trim(),
        shared.trim()
    );
    drop(stage);
    Ok(())
}

impl Stage {
    fn start() -> Outcome<Self> {
        let ours = Handler {
            name: "pericarp".into(),
            runtime_type: "io.containerd.pericarp.v2".into(),
            programs: Some(beside_us()),
            pod_annotations: Vec::new(),
            config: Some(CONFIG),
        };
        let node = Node::start("pericarp-article", &[Handler::runc("runc"), ours]);
        let node = node.ok_or("the node does not start")?;
        let (program, state) = (beside_us().join("pericarp"), node.scratch().path("kube"));
        println!("$ pericarp node serve &");
        let mut serve = node.inside(&program);
        serve
            .args(["node", "serve", "--name", "demo", "--state-dir"])
            .arg(&state)
            .arg("--containerd-socket")
            .arg(node.scratch().path("c.sock"))
            .args(["--cgroup-parent", &format!("/{}", node.parent())]);
        let server = Process::start(&mut serve, lifetime()).map_err(|e| e.to_string())?;
        if poll(STEP, || server.output().find("listens at")).is_none() {
            return Err(format!("no server: {}", server.output().last(20)));
        }
        println!("$ pericarp kubeconfig > kubeconfig");
        let mut kubeconfig = command(&program);
        kubeconfig.args(["kubeconfig", "--name", "demo", "--state-dir"]);
        let output = kubeconfig.arg(&state).output();
        let output = output.map_err(|e| format!("pericarp kubeconfig: {e}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        node.scratch().file("kubeconfig", &output.stdout);
        for (name, text) in [
            ("trusted-app.yaml", TRUSTED),
            ("untrusted-app.yaml", UNTRUSTED),
        ] {
            node.scratch().file(name, text.as_bytes());
        }
        let kubectl = Part::Kubectl.find().ok_or("there is no kubectl")?;
        Ok(Self {
            node,
            server,
            kubectl,
        })
    }

    /// Types a command, and shows what it says.
    fn kubectl(&self, words: &str) -> Outcome<String> {
        self.run(&words.split(' ').collect::<Vec<_>>(), words)
    }

    /// Which kernel the pod's first container has.
    fn exec(&self, pod: &str) -> Outcome<String> {
        let words = ["exec", pod, "--", "/bin/bash", "-c", "uname -r"];
        self.run(&words, &format!("exec {pod} -- /bin/bash -c 'uname -r'"))
    }

    fn run(&self, words: &[&str], typed: &str) -> Outcome<String> {
        println!("$ kubectl {typed}");
        let scratch = self.node.scratch();
        let mut kubectl: Command = self.node.on_its_network(&self.kubectl);
        kubectl
            .args(words)
            .env("KUBECONFIG", scratch.path("kubeconfig"))
            .env("HOME", scratch.dir())
            .env_remove("HTTPS_PROXY")
            .env_remove("https_proxy")
            .current_dir(scratch.dir())
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        let output = kubectl.output().map_err(|e| format!("kubectl: {e}"))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{said}");
        match output.status.success() {
            true => Ok(said),
            false => Err(format!(
                "kubectl {typed} failed; the server's last words:\n{}",
                self.server.output().last(20)
            )),
        }
    }
}
