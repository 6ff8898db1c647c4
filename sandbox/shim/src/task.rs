//! A container of the pod: what it is shown of the host, and its processes.

use std::{
    collections::HashMap,
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pericarp_api::is_id;
use sha2::{Digest, Sha256};

use crate::{bundle::Kind, error::ShimError, process::Process, rootfs::Places};

pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) kind: Kind,
    /// The container's own, or the pod's.
    pub(crate) own: Arc<Process>,
    /// Those that were added, by id; with what they run until they are started.
    added: Mutex<HashMap<String, Added>>,
    /// None for a pod, and once it is deleted.
    places: Mutex<Option<Places>>,
    memory: Mutex<Memory>,
}

/// The connection on which the guest says that it has killed for want of memory.
#[derive(Default)]
enum Memory {
    #[default]
    Unwatched,
    Watched(UnixStream),
    /// The container is deleted.
    Over,
}

#[derive(Clone)]
pub(crate) struct Added {
    pub(crate) process: Arc<Process>,
    /// The process object.
    pub(crate) spec: Arc<[u8]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    pub(crate) fn new(
        id: &str,
        bundle: PathBuf,
        kind: Kind,
        own: Arc<Process>,
        places: Option<Places>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            bundle,
            kind,
            own,
            added: Mutex::default(),
            places: Mutex::new(places),
            memory: Mutex::default(),
        })
    }

    /// Whether it is the pod, which runs nothing of its own in the guest.
    pub(crate) fn is_pod(&self) -> bool {
        self.kind == Kind::Sandbox
    }

    /// The name of the container in the guest.
    pub(crate) fn guest_name(&self) -> &str {
        &self.own.name.container
    }

    /// The container's own process for an empty id, or one that was added.
    pub(crate) fn process(&self, exec: &str) -> Result<Arc<Process>, ShimError> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.own));
        }
        self.added(exec).map(|added| added.process)
    }

    pub(crate) fn added(&self, exec: &str) -> Result<Added, ShimError> {
        let found = lock(&self.added).get(exec).cloned();
        found.ok_or_else(|| {
            ShimError::NotFound(format!(
                "there is no process '{exec}' in container {}",
                self.id
            ))
        })
    }

    pub(crate) fn add(&self, exec: &str, added: Added) -> Result<(), ShimError> {
        let mut all = lock(&self.added);
        if all.contains_key(exec) {
            let text = format!("there is a process '{exec}' in container {}", self.id);
            return Err(ShimError::Exists(text));
        }
        all.insert(exec.to_owned(), added);
        Ok(())
    }

    pub(crate) fn forget(&self, exec: &str) {
        lock(&self.added).remove(exec);
    }

    /// Remembers where the guest speaks of its memory. False when it is deleted by now.
    pub(crate) fn watch_memory(&self, connection: UnixStream) -> bool {
        let mut memory = lock(&self.memory);
        if matches!(*memory, Memory::Over) {
            return false;
        }
        *memory = Memory::Watched(connection);
        true
    }

    /// Lets go of everything that joins it to the guest, whatever that still sends.
    pub(crate) fn cut(&self) {
        let memory = std::mem::replace(&mut *lock(&self.memory), Memory::Over);
        if let Memory::Watched(connection) = memory {
            // It may have ended by itself.
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.own.cut();
        let added: Vec<Added> = lock(&self.added).values().cloned().collect();
        for added in added {
            added.process.cut();
        }
    }

    /// Takes away what it is shown of the host.
    pub(crate) fn leave_places(&self) {
        drop(lock(&self.places).take());
    }
}

/// What the agent calls what containerd calls `id`: the same, unless that is longer or odder than
/// the agent takes.
pub(crate) fn guest_id(id: &str) -> String {
    if is_id(id) {
        return id.to_owned();
    }
    let digest = Sha256::digest(id.as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_kept_where_the_agent_takes_them() {
        assert_eq!(guest_id("web-1"), "web-1");
        let long = guest_id(&"x".repeat(76));
        assert!(is_id(&long) && long.len() == 64);
        assert_ne!(long, guest_id(&"x".repeat(75)));
    }
}
