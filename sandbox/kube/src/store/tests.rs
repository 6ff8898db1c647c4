//! What the store promises.

use std::{path::PathBuf, time::Duration};

use serde_json::json;

use super::*;

/// A file that goes with the test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("pericarp-store-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "default"}})
}

#[test]
fn what_was_answered_is_there_after_a_restart() {
    let place = Place::new("restart");
    let store = Store::open(&place.0).unwrap();
    let made = store.create(Kind::Pod, pod("a")).unwrap();
    store.create(Kind::Pod, pod("b")).unwrap();
    store.remove(Kind::Pod, "default", "b").unwrap();
    assert!(Store::open(&place.0).is_err(), "it is in use");
    let version = store.version();
    drop(store);
    let store = Store::open(&place.0).unwrap();
    assert_eq!(store.version(), version);
    assert_eq!(store.get(Kind::Pod, "default", "a").unwrap(), made);
    assert!(store.get(Kind::Pod, "default", "b").is_none());
    assert!(matches!(
        store.watch(Kind::Pod, version - 1),
        Err(StoreError::Gone { .. })
    ));
    assert!(store.watch(Kind::Pod, version).is_ok());
}

#[test]
fn names_are_unique_and_identities_stay() {
    let place = Place::new("names");
    let store = Store::open(&place.0).unwrap();
    let made = store.create(Kind::Pod, pod("a")).unwrap();
    assert!(matches!(
        store.create(Kind::Pod, pod("a")),
        Err(StoreError::AlreadyExists { .. })
    ));
    let changed = store
        .update(Kind::Pod, "default", "a", &mut |pod| {
            *pod = json!({"metadata": {"name": "z", "uid": "1"}, "spec": 1});
            Ok(())
        })
        .unwrap();
    assert_eq!(changed["metadata"]["name"], "a");
    assert_eq!(changed["metadata"]["uid"], made["metadata"]["uid"]);
    assert_ne!(
        changed["metadata"]["resourceVersion"],
        made["metadata"]["resourceVersion"]
    );
    let version = store.version();
    store
        .update(Kind::Pod, "default", "a", &mut |_| Ok(()))
        .unwrap();
    assert_eq!(store.version(), version, "nothing was changed");
    assert!(matches!(
        store.update(Kind::Pod, "other", "a", &mut |_| Ok(())),
        Err(StoreError::NotFound { .. })
    ));
}

#[test]
fn changes_are_seen_in_their_order_and_by_kind() {
    let place = Place::new("watch");
    let store = Store::open(&place.0).unwrap();
    let mut watch = store.watch(Kind::Pod, store.version()).unwrap();
    store.create(Kind::Pod, pod("a")).unwrap();
    store.create(Kind::ConfigMap, pod("m")).unwrap();
    store.remove(Kind::Pod, "default", "a").unwrap();
    let mut seen = Vec::new();
    while let Some(change) = watch.next(Duration::ZERO).unwrap() {
        seen.push((change.what, change.version));
    }
    assert_eq!(seen.len(), 2);
    assert_eq!((seen[0].0, seen[1].0), (What::Added, What::Deleted));
    assert!(seen[0].1 < seen[1].1);
    let waiting = std::thread::spawn(move || watch.next(Duration::from_secs(20)));
    store.create(Kind::Pod, pod("b")).unwrap();
    let change = waiting.join().unwrap().unwrap().unwrap();
    assert_eq!(change.object["metadata"]["name"], "b");
}

#[test]
fn who_is_too_slow_is_told() {
    let mut changes = Changes::since(0);
    let change = |version| Change {
        what: What::Added,
        kind: Kind::Pod,
        object: Arc::new(Value::Null),
        before: None,
        version,
    };
    for version in 1..=5000 {
        changes.push(change(version), 4);
    }
    assert!(!changes.reach(903));
    assert!(changes.reach(904));
    // Large ones are forgotten sooner, but for the last.
    for version in 5001..=5004 {
        changes.push(change(version), 12 << 20);
    }
    assert!(!changes.reach(5001));
    assert!(changes.reach(5002));
    changes.push(change(5005), 1 << 30);
    assert!(changes.reach(5004) && !changes.reach(5003));
}
