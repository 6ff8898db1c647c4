//! One pod: looks at it, does what is next, says how it is, and waits. Called by `node`, a thread
//! for each pod.
//!
//! ```text
//! worker  the loop, and a pod that runs
//! making  sandboxes and containers come
//! ending  a pod goes, and all that it had
//! report  its status, and what it has too much of
//! causes  why it is not well, as its shim says it
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::backoff::{Backoff, Turn};
use super::causes::Placed;
use super::events::Sort;
use super::health;
use super::images::Pulls;
use super::kills::{Kills, Victim};
use super::plan::{self, Health, Kill, Plan, SandboxNeed, Start};
use super::probes::{Probes, Told};
use super::seen::{Instance, Seen, State};
use super::shared::Shared;
use super::spec::{Container, Pod, seconds};
use super::status::{self, Reason, Waits};
use crate::cri::CallError;
use crate::store::Kind;

/// How long a pod is left alone of which nothing is expected.
const IDLE: Duration = Duration::from_secs(60);
/// How long it is waited until something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long it is waited for what comes at once.
const SOON: Duration = Duration::from_millis(100);

/// How a worker is told that there is something to look at.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    woken: Mutex<bool>,
    wake: Condvar,
    quit: AtomicBool,
    /// A ConfigMap or a Secret is another: what failed for the want of one is tried at once.
    objects: AtomicBool,
}

impl Inbox {
    /// Something changed.
    pub(super) fn wake(&self) {
        *self.lock() = true;
        self.wake.notify_all();
    }

    /// A ConfigMap or a Secret of its namespace changed.
    pub(super) fn objects_changed(&self) {
        self.objects.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// The node ends. The pod goes on.
    pub(super) fn quit(&self) {
        self.quit.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn is_over(&self) -> bool {
        self.quit.load(Ordering::Relaxed)
    }

    fn wait(&self, time: Duration) {
        let woken = self.lock();
        let waited = self.wake.wait_timeout_while(woken, time, |woken| !*woken);
        let (mut woken, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *woken = false;
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a look at a pod came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is gone, and so is all that it had.
    Gone,
    /// It is looked at again after this time, or when something changed.
    After(Duration),
}

impl Next {
    /// The sooner of two.
    pub(super) fn or_after(self, time: Duration) -> Self {
        match self {
            Self::Gone => Self::Gone,
            Self::After(other) => Self::After(other.min(time)),
        }
    }
}

/// A pod and what is remembered of it. All of it can be forgotten: containerd and the store know
/// what counts.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) inbox: Arc<Inbox>,
    /// What containerd had at the last look, for others.
    pub(super) seen: Arc<Mutex<Option<Seen>>>,
    /// The object as it was last in the store.
    pub(super) object: Arc<Value>,
    /// It is not in the store any more.
    pub(super) is_forced: bool,
    pub(super) probes: Probes,
    pub(super) waits: Waits,
    pub(super) pulls: Pulls,
    pub(super) kills: Kills,
    pub(super) backoff: Backoff,
    /// The attempts for which the time has come, by the names of their containers.
    pub(super) allowed: HashMap<String, u32>,
    /// When something about a container failed that left no container.
    pub(super) failed: HashMap<String, SystemTime>,
    /// Why it has failed as a whole.
    pub(super) verdict: Option<Reason>,
    /// By when its containers have to be gone.
    pub(super) end: Option<Instant>,
    pub(super) measured: Option<Instant>,
    /// What was written down of it at the last look.
    pub(super) causes: Vec<Placed>,
}

impl Worker {
    pub(super) fn new(shared: &Arc<Shared>, object: Arc<Value>) -> Self {
        Self {
            shared: Arc::clone(shared),
            inbox: Arc::default(),
            seen: Arc::default(),
            object,
            is_forced: false,
            probes: Probes::default(),
            waits: Waits::new(),
            pulls: Pulls::default(),
            kills: Kills::default(),
            backoff: Backoff::default(),
            allowed: HashMap::new(),
            failed: HashMap::new(),
            verdict: None,
            end: None,
            measured: None,
            causes: Vec::new(),
        }
    }

    /// Looks after the pod until it is gone or the node ends; whether it is gone.
    pub(super) fn run(mut self) -> bool {
        while !self.inbox.is_over() {
            match self.look() {
                Next::Gone => return true,
                Next::After(time) => self.inbox.wait(time),
            }
        }
        self.probes.end();
        false
    }

    fn look(&mut self) -> Next {
        self.read();
        if self.inbox.objects.swap(false, Ordering::Relaxed) {
            self.failed.clear();
        }
        let pod = match Pod::read(&self.object) {
            Ok(pod) => pod,
            Err(error) => return self.unreadable(&error),
        };
        let seen = match self.see(&pod) {
            Ok(seen) => seen,
            Err(error) => return self.lost(&error),
        };
        self.learn(&pod, &seen);
        let ends = self.is_forced || pod.metadata.deletion_timestamp.is_some();
        let next = if ends {
            self.end(&pod, &seen)
        } else {
            self.keep_up(&pod, &seen)
        };
        next.unwrap_or_else(|error| self.lost(&error))
    }

    /// The pod as the store has it now.
    fn read(&mut self) {
        let of = |field: &str| self.object["metadata"][field].as_str().unwrap_or_default();
        let found = self
            .shared
            .store
            .get(Kind::Pod, of("namespace"), of("name"));
        match found.filter(|found| found["metadata"]["uid"] == self.object["metadata"]["uid"]) {
            Some(found) => self.object = found,
            None => self.is_forced = true,
        }
    }

    /// A pod that was admitted and makes no sense all the same is said to have failed.
    fn unreadable(&mut self, error: &serde_json::Error) -> Next {
        if self.is_forced || !self.object["metadata"]["deletionTimestamp"].is_null() {
            // Nothing of it ever ran.
            self.shared.forget(&self.object);
            return Next::Gone;
        }
        let reason = Reason::new("Invalid", error.to_string());
        self.fail_unread(&reason);
        Next::After(IDLE)
    }

    /// Containerd did not do what it was asked for; it is asked again.
    pub(super) fn lost(&self, error: &CallError) -> Next {
        if !error.is_away() {
            let name = self.object["metadata"]["name"].as_str().unwrap_or_default();
            log::warn!("pod {name}: {error}");
        }
        Next::After(RETRY)
    }

    /// What containerd has of the pod.
    pub(super) fn see(&self, pod: &Pod) -> Result<Seen, CallError> {
        let shared = &self.shared;
        let seen = Seen::look(&shared.client, &shared.name, &pod.metadata.uid)?;
        let mut last = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(seen.clone());
        Ok(seen)
    }

    /// A pod that is not to be deleted.
    fn keep_up(&mut self, pod: &Pod, seen: &Seen) -> Result<Next, CallError> {
        if status::is_over(&self.object["status"]) {
            return self.settle(pod, seen);
        }
        self.watch(pod, seen);
        if self.verdict.is_none() {
            self.verdict = self.judge(pod);
            if let Some(verdict) = &self.verdict {
                self.note(pod, seen, None, &verdict.message);
            }
        }
        if self.verdict.is_some() {
            self.say(pod, seen, true);
            return Ok(Next::After(SOON));
        }
        if let Err(failed) = self.refresh(pod, seen) {
            log::warn!("pod {}: {failed}", pod.full_name());
        }
        let healths = |id: &str| self.probes.health(id);
        let plan = plan::run(pod, seen, &healths);
        let over = plan.over && seen.alive().next().is_none();
        let (next, acted) = self.act(pod, seen, plan)?;
        let mut seen = seen.clone();
        if acted {
            seen = self.see(pod)?;
            // Who was just started is not well before it says so.
            self.watch(pod, &seen);
        }
        self.say(pod, &seen, over);
        self.tidy(pod, &seen);
        // What was done has made something else be next.
        Ok(match acted {
            true => Next::After(Duration::ZERO),
            false => next
                .or_after(self.until_judged(pod))
                .or_after(self.until_learned(pod, &seen)),
        })
    }

    /// A pod that has run: nothing of it may still do so.
    fn settle(&mut self, pod: &Pod, seen: &Seen) -> Result<Next, CallError> {
        self.probes.end();
        let plan = plan::end(pod, seen);
        let grace = Duration::from_secs(seconds(pod.spec.termination_grace_period_seconds).into());
        let nobody = plan.kill.is_empty();
        for kill in plan.kill {
            self.stop(pod, seen, &kill, grace);
        }
        if nobody && let Some(sandbox) = seen.ready() {
            self.shared.client.stop_sandbox(&sandbox.id)?;
            return Ok(Next::After(Duration::ZERO));
        }
        self.say(pod, seen, true);
        self.tidy(pod, seen);
        let next = Next::After(if nobody { IDLE } else { RETRY });
        Ok(next.or_after(self.until_learned(pod, seen)))
    }

    /// Has those that run be asked how they are.
    fn watch(&mut self, pod: &Pod, seen: &Seen) {
        let running = |id: &str| {
            let mut all = seen.containers.iter();
            all.any(|one| one.id == id && one.state == State::Running)
        };
        self.probes.keep(running);
        let Some(sandbox) = seen.ready() else {
            return;
        };
        let ip = self.shared.ip_of(pod, sandbox);
        let told = self.told(pod);
        for container in pod.all_containers() {
            let Some(one) = seen.current(&container.name) else {
                continue;
            };
            if one.state != State::Running {
                continue;
            }
            let was = self.was(one);
            let client = &self.shared.client;
            let watched = self.probes.watch(client, container, one, &ip, was, &told);
            if let Err(error) = watched {
                log::warn!("pod {}: no probes: {error}", pod.full_name());
            }
        }
    }

    /// How a container was said to be. It is asked anew after this process was restarted, and has
    /// not changed by that.
    fn was(&self, one: &Instance) -> Health {
        let name = status::name_of(one);
        let lists = ["containerStatuses", "initContainerStatuses"];
        let mut all = lists
            .iter()
            .filter_map(|list| self.object["status"][*list].as_array())
            .flatten();
        let said = all.find(|said| said["containerID"] == *name);
        let is = |field: &str| said.is_some_and(|said| said[field] == true);
        Health {
            started: is("started"),
            ready: is("ready"),
            failed: None,
        }
    }

    fn told(&self, pod: &Pod) -> Arc<Told> {
        let (events, inbox) = (self.shared.events.clone(), Arc::clone(&self.inbox));
        let pod = pod.clone();
        Arc::new(move |name: &str, kind: health::Kind, answer, changed| {
            if let Err(words) = answer {
                let message = format!("{} probe failed: {words}", kind.name());
                events.tell(&pod, Some(name), Sort::Warning, "Unhealthy", &message);
            }
            if changed {
                inbox.wake();
            }
        })
    }

    /// Does what is planned; when to look again, and whether anything was done.
    fn act(&mut self, pod: &Pod, seen: &Seen, plan: Plan) -> Result<(Next, bool), CallError> {
        let mut next = Next::After(IDLE);
        let mut acted = false;
        for kill in &plan.kill {
            let grace = grace(pod, kill);
            self.stop(pod, seen, kill, grace);
            next = next.or_after(RETRY);
        }
        if plan.over {
            if plan.kill.is_empty()
                && let Some(sandbox) = seen.ready()
            {
                self.shared.client.stop_sandbox(&sandbox.id)?;
                acted = true;
            }
            return Ok((next, acted));
        }
        if let SandboxNeed::Make(attempt) = plan.sandbox {
            return self.make_sandbox(pod, seen, attempt);
        }
        for id in &plan.remove {
            self.shared.client.remove(id)?;
            acted = true;
        }
        for start in &plan.start {
            match self.begin(pod, seen, start)? {
                None => acted = true,
                Some(left) => next = next.or_after(left),
            }
        }
        Ok((next, acted))
    }

    /// Starts a container unless it is to be left alone for a while; how long.
    fn begin(
        &mut self,
        pod: &Pod,
        seen: &Seen,
        start: &Start,
    ) -> Result<Option<Duration>, CallError> {
        let Some(container) = pod.all_containers().find(|one| one.name == start.name) else {
            return Ok(Some(IDLE));
        };
        let now = SystemTime::now();
        let before = start.after.as_ref();
        let before = before.and_then(|id| seen.containers.iter().find(|one| one.id == *id));
        if let Some(before) = before
            && before.state == State::Exited
            && !self.failed.contains_key(&start.name)
            && self.allowed.get(&start.name) != Some(&start.attempt)
        {
            let ended = Duration::from_nanos(u64::try_from(before.finished).unwrap_or_default());
            let ended = SystemTime::UNIX_EPOCH + ended;
            let turn = self.backoff.turn(&start.name, ended, now, before.attempt);
            if let Turn::Later { delay, left } = turn {
                self.wait_for(pod, container, delay);
                return Ok(Some(left));
            }
            self.allowed.insert(start.name.clone(), start.attempt);
        }
        if let Some(when) = self.failed.get(&start.name) {
            let key = format!("make {}", start.name);
            if let Turn::Later { left, .. } = self.backoff.turn(&key, *when, now, 1) {
                return Ok(Some(left));
            }
        }
        self.start(pod, seen, container, start.attempt)
    }

    fn wait_for(&mut self, pod: &Pod, container: &Container, delay: Duration) {
        let name = &container.name;
        let full = pod.full_name();
        let delay = delay.as_secs();
        let (minutes, rest) = (delay / 60, delay % 60);
        let delay = match minutes {
            0 => format!("{rest}s"),
            _ => format!("{minutes}m{rest}s"),
        };
        let message = format!("back-off {delay} restarting failed container={name} pod={full}");
        let reason = Reason::new("CrashLoopBackOff", message);
        let event = format!("Back-off restarting failed container {name} in pod {full}");
        if self.waits.insert(name.clone(), reason.clone()) != Some(reason) {
            self.tell(pod, Some(name), Sort::Warning, "BackOff", &event);
        }
    }

    /// Has a container be stopped.
    pub(super) fn stop(&self, pod: &Pod, seen: &Seen, kill: &Kill, grace: Duration) {
        let mut containers = pod.all_containers();
        let container = containers.find(|one| one.name == kill.name).cloned();
        let sandbox = seen.ready();
        let victim = Victim {
            id: kill.id.clone(),
            container,
            ip: sandbox
                .map(|sandbox| self.shared.ip_of(pod, sandbox))
                .unwrap_or_default(),
            grace,
        };
        let inbox = Arc::clone(&self.inbox);
        let (events, name, of) = (self.shared.events.clone(), kill.name.clone(), pod.clone());
        let failed = move |words: String| {
            let message = format!("PreStopHook failed: {words}");
            events.tell(
                &of,
                Some(&name),
                Sort::Warning,
                "FailedPreStopHook",
                &message,
            );
        };
        let client = &self.shared.client;
        match self
            .kills
            .stop(client, victim, failed, move || inbox.wake())
        {
            Ok(true) => {
                let name = &kill.name;
                let message = match kill.failed {
                    Some(probe) => format!(
                        "Container {name} failed {} probe, will be restarted",
                        probe.name()
                    ),
                    None => format!("Stopping container {name}"),
                };
                self.tell(pod, Some(name), Sort::Normal, "Killing", &message);
            }
            Ok(false) => {}
            Err(error) => log::warn!("container {} is not stopped: {error}", kill.id),
        }
    }

    pub(super) fn tell(
        &self,
        pod: &Pod,
        container: Option<&str>,
        sort: Sort,
        reason: &str,
        message: &str,
    ) {
        self.shared
            .events
            .tell(pod, container, sort, reason, message);
    }
}

/// How long a container has to end; a probe may say its own time.
fn grace(pod: &Pod, kill: &Kill) -> Duration {
    let of_pod = pod.spec.termination_grace_period_seconds;
    let own = kill.failed.and_then(|failed| {
        let mut containers = pod.all_containers();
        let container = containers.find(|one| one.name == kill.name)?;
        let probe = match failed {
            plan::Failed::Liveness => &container.liveness_probe,
            plan::Failed::Startup => &container.startup_probe,
        };
        probe.as_ref()?.termination_grace_period_seconds
    });
    Duration::from_secs(seconds(own.or(of_pod)).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_probe_may_say_how_long_a_container_has() {
        let probe = json!({"exec": {"command": ["x"]}, "terminationGracePeriodSeconds": 3});
        let pod = Pod::read(
            &json!({"spec": {"terminationGracePeriodSeconds": 9, "containers": [
            {"name": "a", "livenessProbe": probe}, {"name": "b"}]}}),
        )
        .unwrap();
        let of = |name: &str, failed| {
            let (id, name) = (String::new(), name.to_owned());
            grace(&pod, &Kill { id, name, failed }).as_secs()
        };
        assert_eq!(of("a", Some(plan::Failed::Liveness)), 3);
        assert_eq!(of("a", Some(plan::Failed::Startup)), 9);
        assert_eq!(of("b", None), 9);
    }

    #[test]
    fn the_sooner_counts() {
        let (one, two) = (Duration::from_secs(1), Duration::from_secs(2));
        assert_eq!(Next::After(two).or_after(one), Next::After(one));
        assert_eq!(Next::After(one).or_after(two), Next::After(one));
        assert_eq!(Next::Gone.or_after(one), Next::Gone);
    }

    #[test]
    fn who_is_woken_does_not_wait() {
        let inbox = Inbox::default();
        inbox.wake();
        inbox.wait(Duration::from_secs(100));
        inbox.objects_changed();
        assert!(inbox.objects.load(Ordering::Relaxed));
        inbox.wait(Duration::from_secs(100));
        inbox.wait(Duration::ZERO);
        inbox.quit();
        assert!(inbox.is_over());
    }
}
