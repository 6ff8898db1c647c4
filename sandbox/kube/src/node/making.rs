//! Sandboxes and containers come. The part of `worker` that makes them.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::asking::{Whom, Wrong};
use super::container::{self, Around};
use super::environment::{self, Environment};
use super::events::Sort;
use super::images::{self, Policy, Pull};
use super::plan::Kill;
use super::sandbox;
use super::seen::{Sandbox, Seen};
use super::spec::{Container, Pod, seconds};
use super::status::Reason;
use super::volumes::{self, Ready};
use super::worker::{Next, Worker};
use crate::cri::CallError;
use crate::cri::proto::{Image, Mount, PodSandboxConfig};
use crate::store::Kind;

/// What has to be there for a pod is looked for again after this time.
const RETRY: Duration = Duration::from_secs(5);
/// A hook that a container starts with has so long.
const HOOK: Duration = Duration::from_secs(600);
/// The node's own files that pods see.
const RESOLV: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// Why a container is not made.
enum Refusal {
    /// It waits for this.
    Wait(Reason),
    /// Something is under way for it.
    Patience,
    /// Containerd did not answer.
    Away(CallError),
}

impl Worker {
    /// Makes the sandbox, and what has to be there before; whether that was done.
    pub(super) fn make_sandbox(
        &mut self,
        pod: &Pod,
        seen: &Seen,
        attempt: u32,
    ) -> Result<(Next, bool), CallError> {
        let wait = Ok((Next::After(RETRY), false));
        if let Some(old) = seen.sandbox() {
            // Its network goes, and whoever may still be in it.
            self.shared.client.stop_sandbox(&old.id)?;
            let message = "Pod sandbox changed, it will be killed and re-created.";
            self.tell(pod, None, Sort::Normal, "SandboxChanged", message);
        }
        if let Err(message) = self.set_up(pod, None) {
            self.tell(pod, None, Sort::Warning, "FailedMount", &message);
            return wait;
        }
        let handler = match self.class(pod) {
            Ok(handler) => handler,
            Err(message) => {
                self.tell(pod, None, Sort::Warning, "FailedCreatePodSandBox", &message);
                return wait;
            }
        };
        let config = self.sandbox_config(pod, attempt);
        let logs = Path::new(&config.log_directory);
        if let Err(error) = private(logs) {
            let message = format!("{}: {error}", logs.display());
            self.tell(pod, None, Sort::Warning, "FailedCreatePodSandBox", &message);
            return wait;
        }
        match self.shared.client.run_sandbox(&config, &handler) {
            Ok(_) => Ok((Next::After(Duration::ZERO), true)),
            Err(error) if error.is_away() => Err(error),
            Err(error) => {
                let message = format!("Failed to create pod sandbox: {error}");
                self.tell(pod, None, Sort::Warning, "FailedCreatePodSandBox", &message);
                wait
            }
        }
    }

    /// The handler of the pod's class.
    fn class(&self, pod: &Pod) -> Result<String, String> {
        let said = pod.spec.runtime_class_name.as_deref();
        let Some(name) = said.filter(|name| !name.is_empty()) else {
            return Ok(String::new());
        };
        let class = self.shared.store.get(Kind::RuntimeClass, "", name);
        let class = class.ok_or_else(|| format!("RuntimeClass \"{name}\" not found"))?;
        Ok(class["handler"].as_str().unwrap_or_default().to_owned())
    }

    fn sandbox_config(&self, pod: &Pod, attempt: u32) -> PodSandboxConfig {
        // A node without the file resolves nothing, and pods neither.
        let resolv = fs::read_to_string(RESOLV).unwrap_or_default();
        let around = sandbox::Around {
            node: &self.shared.name,
            places: &self.shared.places,
            cgroup_parent: &self.shared.cgroup_parent,
            resolv: &resolv,
        };
        sandbox::config(pod, &around, attempt)
    }

    /// Makes its volumes be there.
    fn set_up(&self, pod: &Pod, sandbox: Option<&Sandbox>) -> Result<Ready, String> {
        let shared = &self.shared;
        let directory = shared.places.pod(&pod.metadata.uid);
        private(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        let facts = shared.facts(pod, sandbox);
        let find = shared.find(pod);
        volumes::set_up(pod, &shared.places, &facts, &find).map_err(|failed| failed.to_string())
    }

    /// Brings files of ConfigMaps, Secrets and the pod up to date under running containers.
    pub(super) fn refresh(&self, pod: &Pod, seen: &Seen) -> Result<(), String> {
        match seen.ready() {
            Some(sandbox) if !pod.spec.volumes.is_empty() => {
                self.set_up(pod, Some(sandbox)).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Makes a container and starts it; when to try again if that cannot be done now.
    pub(super) fn start(
        &mut self,
        pod: &Pod,
        seen: &Seen,
        container: &Container,
        attempt: u32,
    ) -> Result<Option<Duration>, CallError> {
        let Some(sandbox) = seen.ready() else {
            return Ok(Some(Duration::ZERO));
        };
        let name = &container.name;
        match self.make(pod, seen, sandbox, container, attempt) {
            Ok(id) => {
                self.waits.remove(name);
                self.failed.remove(name);
                self.after_start(pod, sandbox, container, id);
                Ok(None)
            }
            Err(Refusal::Away(error)) => Err(error),
            Err(Refusal::Patience) => Ok(Some(RETRY)),
            Err(Refusal::Wait(reason)) => {
                let said = match reason.message.as_str() {
                    "" => reason.word.as_str(),
                    said => said,
                };
                let pulls = reason.word.starts_with("ImagePull") || reason.word == "ErrImagePull";
                if !pulls {
                    self.failed.insert(name.clone(), SystemTime::now());
                    let message = format!("Error: {said}");
                    self.tell(pod, Some(name), Sort::Warning, "Failed", &message);
                    self.note(pod, seen, Some(name), said);
                }
                self.waits.insert(name.clone(), reason);
                Ok(Some(RETRY))
            }
        }
    }

    fn make(
        &mut self,
        pod: &Pod,
        seen: &Seen,
        sandbox: &Sandbox,
        container: &Container,
        attempt: u32,
    ) -> Result<String, Refusal> {
        let image = self.image(pod, seen, container)?;
        let config_error =
            |message: String| Refusal::Wait(Reason::new("CreateContainerConfigError", message));
        container::check_user(pod, container, &image).map_err(config_error)?;
        let facts = self.shared.facts(pod, Some(sandbox));
        let find = self.shared.find(pod);
        let environment = environment::environment(pod, container, &facts, &find);
        let environment = environment.map_err(|error| config_error(error.to_string()))?;
        let ready = match self.set_up(pod, Some(sandbox)) {
            Ok(ready) => ready,
            Err(message) => {
                self.tell(pod, None, Sort::Warning, "FailedMount", &message);
                return Err(Refusal::Patience);
            }
        };
        let mounts = self.mounts(pod, container, &environment, &ready);
        let mounts = mounts.map_err(config_error)?;
        let files = self.files(pod, sandbox, container, attempt);
        files.map_err(|error| config_error(error.to_string()))?;
        let around = Around {
            node: &self.shared.name,
            memory: self.shared.memory,
            places: &self.shared.places,
            image: &image.id,
            environment: &environment,
            mounts,
        };
        let config = container::config(pod, container, around, attempt);
        let of = self.sandbox_config(pod, sandbox.attempt);
        let client = &self.shared.client;
        let failed = |word: &'static str| {
            move |error: CallError| match error.is_away() {
                true => Refusal::Away(error),
                false => Refusal::Wait(Reason::new(word, error.to_string())),
            }
        };
        let id = client.create(&sandbox.id, &config, &of);
        let id = id.map_err(failed("CreateContainerError"))?;
        let name = &container.name;
        let message = format!("Created container: {name}");
        self.tell(pod, Some(name), Sort::Normal, "Created", &message);
        client.start(&id).map_err(failed("RunContainerError"))?;
        let message = format!("Started container {name}");
        self.tell(pod, Some(name), Sort::Normal, "Started", &message);
        Ok(id)
    }

    /// The container's image, when it is there.
    fn image(&mut self, pod: &Pod, seen: &Seen, container: &Container) -> Result<Image, Refusal> {
        let (name, image) = (container.name.as_str(), container.image.as_str());
        let client = self.shared.client.clone();
        let there = client.image(image).map_err(|error| match error.is_away() {
            true => Refusal::Away(error),
            false => Refusal::Wait(Reason::new("InvalidImageName", error.to_string())),
        })?;
        match (
            Policy::of(container.image_pull_policy.as_deref(), image),
            there,
        ) {
            (Policy::IfNotPresent | Policy::Never, Some(there)) => {
                let message = format!("Container image \"{image}\" already present on machine");
                self.tell(pod, Some(name), Sort::Normal, "Pulled", &message);
                return Ok(there);
            }
            (Policy::Never, None) => {
                let message =
                    format!("Container image \"{image}\" is not present with pull policy of Never");
                return Err(Refusal::Wait(Reason::new("ErrImageNeverPull", message)));
            }
            (Policy::Always | Policy::IfNotPresent, _) => {}
        }
        let find = self.shared.find(pod);
        let auths = images::auths(&find, &pod.spec.image_pull_secrets, image);
        let inbox = Arc::clone(&self.inbox);
        let pull = self
            .pulls
            .pull(&client, name, image, auths, move || inbox.wake());
        let pull =
            pull.map_err(|error| Refusal::Wait(Reason::new("ErrImagePull", error.to_string())))?;
        match pull {
            Pull::Done => {
                let message = format!("Successfully pulled image \"{image}\"");
                self.tell(pod, Some(name), Sort::Normal, "Pulled", &message);
                let there = client.image(image).map_err(Refusal::Away)?;
                there.ok_or(Refusal::Patience)
            }
            Pull::Running => Err(Refusal::Patience),
            Pull::Begun => {
                let message = format!("Pulling image \"{image}\"");
                self.tell(pod, Some(name), Sort::Normal, "Pulling", &message);
                Err(Refusal::Patience)
            }
            Pull::Failed(reason) => {
                let message = format!("Failed to pull image \"{image}\": {}", reason.message);
                self.tell(pod, Some(name), Sort::Warning, "Failed", &message);
                self.note(pod, seen, Some(name), &message);
                Err(Refusal::Wait(reason))
            }
            Pull::Later(reason, _) => {
                let message = format!("Back-off pulling image \"{image}\"");
                if self.waits.get(name) != Some(&reason) {
                    self.tell(pod, Some(name), Sort::Normal, "BackOff", &message);
                }
                Err(Refusal::Wait(reason))
            }
        }
    }

    /// What of the volumes is mounted where.
    fn mounts(
        &self,
        pod: &Pod,
        container: &Container,
        environment: &Environment,
        ready: &Ready,
    ) -> Result<Vec<Mount>, String> {
        let mut mounts = Vec::new();
        for (at, said) in container.volume_mounts.iter().enumerate() {
            let place = ready.get(&said.name);
            let place = place.ok_or_else(|| format!("volume \"{}\" not found", said.name))?;
            let sub = container::sub_path(said, environment);
            if sub.is_empty() {
                mounts.push(container::volume(&place.path, said, place.read_only));
                continue;
            }
            let parts = self.shared.places.sub_paths(&pod.metadata.uid);
            let target = parts
                .join(&said.name)
                .join(&container.name)
                .join(at.to_string());
            volumes::mount_sub_path(&place.path, &sub, &target).map_err(|error| {
                format!(
                    "failed to prepare subPath for volumeMount \"{}\": {error}",
                    said.name
                )
            })?;
            mounts.push(container::volume(&target, said, place.read_only));
        }
        Ok(mounts)
    }

    /// The files that the container has beside its volumes, and the directory of its log.
    fn files(
        &self,
        pod: &Pod,
        sandbox: &Sandbox,
        container: &Container,
        attempt: u32,
    ) -> io::Result<()> {
        let (places, uid) = (&self.shared.places, &pod.metadata.uid);
        let of_node = match pod.spec.host_network {
            true => fs::read_to_string(HOSTS)?,
            false => String::new(),
        };
        let hosts = sandbox::hosts(pod, &sandbox.ips, &of_node);
        let place = places.hosts(uid);
        // It is written in place: running containers have this very file, and may have made it as
        // large as they like.
        if !holds(&place, hosts.as_bytes()) {
            fs::write(&place, hosts)?;
            fs::set_permissions(&place, Permissions::from_mode(0o644))?;
        }
        let words = places.termination(uid, &container.name, attempt);
        if let Some(above) = words.parent() {
            private(above)?;
        }
        let mut options = OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(true)
            .open(&words)?;
        // Whoever the container runs as writes it.
        fs::set_permissions(&words, Permissions::from_mode(0o666))?;
        private(&places.logs(pod).join(&container.name))
    }

    /// Has the container's own hook run. One that fails ends it.
    fn after_start(&self, pod: &Pod, sandbox: &Sandbox, container: &Container, id: String) {
        let Some(how) = container.lifecycle.post_start.clone() else {
            return;
        };
        let ip = self.shared.ip_of(pod, sandbox);
        let (shared, inbox) = (Arc::clone(&self.shared), Arc::clone(&self.inbox));
        let (of, container) = (pod.clone(), container.clone());
        let spawned = std::thread::Builder::new()
            .name("hook".into())
            .stack_size(super::STACK)
            .spawn(move || {
                let whom = Whom {
                    client: &shared.client,
                    container: &container,
                    id: &id,
                    ip: &ip,
                };
                let Err(Wrong::Bad(words)) = whom.ask(&how, HOOK) else {
                    return;
                };
                let (name, events) = (Some(container.name.as_str()), &shared.events);
                let message = format!("PostStartHook failed: {words}");
                events.tell(&of, name, Sort::Warning, "FailedPostStartHook", &message);
                events.tell(&of, name, Sort::Normal, "Killing", "FailedPostStartHook");
                let grace = seconds(of.spec.termination_grace_period_seconds);
                if let Err(error) = shared.client.stop(&id, grace) {
                    log::warn!("container {id} is not stopped: {error}");
                }
                inbox.wake();
            });
        if let Err(error) = spawned {
            log::warn!("pod {}: no hook: {error}", pod.full_name());
        }
    }

    /// The kills of what is left, for a pod that is deleted.
    pub(super) fn kill_all(&self, pod: &Pod, seen: &Seen, kills: Vec<Kill>, grace: Duration) {
        for kill in kills {
            self.stop(pod, seen, &kill, grace);
        }
    }

    /// What the store has for the pod's status.
    pub(super) fn old_status(&self) -> &Value {
        &self.object["status"]
    }
}

/// A directory that only root may look into.
fn private(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o750))
}

/// Whether a file has these bytes and no others.
fn holds(path: &Path, bytes: &[u8]) -> bool {
    let limit = bytes.len() as u64 + 1;
    let mut found = Vec::new();
    let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut found));
    read.is_ok() && found == bytes
}
