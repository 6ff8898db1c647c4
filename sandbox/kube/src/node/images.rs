//! The images of containers: whether they are there, and fetching them. Called by `making`.
//!
//! A pull runs in a thread of its own, since it may take long and a pod may be deleted meanwhile.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde_json::Value;

use super::backoff::{Backoff, Turn};
use super::base64;
use super::sources::{self, Lookup};
use super::spec::Reference;
use super::status::Reason;
use crate::cri::proto::AuthConfig;
use crate::cri::{CallError, Client};

/// When an image is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    Always,
    IfNotPresent,
    Never,
}

impl Policy {
    /// As a manifest says it. Where it does not, an image whose tag names no version is fetched
    /// each time.
    pub(super) fn of(said: Option<&str>, image: &str) -> Self {
        match said {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            Some("IfNotPresent") => Self::IfNotPresent,
            _ if image.contains('@') => Self::IfNotPresent,
            _ => {
                let name = image.rsplit('/').next().unwrap_or(image);
                match name.split_once(':') {
                    None | Some((_, "latest")) => Self::Always,
                    Some(_) => Self::IfNotPresent,
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum State {
    Running,
    Done(Result<(), String>),
}

/// The pulls of one pod.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    states: Arc<Mutex<HashMap<String, State>>>,
    failed: HashMap<String, (SystemTime, String)>,
    backoff: Backoff,
}

/// How a pull stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pull {
    /// The image was fetched.
    Done,
    /// It is being fetched.
    Running,
    /// It was begun by this call.
    Begun,
    /// It just failed.
    Failed(Reason),
    /// It failed, and is left alone for a while.
    Later(Reason, std::time::Duration),
}

impl Pulls {
    /// Has the image fetched; `wake` is called when something comes of it. `container` is for whom.
    pub(super) fn pull(
        &mut self,
        client: &Client,
        container: &str,
        image: &str,
        auths: Vec<AuthConfig>,
        wake: impl FnOnce() + Send + 'static,
    ) -> io::Result<Pull> {
        let key = format!("{container} {image}");
        let now = SystemTime::now();
        // The lock is let go before it is taken again.
        let state = lock(&self.states).get(&key).cloned();
        match state {
            Some(State::Running) => return Ok(Pull::Running),
            Some(State::Done(result)) => {
                lock(&self.states).remove(&key);
                let Err(words) = result else {
                    self.failed.remove(&key);
                    self.backoff.forget(&key);
                    return Ok(Pull::Done);
                };
                self.failed.insert(key, (now, words.clone()));
                return Ok(Pull::Failed(Reason::new("ErrImagePull", words)));
            }
            None => {}
        }
        if let Some((when, words)) = self.failed.get(&key)
            // The first time counts, too: a registry is asked again after ten seconds.
            && let Turn::Later { left, .. } = self.backoff.turn(&key, *when, now, 1)
        {
            let message = format!("Back-off pulling image \"{image}\": ErrImagePull: {words}");
            return Ok(Pull::Later(Reason::new("ImagePullBackOff", message), left));
        }
        lock(&self.states).insert(key.clone(), State::Running);
        let (client, image) = (client.clone(), image.to_owned());
        let states = Arc::clone(&self.states);
        let spawned = std::thread::Builder::new()
            .name("pull".into())
            .stack_size(super::STACK)
            .spawn({
                let key = key.clone();
                move || {
                    let result = fetch(&client, &image, auths).map_err(|error| error.to_string());
                    lock(&states).insert(key, State::Done(result));
                    wake();
                }
            });
        if let Err(error) = spawned {
            lock(&self.states).remove(&key);
            return Err(error);
        }
        Ok(Pull::Begun)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tries each way to be let in; the words of the last that failed count.
fn fetch(client: &Client, image: &str, auths: Vec<AuthConfig>) -> Result<(), CallError> {
    let mut ways: Vec<Option<AuthConfig>> = auths.into_iter().map(Some).collect();
    if ways.is_empty() {
        ways.push(None);
    }
    let mut result = Ok(());
    for way in ways {
        result = client.pull(image, way).map(drop);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// What the pod's Secrets say about the registry of an image.
pub(super) fn auths(find: &Lookup<'_>, secrets: &[Reference], image: &str) -> Vec<AuthConfig> {
    let registry = registry(image);
    let mut auths = Vec::new();
    for secret in secrets {
        // As for a kubelet, one that is not there may not be needed.
        let Ok(data) = sources::secret(find, &secret.name) else {
            continue;
        };
        let said = match (data.get(".dockerconfigjson"), data.get(".dockercfg")) {
            (Some(json), _) => serde_json::from_slice::<Value>(json)
                .ok()
                .and_then(|json| json.get("auths").cloned()),
            (None, Some(json)) => serde_json::from_slice(json).ok(),
            (None, None) => None,
        };
        let said = said.as_ref().and_then(Value::as_object);
        let own = said.into_iter().flatten();
        auths.extend(own.filter(|(of, _)| host(of) == registry).map(auth));
    }
    auths
}

fn auth((registry, said): (&String, &Value)) -> AuthConfig {
    let text = |field: &str| said[field].as_str().unwrap_or_default().to_owned();
    let mut auth = AuthConfig::new();
    auth.server_address.clone_from(registry);
    auth.username = text("username");
    auth.password = text("password");
    auth.identity_token = text("identitytoken");
    auth.registry_token = text("registrytoken");
    let both = base64::decode(&text("auth")).unwrap_or_default();
    if let Some((name, password)) = String::from_utf8_lossy(&both).split_once(':') {
        auth.username = name.into();
        auth.password = password.into();
    }
    auth
}

/// The registry that an image's name names.
fn registry(image: &str) -> &str {
    match image.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => "docker.io",
    }
}

/// The registry that a key of such a Secret names.
fn host(key: &str) -> &str {
    let key = key.strip_prefix("https://").unwrap_or(key);
    let key = key.strip_prefix("http://").unwrap_or(key);
    match key.split('/').next().unwrap_or(key) {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Kind;
    use serde_json::json;

    #[test]
    fn policies() {
        for (said, image, policy) in [
            (None, "nginx", Policy::Always),
            (None, "nginx:latest", Policy::Always),
            (None, "nginx:1.2", Policy::IfNotPresent),
            (None, "host:5000/nginx", Policy::Always),
            (None, "nginx@sha256:abc", Policy::IfNotPresent),
            (Some("Never"), "nginx", Policy::Never),
            (Some("IfNotPresent"), "nginx", Policy::IfNotPresent),
        ] {
            assert_eq!(Policy::of(said, image), policy, "{image}");
        }
    }

    #[test]
    fn secrets_are_for_their_registry() {
        let text = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "YWRhOnB3"},
            "mcr.test": {"username": "bob", "password": "x"}}}"#;
        let mut encoded = String::new();
        // Only for this test: three bytes at a time.
        let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        for part in text.as_bytes().chunks(3) {
            let bits = part
                .iter()
                .fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte));
            let bits = bits << (8 * (3 - part.len()));
            for at in 0..=part.len() {
                let index = bits >> (18 - 6 * at) & 63;
                encoded.push(letters[index as usize] as char);
            }
        }
        let find = |_: Kind, name: &str| {
            let secret = json!({"data": {".dockerconfigjson": encoded}});
            (name == "s").then(|| Arc::new(secret))
        };
        let secrets = ["none", "s"].map(|name| Reference { name: name.into() });
        let of = |image: &str| {
            let auths = auths(&find, &secrets, image);
            let names = auths
                .iter()
                .map(|auth| (auth.username.clone(), auth.password.clone()));
            names.collect::<Vec<_>>()
        };
        assert_eq!(of("nginx:1"), [("ada".to_owned(), "pw".to_owned())]);
        assert_eq!(of("mcr.test/a/b"), [("bob".to_owned(), "x".to_owned())]);
        assert!(of("ghcr.io/a").is_empty());
        assert!(of("localhost/a").is_empty());
    }

    #[test]
    fn a_pull_that_fails_is_tried_again_later() {
        let client = Client::connect(std::path::Path::new("/nowhere")).unwrap();
        let mut pulls = Pulls::default();
        let (say, hear) = std::sync::mpsc::channel();
        let mut pull = || {
            let say = say.clone();
            let wake = move || say.send(()).unwrap();
            pulls.pull(&client, "c", "x:1", Vec::new(), wake).unwrap()
        };
        assert_eq!(pull(), Pull::Begun);
        hear.recv().unwrap();
        let words = "containerd's socket cannot be used";
        assert_eq!(pull(), Pull::Failed(Reason::new("ErrImagePull", words)));
        let Pull::Later(reason, left) = pull() else {
            panic!("it is tried at once");
        };
        assert_eq!(reason.word, "ImagePullBackOff");
        assert!(left.as_secs() <= 10);
    }
}
