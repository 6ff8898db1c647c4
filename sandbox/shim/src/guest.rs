//! Requests to the pod's agent: one connection for each, and its errors as containerd knows them.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use pericarp_api::{agent, agent_ttrpc::AgentClient, host::Guest};
use pericarp_pod::process::{Name, context, context_within, refused, unreachable};
use ttrpc::{Code, context::Context};

use crate::error::ShimError;

/// How long a guest may take to pass a signal on: its processes are asked for nothing.
const SIGNAL_LIMIT: Duration = Duration::from_secs(15);
/// How long a guest may take to let go of a disk that nobody in it uses.
const DISK_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest may take to copy what a kubelet has written.
const REFRESH_LIMIT: Duration = Duration::from_secs(15);
/// How long a guest may take to say how much a container uses. containerd asks for all containers
/// of a node, one after the other.
const STATS_LIMIT: Duration = Duration::from_secs(2);
/// How long a guest that took longer is not asked again.
const STATS_PAUSE: Duration = Duration::from_secs(30);

fn told(error: ttrpc::Error) -> ShimError {
    let code = match &error {
        ttrpc::Error::RpcStatus(status) => Some(status.code()),
        _ => None,
    };
    // Made safe to print.
    let text = refused(error).to_string();
    match code {
        Some(Code::NOT_FOUND) => ShimError::NotFound(text),
        Some(Code::ALREADY_EXISTS) => ShimError::Exists(text),
        Some(Code::FAILED_PRECONDITION) => ShimError::State(text),
        Some(Code::INVALID_ARGUMENT) => ShimError::Invalid(text),
        _ => ShimError::Machine(text),
    }
}

/// Asks the agent.
pub(crate) fn ask<T>(
    guest: &Guest,
    what: impl FnOnce(&AgentClient) -> ttrpc::Result<T>,
) -> Result<T, ShimError> {
    let client = guest.client().map_err(unreachable)?;
    what(&client).map_err(told)
}

/// Asks an agent that has no longer than `limit`, the connection included.
fn ask_within<T>(
    guest: &Guest,
    limit: Duration,
    what: impl FnOnce(&AgentClient, Context) -> ttrpc::Result<T>,
) -> Result<T, ShimError> {
    let begin = Instant::now();
    let client = guest.client_within(limit).map_err(unreachable)?;
    let left = limit.saturating_sub(begin.elapsed());
    what(&client, context_within(left)).map_err(told)
}

pub(crate) fn signal(guest: &Guest, name: &Name, signal: u32, all: bool) -> Result<(), ShimError> {
    let request = agent::SignalRequest {
        container: name.container.clone(),
        process: name.process.clone(),
        signal,
        all,
        ..agent::SignalRequest::default()
    };
    let asked = ask_within(guest, SIGNAL_LIMIT, |client, context| {
        client.signal_process(context, &request)
    });
    asked.map(drop)
}

pub(crate) fn remove(guest: &Guest, container: &str) -> Result<(), ShimError> {
    let request = agent::ContainerRequest {
        container: container.to_owned(),
        ..agent::ContainerRequest::default()
    };
    ask(guest, |client| client.remove_container(context(), &request)).map(drop)
}

/// Has the guest's kernel let go of a disk.
pub(crate) fn remove_disk(guest: &Guest, id: &str) -> Result<(), ShimError> {
    let request = agent::DiskRequest {
        disk: id.to_owned(),
        ..agent::DiskRequest::default()
    };
    let asked = ask_within(guest, DISK_LIMIT, |client, context| {
        client.remove_disk(context, &request)
    });
    asked.map(drop)
}

/// Has the guest look at what a copy of its was made of, which is of this version now.
pub(crate) fn refresh(
    guest: &Guest,
    (tag, path): (&str, &str),
    version: &str,
) -> Result<(), ShimError> {
    let part = agent::Part {
        tag: tag.to_owned(),
        path: path.to_owned(),
        ..agent::Part::default()
    };
    let request = agent::RefreshRequest {
        part: Some(part).into(),
        version: version.to_owned(),
        ..agent::RefreshRequest::default()
    };
    let asked = ask_within(guest, REFRESH_LIMIT, |client, context| {
        client.refresh_source(context, &request)
    });
    asked.map(drop)
}

/// Asks for numbers, and not for long.
#[derive(Debug)]
pub(crate) struct Meter {
    limit: Duration,
    pause: Duration,
    /// The guest has not answered in time, and is left alone.
    silent_until: Mutex<Option<Instant>>,
}

impl Default for Meter {
    fn default() -> Self {
        Self::new(STATS_LIMIT, STATS_PAUSE)
    }
}

impl Meter {
    fn new(limit: Duration, pause: Duration) -> Self {
        Self {
            limit,
            pause,
            silent_until: Mutex::default(),
        }
    }

    /// Numbers of a container; of the machine for an empty name.
    pub(crate) fn read(
        &self,
        guest: &Guest,
        container: &str,
    ) -> Result<agent::StatsResponse, ShimError> {
        let silent_until = || {
            self.silent_until
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let begin = Instant::now();
        if (*silent_until()).is_some_and(|until| begin < until) {
            let text = "the guest has not said how much it uses, and is not asked for a while";
            return Err(ShimError::Machine(text.into()));
        }
        let request = agent::StatsRequest {
            container: container.to_owned(),
            ..agent::StatsRequest::default()
        };
        let answer = ask_within(guest, self.limit, |client, context| {
            client.get_stats(context, &request)
        });
        // An error that came late is the limit's; timers are not exact.
        let is_late = begin.elapsed() >= self.limit * 9 / 10;
        *silent_until() = (answer.is_err() && is_late).then(|| Instant::now() + self.pause);
        answer
    }
}

pub(crate) fn update(guest: &Guest, container: &str, resources: Vec<u8>) -> Result<(), ShimError> {
    let request = agent::UpdateRequest {
        container: container.to_owned(),
        resources,
        ..agent::UpdateRequest::default()
    };
    ask(guest, |client| client.update_container(context(), &request)).map(drop)
}

pub(crate) fn freeze(guest: &Guest, container: &str, frozen: bool) -> Result<(), ShimError> {
    let request = agent::FreezeRequest {
        container: container.to_owned(),
        frozen,
        ..agent::FreezeRequest::default()
    };
    ask(guest, |client| client.freeze_container(context(), &request)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        os::unix::net::UnixListener,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        thread,
    };

    use super::*;

    #[test]
    fn a_guest_without_numbers_is_left_alone() {
        let socket = std::env::temp_dir().join(format!("pericarp-meter-{}", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                // The second is not even accepted.
                if count.fetch_add(1, Ordering::SeqCst) != 1 {
                    stream.write_all(b"OK 1073741824\n").unwrap();
                }
                kept.push(stream);
            }
        });
        let guest = Guest::new(&socket);
        let (limit, pause) = (Duration::from_millis(300), Duration::from_millis(1500));
        let meter = Meter::new(limit, pause);
        for asked_by_then in [1, 2] {
            let begin = Instant::now();
            meter.read(&guest, "c").unwrap_err();
            assert!(begin.elapsed() < 10 * limit);
            let begin = Instant::now();
            let error = meter.read(&guest, "d").unwrap_err().to_string();
            assert!(error.contains("is not asked"), "{error}");
            assert!(begin.elapsed() < limit);
            assert_eq!(asked.load(Ordering::SeqCst), asked_by_then);
            thread::sleep(pause);
        }
        std::fs::remove_file(socket).unwrap();
    }
}
