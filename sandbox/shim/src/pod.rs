//! The pod: its containers, and its machine as far as others than `keeper` know it.
//!
//! Asked by `service`. What is waited for is waited for without a lock; containerd asks for one
//! container one thing after the other, but for several at once.

mod acts;
mod kill;

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
};
use pericarp_api::agent;
use pericarp_pod::process::{Name, context};
use protobuf::MessageField;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

use crate::{
    bundle::{Bundle, Kind},
    cgroup,
    directory::Directory,
    error::{ShimError, during},
    events::Events,
    guest::{self, Meter},
    keeper::Orders,
    machine::{Booted, Plan},
    oom,
    process::{Exit, LOST, Process},
    profile,
    rootfs::Places,
    spec,
    stdio::Stdio,
    task::{Task, guest_id},
    volumes::Volumes,
};

pub(crate) struct Pod {
    directory: Directory,
    volumes: Arc<Volumes>,
    orders: Orders,
    pub(crate) events: Arc<Events>,
    /// The highest oom_score_adj of the containers so far.
    score: AtomicI32,
    meter: Meter,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    machine: MachineState,
    /// Of the machine on the host, also once it has ended.
    pid: u32,
    /// The same, to end it by.
    handle: Option<OwnedFd>,
    /// Why we have ended it by that.
    reason: Option<String>,
    /// None while it is being created.
    tasks: HashMap<String, Option<Arc<Task>>>,
}

#[derive(Default)]
enum MachineState {
    #[default]
    None,
    Running(Booted),
    /// Why.
    Ended(String),
}

impl Pod {
    pub(crate) fn new(directory: Directory, orders: Orders, events: Arc<Events>) -> Arc<Self> {
        Arc::new(Self {
            volumes: Volumes::new(directory.clone()),
            directory,
            orders,
            events,
            score: AtomicI32::new(i32::MIN),
            meter: Meter::default(),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self) -> Result<Booted, ShimError> {
        match &self.state().machine {
            MachineState::Running(booted) => Ok(booted.clone()),
            MachineState::None => Err(ShimError::State("the pod has no machine".into())),
            MachineState::Ended(reason) => Err(ShimError::Machine(format!(
                "the pod's machine has ended: {reason}"
            ))),
        }
    }

    /// What containerd takes for the id of a process: that of the machine, on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.state().pid
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        let found = self.state().tasks.get(id).cloned().flatten();
        found.ok_or_else(|| ShimError::NotFound(format!("there is no container {id}")))
    }

    /// The machine has ended, and nobody has ended it in good order.
    pub(crate) fn lost(&self, reason: String) {
        let tasks: Vec<Arc<Task>> = {
            let mut state = self.state();
            let reason = state.reason.take().unwrap_or(reason);
            log::error!("the pod's machine has ended: {reason}");
            state.machine = MachineState::Ended(reason);
            state.handle = None;
            state.tasks.values().flatten().cloned().collect()
        };
        // Containers notice by themselves: their streams have ended.
        for task in tasks.into_iter().filter(|task| task.is_pod()) {
            self.over(&task, "", Exit::now(LOST));
        }
    }

    pub(crate) fn create(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<u32, ShimError> {
        if !request.checkpoint.is_empty() {
            let text = "checkpoint: a container cannot be restored in a pod of ours";
            return Err(ShimError::Unimplemented(text.into()));
        }
        let bundle = Bundle::read(Path::new(&request.bundle))?;
        let id = &request.id;
        {
            let mut state = self.state();
            if state.tasks.contains_key(id) {
                return Err(ShimError::Exists(format!("there is a container {id}")));
            }
            state.tasks.insert(id.clone(), None);
        }
        let created = self.make(request, &bundle);
        let mut state = self.state();
        match created {
            Ok(task) => {
                state.tasks.insert(id.clone(), Some(task));
                drop(state);
            }
            Err(error) => {
                state.tasks.remove(id);
                drop(state);
                if bundle.kind() != Kind::Member {
                    self.end_machine("it was not needed");
                }
                log::error!("container {id} cannot be created: {error}");
                return Err(error);
            }
        }
        let pid = self.pid();
        self.events.publish(&TaskCreate {
            container_id: id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        });
        Ok(pid)
    }

    fn make(&self, request: &CreateTaskRequest, bundle: &Bundle) -> Result<Arc<Task>, ShimError> {
        let kind = bundle.kind();
        // Before anything is made.
        let mut prepared = match kind {
            Kind::Sandbox => None,
            Kind::Member | Kind::Single => Some(spec::prepare(bundle)?),
        };
        if kind != Kind::Member {
            bundle.check_pod()?;
            let plan = Plan {
                profile: profile::of(request, bundle)?,
                hostname: bundle.spec["hostname"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                sysctls: spec::sysctls(bundle).collect(),
                network: bundle.network()?,
                group: cgroup::group(bundle.cgroup())?,
            };
            let booted = self.orders.boot(plan)?;
            let mut state = self.state();
            state.pid = booted.pid;
            state.handle = Some(handle(booted.pid)?);
            state.machine = MachineState::Running(booted);
        }
        let path = bundle.path.clone();
        let Some(prepared) = &mut prepared else {
            return Ok(Task::new(&request.id, path, kind, Process::of_pod(), None));
        };
        let booted = self.machine()?;
        self.expose(&booted, &bundle.spec["process"]["oomScoreAdj"]);
        let name = Name {
            container: guest_id(&request.id),
            process: String::new(),
        };
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        prepared.spec["process"]["terminal"] = request.terminal.into();
        let own = Process::create(name, stdio)?;
        let mut places = Places::make(&self.directory, &own.name.container)?;
        let root = places.root(&request.rootfs, bundle)?;
        let mut sources = Vec::new();
        for (index, source) in &prepared.sources {
            sources.push(places.source(*index, source, &self.volumes)?);
        }
        let wanted = agent::CreateContainerRequest {
            container: own.name.container.clone(),
            root: MessageField::some(root),
            spec: prepared.spec.to_string().into_bytes(),
            streams: MessageField::some(own.wiring().streams()),
            sources,
            user_in_spec: true,
            shared_processes: prepared.shared_processes,
            ..agent::CreateContainerRequest::default()
        };
        guest::ask(&booted.guest, |client| {
            client.create_container(context(), &wanted)
        })?;
        Ok(Task::new(&request.id, path, kind, own, Some(places)))
    }

    /// Has the host's kernel end the machine as soon as the container that is to go first.
    fn expose(&self, booted: &Booted, score: &Value) {
        let score = score.as_i64().and_then(|score| i32::try_from(score).ok());
        if let Some(score) = score.filter(|score| (-1000..=1000).contains(score)) {
            let before = self.score.fetch_max(score, Ordering::Relaxed);
            if score > before {
                let all = booted.processes.lock();
                oom::set(&all.unwrap_or_else(PoisonError::into_inner), score);
            }
        }
    }

    fn end_machine(&self, why: &str) {
        self.orders.end();
        let mut state = self.state();
        state.handle = None;
        if matches!(state.machine, MachineState::Running(_)) {
            state.machine = MachineState::Ended(why.to_owned());
        }
    }

    /// Leaves, unless there are containers left and `now` does not say so all the same.
    pub(crate) fn shutdown(&self, now: bool) {
        if now || self.state().tasks.is_empty() {
            self.orders.leave();
        }
    }
}

/// A process that is signalled by this is never another of the same id.
fn handle(pid: u32) -> Result<OwnedFd, ShimError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| ShimError::Machine("the machine is no process".into()))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(during("the machine's process"))
}
