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
use serde_json::{Value, json};

use crate::{
    audit::Audit,
    blocks::Blocks,
    bundle::{Bundle, Kind, refused},
    cgroup,
    directory::{CONTAINERS, Directory},
    error::{ShimError, during},
    events::Events,
    guest::{self, Meter},
    keeper::Orders,
    machine::{Booted, Ended, Plan},
    oom,
    process::{Exit, LOST, Process},
    profile,
    rootfs::{OfPod, Places},
    spec::{self, Prepared, Source},
    stamps::{self, Stamps},
    stdio::Stdio,
    task::{Task, guest_id},
    volumes::Volumes,
    watched::Watched,
    why::Chronicle,
};

const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
const IMAGE_NAME: &str = "io.kubernetes.cri.image-name";

pub(crate) struct Pod {
    why: Chronicle,
    audit: Audit,
    directory: Directory,
    volumes: Arc<Volumes>,
    blocks: Arc<Blocks>,
    watched: Watched,
    orders: Arc<Orders>,
    pub(crate) events: Arc<Events>,
    /// The highest oom_score_adj of the containers so far.
    score: AtomicI32,
    meter: Meter,
    stamps: Arc<Stamps>,
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
    processes: Processes,
    tasks: HashMap<String, Slot>,
    /// containerd has asked us to leave while the pod was being created.
    leaving: bool,
}

#[derive(Default)]
enum MachineState {
    #[default]
    None,
    Running(Booted),
    /// Why.
    Ended(String),
}

impl MachineState {
    fn forget_ended(&mut self) {
        if matches!(self, Self::Ended(_)) {
            *self = Self::None;
        }
    }
}

/// A place among the containers.
enum Slot {
    Creating {
        kind: Kind,
        /// containerd has given it up: whoever creates it undoes it.
        unwanted: bool,
    },
    There(Arc<Task>),
}

impl Slot {
    /// Whether this is the pod, or has one of its own.
    fn has_machine(&self) -> bool {
        let kind = match self {
            Self::Creating { kind, .. } => *kind,
            Self::There(task) => task.kind,
        };
        kind != Kind::Member
    }
}

/// Whose processes the containers of the pod see.
///
/// A configuration says that by the path of a namespace of the host, which is the same path for the
/// pod and for each of its containers: all have one process there. A pod that shares does so from its
/// first container on. Who comes with a path once containers have namespaces of their own wants to
/// join one of these, and there is no saying which.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Processes {
    #[default]
    Undecided,
    Shared,
    Separate,
}

impl Processes {
    /// What this container's process namespace means for the pod.
    fn with(self, namespace: Option<Option<&str>>) -> Result<Self, ShimError> {
        match (self, namespace) {
            (Self::Undecided, Some(None)) => Ok(Self::Separate),
            (Self::Undecided, Some(Some(_))) => Ok(Self::Shared),
            (Self::Separate, Some(Some(_))) => Err(refused(
                "linux.namespaces: pid",
                "is another container's, which cannot be joined in a guest (kubectl debug \
                 --target); a pod shares its processes from its first container on \
                 (shareProcessNamespace) or not at all",
            )),
            (decided, _) => Ok(decided),
        }
    }
}

impl Pod {
    pub(crate) fn new(
        why: Chronicle,
        directory: Directory,
        orders: Orders,
        events: Arc<Events>,
        stamps: Arc<Stamps>,
    ) -> Arc<Self> {
        let orders = Arc::new(orders);
        Arc::new(Self {
            why,
            audit: Audit::default(),
            volumes: Volumes::new(directory.clone()),
            blocks: Blocks::new(Arc::clone(&orders)),
            watched: Watched::default(),
            directory,
            orders,
            events,
            score: AtomicI32::new(i32::MIN),
            meter: Meter::default(),
            stamps,
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
            MachineState::Ended(reason) => Err(has_ended(reason)),
        }
    }

    /// What containerd takes for the id of a process: that of the machine, on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.state().pid
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        match self.state().tasks.get(id) {
            Some(Slot::There(task)) => Ok(Arc::clone(task)),
            _ => Err(no_container(id)),
        }
    }

    /// The same for one that is not wanted any more: if it is still being created, it will not be
    /// there.
    fn unwanted_task(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        match self.state().tasks.get_mut(id) {
            Some(Slot::There(task)) => Ok(Arc::clone(task)),
            Some(Slot::Creating { unwanted, .. }) => {
                *unwanted = true;
                Err(no_container(id))
            }
            None => Err(no_container(id)),
        }
    }

    /// Nothing more is to be said: waits a moment for what has been.
    pub(crate) fn finish(&self) {
        self.audit.finish();
    }

    /// The machine has ended, and nobody has ended it in good order.
    pub(crate) fn lost(&self, ended: Ended) {
        let (tasks, said): (Vec<Arc<Task>>, String) = {
            let mut state = self.state();
            let reason = state.reason.take().unwrap_or(ended.reason);
            let said = has_ended(&reason).to_string();
            state.machine = MachineState::Ended(reason);
            state.handle = None;
            let there = state.tasks.values().filter_map(|slot| match slot {
                Slot::There(task) => Some(Arc::clone(task)),
                Slot::Creating { .. } => None,
            });
            (there.collect(), said)
        };
        // Files are written here, for which no request is to wait.
        log::error!("{said}");
        let facts = json!({ "reason": said });
        self.audit.tell("machine-ended", None, facts);
        self.why.lost(ended.kind, said, ended.evidence);
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
        let (id, kind) = (&request.id, bundle.kind());
        {
            let mut state = self.state();
            if state.tasks.contains_key(id) {
                return Err(ShimError::Exists(format!("there is a container {id}")));
            }
            if kind != Kind::Sandbox {
                state.processes = state.processes.with(bundle.namespace("pid"))?;
            }
            let slot = Slot::Creating {
                kind,
                unwanted: false,
            };
            state.tasks.insert(id.clone(), slot);
        }
        self.why.learn(id, &bundle);
        let made = self.make(request, &bundle);
        if let Err(error) = self.settle(id, kind, made) {
            log::error!("container {id} cannot be created: {error}");
            self.why.refused(id, "create", &error.to_string());
            self.why.forget(id);
            return Err(error);
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
        let (id, kind) = (&request.id, bundle.kind());
        let began = stamps::now();
        // Before anything is made.
        let mut prepared = match kind {
            Kind::Sandbox => None,
            Kind::Member | Kind::Single => Some(spec::prepare(bundle)?),
        };
        if kind != Kind::Member {
            self.stamps.asked();
            bundle.check_pod()?;
            let profile = profile::of(request, bundle)?;
            let name = bundle.pod_name(id);
            let audit = profile.pod.settings.audit.as_deref();
            self.audit.begin(audit, self.why.namespace(), id, &name);
            let plan = Plan {
                namespace: self.why.namespace().to_owned(),
                id: id.clone(),
                name,
                uid: bundle.pod_uid().to_owned(),
                profile,
                hostname: bundle.spec["hostname"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                sysctls: spec::sysctls(bundle).collect(),
                network: bundle.network()?,
                group: cgroup::group(bundle.cgroup())?,
            };
            let size = &plan.profile.size;
            self.audit.tell(
                "pod",
                None,
                json!({"vcpus": size.vcpus, "memory_bytes": size.memory}),
            );
            // What it says from now on is of the new one.
            self.state().machine.forget_ended();
            let booted = self.orders.boot(plan)?;
            self.stamps.made();
            let mut state = self.state();
            if let MachineState::Ended(reason) = &state.machine {
                return Err(has_ended(reason));
            }
            state.pid = booted.pid;
            state.handle = Some(handle(booted.pid)?);
            state.machine = MachineState::Running(booted);
        }
        let path = bundle.path.clone();
        let Some(prepared) = &mut prepared else {
            return Ok(Task::new(&request.id, path, kind, Process::of_pod(), None));
        };
        // A container without a pod has waited for its machine.
        let began = if kind == Kind::Single {
            stamps::now()
        } else {
            began
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
        let of_pod = OfPod {
            volumes: &self.volumes,
            blocks: &self.blocks,
            watched: &self.watched,
            booted: &booted,
        };
        let root = places.root(&request.rootfs, bundle, of_pod)?;
        let mut sources = Vec::new();
        for (index, source) in &prepared.sources {
            sources.push(places.source(*index, source, of_pod)?);
        }
        let shared = root.file_system.is_none().then(|| {
            let top = self.directory.shared().join(CONTAINERS);
            top.join(&own.name.container)
        });
        self.why
            .learn_places(&request.id, shared, prepared, &sources);
        let nodes = prepared.nodes.iter();
        let devices: Result<_, _> = nodes.map(|node| places.node(node, of_pod)).collect();
        let shown = self.stamps.of(id, "show", began);
        self.tell_container(&request.id, bundle, prepared);
        let wanted = agent::CreateContainerRequest {
            container: own.name.container.clone(),
            root: MessageField::some(root),
            spec: prepared.spec.to_string().into_bytes(),
            streams: MessageField::some(own.wiring().streams()),
            sources,
            devices: devices?,
            user_in_spec: true,
            shared_processes: prepared.shared_processes,
            ..agent::CreateContainerRequest::default()
        };
        guest::ask(&booted.guest, |client| {
            client.create_container(context(), &wanted)
        })?;
        self.stamps.of(id, "create", shown);
        Ok(Task::new(&request.id, path, kind, own, Some(places)))
    }

    /// Says what a container is to run and to be shown.
    fn tell_container(&self, id: &str, bundle: &Bundle, prepared: &Prepared) {
        let process = &bundle.spec["process"];
        let facts = json!({
            "name": bundle.annotation(CONTAINER_NAME),
            "image": bundle.annotation(IMAGE_NAME),
            "args": process["args"],
            "user": process["user"],
        });
        self.audit.tell("container", Some(id), facts);
        for (index, source) in &prepared.sources {
            if let Source::Host(bind, _) = source {
                let facts = json!({
                    "source": bind.path.display().to_string(),
                    "destination": prepared.spec["mounts"][*index]["destination"],
                    "read_only": bind.read_only,
                });
                self.audit.tell("mount", Some(id), facts);
            }
        }
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

    /// What was made is there, unless it failed or containerd has given it up meanwhile: then
    /// nothing of it is left.
    fn settle(
        &self,
        id: &str,
        kind: Kind,
        made: Result<Arc<Task>, ShimError>,
    ) -> Result<(), ShimError> {
        let error = {
            let mut state = self.state();
            let slot = state.tasks.get(id);
            let is_unwanted = matches!(slot, Some(Slot::Creating { unwanted: true, .. }));
            match made {
                Ok(task) if is_unwanted => {
                    drop(state);
                    self.take_away(&task);
                    let text = "it was given up while it was being created";
                    ShimError::State(text.into())
                }
                Ok(task) => match &state.machine {
                    // `lost` has not seen it.
                    MachineState::Ended(reason) if kind != Kind::Member => has_ended(reason),
                    _ => {
                        state.tasks.insert(id.to_owned(), Slot::There(task));
                        return Ok(());
                    }
                },
                Err(error) => error,
            }
        };
        if kind != Kind::Member {
            self.end_machine("it was not needed");
        }
        let mut state = self.state();
        state.tasks.remove(id);
        if state.leaving && !state.tasks.values().any(Slot::has_machine) {
            drop(state);
            self.orders.leave();
        }
        Err(error)
    }

    /// Removes a container in the guest, and what it was shown.
    fn take_away(&self, task: &Task) {
        if !task.is_pod()
            && let Ok(booted) = self.machine()
        {
            match guest::remove(&booted.guest, task.guest_name()) {
                Ok(()) | Err(ShimError::NotFound(_)) => {}
                Err(error) => {
                    log::warn!("container {} is not removed in the guest: {error}", task.id);
                }
            }
        }
        task.cut();
        task.leave_places();
    }

    fn end_machine(&self, why: &str) {
        self.orders.end();
        let mut state = self.state();
        state.handle = None;
        if matches!(state.machine, MachineState::Running(_)) {
            state.machine = MachineState::Ended(why.to_owned());
        }
    }

    /// Leaves, unless the pod is still there and `now` does not say so all the same. Containers that
    /// are left of a pod that is not there are nobody's. A pod that is being created while nobody
    /// knows of it any more is not wanted, and we leave when that is undone.
    pub(crate) fn shutdown(&self, now: bool) {
        let mut state = self.state();
        if !now {
            let mut stays = false;
            let mut is_made = false;
            for slot in state.tasks.values_mut().filter(|slot| slot.has_machine()) {
                match slot {
                    Slot::There(_) => stays = true,
                    Slot::Creating { unwanted, .. } => {
                        *unwanted = true;
                        is_made = true;
                    }
                }
            }
            state.leaving = is_made;
            if stays || is_made {
                return;
            }
        }
        drop(state);
        self.orders.leave();
    }
}

fn has_ended(reason: &str) -> ShimError {
    ShimError::Machine(format!("the pod's machine has ended: {reason}"))
}

fn no_container(id: &str) -> ShimError {
    ShimError::NotFound(format!("there is no container {id}"))
}

/// A process that is signalled by this is never another of the same id.
fn handle(pid: u32) -> Result<OwnedFd, ShimError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| ShimError::Machine("the machine is no process".into()))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(during("the machine's process"))
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use containerd_shim_protos::{TaskClient, api::WaitRequest};

    use super::*;
    use crate::{keeper::Keeper, service};

    /// Has `act` done with a pod whose keeper runs until it is told to leave.
    fn with_pod(name: &str, act: impl FnOnce(&Arc<Pod>) + Send + 'static) {
        let namespace = format!("pericarp-test-{}", std::process::id());
        let directory = Directory::of(&namespace, name);
        let stamps = Arc::new(Stamps::new(directory.path(), name, stamps::now()));
        let socket = directory.join("socket");
        let (keeper, orders) = Keeper::new(directory.clone(), socket, Arc::clone(&stamps)).unwrap();
        let events = Events::to(String::new(), namespace.clone()).unwrap();
        let why = Chronicle::new(&namespace, name);
        let pod = Pod::new(why, directory, orders, events, stamps);
        let acting = thread::spawn(move || {
            let pod = LeaveAtPanic(pod);
            act(&pod.0);
        });
        keeper.run(|ended| panic!("{ended:?}"));
        acting.join().unwrap();
    }

    /// A test that fails is not waited for.
    struct LeaveAtPanic(Arc<Pod>);

    impl Drop for LeaveAtPanic {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.orders.leave();
            }
        }
    }

    fn task(id: &str, kind: Kind) -> Arc<Task> {
        Task::new(id, "/b".into(), kind, Process::of_pod(), None)
    }

    fn creating(pod: &Pod, id: &str, kind: Kind) {
        let slot = Slot::Creating {
            kind,
            unwanted: false,
        };
        pod.state().tasks.insert(id.into(), slot);
    }

    #[test]
    fn a_pod_that_was_given_up_is_undone_and_left() {
        with_pod("given-up", |pod| {
            creating(pod, "p", Kind::Sandbox);
            let error = pod.delete("p", "").unwrap_err();
            assert!(matches!(error, ShimError::NotFound(_)), "{error}");
            pod.shutdown(false);
            // The keeper leaves now, and not before.
            let made = Ok(task("p", Kind::Sandbox));
            assert!(pod.settle("p", Kind::Sandbox, made).is_err());
            assert!(pod.state().tasks.is_empty());
        });
    }

    #[test]
    fn a_container_that_was_given_up_is_not_there_and_its_pod_is() {
        with_pod("member", |pod| {
            creating(pod, "p", Kind::Sandbox);
            let made = Ok(task("p", Kind::Sandbox));
            pod.settle("p", Kind::Sandbox, made).unwrap();
            creating(pod, "c", Kind::Member);
            pod.delete("c", "").unwrap_err();
            pod.shutdown(false);
            let made = Ok(task("c", Kind::Member));
            assert!(pod.settle("c", Kind::Member, made).is_err());
            creating(pod, "d", Kind::Member);
            // That of another container's deletion.
            pod.shutdown(false);
            let made = Ok(task("d", Kind::Member));
            pod.settle("d", Kind::Member, made).unwrap();
            assert!(pod.task("p").is_ok() && pod.task("d").is_ok());
            // What is left without its pod keeps nobody.
            pod.delete("p", "").unwrap();
            pod.shutdown(false);
        });
    }

    #[test]
    fn one_that_was_killed_or_deleted_is_not_started() {
        with_pod("killed", |pod| {
            for id in ["k", "d"] {
                creating(pod, id, Kind::Sandbox);
                let made = Ok(task(id, Kind::Sandbox));
                pod.settle(id, Kind::Sandbox, made).unwrap();
            }
            let (killed, deleted) = (pod.task("k").unwrap(), pod.task("d").unwrap());
            pod.kill("k", "", 9, false).unwrap();
            assert_eq!(killed.own.wait(|| true).unwrap().code, LOST);
            let error = pod.kill("k", "", 9, false).unwrap_err();
            assert!(matches!(error, ShimError::NotFound(_)), "{error}");
            pod.delete("d", "").unwrap();
            assert_eq!(deleted.own.wait(|| true).unwrap().code, 0);
            pod.shutdown(true);
        });
    }

    #[test]
    fn who_waits_goes_with_its_connection() {
        with_pod("waits", |pod| {
            creating(pod, "p", Kind::Sandbox);
            let made = Ok(task("p", Kind::Sandbox));
            pod.settle("p", Kind::Sandbox, made).unwrap();
            let own = Arc::clone(&pod.task("p").unwrap().own);
            let socket = format!("pericarp-waits-{}", std::process::id());
            let socket = std::env::temp_dir().join(socket);
            let address = format!("unix://{}", socket.display());
            let server = ttrpc::Server::new().bind(&address).unwrap();
            let mut server = server.register_service(service::methods(pod));
            server.start().unwrap();

            let before = Arc::strong_count(&own);
            let client = TaskClient::new(ttrpc::Client::connect(&address).unwrap());
            let request = WaitRequest {
                id: "p".into(),
                ..WaitRequest::default()
            };
            let limited = ttrpc::context::with_timeout(500_000_000);
            client.wait(limited, &request).unwrap_err();
            assert!(Arc::strong_count(&own) > before);
            drop(client);
            let begin = Instant::now();
            while Arc::strong_count(&own) > before {
                assert!(begin.elapsed() < Duration::from_secs(30));
                thread::sleep(Duration::from_millis(50));
            }
            server.shutdown();
            std::fs::remove_file(socket).unwrap();
            pod.shutdown(true);
        });
    }

    #[test]
    fn processes_are_shared_from_the_first_container_on() {
        let (own, joined) = (Some(None), Some(Some("/proc/7/ns/pid")));
        let all = |namespaces: &[Option<Option<&str>>]| {
            namespaces
                .iter()
                .try_fold(Processes::default(), |decided, one| decided.with(*one))
        };
        assert_eq!(all(&[joined, joined]).unwrap(), Processes::Shared);
        assert_eq!(all(&[joined, own, joined]).unwrap(), Processes::Shared);
        assert_eq!(all(&[None, own, own]).unwrap(), Processes::Separate);
        let error = all(&[own, joined]).unwrap_err();
        assert!(matches!(error, ShimError::Invalid(_)));
        let text = error.to_string();
        assert!(text.starts_with("linux.namespaces: pid: "), "{text}");
    }
}
