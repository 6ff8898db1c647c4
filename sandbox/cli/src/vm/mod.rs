//! `--runtime vm`: a virtual machine, its disks' backend beside it, and the session with the guest.
//!
//! Called by `run`. The order of the steps is the order in which their values are dropped in
//! reverse: the machine ends before the backend it uses, the directory goes last.

mod backend;
mod conversation;
mod initramfs;
mod session;
mod streams;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use pericarp_hypervisor::{ConsoleSpec, DiskSpec, Machine, MachineSpec};
use pericarp_protocol::{Disk, Limits, PORT_NAME, RunSpec};

use crate::{
    failure::{CONSOLE_LINES, Failure, during},
    input::check::{Root, VmPlan},
    report::Timing,
    rootdir,
    run::{ENVIRONMENT, HOSTNAME},
    rundir::{Contents, RunDir},
    signals::Signals,
    vm::backend::{Backend, Device},
};

/// A panicking kernel resets the machine, which ends it; warnings reach the console, the rest of
/// the boot messages would only cost time.
const CMDLINE: &str = "panic=-1 loglevel=5";
/// Free slots for devices that may be added later.
const SPARE_SLOTS: u8 = 4;
/// More queues than this help no guest of ours.
const MAX_QUEUES: u32 = 4;
const QUEUE_SIZE: u16 = 128;
/// How long a guest may take to switch itself off after its command.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(10);

pub(crate) fn run(
    plan: VmPlan,
    root: Root,
    limits: Limits,
    command: Vec<String>,
    signals: &mut Signals,
    timing: &mut Timing,
) -> Result<i32, Failure> {
    // Nothing started from here on may gain privileges by executing a file.
    rustix::thread::set_no_new_privs(true).map_err(during("no_new_privs"))?;
    timing.note("hypervisor", plan.choice.to_string());
    let contents = match root {
        Root::Image(_) => Contents::Small,
        Root::Directory(_) => Contents::Large,
    };
    let run_dir = RunDir::create(contents)?;
    signals.check()?;
    let (root_path, root_read_only) = match &root {
        Root::Image(image) => (image.path.clone(), image.read_only),
        Root::Directory(directory) => (rootdir::image(directory, &run_dir, signals)?, false),
    };
    let initramfs = run_dir.join("initramfs");
    initramfs::write(&plan.assets, &initramfs)?;
    timing.mark("prepare");

    let queues = u16::try_from(plan.size.cpus.min(MAX_QUEUES)).unwrap_or(1);
    let mut devices = vec![device(
        "root".into(),
        root_path,
        root_read_only,
        queues,
        &run_dir,
    )];
    for (index, disk) in plan.disks.iter().enumerate() {
        let id = format!("disk{}", index + 1);
        devices.push(device(
            id,
            disk.path.clone(),
            disk.read_only,
            queues,
            &run_dir,
        ));
    }
    let mut backend = Backend::start(&devices, signals)?;
    timing.mark("backend");

    let spec = run_spec(&devices, limits, command);
    let machine_spec = MachineSpec {
        kernel: plan.assets.kernel.clone(),
        initramfs,
        cmdline: CMDLINE.into(),
        cpus: plan.size.cpus,
        memory: plan.size.memory,
        disks: devices
            .iter()
            .map(|device| DiskSpec {
                id: device.id.clone(),
                socket: device.socket.clone(),
                num_queues: device.queues,
                queue_size: QUEUE_SIZE,
            })
            .collect(),
        vsock: None,
        channels: vec![PORT_NAME.into()],
        spare_slots: SPARE_SLOTS,
        console: ConsoleSpec {
            file: plan.console_log.clone(),
            ..ConsoleSpec::default()
        },
        run_dir: run_dir.path().to_owned(),
    };
    let hypervisor = plan.choice.hypervisor();
    let describe = |error, console| Failure::Machine {
        error,
        console,
        hypervisor: plan.choice.to_string(),
    };
    let started = Instant::now();
    let mut machine = hypervisor.start(&machine_spec).map_err(|error| {
        // QEMU fails without its disks; then the cause is the backend.
        backend
            .death()
            .unwrap_or_else(|| describe(error, Vec::new()))
    })?;
    timing.mark("machine");

    let limit = plan
        .boot_timeout
        .unwrap_or_else(|| hypervisor.boot_timeout());
    let boot = session::BootLimit {
        deadline: started + limit,
        limit,
    };
    let outcome = session::Session::new(&mut machine, &mut backend, signals, timing, &spec)
        .and_then(|session| session.run(boot))
        .map_err(|ending| match ending {
            session::Ending::Failure(failure) => failure,
            session::Ending::Machine(error) => {
                describe(error, machine.console_lines(CONSOLE_LINES))
            }
            session::Ending::Guest(what) => Failure::Guest {
                what,
                console: machine.console_lines(CONSOLE_LINES),
            },
        });
    end(machine, backend, outcome.is_ok());
    timing.mark("power-off");
    outcome
}

/// Ends the machine and then the backend. After a good end the guest has flushed its disks and is
/// switching itself off; otherwise there is nothing to wait for.
fn end(mut machine: Machine, backend: Backend, orderly: bool) {
    if orderly && !machine.wait_for_power_off(POWER_OFF_LIMIT) {
        crate::report::warn("the machine did not switch itself off and was stopped");
    }
    drop(machine);
    backend.end();
}

fn device(id: String, file: PathBuf, read_only: bool, queues: u16, run_dir: &RunDir) -> Device {
    let socket = run_dir.join(&format!("{id}.sock"));
    Device {
        id,
        socket,
        file,
        read_only,
        queues,
    }
}

fn run_spec(devices: &[Device], limits: Limits, command: Vec<String>) -> RunSpec {
    let mut disks = devices.iter().map(|device| Disk {
        id: device.id.clone(),
        read_only: device.read_only,
    });
    // The first device is the root; there is always one.
    let root = disks.next().unwrap_or(Disk {
        id: String::new(),
        read_only: true,
    });
    RunSpec {
        root,
        disks: disks.collect(),
        hostname: HOSTNAME.into(),
        argv: command,
        env: ENVIRONMENT
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect(),
        cwd: "/".into(),
        limits,
    }
}
