//! `--runtime vm`: a virtual machine, its sidecars beside it, and the container in it.
//!
//! Called by `run`. The order of the steps is the order in which their values are dropped in
//! reverse: the machine ends before the sidecars it uses, the directory goes last.

mod pod;
pub(crate) mod record;
mod start;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use pericarp_api::{agent, host::Guest, stream::ExitReport};
use pericarp_hypervisor::{CardSpec, ConsoleSpec, MachineError, MachineSpec, ShareSpec, VsockSpec};
use pericarp_pod::{
    Greeting, Lasting, Sidecar, initramfs,
    process::Name,
    record::DeviceKind,
    sidecar::{Access, Device, Limits, Share},
    spec::{card_spec, disk_spec, share_spec},
};

use crate::{
    failure::{CONSOLE_LINES, Failure, during},
    guest::session::{BootLimit, Ending, Ends, Session},
    input::{
        check::{Root, VmPlan},
        network::NetworkPlan,
        volume::Volume,
    },
    network::Joined,
    registry::{CONTAINER, guest_socket},
    report::Timing,
    rootfs::{self, Disk, Source},
    run::Command,
    rundir::RunDir,
    signals::Signals,
    terminal,
    vm::{
        pod::Pod,
        record::{Told, control},
        start::{Phases, Start},
    },
};

/// A panicking kernel resets the machine, which ends it; warnings reach the console, the rest of
/// the boot messages would only cost time.
const CMDLINE: &str = "panic=-1 loglevel=5";
/// Free slots for devices that may be added later.
const SPARE_SLOTS: u8 = 4;
/// More queues than this help no guest of ours.
const MAX_QUEUES: u32 = 4;
/// Serial of the disk, or tag of the share, that the container's root comes from.
const ROOT: &str = "root";
/// Serial of the disk for what the container writes.
const SCRATCH: &str = "scratch";
/// Each machine has a vsock device of its own, so all guests can have the same context id.
const GUEST_CID: u32 = 3;

/// What `run` hands over.
pub(crate) struct Job<'a> {
    pub(crate) plan: VmPlan,
    pub(crate) root: Root,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) network: NetworkPlan,
    pub(crate) command: Command,
    pub(crate) run_dir: &'a RunDir,
    pub(crate) ends: Ends,
    /// Called when the command runs.
    pub(crate) started: &'a mut dyn FnMut() -> Result<(), Failure>,
}

pub(crate) fn run(
    job: Job<'_>,
    signals: &mut Signals,
    timing: &mut Timing,
) -> Result<ExitReport, Failure> {
    let Job {
        plan,
        root,
        volumes,
        network,
        mut command,
        run_dir,
        ends,
        started,
    } = job;
    // Nothing started from here on may gain privileges by executing a file.
    rustix::thread::set_no_new_privs(true).map_err(during("no_new_privs"))?;
    timing.note("hypervisor", plan.choice.to_string());
    signals.check()?;
    let parts = rootfs::for_machine(&root, signals)?;
    timing.mark("image");
    let queues = u16::try_from(plan.size.cpus.min(MAX_QUEUES)).unwrap_or(1);
    let mut network = Joined::join(network, run_dir, signals)?;
    let cards = network.cards(queues, run_dir)?;
    network.show_in_guest(&mut command.spec);
    if !cards.is_empty() {
        timing.mark("network");
    }
    let initramfs = run_dir.join("initramfs");
    let has_shares = !volumes.is_empty() || matches!(parts.source, Source::Directory(_));
    initramfs::write(&plan.assets, (has_shares, !cards.is_empty()), &initramfs)?;
    timing.mark("prepare");

    let device = |id: &str, disk: &Disk| Device {
        id: id.to_owned(),
        socket: run_dir.join(&format!("{id}.sock")),
        file: disk.path.clone(),
        read_only: disk.read_only,
        queues,
        limits: Limits::default(),
    };
    let share = |id: &str, directory: &Path, access| Share {
        id: id.to_owned(),
        socket: run_dir.join(&format!("{id}.sock")),
        directory: directory.to_owned(),
        access,
        queues,
        limits: Limits::default(),
    };
    let mut devices = Vec::new();
    let mut shares = Vec::new();
    let mut counted = Vec::new();
    match &parts.source {
        Source::Disk(disk, _) => {
            counted.push(record::device(ROOT, DeviceKind::Disk, ROOT));
            devices.push(device(ROOT, disk));
        }
        Source::Directory(directory) => {
            counted.push(record::device(ROOT, DeviceKind::Share, ROOT));
            shares.push(share(ROOT, directory, Access::Root));
        }
    }
    if let Some(scratch) = &parts.scratch {
        counted.push(record::device(SCRATCH, DeviceKind::Disk, SCRATCH));
        devices.push(device(SCRATCH, scratch));
    }
    let mut shown = Vec::new();
    for (index, disk) in plan.disks.iter().enumerate() {
        let id = format!("disk{}", index + 1);
        let disk = Disk {
            path: disk.path.clone(),
            read_only: disk.read_only,
        };
        devices.push(device(&id, &disk));
        let path = format!("/dev/pericarp/{id}");
        counted.push(record::device(&id, DeviceKind::Disk, &path));
        shown.push(agent::Device {
            path,
            disk: id,
            read_only: disk.read_only,
            ..Default::default()
        });
    }
    let mut mounted = Vec::new();
    for (index, volume) in volumes.into_iter().enumerate() {
        let id = format!("volume{}", index + 1);
        let access = match volume.read_only {
            true => Access::Reading,
            false => Access::Writing,
        };
        shares.push(share(&id, &volume.host, access));
        counted.push(record::device(&id, DeviceKind::Share, &volume.guest));
        mounted.push(agent::Share {
            tag: id,
            path: volume.guest,
            read_only: volume.read_only,
            ..Default::default()
        });
    }
    let hypervisor = plan.choice.hypervisor();
    let answers_at = |kind| run_dir.join(control(kind));
    let mut sidecars = vec![Sidecar::block(&devices, &answers_at(DeviceKind::Disk))?];
    let mut lasting = Vec::new();
    let share_specs: Vec<ShareSpec> = shares.iter().map(share_spec).collect();
    let place = answers_at(DeviceKind::Share);
    match (shares.is_empty(), hypervisor.finds_shares_again()) {
        (true, _) => {}
        (false, true) => lasting.push(Lasting::shares(shares, place)?),
        (false, false) => sidecars.push(Sidecar::fs(&shares, None, &place)?),
    }
    let card_specs: Vec<CardSpec> = cards.iter().map(card_spec).collect();
    if !cards.is_empty() {
        let of_cards = cards
            .iter()
            .map(|card| record::device(&card.id, DeviceKind::Card, ""));
        counted.extend(of_cards);
        lasting.push(Lasting::cards(cards, answers_at(DeviceKind::Card))?);
    }
    let vsock_socket = run_dir.join("vsock.sock");
    let host_side = guest_socket(run_dir.path());
    std::fs::create_dir(run_dir.join("vsock")).map_err(during("a directory for sockets"))?;
    sidecars.push(Sidecar::vsock(&vsock_socket, GUEST_CID, &host_side)?);
    let check = &mut || signals.check();
    for one in &mut sidecars {
        one.listening(check)?;
    }
    for one in &mut lasting {
        one.listening(check)?;
    }
    // Listens before the machine starts: the agent dials once.
    let greeting = Greeting::listen(&host_side)?;
    timing.mark("sidecars");

    let machine_spec = MachineSpec {
        kernel: plan.assets.kernel.clone(),
        initramfs,
        cmdline: CMDLINE.into(),
        cpus: plan.size.cpus,
        memory: plan.size.memory,
        disks: devices.iter().map(disk_spec).collect(),
        shares: share_specs,
        cards: card_specs,
        vsock: Some(VsockSpec {
            id: "vsock".into(),
            socket: vsock_socket,
            guest_cid: GUEST_CID,
        }),
        spare_slots: SPARE_SLOTS,
        console: ConsoleSpec {
            file: plan.console_log.clone(),
            ..ConsoleSpec::default()
        },
    };
    let describe = |error, console| Failure::Machine {
        error,
        console,
        hypervisor: plan.choice.to_string(),
    };
    let begun = Instant::now();
    let machine = hypervisor.start(&machine_spec).map_err(|error| {
        // QEMU fails without its devices; then the cause is a sidecar.
        let dead = sidecars.iter_mut().find_map(Sidecar::death);
        dead.or_else(|| lasting.iter_mut().find_map(Lasting::death))
            .map(Failure::from)
            .unwrap_or_else(|| describe(error, Vec::new()))
    })?;
    timing.mark("machine");
    let hello = Arc::new(Mutex::new(None));
    let told = Told::new(run_dir, &plan, counted);
    let mut pod = Pod::new(machine, sidecars, lasting, Arc::clone(&hello), told);

    let limit = plan
        .boot_timeout
        .unwrap_or_else(|| hypervisor.boot_timeout());
    let name = Name {
        container: CONTAINER.into(),
        process: String::new(),
    };
    let wiring = command.wiring;
    let guest = Guest::new(host_side);
    let phases = Phases::default();
    let start = Start {
        phases: phases.clone(),
        guest: guest.clone(),
        greeting,
        hello,
        name: name.clone(),
        configure: agent::ConfigureRequest {
            hostname: command.hostname.clone(),
            scratch_disk: parts
                .scratch
                .as_ref()
                .map_or(String::new(), |_| SCRATCH.into()),
            network: network.message().into(),
            ..Default::default()
        },
        create: agent::CreateContainerRequest {
            container: name.container.clone(),
            root: Some(agent::RootFs {
                source: ROOT.into(),
                fs_type: parts.source.fs_type().into(),
                read_only: parts.source.is_read_only(),
                // Mount points are made in it even where the container may change nothing.
                writable_layer: parts.source.is_read_only(),
                ..Default::default()
            })
            .into(),
            spec: command.spec.to_string().into_bytes(),
            user: command.user.clone(),
            devices: shown,
            shares: mounted,
            streams: Some(wiring.streams()).into(),
            ..Default::default()
        },
        wiring,
        size: wiring.terminal.then(terminal::size).flatten(),
    };
    let mut tell = || {
        started()?;
        phases.mark(timing);
        Ok(())
    };
    let session = Session {
        guest: guest.clone(),
        name,
        signals,
        surroundings: &mut pod,
        ends: Some(ends),
        terminal: wiring.terminal,
        boot: Some(BootLimit {
            deadline: begun + limit,
            limit,
        }),
        started: &mut tell,
    };
    let outcome = session
        .run(move || start.run())
        .map_err(|ending| match ending {
            Ending::Failure(failure) => failure,
            Ending::Machine(error) => describe(error, pod.console_lines(CONSOLE_LINES)),
            Ending::BootTimeout(limit) => describe(
                MachineError::BootTimeout(limit),
                pod.console_lines(CONSOLE_LINES),
            ),
            Ending::Guest(what) => Failure::Guest {
                what,
                console: pod.console_lines(CONSOLE_LINES),
            },
            Ending::Agent(words) => Failure::Agent {
                words,
                console: pod.console_lines(CONSOLE_LINES),
            },
        });
    timing.mark("command");
    let outcome = pod.end(&guest, outcome);
    timing.mark("power-off");
    network.leave(signals);
    // Until here: the backend has the files open, and their locks are ours.
    drop(parts);
    drop(root);
    outcome
}
