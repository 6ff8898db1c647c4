//! What happened to pods, for `kubectl describe`. Called by everything in `node` that does
//! something. An event that happens again is counted, not written again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::spec::Pod;
use super::status::time;
use crate::store::{Kind, Store, StoreError};

/// How long events are kept.
const KEPT: Duration = Duration::from_secs(3600);
/// So many are remembered to be counted.
const REMEMBERED: usize = 4096;
/// A message is no longer than Kubernetes takes it.
const LONGEST: usize = 1024;

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    Normal,
    Warning,
}

/// Where events go.
#[derive(Clone, Debug)]
pub(super) struct Events {
    store: Store,
    node: String,
    /// The names of the last events by what they say.
    known: Arc<Mutex<HashMap<[String; 4], String>>>,
}

impl Events {
    pub(super) fn new(store: &Store, node: &str) -> Self {
        Self {
            store: store.clone(),
            node: node.into(),
            known: Arc::default(),
        }
    }

    /// Says that something happened to a pod, or to a container of it.
    pub(super) fn tell(
        &self,
        pod: &Pod,
        container: Option<&str>,
        sort: Sort,
        reason: &str,
        message: &str,
    ) {
        let of = &pod.metadata;
        let place = container.map(|name| {
            let first = pod.spec.init_containers.iter();
            let list = match first.clone().any(|one| one.name == name) {
                true => "initContainers",
                false => "containers",
            };
            format!("spec.{list}{{{name}}}")
        });
        let place = place.unwrap_or_default();
        let message: String = message.chars().take(LONGEST).collect();
        let key = [
            of.uid.clone(),
            place.clone(),
            reason.into(),
            message.clone(),
        ];
        let now = time(SystemTime::now());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = known.get(&key)
            && self.again(&of.namespace, name, &now)
        {
            return;
        }
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let name = format!("{}.{:x}", of.name, since.unwrap_or_default().as_nanos());
        let mut involved = json!({
            "apiVersion": "v1", "kind": "Pod",
            "name": of.name, "namespace": of.namespace, "uid": of.uid,
        });
        if !place.is_empty() {
            involved["fieldPath"] = json!(place);
        }
        let event = json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": name, "namespace": of.namespace},
            "involvedObject": involved,
            "type": match sort { Sort::Normal => "Normal", Sort::Warning => "Warning" },
            "reason": reason,
            "message": message,
            "source": {"component": "pericarp", "host": self.node},
            "reportingComponent": "pericarp",
            "reportingInstance": self.node,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        match self.store.create(Kind::Event, event) {
            Ok(_) => {
                if known.len() >= REMEMBERED {
                    known.clear();
                }
                known.insert(key, name);
            }
            Err(error) => log::warn!("an event is lost ({reason}: {message}): {error}"),
        }
    }

    /// Says what happened to a pod at this time, unless that is said already or long ago.
    pub(super) fn tell_once(
        &self,
        pod: &Pod,
        container: Option<&str>,
        reason: &str,
        message: &str,
        at: SystemTime,
    ) {
        let is_old = SystemTime::now()
            .duration_since(at)
            .is_ok_and(|age| age > KEPT);
        let cut: String = message.chars().take(LONGEST).collect();
        let (events, _) = self.store.list(Kind::Event, Some(&pod.metadata.namespace));
        // Times are whole seconds, and have one form.
        let since = time(at);
        let is_said = events.iter().any(|event| {
            event["involvedObject"]["uid"] == *pod.metadata.uid
                && event["reason"] == reason
                && event["message"] == cut
                && event["lastTimestamp"]
                    .as_str()
                    .is_some_and(|said| said >= since.as_str())
        });
        if !is_old && !is_said {
            self.tell(pod, container, Sort::Warning, reason, message);
        }
    }

    /// Counts one more; false when the event is not kept any more.
    fn again(&self, namespace: &str, name: &str, now: &str) -> bool {
        let done = self
            .store
            .update(Kind::Event, namespace, name, &mut |event| {
                let count = event["count"].as_u64().unwrap_or(1);
                event["count"] = json!(count + 1);
                event["lastTimestamp"] = json!(now);
                Ok(())
            });
        match done {
            Err(StoreError::NotFound { .. }) => false,
            Err(error) => {
                log::warn!("an event is not counted: {error}");
                true
            }
            Ok(_) => true,
        }
    }

    /// Forgets what happened long ago.
    pub(super) fn forget_old(&self, now: SystemTime) {
        let (events, _) = self.store.list(Kind::Event, None);
        let text =
            |event: &Value, field: &str| event["metadata"][field].as_str().map(str::to_owned);
        for event in events {
            if !is_old(&event, now) {
                continue;
            }
            let (namespace, name) = (text(&event, "namespace"), text(&event, "name"));
            let namespace = namespace.unwrap_or_default();
            let gone = self
                .store
                .remove(Kind::Event, &namespace, &name.unwrap_or_default());
            if let Err(error) = gone {
                log::warn!("an old event stays: {error}");
            }
        }
    }
}

fn is_old(event: &Value, now: SystemTime) -> bool {
    let said = ["lastTimestamp", "eventTime", "firstTimestamp"];
    let said = said.iter().find_map(|field| event[*field].as_str());
    let said = said.or(event["metadata"]["creationTimestamp"].as_str());
    let at = said.and_then(|text| humantime::parse_rfc3339(text).ok());
    at.is_none_or(|at| now.duration_since(at).is_ok_and(|age| age > KEPT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;

    #[test]
    fn events_are_counted_and_forgotten() {
        let scratch = Scratch::new();
        let store = Store::open(&scratch.path().join("store")).unwrap();
        let pod = Pod::read(&json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"initContainers": [{"name": "i"}], "containers": [{"name": "c"}]},
        }))
        .unwrap();
        let events = Events::new(&store, "node");
        for _ in 0..3 {
            events.tell(&pod, Some("c"), Sort::Warning, "BackOff", "again");
        }
        events.tell(
            &pod,
            Some("i"),
            Sort::Normal,
            "Started",
            "Started container i",
        );
        let (all, _) = store.list(Kind::Event, Some("n"));
        let counts: Vec<_> = all
            .iter()
            .map(|event| event["count"].as_u64().unwrap())
            .collect();
        assert_eq!(counts, [3, 1]);
        assert_eq!(all[0]["involvedObject"]["fieldPath"], "spec.containers{c}");
        assert_eq!(
            all[1]["involvedObject"]["fieldPath"],
            "spec.initContainers{i}"
        );
        events.forget_old(SystemTime::now());
        assert_eq!(store.list(Kind::Event, None).0.len(), 2);
        events.forget_old(SystemTime::now() + KEPT * 2);
        assert_eq!(store.list(Kind::Event, None).0.len(), 0);
        // What is not kept any more is written anew, and what is said already is not said again, by
        // another process either.
        events.tell(&pod, Some("c"), Sort::Warning, "BackOff", "again");
        assert_eq!(store.list(Kind::Event, None).0.len(), 1);
        let now = SystemTime::now();
        for at in [now, now, now - KEPT * 2] {
            let events = Events::new(&store, "node");
            events.tell_once(&pod, None, "MachineEnded", "why", at);
        }
        let (all, _) = store.list(Kind::Event, None);
        let said: Vec<_> = all.iter().map(|event| &event["message"]).collect();
        assert_eq!(said, ["again", "why"]);
        assert_eq!(all[1]["count"], 1);
    }
}
