//! Sees to it that each pod is looked after, and that who looks after it hears of what changes: in
//! the store and in containerd. Called by `node`, in threads of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::ending::erase_unknown;
use super::places::Places;
use super::record::Record;
use super::spec::Pod;
use super::{Inner, STACK, labels, logs};
use crate::cri::CallError;
use crate::store::{Change, Kind, StoreError, What};

/// How often containerd is looked at.
const SIGHT: Duration = Duration::from_millis(700);
/// How long a thread may take to see that the node ends.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often containerd is asked how it is, and how often old events are looked for.
const OFTEN: Duration = Duration::from_secs(10);
const SELDOM: Duration = Duration::from_secs(60);

/// Starts the threads.
pub(super) fn start(inner: &Arc<Inner>, version: String) -> io::Result<Vec<JoinHandle<()>>> {
    let spawn = |name: &str, inner: Arc<Inner>, run: Box<dyn FnOnce(Arc<Inner>) + Send>| {
        let builder = std::thread::Builder::new().name(name.into());
        builder.stack_size(STACK).spawn(move || run(inner))
    };
    let mut threads = Vec::new();
    let started = (|| {
        let of = |kind| Box::new(move |inner: Arc<Inner>| follow(&inner, kind)) as _;
        threads.push(spawn("pods", Arc::clone(inner), of(Kind::Pod))?);
        threads.push(spawn("maps", Arc::clone(inner), of(Kind::ConfigMap))?);
        threads.push(spawn("secrets", Arc::clone(inner), of(Kind::Secret))?);
        let look = Box::new(move |inner: Arc<Inner>| look(&inner, version)) as _;
        threads.push(spawn("sight", Arc::clone(inner), look)?);
        Ok(())
    })();
    if started.is_err() {
        inner.quit();
    }
    started.map(|()| threads)
}

/// Follows the changes of a kind.
fn follow(inner: &Arc<Inner>, kind: Kind) {
    let store = &inner.shared.store;
    while !inner.is_over() {
        // What changed unseen is seen now.
        let (all, version) = store.list(kind, None);
        all.iter()
            .for_each(|object| heard(inner, kind, What::Added, object));
        let Ok(mut watch) = store.watch(kind, version) else {
            continue;
        };
        while !inner.is_over() {
            match watch.next(PATIENCE) {
                Ok(Some(Change { what, object, .. })) => heard(inner, kind, what, &object),
                Ok(None) => {}
                Err(StoreError::Gone { .. }) => break,
                Err(error) => {
                    log::error!("changes are not seen: {error}");
                    break;
                }
            }
        }
    }
}

fn heard(inner: &Arc<Inner>, kind: Kind, what: What, object: &Arc<Value>) {
    if kind == Kind::Pod {
        match what {
            // Who looks after it may have done that. What it left is seen.
            What::Deleted => inner.wake(object["metadata"]["uid"].as_str()),
            What::Added | What::Modified => inner.look_after(object),
        }
        return;
    }
    let namespace = object["metadata"]["namespace"].as_str();
    let workers = inner.workers();
    let own = workers.values();
    own.filter(|one| Some(one.namespace.as_str()) == namespace)
        .for_each(|one| one.inbox.objects_changed());
}

/// What there is of a pod in containerd, as far as a change of it matters.
type Sight = BTreeMap<String, BTreeSet<String>>;

/// Looks at containerd again and again.
fn look(inner: &Arc<Inner>, version: String) {
    let mut before: Option<Sight> = None;
    let mut record = Record::new(&inner.shared, version);
    let (mut asked, mut cleaned): (Option<Instant>, Option<Instant>) = (None, None);
    while !inner.is_over() {
        let is_time = |last: Option<Instant>, often| last.is_none_or(|at| at.elapsed() >= often);
        match sight(inner) {
            Ok((now, names)) => {
                if record.is_away() || is_time(asked, OFTEN) {
                    record.update(&inner.shared);
                    shorten_logs(inner);
                    asked = Some(Instant::now());
                }
                let first = before.is_none();
                let known = before.unwrap_or_default();
                changed(inner, &known, &now, &names);
                if first {
                    clean(inner, &now);
                }
                before = Some(now);
            }
            Err(error) => {
                if !error.is_away() {
                    log::warn!("containerd cannot be looked at: {error}");
                }
                record.away(&inner.shared, &error);
            }
        }
        if is_time(cleaned, SELDOM) {
            inner.shared.events.forget_old(SystemTime::now());
            cleaned = Some(Instant::now());
        }
        std::thread::sleep(SIGHT);
    }
}

/// Who a sandbox says it is of.
type Names = HashMap<String, (String, String)>;

fn sight(inner: &Inner) -> Result<(Sight, Names), CallError> {
    let shared = &inner.shared;
    let of = [(labels::NODE, shared.name.as_str())];
    let (mut sight, mut names) = (Sight::new(), Names::new());
    for one in shared.client.sandboxes(&of)? {
        let label = |name: &str| one.labels.get(name).cloned().unwrap_or_default();
        let uid = label(labels::UID);
        names.insert(uid.clone(), (label(labels::NAMESPACE), label(labels::POD)));
        let line = format!("sandbox {} {}", one.id, one.state.value());
        sight.entry(uid).or_default().insert(line);
    }
    for one in shared.client.containers(&of)? {
        let uid = one.labels.get(labels::UID).cloned().unwrap_or_default();
        let line = format!("container {} {}", one.id, one.state.value());
        sight.entry(uid).or_default().insert(line);
    }
    Ok((sight, names))
}

/// Wakes who looks after what is different, and has those looked after that nobody does: they
/// were deleted while this process was away, or there was no thread for them.
fn changed(inner: &Arc<Inner>, before: &Sight, now: &Sight, names: &Names) {
    for uid in before.keys().chain(now.keys()) {
        if before.get(uid) != now.get(uid) {
            inner.wake(Some(uid));
        }
    }
    let (stored, _) = inner.shared.store.list(Kind::Pod, None);
    let lonely = |uid: &str| !inner.workers().contains_key(uid);
    let text = |pod: &Value| pod["metadata"]["uid"].as_str().map(str::to_owned);
    for pod in &stored {
        if text(pod).is_some_and(|uid| lonely(&uid)) {
            inner.look_after(pod);
        }
    }
    for (uid, (namespace, name)) in names {
        if !lonely(uid) || stored.iter().any(|pod| text(pod).as_ref() == Some(uid)) {
            continue;
        }
        log::info!("pod {namespace}/{name} ({uid}) is in no store; it is removed");
        let metadata = json!({"namespace": namespace, "name": name, "uid": uid});
        inner.look_after(&Arc::new(json!({"metadata": metadata, "spec": {}})));
    }
}

/// Moves logs aside that are too large.
fn shorten_logs(inner: &Inner) {
    let shared = &inner.shared;
    for object in shared.store.list(Kind::Pod, None).0 {
        let Ok(pod) = Pod::read(&object) else {
            continue;
        };
        let seen = inner.last_seen(&pod.metadata.uid).unwrap_or_default();
        for one in seen.alive() {
            let log = shared.places.logs(&pod);
            let log = log.join(Places::log_of(&one.name, one.attempt));
            let done = logs::move_aside(&log, SystemTime::now()).and_then(|aside| {
                let Some(aside) = aside else {
                    return Ok(());
                };
                shared.client.reopen_log(&one.id).or_else(|error| {
                    // It goes on where it was.
                    log::warn!("{}: no new log: {error}", log.display());
                    std::fs::rename(&aside, &log)
                })
            });
            if let Err(error) = done {
                log::warn!("{}: {error}", log.display());
            }
        }
    }
}

/// Removes what is left of pods that nobody knows.
fn clean(inner: &Inner, now: &Sight) {
    let (pods, _) = inner.shared.store.list(Kind::Pod, None);
    let stored = |uid: &str| pods.iter().any(|pod| pod["metadata"]["uid"] == *uid);
    let known =
        |uid: &str| now.contains_key(uid) || stored(uid) || inner.workers().contains_key(uid);
    if let Err(error) = erase_unknown(&inner.shared.places, known) {
        log::warn!("files of pods that are gone stay: {error}");
    }
}
