//! The last changes of a kind, and who waits for further ones.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{Kind, Memory, Store, StoreError};

/// So many changes of each kind are remembered, unless they have more bytes than this.
const REMEMBERED: usize = 4096;
const BYTES: usize = 32 << 20;

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It is new.
    Added,
    /// It is another than it was.
    Modified,
    /// It is gone.
    Deleted,
}

/// One change.
#[derive(Clone, Debug)]
pub struct Change {
    /// What happened.
    pub what: What,
    /// The object's kind.
    pub kind: Kind,
    /// The object after the change; what it was last if it is gone.
    pub object: Arc<Value>,
    /// The object before the change, if there was one.
    pub before: Option<Arc<Value>>,
    /// The version it made.
    pub version: u64,
}

/// The last changes, oldest first.
#[derive(Debug)]
pub(super) struct Changes {
    /// Each with the bytes of its object, as text.
    last: VecDeque<(Change, usize)>,
    bytes: usize,
    /// All changes after this version are here.
    since: u64,
}

impl Changes {
    pub(super) fn since(version: u64) -> Self {
        Self {
            last: VecDeque::new(),
            bytes: 0,
            since: version,
        }
    }

    pub(super) fn push(&mut self, change: Change, bytes: usize) {
        self.last.push_back((change, bytes));
        self.bytes += bytes;
        // The last one stays, however large.
        while self.last.len() > 1 && (self.last.len() > REMEMBERED || self.bytes > BYTES) {
            if let Some((oldest, bytes)) = self.last.pop_front() {
                self.since = oldest.version;
                self.bytes -= bytes;
            }
        }
    }

    /// Whether all changes after `version` are here.
    pub(super) fn reach(&self, version: u64) -> bool {
        version >= self.since
    }

    fn after(&self, version: u64) -> Option<&Change> {
        let seen = |(one, _): &(Change, usize)| one.version <= version;
        let index = self.last.partition_point(seen);
        self.last.get(index).map(|(change, _)| change)
    }
}

/// Sees the changes of one kind, in their order. It costs nothing while nobody asks it.
#[derive(Debug)]
pub struct Watch {
    pub(super) store: Store,
    pub(super) kind: Kind,
    /// All changes up to this one have been seen.
    pub(super) version: u64,
}

impl Watch {
    /// The next change, or `None` when there was none in time. For threads.
    ///
    /// # Errors
    /// [`StoreError::Gone`] for who was so slow that changes are forgotten: list, and watch anew.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Change>, StoreError> {
        let end = Instant::now() + timeout;
        let store = self.store.clone();
        let mut memory = store.memory();
        loop {
            if let Some(change) = self.seen(&memory)? {
                return Ok(Some(change));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = store.0.changed.wait_timeout(memory, left);
            memory = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next change, whenever it comes. For tasks; nothing is lost when it is given up.
    ///
    /// # Errors
    /// As [`Watch::next`].
    pub async fn changed(&mut self) -> Result<Change, StoreError> {
        let store = self.store.clone();
        loop {
            // Enrolled before looking, so that no change falls in between.
            let mut notified = pin!(store.0.notify.notified());
            notified.as_mut().enable();
            let change = self.seen(&store.memory())?;
            if let Some(change) = change {
                return Ok(change);
            }
            notified.await;
        }
    }

    /// The version up to which all has been seen.
    pub fn version(&self) -> u64 {
        self.version
    }

    fn seen(&mut self, memory: &Memory) -> Result<Option<Change>, StoreError> {
        let gone = StoreError::Gone {
            version: self.version,
        };
        let Some(changes) = memory.changes.get(&self.kind) else {
            return Err(gone);
        };
        if !changes.reach(self.version) {
            return Err(gone);
        }
        let change = changes.after(self.version).cloned();
        // When nothing of ours changed, what others changed needs not be remembered for us.
        self.version = change.as_ref().map_or(memory.version, |one| one.version);
        Ok(change)
    }
}
