//! What happens without being asked for: old events go, and namespaces that are being deleted become
//! empty and go, too.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use super::{Api, verbs};
use crate::{
    objects::name_of,
    store::{Kind, Store, StoreError},
};

/// How often.
const EVERY: Duration = Duration::from_secs(1);
/// How long an event is kept, as Kubernetes does.
const EVENTS_LAST: Duration = Duration::from_secs(60 * 60);
/// So many are kept: a pod that fails for days writes many.
const EVENTS: usize = 2000;
/// Looking through them all is done this seldom.
const LOOK_THROUGH_EVENTS: u32 = 30;

/// Sweeps for ever.
pub(super) async fn sweep(api: Arc<Api>) {
    let mut turn = 0_u32;
    loop {
        tokio::time::sleep(EVERY).await;
        turn = turn.wrapping_add(1);
        let api = Arc::clone(&api);
        let swept = tokio::task::spawn_blocking(move || {
            if turn.is_multiple_of(LOOK_THROUGH_EVENTS) {
                old_events(&api.store, SystemTime::now());
            }
            ending_namespaces(&api.store);
        });
        if swept.await.is_err() {
            log::error!("the sweep for old events and namespaces failed");
        }
    }
}

fn old_events(store: &Store, now: SystemTime) {
    let (events, _) = store.list(Kind::Event, None);
    let time = |event: &Value| {
        let of = |field: &str| humantime::parse_rfc3339(event[field].as_str()?).ok();
        let made = event["metadata"]["creationTimestamp"].as_str();
        let made = made.and_then(|made| humantime::parse_rfc3339(made).ok());
        of("lastTimestamp").or(of("eventTime")).or(made)
    };
    let mut kept: Vec<_> = events.iter().map(|event| (time(event), event)).collect();
    kept.sort_by_key(|(time, _)| *time);
    let too_many = kept.len().saturating_sub(EVENTS);
    for (index, (time, event)) in kept.into_iter().enumerate() {
        let age = time.and_then(|time| now.duration_since(time).ok());
        if index < too_many || age.is_some_and(|age| age > EVENTS_LAST) {
            forget(store, Kind::Event, event);
        }
    }
}

fn forget(store: &Store, kind: Kind, object: &Value) {
    let namespace = object["metadata"]["namespace"].as_str();
    match store.remove(kind, namespace.unwrap_or_default(), &name_of(object)) {
        Ok(_) | Err(StoreError::NotFound { .. }) => {}
        Err(error) => log::warn!("{} {}: {error}", kind.plural(), name_of(object)),
    }
}

fn ending_namespaces(store: &Store) {
    let (namespaces, _) = store.list(Kind::Namespace, None);
    for namespace in namespaces {
        if namespace["metadata"]["deletionTimestamp"].is_null() {
            continue;
        }
        let name = name_of(&namespace);
        for kind in [Kind::ConfigMap, Kind::Secret, Kind::Event] {
            // Pods may still need what they have mounted: they go first.
            if !store.list(Kind::Pod, Some(&name)).0.is_empty() {
                break;
            }
            for object in store.list(kind, Some(&name)).0 {
                forget(store, kind, &object);
            }
        }
        for pod in store.list(Kind::Pod, Some(&name)).0 {
            if !pod["metadata"]["deletionTimestamp"].is_null() {
                continue;
            }
            let ended = store.update(Kind::Pod, &name, &name_of(&pod), &mut |pod| {
                verbs::end_pod(pod, None);
                Ok(())
            });
            if let Err(error) = ended {
                log::warn!("pods {}: {error}", name_of(&pod));
            }
        }
        let empty = [Kind::Pod, Kind::ConfigMap, Kind::Secret, Kind::Event]
            .iter()
            .all(|kind| store.list(*kind, Some(&name)).0.is_empty());
        if empty {
            forget(store, Kind::Namespace, &namespace);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_namespace_goes_when_it_is_empty_and_old_events_go() {
        let path = std::env::temp_dir().join(format!("pericarp-sweep-{}", std::process::id()));
        let store = Store::open(&path).unwrap();
        let inside = |name: &str| json!({"metadata": {"name": name, "namespace": "n"}});
        let ending =
            json!({"metadata": {"name": "n", "deletionTimestamp": "2026-01-01T00:00:00Z"}});
        store.create(Kind::Namespace, ending).unwrap();
        store.create(Kind::Pod, inside("p")).unwrap();
        store.create(Kind::ConfigMap, inside("m")).unwrap();
        ending_namespaces(&store);
        let pod = store.get(Kind::Pod, "n", "p").unwrap();
        assert!(pod["metadata"]["deletionTimestamp"].is_string());
        assert!(store.get(Kind::ConfigMap, "n", "m").is_some());
        store.remove(Kind::Pod, "n", "p").unwrap();
        ending_namespaces(&store);
        assert!(store.get(Kind::ConfigMap, "n", "m").is_none());
        assert!(store.get(Kind::Namespace, "", "n").is_none());
        store.create(Kind::Event, inside("e")).unwrap();
        let now = SystemTime::now();
        old_events(&store, now);
        assert!(store.get(Kind::Event, "n", "e").is_some());
        old_events(&store, now + EVENTS_LAST + Duration::from_secs(2));
        assert!(store.get(Kind::Event, "n", "e").is_none());
        std::fs::remove_file(&path).unwrap();
    }
}
