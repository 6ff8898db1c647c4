//! The Node object: what the machine has, and whether it can run pods. Called by `watching`.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::quantity::Quantity;
use super::shared::Shared;
use super::status::time;
use crate::cri::CallError;
use crate::store::{Kind, StoreError};

/// How often it is written although nothing changed.
const BEAT: Duration = Duration::from_secs(300);
/// As many pods as a kubelet takes.
const PODS: u32 = 110;

/// The machine's CPUs and its memory.
pub(super) fn capacity() -> (Quantity, Quantity) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = rustix::system::sysinfo();
    let bytes = u128::from(memory.totalram) * u128::from(memory.mem_unit);
    (
        Quantity::whole(i64::try_from(cpus).unwrap_or(1)),
        Quantity::whole(i64::try_from(bytes).unwrap_or(i64::MAX)),
    )
}

/// The object, and what is remembered of it.
#[derive(Debug)]
pub(super) struct Record {
    version: String,
    runtime: String,
    /// Whether it is said to be ready.
    ready: Option<bool>,
    beat: Option<Instant>,
}

impl Record {
    pub(super) fn new(shared: &Arc<Shared>, version: String) -> Self {
        let mut record = Self {
            version,
            runtime: "containerd://unknown".into(),
            ready: None,
            beat: None,
        };
        record.say(
            shared,
            Err(("KubeletNotReady", "containerd was not asked yet".into())),
        );
        record
    }

    /// Whether the last that was said is that it cannot run pods.
    pub(super) fn is_away(&self) -> bool {
        self.ready != Some(true)
    }

    /// Asks containerd how it is, and says so.
    pub(super) fn update(&mut self, shared: &Shared) {
        if let Ok(version) = shared.client.version() {
            self.runtime = format!("{}://{}", version.runtime_name, version.runtime_version);
        }
        match shared.client.status() {
            Ok(conditions) => {
                let wrong = conditions.iter().filter(|one| !one.status);
                let wrong: Vec<String> = wrong
                    .map(|one| format!("{}: {}", one.type_, one.message))
                    .collect();
                match wrong.is_empty() {
                    true => self.say(shared, Ok(())),
                    false => self.say(shared, Err(("KubeletNotReady", wrong.join("; ")))),
                }
            }
            Err(error) => self.away(shared, &error),
        }
    }

    /// Says that containerd is away.
    pub(super) fn away(&mut self, shared: &Shared, error: &CallError) {
        self.say(shared, Err(("ContainerRuntimeNotReady", error.to_string())));
    }

    fn say(&mut self, shared: &Shared, is: Result<(), (&str, String)>) {
        let ready = is.is_ok();
        let beats = self.beat.is_some_and(|at| at.elapsed() < BEAT);
        if beats && self.ready == Some(ready) && (ready || self.ready.is_some()) {
            return;
        }
        let old = shared.store.get(Kind::Node, "", &shared.name);
        let status = self.status(shared, is, old.as_deref());
        let done = match old {
            None => {
                let object = self.object(shared, status);
                shared.store.create(Kind::Node, object)
            }
            Some(_) => shared
                .store
                .update(Kind::Node, "", &shared.name, &mut |node| {
                    node["status"] = status.clone();
                    Ok(())
                }),
        };
        match done {
            Ok(_) => {
                self.ready = Some(ready);
                self.beat = Some(Instant::now());
            }
            // Somebody else wrote it meanwhile; next time.
            Err(StoreError::AlreadyExists { .. } | StoreError::NotFound { .. }) => {}
            Err(error) => log::error!("the node's status is not kept: {error}"),
        }
    }

    fn object(&self, shared: &Shared, status: Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": shared.name, "labels": {
                "kubernetes.io/hostname": shared.name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": architecture(),
            }},
            "spec": {},
            "status": status,
        })
    }

    fn status(
        &self,
        shared: &Shared,
        is: Result<(), (&str, String)>,
        old: Option<&Value>,
    ) -> Value {
        let now = time(SystemTime::now());
        let (status, reason, message) = match is {
            Ok(()) => ("True", "KubeletReady", "pods can run".to_owned()),
            Err((reason, message)) => ("False", reason, message),
        };
        let conditions = old.and_then(|node| node["status"]["conditions"].as_array());
        let before = conditions.into_iter().flatten();
        let since = before
            .filter(|one| one["type"] == "Ready" && one["status"] == status)
            .find_map(|one| one["lastTransitionTime"].as_str());
        let kernel = rustix::system::uname();
        let text = |file: &str| {
            fs::read_to_string(file)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let amounts = json!({
            "cpu": shared.cpu.value().to_string(),
            "memory": format!("{}Ki", shared.memory.value() >> 10),
            "pods": PODS.to_string(),
        });
        json!({
            "capacity": amounts,
            "allocatable": amounts,
            "conditions": [{
                "type": "Ready", "status": status, "reason": reason, "message": message,
                "lastHeartbeatTime": now, "lastTransitionTime": since.unwrap_or(&now),
            }],
            "addresses": [
                {"type": "InternalIP", "address": shared.address},
                {"type": "Hostname", "address": kernel.nodename().to_string_lossy()},
            ],
            "nodeInfo": {
                "machineID": text("/etc/machine-id"),
                "systemUUID": text("/etc/machine-id"),
                "bootID": text("/proc/sys/kernel/random/boot_id"),
                "kernelVersion": kernel.release().to_string_lossy(),
                "osImage": system(&text("/etc/os-release")),
                "containerRuntimeVersion": self.runtime,
                "kubeletVersion": self.version,
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": architecture(),
            },
        })
    }
}

/// As Go names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The name of the system in os-release(5).
fn system(release: &str) -> String {
    let mut lines = release.lines();
    let name = lines.find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(
        || "Linux".into(),
        |name| name.trim_matches(['"', '\'']).to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_have_names() {
        assert_eq!(system("ID=x\nPRETTY_NAME=\"A System 1\"\n"), "A System 1");
        assert_eq!(system(""), "Linux");
    }

    #[test]
    fn this_machine_has_something() {
        let (cpu, memory) = capacity();
        assert!(cpu >= Quantity::whole(1) && memory > Quantity::whole(1 << 20));
    }
}
