//! The QEMU driver: a q35 machine whose devices are vhost-user backends.
//!
//! Works wherever QEMU is installed, with KVM or with an emulated CPU. Called through
//! [`Hypervisor`]. The machine has no firmware devices beyond what the boot needs and no network.
//! QEMU itself runs without capabilities, in an empty network namespace (where the caller may make
//! one), behind its own system call filter, and with no file in reach but those it boots from and
//! its own (`walls`); it inherits its connections to the backends and to
//! us, and opens those to backends that may be started again: network cards, and disks that come
//! later (`plug`).

mod arguments;
mod plug;
mod set_up;

pub(crate) use plug::Ports;

use std::{
    io,
    os::fd::AsRawFd,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    console::Console,
    machine::{Hypervisor, Machine, MachineError},
    monitor::{Monitor, MonitorError},
    process::{Confinement, Process},
    remote::Remote,
    select::Accelerator,
    spec::MachineSpec,
    walls::{self, Reach},
};

const PROGRAM: &str = "qemu-system-x86_64";
/// How long QEMU may take to make the machine. A second at most, unless the host is overloaded or
/// a backend does not answer.
const SET_UP_LIMIT: Duration = Duration::from_secs(30);
/// How long a QEMU that has closed its connections may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What QEMU opens by a path. A kernel that it inherits has none.
fn reach(accelerator: Accelerator, kernel: &Path, initramfs: &Path) -> Reach {
    let mut read = vec![initramfs.to_owned()];
    if !kernel.starts_with("/proc") {
        read.push(kernel.to_owned());
    }
    Reach {
        read,
        devices: match accelerator {
            Accelerator::Kvm => vec!["/dev/kvm".into()],
            Accelerator::Tcg => Vec::new(),
        },
    }
}

/// The driver.
#[derive(Debug, Clone, Copy)]
pub struct Qemu {
    accelerator: Accelerator,
    set_up_limit: Duration,
}

impl Qemu {
    /// A driver that provides the guest's CPU this way.
    #[must_use]
    pub fn new(accelerator: Accelerator) -> Self {
        Self {
            accelerator,
            set_up_limit: SET_UP_LIMIT,
        }
    }

    /// The same driver with another limit on the time to set a machine up, the guest's boot not
    /// included.
    #[must_use]
    pub fn with_set_up_limit(self, set_up_limit: Duration) -> Self {
        Self {
            set_up_limit,
            ..self
        }
    }
}

impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn boot_timeout(&self) -> Duration {
        Duration::from_secs(match self.accelerator {
            Accelerator::Kvm => 20,
            Accelerator::Tcg => 60,
        })
    }

    /// `vhost-user-fs` takes no connection that is made again.
    fn finds_shares_again(&self) -> bool {
        false
    }

    fn start(&self, spec: &MachineSpec) -> Result<Machine, MachineError> {
        spec.check()?;
        set_up::look(self.accelerator, spec)?;
        let host = |what: &str| {
            let what = what.to_owned();
            move |source| MachineError::Host { what, source }
        };
        let (mut monitor, control) =
            Monitor::pair().map_err(host("no control connection can be made"))?;
        let number = control.as_raw_fd();
        let mut inherited = vec![control];
        let kernel = set_up::kernel(spec, &mut inherited)?;
        let mut connections = set_up::connect(spec, &mut inherited)?;
        connections.monitor = number;
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments::arguments(
                self.accelerator,
                spec,
                &kernel,
                &connections,
            ))
            .stdout(Stdio::piped())
            .current_dir("/");
        let reach = reach(self.accelerator, &kernel, &spec.initramfs);
        walls::enter(&mut command, PROGRAM, &reach)
            .map_err(host("what it may open cannot be said"))?;
        let confinement = Confinement {
            drop_capabilities: true,
            private_network: true,
            ..Confinement::default()
        };
        let mut process =
            Process::spawn_with(PROGRAM, command, confinement, inherited).map_err(|source| {
                MachineError::Start {
                    program: PROGRAM.into(),
                    source,
                }
            })?;
        let Some(output) = process.take_stdout() else {
            return Err(host("the console")(io::ErrorKind::BrokenPipe.into()));
        };
        let console =
            Console::follow(&spec.console, output).map_err(host("the console cannot be kept"))?;
        // QEMU carries out its first command when the machine is made and all backends have agreed.
        match monitor.execute("qmp_capabilities", self.set_up_limit) {
            Ok(()) => {}
            Err(MonitorError::Silent(limit)) => return Err(MachineError::SetUpTimeout(limit)),
            Err(_) => {
                let status = process.wait_for(END_LIMIT);
                process.kill();
                let known = set_up::diagnose(spec, status, &process.last_words(20));
                return Err(known.unwrap_or_else(|| MachineError::SetUp {
                    program: PROGRAM.into(),
                    end: process.describe_end(),
                }));
            }
        }
        Ok(Machine {
            process,
            console,
            remote: Remote::Qemu(monitor, Ports::new(spec.spare_slots)),
        })
    }
}
