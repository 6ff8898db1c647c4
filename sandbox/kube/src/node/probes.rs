//! Asks containers how they are, as long as they run: a thread for each container that has probes.
//! Called by `worker`, which is woken when the health of one changes.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::asking::{Whom, Wrong};
use super::health::{self, Kind, State};
use super::plan::Health;
use super::seen::Instance;
use super::spec::{Container, Probe};
use crate::cri::Client;

/// Is called when an answer counts: with the probe and, when it is bad, what is wrong.
pub(super) type Told = dyn Fn(&str, Kind, Result<(), &str>, bool) + Send + Sync;

#[derive(Debug)]
struct Watched {
    state: Mutex<State>,
    ended: Mutex<bool>,
    end: Condvar,
}

impl Watched {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long, or until it is over; false then.
    fn wait(&self, time: Duration) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.end.wait_timeout_while(ended, time, |ended| !*ended);
        let (ended, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !*ended
    }

    fn finish(&self) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.end.notify_all();
    }
}

/// The containers of a pod that are asked, by their ids. They are left alone when this goes.
#[derive(Debug, Default)]
pub(super) struct Probes(HashMap<String, Arc<Watched>>);

impl Drop for Probes {
    fn drop(&mut self) {
        self.end();
    }
}

impl Probes {
    /// How a container is that runs. Who is not asked is well.
    pub(super) fn health(&self, id: &str) -> Health {
        match self.0.get(id) {
            Some(watched) => watched.state().health(),
            None => Health {
                started: true,
                ready: true,
                failed: None,
            },
        }
    }

    /// Asks a container from now on, if it has probes. It is as it `was` until it says otherwise.
    pub(super) fn watch(
        &mut self,
        client: &Client,
        container: &Container,
        one: &Instance,
        ip: &str,
        was: Health,
        told: &Arc<Told>,
    ) -> io::Result<()> {
        let asked = [
            (Kind::Startup, &container.startup_probe),
            (Kind::Liveness, &container.liveness_probe),
            (Kind::Readiness, &container.readiness_probe),
        ];
        if self.0.contains_key(&one.id) || asked.iter().all(|(_, probe)| probe.is_none()) {
            return Ok(());
        }
        let watched = Arc::new(Watched {
            state: Mutex::new(State::new(container, was)),
            ended: Mutex::new(false),
            end: Condvar::new(),
        });
        let asker = Asker {
            client: client.clone(),
            container: container.clone(),
            id: one.id.clone(),
            ip: ip.to_owned(),
            watched: Arc::clone(&watched),
            told: Arc::clone(told),
        };
        let since = age(one.started);
        std::thread::Builder::new()
            .name("probes".into())
            .stack_size(super::STACK)
            .spawn(move || asker.run(since))?;
        self.0.insert(one.id.clone(), watched);
        Ok(())
    }

    /// Leaves alone all but these.
    pub(super) fn keep(&mut self, is_kept: impl Fn(&str) -> bool) {
        self.0.retain(|id, watched| {
            let kept = is_kept(id);
            if !kept {
                watched.finish();
            }
            kept
        });
    }

    /// Leaves all alone. How they were stays known.
    pub(super) fn end(&self) {
        self.0.values().for_each(|watched| watched.finish());
    }
}

/// How long ago that was.
fn age(started: i64) -> Duration {
    let started = Duration::from_nanos(u64::try_from(started).unwrap_or_default());
    let at = SystemTime::UNIX_EPOCH + started;
    at.elapsed().unwrap_or_default()
}

struct Asker {
    client: Client,
    container: Container,
    id: String,
    ip: String,
    watched: Arc<Watched>,
    told: Arc<Told>,
}

impl Asker {
    fn run(&self, age: Duration) {
        let all = [
            (Kind::Startup, &self.container.startup_probe),
            (Kind::Liveness, &self.container.liveness_probe),
            (Kind::Readiness, &self.container.readiness_probe),
        ];
        let now = Instant::now();
        let mut due: Vec<(Kind, &Probe, Instant)> = all
            .into_iter()
            .filter_map(|(kind, probe)| {
                let probe = probe.as_ref()?;
                let first = now + health::delay(probe).saturating_sub(age);
                Some((kind, probe, first))
            })
            .collect();
        loop {
            let state = *self.watched.state();
            let asked = due.iter_mut().filter(|(kind, ..)| state.is_asked(*kind));
            let Some((kind, probe, when)) = asked.min_by_key(|(.., when)| *when) else {
                // It came up, and nothing more is asked.
                return;
            };
            if !self
                .watched
                .wait(when.saturating_duration_since(Instant::now()))
            {
                return;
            }
            self.ask(*kind, probe);
            *when = Instant::now() + health::period(probe);
        }
    }

    fn ask(&self, kind: Kind, probe: &Probe) {
        let whom = Whom {
            client: &self.client,
            container: &self.container,
            id: &self.id,
            ip: &self.ip,
        };
        let answer = whom.ask(&probe.handler, health::limit(probe));
        if answer == Err(Wrong::Unknown) || !self.watched.wait(Duration::ZERO) {
            return;
        }
        let changed = self.watched.state().answer(kind, answer.is_ok());
        let answer = match &answer {
            Err(Wrong::Bad(words)) => Err(words.as_str()),
            _ => Ok(()),
        };
        (self.told)(&self.container.name, kind, answer, changed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize as _;
    use serde_json::json;
    use std::net::TcpListener;
    use std::path::Path;
    use std::sync::mpsc;

    #[test]
    fn a_container_is_asked_until_it_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let tcp = json!({"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 1});
        let container = json!({"name": "c", "startupProbe": tcp, "livenessProbe": tcp});
        let container = Container::deserialize(container).unwrap();
        let client = Client::connect(Path::new("/nowhere")).unwrap();
        let one = Instance {
            id: "id".into(),
            started: i64::MAX,
            ..Instance::default()
        };
        let (say, hear) = mpsc::channel();
        let told: Arc<Told> =
            Arc::new(move |name: &str, kind, answer: Result<(), &str>, changed| {
                let _ = say.send((name.to_owned(), kind, answer.is_ok(), changed));
            });
        let mut probes = Probes::default();
        assert!(probes.health("id").ready);
        let was = Health::default();
        probes
            .watch(&client, &container, &one, "127.0.0.1", was, &told)
            .unwrap();
        drop(told);
        let next = || hear.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(next(), ("c".into(), Kind::Startup, true, true));
        assert!(probes.health("id").started);
        assert_eq!(next(), ("c".into(), Kind::Liveness, true, true));
        drop(listener);
        while next() != ("c".into(), Kind::Liveness, false, true) {}
        assert!(probes.health("id").failed.is_some());
        probes.keep(|_| false);
        // The thread ends, and with it who tells.
        while hear.recv_timeout(Duration::from_secs(20)).is_ok() {}
        assert_eq!(hear.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }
}
