//! The objects, in memory and on disk, and what changed of them.
//!
//! Called by `http` for clients and by `node`, which makes pods run. What is answered has been
//! written: a change is committed to the file before anybody sees it, so that a restart loses
//! nothing. Reads take memory's lock only and never wait for the disk. Nothing here knows what an
//! object may be; `objects` does.

mod changes;
mod error;
mod file;
mod kind;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use self::{changes::Changes, file::File};
pub use self::{
    changes::{Change, Watch, What},
    error::StoreError,
    kind::Kind,
};

/// Namespace (empty for what belongs to none) and name.
type Key = (String, String);
/// Changes an object, or refuses to.
pub type Edit<'a> = dyn FnMut(&mut Value) -> Result<(), StoreError> + 'a;

/// The objects of one node. Clones are the same store.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Held while a change is made, its writing included: changes have one order.
    file: Mutex<File>,
    memory: Mutex<Memory>,
    /// Wakes threads that wait for changes.
    changed: Condvar,
    /// Wakes tasks that do.
    notify: Notify,
}

#[derive(Debug)]
struct Memory {
    objects: BTreeMap<Kind, BTreeMap<Key, Arc<Value>>>,
    changes: BTreeMap<Kind, Changes>,
    version: u64,
}

impl Store {
    /// Opens the store in this file, which is made if it is not there.
    ///
    /// # Errors
    /// When it is in use, cannot be written or is no store.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (file, kept) = File::open(path)?;
        let mut objects: BTreeMap<Kind, BTreeMap<Key, Arc<Value>>> = BTreeMap::new();
        for (kind, object) in kept.objects {
            let key = key_of(kind, &object);
            objects
                .entry(kind)
                .or_default()
                .insert(key, Arc::new(object));
        }
        let version = kept.version;
        let changes = Kind::ALL.map(|kind| (kind, Changes::since(version)));
        Ok(Self(Arc::new(Inner {
            file: Mutex::new(file),
            memory: Mutex::new(Memory {
                objects,
                changes: changes.into(),
                version,
            }),
            changed: Condvar::new(),
            notify: Notify::new(),
        })))
    }

    /// The object of that name; the namespace is empty for what belongs to none.
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Arc<Value>> {
        self.memory()
            .find(kind, &(namespace.to_owned(), name.to_owned()))
    }

    /// All objects of a kind, of one namespace or of all, in the order of their names, and the
    /// version they are of.
    pub fn list(&self, kind: Kind, namespace: Option<&str>) -> (Vec<Arc<Value>>, u64) {
        let memory = self.memory();
        let all = memory.objects.get(&kind).into_iter().flatten();
        let wanted = all.filter(|(key, _)| namespace.is_none_or(|one| one == key.0));
        let list = wanted.map(|(_, object)| Arc::clone(object)).collect();
        (list, memory.version)
    }

    /// The version of the last change.
    pub fn version(&self) -> u64 {
        self.memory().version
    }

    /// Keeps a new object, which gets its uid, its time and its version.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`]; when it cannot be written.
    pub fn create(&self, kind: Kind, mut object: Value) -> Result<Arc<Value>, StoreError> {
        let mut file = self.file();
        let key = key_of(kind, &object);
        if key.1.is_empty() {
            return Err(StoreError::Invalid("metadata.name: is missing".into()));
        }
        if self.memory().find(kind, &key).is_some() {
            return Err(StoreError::AlreadyExists { kind, name: key.1 });
        }
        stamp(&mut object)?;
        self.put(&mut file, What::Added, kind, key, object)
    }

    /// Changes an object under the store's lock. Its name, uid and time stay what they are. When
    /// nothing is changed, no version is spent.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; what `change` says; when it cannot be written.
    pub fn update(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        change: &mut Edit<'_>,
    ) -> Result<Arc<Value>, StoreError> {
        let mut file = self.file();
        let key = (namespace.to_owned(), name.to_owned());
        let old = self.found(kind, &key)?;
        let mut object = (*old).clone();
        change(&mut object)?;
        if !object.is_object() {
            return Err(StoreError::Invalid("it is not an object".into()));
        }
        keep_identity(&old, &mut object);
        if object == *old {
            return Ok(old);
        }
        self.put(&mut file, What::Modified, kind, key, object)
    }

    /// Forgets an object; what it was last, with the version of its end.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; when it cannot be written.
    pub fn remove(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Value>, StoreError> {
        self.remove_if(kind, namespace, name, &mut |_| Ok(()))
    }

    /// The same, if `check` allows it: nothing can change in between.
    ///
    /// # Errors
    /// As [`Store::remove`]; what `check` says.
    pub fn remove_if(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        check: &mut dyn FnMut(&Value) -> Result<(), StoreError>,
    ) -> Result<Arc<Value>, StoreError> {
        let mut file = self.file();
        let key = (namespace.to_owned(), name.to_owned());
        let old = self.found(kind, &key)?;
        check(&old)?;
        self.put(&mut file, What::Deleted, kind, key, (*old).clone())
    }

    /// All changes of a kind after `version`.
    ///
    /// # Errors
    /// [`StoreError::Gone`] if they are not remembered any more.
    pub fn watch(&self, kind: Kind, version: u64) -> Result<Watch, StoreError> {
        let memory = self.memory();
        let remembered = memory.changes.get(&kind).is_some_and(|c| c.reach(version));
        if !remembered || version > memory.version {
            return Err(StoreError::Gone { version });
        }
        Ok(Watch {
            store: self.clone(),
            kind,
            version,
        })
    }

    fn found(&self, kind: Kind, key: &Key) -> Result<Arc<Value>, StoreError> {
        let found = self.memory().find(kind, key);
        found.ok_or_else(|| StoreError::NotFound {
            kind,
            name: key.1.clone(),
        })
    }

    /// Writes one change, then lets it be seen.
    fn put(
        &self,
        file: &mut MutexGuard<'_, File>,
        what: What,
        kind: Kind,
        key: Key,
        mut object: Value,
    ) -> Result<Arc<Value>, StoreError> {
        let version = self.memory().version + 1;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let text = object.to_string();
        let kept = (what != What::Deleted).then_some(text.as_str());
        file.write(kind, &key, kept, version)?;
        let object = Arc::new(object);
        let mut memory = self.memory();
        let all = memory.objects.entry(kind).or_default();
        let before = match what {
            What::Deleted => all.remove(&key),
            What::Added | What::Modified => all.insert(key, Arc::clone(&object)),
        };
        memory.version = version;
        if let Some(changes) = memory.changes.get_mut(&kind) {
            let change = Change {
                what,
                kind,
                object: Arc::clone(&object),
                before,
                version,
            };
            changes.push(change, text.len());
        }
        drop(memory);
        self.0.changed.notify_all();
        self.0.notify.notify_waiters();
        Ok(object)
    }

    /// Nobody panics while holding it; if somebody does, memory is still as it was committed.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> MutexGuard<'_, File> {
        self.0.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    fn find(&self, kind: Kind, key: &Key) -> Option<Arc<Value>> {
        self.objects.get(&kind)?.get(key).cloned()
    }
}

/// Now, as Kubernetes writes times.
pub fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// A new unique name.
///
/// # Errors
/// When the kernel gives none.
pub fn new_uid() -> Result<String, StoreError> {
    let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    let uid = uid.map_err(|error| StoreError::Disk(Box::new(redb::Error::Io(error))))?;
    Ok(uid.trim().to_owned())
}

/// Text at `metadata.FIELD`, empty if there is none.
fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

fn key_of(kind: Kind, object: &Value) -> Key {
    let namespace = match kind.namespaced() {
        true => text(object, "namespace"),
        false => "",
    };
    (namespace.to_owned(), text(object, "name").to_owned())
}

fn stamp(object: &mut Value) -> Result<(), StoreError> {
    let not_an_object = || StoreError::Invalid("metadata: is not an object".into());
    let metadata = object.get_mut("metadata").and_then(Value::as_object_mut);
    let metadata: &mut Map<String, Value> = metadata.ok_or_else(not_an_object)?;
    metadata.insert("uid".into(), new_uid()?.into());
    metadata.insert("creationTimestamp".into(), now().into());
    Ok(())
}

fn keep_identity(old: &Value, object: &mut Value) {
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "resourceVersion",
    ] {
        match old["metadata"].get(field) {
            Some(value) => object["metadata"][field] = value.clone(),
            None => {
                if let Some(metadata) = object["metadata"].as_object_mut() {
                    metadata.remove(field);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
