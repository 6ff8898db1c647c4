//! The machine of a pod: its sidecars, its network, and whether all of it is still there.
//!
//! Made and ended by `keeper`, on the thread that lives as long as the shim: the kernel ends the
//! processes with it, however it ends.

use std::{
    collections::{BTreeSet, HashMap},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use pericarp_api::{agent, hello::last_words, host::Guest};
use pericarp_config::{Pod, Settings};
use pericarp_hypervisor::{
    ConsoleSpec, HostFacts, Machine, MachineError, MachineSpec, VsockSpec, select,
};
use pericarp_network::{Attached, Namespace, attach};
use pericarp_pod::{
    Assets, Greeting, Sidecar, assets,
    history::Kind,
    initramfs,
    network::message,
    overhead,
    power_off::{POWER_OFF_LIMIT, power_off},
    process::{context, refused, unreachable},
    record::{ALL, DeviceKind, DeviceRecord, MACHINE, PodRecord, ProcessRecord},
    sidecar::{Access, BLOCK, Card, Limits, Share},
    spec::{card_spec, share_spec},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    cgroup::Entered,
    directory::Directory,
    disks::{self, Backing, Disks},
    error::{ShimError, during},
    lanes::{Lane, tag},
    lasting::Lasting,
    oom::Ordinary,
    pinned::{self, Pinned},
    profile::Profile,
    stamps::{self, Stamps},
};

/// Tag of the share that has everything the pod's containers are shown.
pub(crate) const POD_SHARE: &str = "pod";
/// Where the sidecars of shares and of cards answer, in the pod's directory.
const FS_CONTROL: &str = "fs.control";
const NET_CONTROL: &str = "net.control";
/// As `pericarp run` has it.
const CMDLINE: &str = "panic=-1 loglevel=5";
const GUEST_CID: u32 = 3;
const MAX_QUEUES: u32 = 4;
/// Lines of the guest's console that are kept when it has ended.
const EVIDENCE: usize = 12;
/// How often the processes are looked at while the guest boots.
const LOOK: Duration = Duration::from_millis(50);
/// When something has ended, how soon the cause shows if it is one of our processes.
const CAUSE_LIMIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};
const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// A machine to be made.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// What containerd and Kubernetes call the pod.
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) profile: Profile,
    pub(crate) hostname: String,
    pub(crate) sysctls: HashMap<String, String>,
    /// The pod's network namespace.
    pub(crate) network: Option<PathBuf>,
    /// The pod's control group on the host.
    pub(crate) group: Option<PathBuf>,
}

/// What of a pod decides how its containers get what they are shown.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) pod: Pod,
    pub(crate) lanes: Vec<Lane>,
    /// Modules of the guest's kernel for XFS, in their order.
    pub(crate) xfs: Vec<PathBuf>,
    /// Names of volumes that containers have had.
    pub(crate) seen: Mutex<BTreeSet<String>>,
}

impl About {
    /// A container has a volume of this name.
    pub(crate) fn saw(&self, name: &str) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(name.to_owned());
    }

    /// Says which volumes have limits and were never there: a mistake that nobody saw before.
    fn tell_unseen(&self) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for name in self
            .pod
            .named_volumes()
            .filter(|name| !seen.contains(*name))
        {
            log::warn!("io.pericarp/volume.{name}: no container of the pod has had such a volume");
        }
    }
}

/// A machine's processes, one of which may be replaced.
pub(crate) type Processes = Arc<Mutex<Vec<u32>>>;

/// Why a machine has ended that must not.
#[derive(Debug)]
pub(crate) struct Ended {
    /// In one line.
    pub(crate) reason: String,
    pub(crate) kind: Kind,
    /// The last lines of its console, and what the host's kernel says.
    pub(crate) evidence: Vec<String>,
}

/// What others need of a machine.
#[derive(Debug, Clone)]
pub(crate) struct Booted {
    pub(crate) guest: Guest,
    /// On the host.
    pub(crate) pid: u32,
    /// That one, and those of the sidecars.
    pub(crate) processes: Processes,
    pub(crate) about: Arc<About>,
}

/// A machine that answers.
pub(crate) struct Running {
    // In the order in which they end.
    machine: Machine,
    sidecars: Vec<Sidecar>,
    disks: Disks,
    lasting: Lasting,
    network: Option<Attached>,
    guest: Guest,
    /// Its end is the agent's.
    hello: UnixStream,
    processes: Processes,
    about: Arc<About>,
    directory: Directory,
    record: PodRecord,
    /// Kept from being removed.
    _assets: Assets,
    group: Option<Entered>,
    _pinned: Option<Pinned>,
}

impl Running {
    /// Boots it. On failure nothing is left but the directory.
    pub(crate) fn boot(
        plan: &Plan,
        directory: &Directory,
        stamps: &Stamps,
    ) -> Result<Self, ShimError> {
        let Profile { pod, size, lanes } = &plan.profile;
        let settings = &pod.settings;
        let assets = open_assets(settings)?;
        let cpus = settings.cpus.as_ref();
        let before = cpus.map(|_| pinned::here()).transpose()?;
        // Undone after the group is left, whose CPUs need not be those from before.
        let pinned;
        // Left after all else, whatever fails.
        let group = enter_group(plan, directory)?;
        // With all threads, for good: one that is started later is there, too.
        pinned = match cpus.zip(before) {
            Some((cpus, before)) => Some(Pinned::to(cpus, before)?),
            None => None,
        };
        let choice = select(settings.hypervisor, &HostFacts::probe());
        log::debug!("{choice}");
        let hypervisor = choice.hypervisor();
        let mut record = record(plan, &assets, choice.to_string());
        let beside = settings.overhead;
        record.overhead = beside.unwrap_or_else(|| overhead::usual(choice.driver));
        record
            .write(directory.path())
            .map_err(during("the pod's record"))?;
        let _ordinary = Ordinary::begin();
        // Nothing started from here on may gain privileges by executing a file.
        rustix::thread::set_no_new_privs(true).map_err(during("no_new_privs"))?;
        let queues = u16::try_from(size.vcpus.min(MAX_QUEUES)).unwrap_or(1);
        let share = |id: String, shown, queues, limits| Share {
            socket: directory.join(&format!("{id}.sock")),
            id,
            directory: shown,
            access: Access::Pod {
                cache: settings.share_cache.name(),
            },
            queues,
            limits,
        };
        let of_all = share(
            POD_SHARE.into(),
            directory.shared(),
            queues,
            Limits::default(),
        );
        directory.create_lanes(lanes.len())?;
        let own = lanes.iter().enumerate();
        let own = own.map(|(number, lane)| {
            share(tag(number), directory.shared_lane(number), 1, lane.limits)
        });
        let shares: Vec<Share> = [of_all].into_iter().chain(own).collect();
        let share_specs = shares.iter().map(share_spec).collect();
        let control = directory.join(FS_CONTROL);
        stamps.over("prepare");
        // Declared before the sidecars, so that it is left after them, whatever fails.
        let (network, cards);
        let (mut sidecars, mut lasting) = (Vec::new(), Lasting::default());
        // They get ready while the rest is made.
        match hypervisor.finds_shares_again() {
            true => lasting.push(pericarp_pod::Lasting::shares(shares, control)?),
            false => sidecars.push(Sidecar::fs(&shares, None, &control)?),
        }
        let (socket, host_side) = (directory.join("vsock.sock"), directory.join("vsock/guest"));
        sidecars.push(Sidecar::vsock(&socket, GUEST_CID, &host_side)?);
        (network, cards) = join_network(plan, directory, queues)?;
        stamps.over("network");
        record.devices = devices(lanes, &cards);
        let has_cards = !cards.is_empty();
        let card_specs = cards.iter().map(card_spec).collect();
        if has_cards {
            let control = directory.join(NET_CONTROL);
            lasting.push(pericarp_pod::Lasting::cards(cards, control)?);
        }
        let image = directory.join("initramfs");
        initramfs::write(&assets, (true, has_cards), &image)?;
        stamps.over("image");
        // Listens before the machine starts: the agent dials once.
        let greeting = Greeting::listen(&host_side)?;
        for sidecar in &mut sidecars {
            sidecar.listening(&mut || Ok::<_, ShimError>(()))?;
        }
        lasting.listening()?;
        stamps.over("sidecars");

        let spec = MachineSpec {
            kernel: assets.kernel.clone(),
            initramfs: image,
            cmdline: format!("{CMDLINE} {}", settings.kernel_parameters)
                .trim_end()
                .to_owned(),
            cpus: size.vcpus,
            memory: size.memory,
            disks: Vec::new(),
            shares: share_specs,
            cards: card_specs,
            vsock: Some(VsockSpec {
                id: "vsock".into(),
                socket,
                guest_cid: GUEST_CID,
            }),
            spare_slots: disks::MOST,
            console: ConsoleSpec::default(),
        };
        let limit = settings
            .boot_timeout
            .unwrap_or_else(|| hypervisor.boot_timeout());
        let mut machine = match hypervisor.start(&spec) {
            Ok(machine) => machine,
            // QEMU fails without its devices; then the cause is a sidecar.
            Err(error) => {
                let dead = sidecars.iter_mut().find_map(Sidecar::death);
                let dead = dead.or_else(|| lasting.death());
                return Err(dead.map_or_else(|| no_machine(&error), ShimError::from));
            }
        };
        stamps.over("machine");
        let guest = Guest::new(host_side);
        let configure = agent::ConfigureRequest {
            hostname: plan.hostname.clone(),
            network: network
                .as_ref()
                .map(|joined| message(&joined.network))
                .into(),
            sysctls: plan.sysctls.clone(),
            ..agent::ConfigureRequest::default()
        };
        let hello = greet(
            &guest,
            greeting,
            configure,
            &mut || {
                let dead = sidecars.iter_mut().find_map(Sidecar::death);
                if let Some(death) = dead.or_else(|| lasting.death()) {
                    return Some(death.into());
                }
                machine
                    .has_ended()
                    .then(|| with_console(&machine.death(), &machine))
            },
            limit,
        );
        let hello = match hello {
            Ok((hello, greeted)) => {
                stamps.over_at("kernel", greeted.began);
                stamps.over_at("agent", greeted.said);
                stamps.over("configure");
                hello
            }
            Err(Unanswered::Failed(error)) => return Err(error),
            Err(Unanswered::Late) => {
                return Err(with_console(&MachineError::BootTimeout(limit), &machine));
            }
        };
        let mut running = Self {
            processes: Processes::default(),
            machine,
            sidecars,
            disks: Disks::new(directory.clone(), queues),
            lasting,
            network,
            guest,
            hello,
            about: Arc::new(About {
                xfs: assets.xfs(),
                pod: pod.clone(),
                lanes: lanes.clone(),
                seen: Mutex::default(),
            }),
            directory: directory.clone(),
            record,
            _assets: assets,
            _pinned: pinned,
            group,
        };
        running.tell_processes();
        Ok(running)
    }

    /// Has others know the processes that there are now.
    fn tell_processes(&mut self) {
        let process = |role: &str, pid| ProcessRecord {
            role: role.to_owned(),
            pid,
            device: String::new(),
        };
        let all = [process(MACHINE, self.machine.pid())]
            .into_iter()
            .chain(self.sidecars.iter().map(|it| process(it.name(), it.pid())))
            .chain(self.disks.all().map(|(backing, pid)| ProcessRecord {
                device: backing.id.clone(),
                ..process(BLOCK, pid)
            }))
            .chain(
                self.lasting
                    .processes()
                    .map(|(name, pid)| process(name, pid)),
            );
        self.record.processes = all.collect();
        let devices = &mut self.record.devices;
        devices.retain(|device| device.kind != DeviceKind::Disk);
        devices.extend(self.disks.all().map(|(backing, _)| DeviceRecord {
            id: backing.id.clone(),
            kind: DeviceKind::Disk,
            volume: backing.volume.clone(),
            control: disks::control_name(&backing.id),
        }));
        let mut told = self
            .processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *told = self.record.processes.iter().map(|one| one.pid).collect();
        drop(told);
        if let Err(error) = self.record.write(self.directory.path()) {
            log::warn!("the pod's record is out of date: {error}");
        }
    }

    /// Serves a disk and adds it.
    pub(crate) fn add_disk(&mut self, backing: Backing) -> Result<(), ShimError> {
        let added = self.disks.add(&mut self.machine, backing);
        self.tell_processes();
        added
    }

    /// Takes a disk away, as `Disks::remove` has it.
    pub(crate) fn remove_disk(&mut self, id: &str, must: bool) -> bool {
        let removed = self.disks.remove(&mut self.machine, id, must);
        self.tell_processes();
        removed
    }

    pub(crate) fn booted(&self) -> Booted {
        Booted {
            guest: self.guest.clone(),
            pid: self.machine.pid(),
            processes: Arc::clone(&self.processes),
            about: Arc::clone(&self.about),
        }
    }

    /// Readable when something has ended that must not.
    pub(crate) fn exit_fds(&self) -> Vec<BorrowedFd<'_>> {
        let sidecars = self.sidecars.iter().map(Sidecar::exit_fd);
        sidecars
            .chain(self.disks.exit_fds())
            .chain(self.lasting.exit_fds())
            .chain([self.machine.exit_fd(), self.hello.as_fd()])
            .collect()
    }

    /// What has ended and must not. The sidecars of disks and cards are started again, and that of the
    /// share where the driver finds it.
    pub(crate) fn ended(&mut self) -> Option<Ended> {
        let reason = self.reason()?;
        let mut evidence = self.machine.console_lines(EVIDENCE);
        let killed = self.group.as_ref().and_then(Entered::killed_for_memory);
        Some(match killed {
            None => Ended {
                reason,
                kind: Kind::Machine,
                evidence,
            },
            Some(said) => {
                evidence.insert(0, said.clone());
                Ended {
                    reason: format!("{said}: {reason}"),
                    kind: Kind::HostOutOfMemory,
                    evidence,
                }
            }
        })
    }

    /// The same in one line, as the processes say it.
    fn reason(&mut self) -> Option<String> {
        {
            let processes = self.sidecars.iter().map(Sidecar::exit_fd);
            let mut fds: Vec<PollFd<'_>> = processes
                .chain(self.disks.exit_fds())
                .chain(self.lasting.exit_fds())
                .chain([self.machine.exit_fd()])
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            // An interrupted wait explains less.
            let _ = poll(&mut fds, Some(&CAUSE_LIMIT));
        }
        if let Some(death) = self.sidecars.iter_mut().find_map(Sidecar::death) {
            return Some(death.to_string());
        }
        if self.machine.has_ended() {
            let death = self.machine.death();
            return Some(with_console(&death, &self.machine).to_string());
        }
        let machine = self.machine.pid();
        let lasting = self.lasting.revive(machine);
        match lasting.and_then(|some| Ok(self.disks.revive(machine)? + some)) {
            Ok(0) => {}
            Ok(revived) => {
                if let Some(group) = &mut self.group {
                    group.outlive(revived);
                }
                self.tell_processes();
            }
            Err(error) => return Some(error.to_string()),
        }
        let mut fds = [PollFd::new(&self.hello, PollFlags::IN)];
        if !poll(&mut fds, Some(&NOW)).is_ok_and(|ready| ready > 0) {
            return None;
        }
        let _ = self.hello.set_read_timeout(Some(Duration::from_secs(1)));
        let words = last_words(&self.hello);
        Some(match (self.machine.death(), words) {
            (error @ MachineError::Panicked(_), _) | (error, None) => {
                with_console(&error, &self.machine).to_string()
            }
            (_, Some(words)) => format!("the guest's agent has ended (\"{words}\")"),
        })
    }

    /// Ends it: the guest ends its containers and switches itself off, unless it is dead.
    pub(crate) fn end(mut self, orderly: bool) {
        if orderly && !self.machine.has_ended() {
            self.about.tell_unseen();
            match power_off(&self.guest) {
                Ok(()) => drop(self.machine.wait_for_power_off(POWER_OFF_LIMIT)),
                Err(error) => log::warn!("the guest does not switch itself off: {error}"),
            }
        }
        drop(self.machine);
        for sidecar in self.sidecars {
            sidecar.end();
        }
        self.disks.end();
        self.lasting.end();
        if let Some(Err(error)) = self.network.take().map(Attached::detach) {
            log::warn!("the pod's network is not as it was: {error}");
        }
    }
}

fn open_assets(settings: &Settings) -> Result<Assets, ShimError> {
    let found = assets::place::find(settings.assets.as_deref());
    let (directory, _) = found.unwrap_or_default();
    Assets::open(&directory)
        .map_err(|error| ShimError::Machine(format!("{error}; {}", assets::CURE)))
}

/// What there is to know of a pod before it has a machine.
fn record(plan: &Plan, assets: &Assets, hypervisor: String) -> PodRecord {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    PodRecord {
        namespace: plan.namespace.clone(),
        id: plan.id.clone(),
        name: plan.name.clone(),
        uid: plan.uid.clone(),
        created: now.map_or(0, |passed| passed.as_secs()),
        shim: std::process::id(),
        hypervisor,
        vcpus: plan.profile.size.vcpus,
        memory: plan.profile.size.memory,
        assets: assets.directory.clone(),
        assets_version: assets.version().map(str::to_owned),
        kernel: assets.release(),
        ..PodRecord::default()
    }
}

/// Those that a machine has from its start.
fn devices(lanes: &[Lane], cards: &[Card]) -> Vec<DeviceRecord> {
    let share = |id: String, volume: &str| DeviceRecord {
        id,
        kind: DeviceKind::Share,
        volume: volume.to_owned(),
        control: FS_CONTROL.to_owned(),
    };
    let of_volumes = lanes.iter().enumerate();
    let of_volumes = of_volumes
        .map(|(number, lane)| share(tag(number), lane.name.as_deref().unwrap_or_default()));
    let cards = cards.iter().map(|card| DeviceRecord {
        id: card.id.clone(),
        kind: DeviceKind::Card,
        volume: String::new(),
        control: NET_CONTROL.to_owned(),
    });
    [share(POD_SHARE.to_owned(), ALL)]
        .into_iter()
        .chain(of_volumes)
        .chain(cards)
        .collect()
}

fn enter_group(plan: &Plan, directory: &Directory) -> Result<Option<Entered>, ShimError> {
    let Some(group) = &plan.group else {
        return Ok(None);
    };
    directory.remember_group(group)?;
    let cpus = plan.profile.pod.settings.cpus.as_ref();
    Entered::enter(group.clone(), cpus).map(Some)
}

fn join_network(
    plan: &Plan,
    directory: &Directory,
    queues: u16,
) -> Result<(Option<Attached>, Vec<Card>), ShimError> {
    let Some(path) = &plan.network else {
        return Ok((None, Vec::new()));
    };
    let failed = |error: String| ShimError::Machine(format!("the pod's network: {error}"));
    let namespace = Namespace::open(path).map_err(|error| failed(error.to_string()))?;
    directory.remember_network(path)?;
    let mut joined = attach(&namespace, queues).map_err(|error| failed(error.to_string()))?;
    for what in &joined.network.left_out {
        log::warn!("the pod's network is without {what}");
    }
    let cards = std::mem::take(&mut joined.cards);
    let card = |(index, card): (usize, pericarp_network::Card)| {
        let id = format!("card{}", index + 1);
        Card {
            socket: directory.join(&format!("{id}.sock")),
            id,
            mac: card.mac,
            mtu: card.mtu,
            queues: card.queues,
        }
    };
    Ok((
        Some(joined),
        cards.into_iter().enumerate().map(card).collect(),
    ))
}

/// When the agent began, and when it said so.
struct Greeted {
    began: Duration,
    said: Duration,
}

enum Unanswered {
    Failed(ShimError),
    Late,
}

/// Waits for the agent and configures the machine; `look` says what has ended meanwhile.
fn greet(
    guest: &Guest,
    greeting: Greeting,
    configure: agent::ConfigureRequest,
    look: &mut dyn FnMut() -> Option<ShimError>,
    limit: Duration,
) -> Result<(UnixStream, Greeted), Unanswered> {
    let end = Instant::now() + limit;
    let (tell, told) = channel();
    let guest = guest.clone();
    let talk = move || {
        let talked = || -> Result<(UnixStream, Greeted), ShimError> {
            let received = greeting.receive();
            let (words, hello) = received.map_err(|error| ShimError::Machine(error.to_string()))?;
            let said = stamps::now();
            let began = said.saturating_sub(words.in_agent());
            let client = guest.client().map_err(unreachable)?;
            client.configure(context(), &configure).map_err(refused)?;
            Ok((hello, Greeted { began, said }))
        };
        let _ = tell.send(talked());
    };
    thread::Builder::new()
        .name("greeting".into())
        .spawn(talk)
        .map_err(|error| Unanswered::Failed(during("a thread")(error)))?;
    loop {
        match told.recv_timeout(LOOK) {
            Ok(Ok(hello)) => return Ok(hello),
            // A machine that died explains more than an agent that cannot be reached.
            Ok(Err(error)) => return Err(Unanswered::Failed(look().unwrap_or(error))),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        if let Some(error) = look() {
            return Err(Unanswered::Failed(error));
        }
        if Instant::now() >= end {
            return Err(Unanswered::Late);
        }
    }
}

fn no_machine(error: &MachineError) -> ShimError {
    ShimError::Machine(error.to_string())
}

/// The error with the last line of the guest's console.
fn with_console(error: &MachineError, machine: &Machine) -> ShimError {
    match machine.console_lines(1).pop() {
        Some(line) => ShimError::Machine(format!("{error}; last on its console: {line}")),
        None => no_machine(error),
    }
}
