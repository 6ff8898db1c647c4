//! Stops containers, each in a thread of its own: they have their time, and a pod that is to be
//! gone sooner is stopped sooner. Called by `worker`.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::asking::{Whom, Wrong};
use super::spec::Container;
use crate::cri::Client;

/// After its hook a container has at least so long, as kubelet has it.
const LEAST: Duration = Duration::from_secs(2);

/// Who is being stopped, by id, and by when.
#[derive(Clone, Debug, Default)]
pub(super) struct Kills(Arc<Mutex<HashMap<String, Instant>>>);

/// A container to be stopped.
pub(super) struct Victim {
    pub(super) id: String,
    pub(super) container: Option<Container>,
    /// The pod's address, for its hook.
    pub(super) ip: String,
    /// How long it has.
    pub(super) grace: Duration,
}

impl Kills {
    /// Stops it, unless it is being stopped so soon already; true when this is the first time.
    /// `failed` is told what its hook says, `wake` is called at the end.
    pub(super) fn stop(
        &self,
        client: &Client,
        victim: Victim,
        failed: impl FnOnce(String) + Send + 'static,
        wake: impl FnOnce() + Send + 'static,
    ) -> io::Result<bool> {
        let end = Instant::now() + victim.grace;
        let first = {
            let mut kills = self.lock();
            let before = kills.get(&victim.id).copied();
            // Clocks are read twice: a moment is no sooner.
            if before.is_some_and(|before| before <= end + Duration::from_secs(1)) {
                return Ok(false);
            }
            kills.insert(victim.id.clone(), end);
            before.is_none()
        };
        let (kills, client, id) = (self.clone(), client.clone(), victim.id.clone());
        let spawned = std::thread::Builder::new()
            .name("kill".into())
            .stack_size(super::STACK)
            .spawn(move || {
                if first && !victim.grace.is_zero() {
                    hook(&client, &victim).unwrap_or_else(failed);
                }
                let mut left = end.saturating_duration_since(Instant::now());
                if !victim.grace.is_zero() {
                    left = left.max(LEAST.min(victim.grace));
                }
                let seconds = u32::try_from(left.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
                if let Err(error) = client.stop(&victim.id, seconds)
                    && !error.is_not_found()
                {
                    log::warn!("container {} is not stopped: {error}", victim.id);
                }
                // One that was told to end sooner has the last word.
                let mut all = kills.lock();
                if all.get(&victim.id) == Some(&end) {
                    all.remove(&victim.id);
                }
                drop(all);
                wake();
            });
        if let Err(error) = spawned {
            self.lock().remove(&id);
            return Err(error);
        }
        Ok(first)
    }

    /// Whether nobody is being stopped.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Whether this one is.
    pub(super) fn has(&self, id: &str) -> bool {
        self.lock().contains_key(id)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets the container do what it wants to before its end.
fn hook(client: &Client, victim: &Victim) -> Result<(), String> {
    let Some(container) = &victim.container else {
        return Ok(());
    };
    let Some(how) = &container.lifecycle.pre_stop else {
        return Ok(());
    };
    let whom = Whom {
        client,
        container,
        id: &victim.id,
        ip: &victim.ip,
    };
    match whom.ask(how, victim.grace) {
        Err(Wrong::Bad(words)) => Err(words),
        _ => Ok(()),
    }
}
