//! All containers of this machine, by id.
//!
//! Asked by `service` and `streams`. Its lock guards the table only: what takes time is done
//! without it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::{
    agent::{ConfigureRequest, CreateContainerRequest, RefreshRequest},
    is_id,
};

use crate::{
    container::Container,
    copies::Copies,
    disks,
    error::{RequestError, trying},
    network,
    process::Process,
    processes::Shared,
    reaper::Reaper,
    root::{Scratch, Sources},
    shares::Shares,
    sysctl,
    volumes::Volumes,
};

const MAX_CONTAINERS: usize = 64;
/// `__NEW_UTS_LEN` of the kernel.
const MAX_HOSTNAME: usize = 64;
/// For mounts of dead containers to go, and for containers being created.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
const SETTLE_PAUSE: Duration = Duration::from_millis(5);

pub(crate) struct Pod {
    pub(crate) reaper: Arc<Reaper>,
    state: Mutex<State>,
    shares: Shares,
    volumes: Volumes,
    copies: Copies,
    processes: Shared,
    /// Processes of all containers.
    count: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    configured: bool,
    scratch: Option<Arc<Scratch>>,
    /// None while it is being created.
    containers: HashMap<String, Option<Arc<Container>>>,
    /// The machine is being switched off.
    stopping: bool,
}

impl Pod {
    pub(crate) fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            state: Mutex::default(),
            shares: Shares::default(),
            volumes: Volumes::default(),
            copies: Copies::default(),
            processes: Shared::default(),
            count: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends this program, so nobody sees a state left half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn configure(&self, request: &ConfigureRequest) -> Result<(), RequestError> {
        let mut state = self.state();
        if state.configured {
            return Err(RequestError::State("the machine is configured".into()));
        }
        if request.hostname.len() > MAX_HOSTNAME || request.hostname.contains('\0') {
            return Err(RequestError::Invalid(format!(
                "a host name has {MAX_HOSTNAME} bytes at most"
            )));
        }
        if !request.hostname.is_empty() {
            rustix::system::sethostname(request.hostname.as_bytes())
                .map_err(trying("the host name"))?;
        }
        if !request.scratch_disk.is_empty() {
            state.scratch = Some(Arc::new(Scratch::mount(&request.scratch_disk)?));
        }
        if let Some(network) = request.network.as_ref() {
            network::configure(network)?;
        }
        for (name, value) in &request.sysctls {
            sysctl::set(name, value)?;
        }
        state.configured = true;
        Ok(())
    }

    pub(crate) fn create(&self, request: &CreateContainerRequest) -> Result<(), RequestError> {
        let id = &request.container;
        if !is_id(id) {
            return Err(RequestError::Invalid(format!(
                "'{id}' is no id of a container"
            )));
        }
        let scratch = {
            let mut state = self.state();
            if !state.configured || state.stopping {
                return Err(RequestError::State(
                    "the machine is not configured, or is being switched off".into(),
                ));
            }
            if state.containers.contains_key(id) {
                return Err(RequestError::Exists(format!("there is a container '{id}'")));
            }
            if state.containers.len() >= MAX_CONTAINERS {
                return Err(RequestError::Exhausted(format!(
                    "there are {MAX_CONTAINERS} containers, and no more are kept"
                )));
            }
            state.containers.insert(id.clone(), None);
            state.scratch.clone()
        };
        let created = self.make(request, scratch.as_deref());
        drop(scratch);
        let mut state = self.state();
        match created {
            Ok(container) => {
                state.containers.insert(id.clone(), Some(container));
                Ok(())
            }
            Err(error) => {
                state.containers.remove(id);
                Err(error)
            }
        }
    }

    fn make(
        &self,
        request: &CreateContainerRequest,
        scratch: Option<&Scratch>,
    ) -> Result<Arc<Container>, RequestError> {
        let processes = match request.shared_processes {
            true => Some(self.processes.first(&self.reaper)?),
            false => None,
        };
        Container::create(request, scratch, self.sources(), processes, &self.count)
    }

    fn sources(&self) -> Sources<'_> {
        Sources {
            shares: &self.shares,
            volumes: &self.volumes,
            copies: &self.copies,
        }
    }

    /// Has a copy that containers are shown be what it was made of again.
    pub(crate) fn refresh(&self, request: &RefreshRequest) -> Result<(), RequestError> {
        self.copies.refresh(&self.shares, request)
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, RequestError> {
        self.state()
            .containers
            .get(id)
            .and_then(Clone::clone)
            .ok_or_else(|| RequestError::NotFound(format!("there is no container '{id}'")))
    }

    pub(crate) fn process(
        &self,
        container: &str,
        process: &str,
    ) -> Result<Arc<Process>, RequestError> {
        self.container(container)?.process(process)
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), RequestError> {
        let container = self.container(id)?;
        container.remove(&self.reaper, self.sources())?;
        self.state().containers.remove(id);
        Ok(())
    }

    /// Ends all containers and brings everything to the disks. Goes on after an error, and gives
    /// the first.
    pub(crate) fn put_away(&self) -> Result<(), RequestError> {
        let end = Instant::now() + SETTLE_LIMIT;
        let containers: Vec<Arc<Container>> = loop {
            let mut state = self.state();
            state.stopping = true;
            let creating = state.containers.values().any(Option::is_none);
            if !creating || Instant::now() >= end {
                break state.containers.values().flatten().cloned().collect();
            }
            drop(state);
            thread::sleep(SETTLE_PAUSE);
        };
        let mut outcome = Ok(());
        for container in &containers {
            outcome = outcome.and(container.end());
        }
        for container in &containers {
            outcome = outcome.and(container.put_away());
        }
        self.copies.put_away();
        outcome = outcome.and(self.volumes.put_away());
        outcome = outcome.and(self.shares.put_away());
        let scratch = self.state().scratch.take();
        // Nobody else holds it: nothing is being created.
        if let Some(scratch) = scratch.and_then(Arc::into_inner) {
            outcome = outcome.and(scratch.put_away());
        }
        let unused = disks::wait_until_unused(SETTLE_LIMIT);
        outcome.and(unused.map_err(trying("a disk is still in use")))
    }
}
