//! A container: its root, its configuration and its processes.
//!
//! Created, asked and removed by `pod`. crun does the work of making it; what it does not do is
//! here: the root's mounts, who the user is, which disks and shares are shown, and the end of
//! everything.

use std::{
    collections::HashMap,
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use pericarp_api::{
    agent::{CreateContainerRequest, CreateProcessRequest, Streams},
    is_id,
    share::{MAX_SOURCES, check_node},
};
use rustix::process::{Pid, Signal};

use crate::{
    cgroup::Group,
    config, crun, disks,
    error::{RequestError, trying},
    inside::Inside,
    process::Process,
    processes::First,
    reaper::{Reaper, Watch},
    root::{Root, Scratch, Sources},
    shares, signals,
    user::{self, User},
};

/// Processes of all containers together.
pub(crate) const MAX_PROCESSES: usize = 1024;
/// Disks shown to one container.
const MAX_DEVICES: usize = 64;
/// For killed processes to go.
const KILL_LIMIT: Duration = Duration::from_secs(10);
const KILL_AGAIN: Duration = Duration::from_millis(50);

/// A process with what crun needs to start it.
#[derive(Debug, Clone)]
struct Entry {
    process: Arc<Process>,
    /// `config.json` of the container's own, the process object of another.
    spec: Arc<[u8]>,
    program: String,
}

#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    group: Group,
    root: Mutex<Root>,
    user: User,
    /// By id; the container's own process has the empty one and stays.
    processes: Mutex<HashMap<String, Entry>>,
    /// Of all containers.
    count: Arc<AtomicUsize>,
    removing: AtomicBool,
    /// Its own process has ended, and the group is killed after that.
    ended: Arc<AtomicBool>,
    /// Kept for as long as the configuration names its descriptor.
    _processes: Option<Arc<First>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends this program, so nobody sees a state left half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Container {
    /// Mounts the root and registers the container's own process.
    pub(crate) fn create(
        request: &CreateContainerRequest,
        scratch: Option<&Scratch>,
        from: Sources<'_>,
        processes: Option<Arc<First>>,
        count: &Arc<AtomicUsize>,
    ) -> Result<Arc<Self>, RequestError> {
        let id = &request.container;
        let mut config = config::Container::parse(&request.spec)?;
        let mut process = config.take_process()?;
        let program = process.program()?;
        let streams = request.streams.clone().unwrap_or_default();
        let has_terminal = process.has_terminal(&streams)?;
        let group = Group::of(id);
        config.set_group(group.name())?;
        if request.devices.len() > MAX_DEVICES {
            return Err(RequestError::Invalid(format!(
                "a container is shown {MAX_DEVICES} disks at most"
            )));
        }
        let mut elsewhere = Vec::new();
        for device in &request.devices {
            let path = &device.path;
            check_node(path).map_err(|error| {
                RequestError::Invalid(format!("'{path}' is no place for a device: it {error}"))
            })?;
            let disk = disks::find(&device.disk)?;
            config.allow_device(device, &disk)?;
            match path.starts_with("/dev/") {
                true => config.add_device(device, &disk)?,
                false => elsewhere.push((device, disk)),
            }
        }
        if request.sources.len() > MAX_SOURCES {
            return Err(RequestError::Invalid(format!(
                "the mounts of a container come from {MAX_SOURCES} places at most"
            )));
        }
        if let Some(processes) = &processes {
            config.join_processes(&processes.path())?;
        }
        shares::check(&request.shares)?;
        for share in &request.shares {
            let place = from.shares.mount(&share.tag, share.read_only)?;
            config.add_share(share, &place)?;
        }

        let mut root = Root::mount(id, &request.root.clone().unwrap_or_default(), scratch, from)?;
        let rootfs = root.rootfs();
        let mut finish = |root: &mut Root| -> Result<User, RequestError> {
            config.set_root(&rootfs.to_string_lossy())?;
            for source in &request.sources {
                config.set_source(source.mount, &root.add_source(source, from)?)?;
            }
            for (device, disk) in &elsewhere {
                config.add_node(device, &root.add_node(device, disk)?)?;
            }
            let inside = Inside::open(&rootfs).map_err(trying("the root"))?;
            let user = match request.user_in_spec {
                true => user::numbered(&inside, process.user()?)?,
                false => user::find(&inside, &request.user)?,
            };
            process.set_user(&user)?;
            // As podman does for an image's directory. Where it cannot be made, crun will say so.
            let directory = Path::new(process.directory()?);
            let _ = inside.make_directory(directory, (user.uid, user.gid));
            Ok(user)
        };
        let user = match finish(&mut root) {
            Ok(user) => user,
            Err(error) => {
                // The first error is the one to tell.
                let _ = root.remove(from);
                return Err(error);
            }
        };
        let spec = config.text(process).into();
        let container = Arc::new(Self {
            id: id.clone(),
            group,
            root: Mutex::new(root),
            user,
            processes: Mutex::default(),
            count: Arc::clone(count),
            removing: AtomicBool::new(false),
            ended: Arc::default(),
            _processes: processes,
        });
        let registered = container.register("", has_terminal, &streams, spec, program);
        if let Err(error) = registered {
            let _ = lock(&container.root).remove(from);
            return Err(error);
        }
        Ok(container)
    }

    fn register(
        self: &Arc<Self>,
        id: &str,
        has_terminal: bool,
        streams: &Streams,
        spec: Arc<[u8]>,
        program: String,
    ) -> Result<(), RequestError> {
        let mut processes = lock(&self.processes);
        if processes.contains_key(id) {
            return Err(RequestError::Exists(format!(
                "there is a process '{id}' in the container"
            )));
        }
        let process = Process::register(Arc::downgrade(self), id, has_terminal, streams)?;
        if self.count.fetch_add(1, Ordering::Relaxed) >= MAX_PROCESSES {
            self.count.fetch_sub(1, Ordering::Relaxed);
            return Err(RequestError::Exhausted(format!(
                "there are {MAX_PROCESSES} processes, and no more are kept"
            )));
        }
        let entry = Entry {
            process,
            spec,
            program,
        };
        processes.insert(id.to_owned(), entry);
        Ok(())
    }

    /// Registers a further process.
    pub(crate) fn add(
        self: &Arc<Self>,
        request: &CreateProcessRequest,
    ) -> Result<(), RequestError> {
        if !is_id(&request.process) {
            return Err(RequestError::Invalid(format!(
                "'{}' is no id of a process",
                request.process
            )));
        }
        let mut process = config::Process::parse(&request.spec)?;
        let program = process.program()?;
        process.directory()?;
        let streams = request.streams.clone().unwrap_or_default();
        let has_terminal = process.has_terminal(&streams)?;
        self.check_running()?;
        let inside = || {
            let rootfs = lock(&self.root).rootfs();
            Inside::open(&rootfs).map_err(trying("the root"))
        };
        if request.user_in_spec {
            let user = user::numbered(&inside()?, process.user()?)?;
            process.set_user(&user)?;
        } else if request.user.is_empty() {
            process.set_user(&self.user)?;
        } else {
            process.set_user(&user::find(&inside()?, &request.user)?)?;
        }
        self.register(
            &request.process,
            has_terminal,
            &streams,
            process.text().into(),
            program,
        )
    }

    fn check_running(&self) -> Result<(), RequestError> {
        let runs = self
            .entry("")
            .is_some_and(|own| own.process.pid().is_some());
        if runs && !self.removing.load(Ordering::SeqCst) {
            Ok(())
        } else {
            Err(RequestError::State("the container is not running".into()))
        }
    }

    fn entry(&self, id: &str) -> Option<Entry> {
        lock(&self.processes).get(id).cloned()
    }

    /// The process with this id.
    pub(crate) fn process(&self, id: &str) -> Result<Arc<Process>, RequestError> {
        self.entry(id)
            .map(|entry| entry.process)
            .ok_or_else(|| no_process(id))
    }

    /// Starts a registered process.
    pub(crate) fn start(self: &Arc<Self>, id: &str, reaper: &Reaper) -> Result<Pid, RequestError> {
        let entry = self.entry(id).ok_or_else(|| no_process(id))?;
        let size = entry.process.begin()?;
        let started = self.launch(&entry, size, reaper);
        if started.is_err() {
            entry.process.failed();
        }
        started
    }

    fn launch(
        self: &Arc<Self>,
        entry: &Entry,
        size: Option<(u16, u16)>,
        reaper: &Reaper,
    ) -> Result<Pid, RequestError> {
        let process = &entry.process;
        let is_own = process.id().is_empty();
        // After `begin`: whoever removes the container sees one of the two.
        if self.removing.load(Ordering::SeqCst) {
            return Err(RequestError::State("the container is being removed".into()));
        }
        if !is_own {
            self.check_running()?;
        }
        let spec = with_size(&entry.spec, size, is_own)?;
        let streams = if process.has_terminal() {
            None
        } else {
            Some(process.make_pipes().map_err(trying("pipes"))?)
        };
        let bundle = lock(&self.root).bundle().to_owned();
        let act = if is_own {
            fs::write(bundle.join("config.json"), &*spec)
                .map_err(trying("the container's configuration"))?;
            crun::Act::Run { bundle: &bundle }
        } else {
            crun::Act::Exec { process: &spec }
        };
        let before = self.group.oom_kills();
        let (group, over) = (self.group.clone(), Arc::clone(&self.ended));
        let ended = Arc::clone(process);
        let watch: Watch = Box::new(move |status| {
            let killed = status.signal() == Some(libc::SIGKILL);
            let out_of_memory = killed && group.oom_kills() > before;
            if is_own {
                // A container is over with its own process, whether or not it had a process
                // namespace, whose processes the kernel ends.
                over.store(true, Ordering::SeqCst);
                group.kill();
            }
            ended.end(status, out_of_memory);
        });
        let (pid, terminal) = crun::start(reaper, &self.id, &entry.program, &act, streams, watch)?;
        // Who came into the group before the mark was there is killed with it; who came later sees
        // the mark. Before the start is told: until then nobody removes the container, and the
        // group is this one's.
        if !is_own && self.ended.load(Ordering::SeqCst) {
            self.group.kill();
        }
        process.started(pid, terminal);
        Ok(pid)
    }

    /// Signals one process, or all.
    pub(crate) fn signal(
        &self,
        id: &str,
        number: u32,
        all: bool,
        reaper: &Reaper,
    ) -> Result<(), RequestError> {
        let signal = signals::numbered(number)
            .ok_or_else(|| RequestError::Invalid(format!("there is no signal {number}")))?;
        let process = self.process(id)?;
        let gone = || RequestError::NotFound("the process is not running".into());
        let pid = process.pid().ok_or_else(gone)?;
        let reached = if all && signal == Signal::KILL {
            self.group.kill();
            true
        } else if all {
            self.group.signal(signal) > 0
        } else {
            reaper.signal(pid, signal)
        };
        if reached { Ok(()) } else { Err(gone()) }
    }

    /// Changes its limits, `linux.resources` of a configuration.
    pub(crate) fn update(&self, resources: &[u8], reaper: &Reaper) -> Result<(), RequestError> {
        self.check_running()?;
        crun::update(reaper, &self.id, resources)
    }

    /// Stops its processes where they are, or lets them go on.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), RequestError> {
        self.check_running()?;
        self.group.freeze(frozen).map_err(trying("the freezer"))
    }

    /// Its control group.
    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    /// This process has ended and has been reported: another may have its id.
    pub(crate) fn forget(&self, process: &Process) {
        if process.id().is_empty() {
            return;
        }
        let mut processes = lock(&self.processes);
        let is_it = processes
            .get(process.id())
            .is_some_and(|entry| std::ptr::eq(Arc::as_ptr(&entry.process), process));
        if is_it {
            let entry = processes.remove(process.id());
            self.count.fetch_sub(1, Ordering::Relaxed);
            drop(processes);
            drop(entry);
        }
    }

    /// Kills all processes and waits for them to be gone. No more are started.
    pub(crate) fn end(&self) -> Result<(), RequestError> {
        self.removing.store(true, Ordering::SeqCst);
        let end = Instant::now() + KILL_LIMIT;
        let processes: Vec<Arc<Process>> = lock(&self.processes)
            .values()
            .map(|entry| Arc::clone(&entry.process))
            .collect();
        for process in &processes {
            // Again and again: what crun is starting now gets into the group a moment later.
            loop {
                self.group.kill();
                if process.wait_over(KILL_AGAIN) {
                    break;
                }
                if Instant::now() >= end {
                    return Err(still_running());
                }
            }
        }
        while self.group.is_populated() {
            if Instant::now() >= end {
                return Err(still_running());
            }
            self.group.kill();
            std::thread::sleep(KILL_AGAIN / 10);
        }
        // Those never started have streams that end now.
        for process in processes.iter().filter(|process| !process.is_over()) {
            process.failed();
        }
        Ok(())
    }

    /// Ends it and undoes everything.
    pub(crate) fn remove(&self, reaper: &Reaper, from: Sources<'_>) -> Result<(), RequestError> {
        self.end()?;
        let deleted = crun::delete(reaper, &self.id);
        let removed = lock(&self.root).remove(from);
        deleted.and(removed)
    }

    /// Writes back what it wrote and unmounts its root. It has been ended.
    pub(crate) fn put_away(&self) -> Result<(), RequestError> {
        lock(&self.root).put_away()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let left = lock(&self.processes).len();
        self.count.fetch_sub(left, Ordering::Relaxed);
    }
}

fn still_running() -> RequestError {
    RequestError::System {
        what: "killed processes do not end".into(),
        source: std::io::ErrorKind::TimedOut.into(),
    }
}

fn no_process(id: &str) -> RequestError {
    RequestError::NotFound(format!("there is no process '{id}' in the container"))
}

/// The specification with the terminal's size, when there is one.
fn with_size(
    spec: &Arc<[u8]>,
    size: Option<(u16, u16)>,
    is_own: bool,
) -> Result<Arc<[u8]>, RequestError> {
    let Some((columns, rows)) = size else {
        return Ok(Arc::clone(spec));
    };
    if is_own {
        let mut config = config::Container::parse(spec)?;
        let mut process = config.take_process()?;
        process.set_size(columns, rows);
        Ok(config.text(process).into())
    } else {
        let mut process = config::Process::parse(spec)?;
        process.set_size(columns, rows);
        Ok(process.text().into())
    }
}
