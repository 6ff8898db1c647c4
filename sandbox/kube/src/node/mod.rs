//! The kubelet's half: makes what the store says of Pods be so in containerd, and says in the store
//! how they are. Started by `pericarp node serve`; `streams` asks it where a container is.
//!
//! ```text
//! worker       a thread for each pod: worker, making, ending, report
//! plan         what is next for a pod, from manifest and sight (decides, does nothing)
//! seen         what containerd has of a pod
//! status       what a Pod's status says
//! sandbox      what containerd is told of a pod; container, of a container
//! environment  variables; sources, where they and files come from
//! volumes      directories, memory, and files that change all at once
//! probes       asks containers how they are; health counts the answers
//! images       whether they are there; kills, stopping; events, what happened; logs, their size
//! record       the Node object
//! fields       what a Pod may not say here
//! causes       what shims have written down of pods in machines
//! ```
//!
//! A worker keeps nothing that counts: after a restart of this process, or of containerd under
//! running pods, what is found by its labels goes on. What containerd says while it is away is
//! nothing, and nothing is done about it.

mod asking;
mod backoff;
mod base64;
mod causes;
mod cgroups;
mod container;
mod ending;
mod environment;
mod events;
mod fields;
mod health;
mod images;
mod kills;
mod labels;
mod logs;
mod making;
mod places;
mod plan;
mod probes;
mod quantity;
mod record;
mod report;
mod resources;
mod sandbox;
mod seen;
mod shared;
mod sources;
mod spec;
mod status;
#[cfg(test)]
mod testing;
mod volumes;
mod watching;
mod worker;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde_json::Value;
use thiserror::Error;

pub use self::causes::{Cause, Chronicle, Remark};
use self::events::Events;
pub use self::fields::{Refused, refused};
use self::places::Places;
use self::seen::Seen;
use self::shared::Shared;
use self::spec::Pod;
use self::worker::{Inbox, Worker};
use crate::cri::{CallError, Client};
use crate::store::{Kind, Store};

/// How much stack a thread of a pod has; there are several for each.
const STACK: usize = 512 << 10;

/// Why a node does not start.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The client of containerd cannot be made.
    #[error(transparent)]
    Client(#[from] CallError),
    /// There is no directory for pods, or no thread.
    #[error("{what}")]
    Io {
        /// What it was for.
        what: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// Where its objects are.
    pub store: Store,
    /// Containerd's socket. Nobody needs to listen there yet.
    pub socket: PathBuf,
    /// Where pods have their files and logs. It is the node's own.
    pub state: PathBuf,
    /// Its name, which tells its pods from those of another node on the same containerd.
    pub name: String,
    /// Its address; the one that leads outside where nothing is said.
    pub address: Option<IpAddr>,
    /// The cgroup below which pods are, such as `/pericarp`, or a slice of systemd's.
    pub cgroup_parent: String,
    /// What it says its version is.
    pub version: String,
    /// Where it is written down what goes wrong in machines.
    pub chronicle: Arc<dyn Chronicle>,
}

/// A node that runs until this is dropped. Its pods go on then.
#[derive(Debug)]
pub struct Node {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    /// The workers, by the uids of their pods.
    workers: Mutex<HashMap<String, Handle>>,
    quit: AtomicBool,
}

#[derive(Debug)]
struct Handle {
    inbox: Arc<Inbox>,
    seen: Arc<Mutex<Option<Seen>>>,
    namespace: String,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    /// Starts one: it finds its pods that run, and goes on from there.
    ///
    /// # Errors
    /// When its directory cannot be made or the kernel gives no threads.
    pub fn start(settings: NodeSettings) -> Result<Self, NodeError> {
        let client = Client::connect(&settings.socket)?;
        let places = Places::new(&settings.state);
        for place in [places.pods(), places.all_logs()] {
            std::fs::create_dir_all(&place).map_err(|source| NodeError::Io {
                what: format!("{}: cannot be made", place.display()),
                source,
            })?;
        }
        let address = settings.address.unwrap_or_else(own_address);
        let (cpu, memory) = record::capacity();
        let shared = Arc::new(Shared {
            events: Events::new(&settings.store, &settings.name),
            store: settings.store,
            client,
            places,
            chronicle: settings.chronicle,
            name: settings.name,
            address: address.to_string(),
            cgroup_parent: settings.cgroup_parent,
            cpu,
            memory,
        });
        let inner = Arc::new(Inner {
            shared,
            workers: Mutex::default(),
            quit: AtomicBool::new(false),
        });
        let threads = watching::start(&inner, settings.version);
        let threads = threads.map_err(|source| NodeError::Io {
            what: "no thread can be started".into(),
            source,
        })?;
        Ok(Self { inner, threads })
    }

    /// The client of containerd.
    pub fn client(&self) -> &Client {
        &self.inner.shared.client
    }

    /// Where the output of a pod's container is, or of the one that was there before it.
    pub fn log_path(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Option<PathBuf> {
        let (pod, seen) = self.inner.seen(namespace, pod)?;
        let one = match previous {
            true => seen.previous(container),
            false => seen.latest(container),
        }?;
        let logs = self.inner.shared.places.logs(&pod);
        Some(logs.join(Places::log_of(&one.name, one.attempt)))
    }

    /// What containerd calls a container that runs.
    pub fn container_id(&self, namespace: &str, pod: &str, container: &str) -> Option<String> {
        let (_, seen) = self.inner.seen(namespace, pod)?;
        let latest = seen.latest(container);
        let running = latest.filter(|one| one.state == seen::State::Running);
        running.map(|one| one.id.clone())
    }

    /// Whether a container runs: what is asked for its log ends with it.
    pub fn is_running(&self, namespace: &str, pod: &str, container: &str) -> bool {
        self.container_id(namespace, pod, container).is_some()
    }

    /// What containerd calls a pod's sandbox, when it is ready.
    pub fn sandbox_id(&self, namespace: &str, pod: &str) -> Option<String> {
        let (_, seen) = self.inner.seen(namespace, pod)?;
        seen.ready().map(|sandbox| sandbox.id.clone())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.inner.quit();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
        let workers = std::mem::take(&mut *self.inner.workers());
        for thread in workers.into_values().filter_map(|one| one.thread) {
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn workers(&self) -> MutexGuard<'_, HashMap<String, Handle>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn quit(&self) {
        self.quit.store(true, std::sync::atomic::Ordering::Relaxed);
        self.workers().values().for_each(|one| one.inbox.quit());
    }

    fn is_over(&self) -> bool {
        self.quit.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Has somebody look after this pod, or wakes who does.
    fn look_after(self: &Arc<Self>, object: &Arc<Value>) {
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
        let (uid, namespace) = (text("uid").to_owned(), text("namespace").to_owned());
        let mut workers = self.workers();
        if self.is_over() {
            return;
        }
        if let Some(one) = workers.get(&uid) {
            one.inbox.wake();
            return;
        }
        let worker = Worker::new(&self.shared, Arc::clone(object));
        let (inbox, seen) = (Arc::clone(&worker.inbox), Arc::clone(&worker.seen));
        let (inner, key) = (Arc::clone(self), uid.clone());
        let spawned = std::thread::Builder::new()
            .name(format!("pod {}", text("name")))
            .stack_size(STACK)
            .spawn(move || {
                if worker.run() {
                    inner.workers().remove(&key);
                }
            });
        match spawned {
            Ok(thread) => {
                let handle = Handle {
                    inbox,
                    seen,
                    namespace,
                    thread: Some(thread),
                };
                workers.insert(uid, handle);
            }
            // It is looked at again with the next sight of containerd.
            Err(error) => log::error!("nobody looks after pod {}: {error}", text("name")),
        }
    }

    /// Wakes who looks after a pod, if somebody does.
    fn wake(&self, uid: Option<&str>) {
        if let Some(one) = uid.and_then(|uid| self.workers().get(uid).map(|one| one.inbox.clone()))
        {
            one.wake();
        }
    }

    /// What was last seen of a pod.
    fn last_seen(&self, uid: &str) -> Option<Seen> {
        let seen = Arc::clone(&self.workers().get(uid)?.seen);
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }

    /// A pod and what containerd has of it.
    fn seen(&self, namespace: &str, name: &str) -> Option<(Pod, Seen)> {
        let object = self.shared.store.get(Kind::Pod, namespace, name)?;
        let pod = Pod::read(&object).ok()?;
        let uid = &pod.metadata.uid;
        let seen = match self.last_seen(uid) {
            Some(seen) => seen,
            None => Seen::look(&self.shared.client, &self.shared.name, uid).ok()?,
        };
        Some((pod, seen))
    }
}

/// The address from which this machine reaches others. Nothing is sent.
fn own_address() -> IpAddr {
    let found = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("198.51.100.1:9")?;
        socket.local_addr()
    });
    found.map_or(Ipv4Addr::LOCALHOST.into(), |address| address.ip())
}
