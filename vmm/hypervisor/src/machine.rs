//! A running virtual machine, whatever driver started it, and the ways it can end.
//!
//! The [`Hypervisor`] trait is the seam between callers and drivers: one method that turns a
//! [`MachineSpec`] into a [`Machine`]. Callers talk to the guest through the backends
//! of its devices and watch [`Machine::exit_fd`]; when it fires, [`Machine::death`] says in one
//! error what happened.

use std::{io, os::fd::BorrowedFd, path::PathBuf, time::Duration};

use thiserror::Error;

use crate::{
    console::Console,
    monitor::Cause,
    process::Process,
    remote::{Order, Remote},
    spec::{DiskSpec, MachineSpec, SpecError},
};

/// A way to run virtual machines on this host.
pub trait Hypervisor {
    /// What messages call it.
    fn name(&self) -> &'static str;

    /// How long a guest may take to report itself before its boot counts as failed.
    fn boot_timeout(&self) -> Duration;

    /// Whether a share goes on when its backend has ended and another one listens in its place. A
    /// card does with every driver, and so does a disk that was added later.
    fn finds_shares_again(&self) -> bool;

    /// Starts a machine. Call from a thread that lives as long as the machine should: the kernel
    /// kills the machine when that thread ends. The backends of its disks must be listening.
    ///
    /// # Errors
    ///
    /// The machine could not be started, with the reason; nothing of it is left.
    fn start(&self, spec: &MachineSpec) -> Result<Machine, MachineError>;
}

/// Why a machine is of no use any more.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The description is invalid.
    #[error("the machine cannot be made: {0}")]
    Spec(#[from] SpecError),
    /// The driver's program cannot be started.
    #[error("'{program}' cannot be started: {source}{}", cure(.source))]
    Start {
        /// Program name.
        program: String,
        /// What the system says.
        source: io::Error,
    },
    /// Something on the host's side failed while the machine was being set up.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// What the system says.
        source: io::Error,
    },
    /// A file the guest boots from cannot be read.
    #[error("the guest's {what} '{}' cannot be read: {source}", .path.display())]
    File {
        /// Which one.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The kernel's file is damaged, or is none.
    #[error("the guest's kernel '{}' cannot be used: {reason}", .path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// KVM was asked for and cannot be used.
    #[error("KVM cannot be used ({0}); ask for qemu-tcg, which emulates the CPU")]
    Kvm(String),
    /// The host does not give the guest its memory.
    #[error("there are no {} MiB of memory for the virtual machine: {reason}", .bytes >> 20)]
    Memory {
        /// What was asked for.
        bytes: u64,
        /// What the system says.
        reason: String,
    },
    /// A device's backend is not there, or does not do its part.
    #[error("the backend of device '{device}' at '{}' cannot be used: {reason}", .socket.display())]
    Backend {
        /// The device.
        device: String,
        /// Where its backend should listen.
        socket: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The driver's program ended before the guest started.
    #[error("the virtual machine could not be set up ({program}: {end})")]
    SetUp {
        /// Program name.
        program: String,
        /// How it ended.
        end: String,
    },
    /// The driver's program did not come to the guest's start.
    #[error("the virtual machine was not set up within {} s; a backend may not answer", .0.as_secs_f64())]
    SetUpTimeout(Duration),
    /// The driver's program ended while the guest was running.
    #[error("the virtual machine died ({program}: {end})")]
    Died {
        /// Program name.
        program: String,
        /// How it ended.
        end: String,
    },
    /// The guest's kernel gave up.
    #[error("the virtual machine's kernel panicked (\"{0}\")")]
    Panicked(String),
    /// The guest switched itself off before it was told to.
    #[error("the virtual machine switched itself off before its command had ended")]
    PoweredOff,
    /// The guest reset the machine without saying why.
    #[error("the virtual machine restarted itself before its command had ended")]
    Reset,
    /// A running machine does not do what it is told.
    #[error("the virtual machine does not {what}: {reason}")]
    Control {
        /// What it was told.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// The guest did not report itself in time.
    #[error("the virtual machine did not start its command within {} s", .0.as_secs_f64())]
    BootTimeout(Duration),
}

fn cure(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::NotFound {
        "; `cargo xtask setup` installs it"
    } else {
        ""
    }
}

/// How long a machine may take to carry out what it is told.
const CONTROL_LIMIT: Duration = Duration::from_secs(10);
/// The same for a disk, whose backend has ten seconds of that to say what it is.
const ADD_LIMIT: Duration = Duration::from_secs(15);

/// A running machine. Dropping it kills and reaps its process.
#[derive(Debug)]
pub struct Machine {
    pub(crate) process: Process,
    pub(crate) console: Console,
    pub(crate) remote: Remote,
}

impl Machine {
    /// Process id of the driver's program.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Becomes readable when the machine has ended.
    #[must_use]
    pub fn exit_fd(&self) -> BorrowedFd<'_> {
        self.process.exit_fd()
    }

    /// Whether the machine has ended.
    pub fn has_ended(&mut self) -> bool {
        self.process.exited().is_some()
    }

    /// Stops the guest's CPUs where they are. Its memory and devices stay.
    ///
    /// # Errors
    ///
    /// The machine has ended, or does not answer.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.control("pause", Order::Pause)
    }

    /// Lets a paused guest go on. One that runs goes on running.
    ///
    /// # Errors
    ///
    /// The machine has ended, or does not answer.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.control("go on", Order::Resume)
    }

    /// Adds a disk whose backend listens. The guest's kernel may have to be told to look for it.
    ///
    /// A backend that ends is dialled again until the disk is taken away.
    ///
    /// # Errors
    ///
    /// The description is invalid, there is no place left ([`MachineSpec::spare_slots`]), or the
    /// machine or the backend does not answer.
    pub fn add_disk(&mut self, disk: &DiskSpec) -> Result<(), MachineError> {
        disk.check()?;
        self.remote
            .add_disk(disk, ADD_LIMIT)
            .map_err(|error| MachineError::Control {
                what: "take a disk",
                reason: error.to_string(),
            })
    }

    /// Takes a disk away that was added and that the guest has let go of. True once it is gone: a
    /// guest may have to agree, and until it has, this is to be called again. The backend has to be
    /// there until then.
    ///
    /// # Errors
    ///
    /// The machine has ended, or does not answer.
    pub fn remove_disk(&mut self, id: &str) -> Result<bool, MachineError> {
        self.remote
            .remove_disk(id, CONTROL_LIMIT)
            .map_err(|error| MachineError::Control {
                what: "let go of a disk",
                reason: error.to_string(),
            })
    }

    fn control(&mut self, what: &'static str, order: Order) -> Result<(), MachineError> {
        self.remote
            .carry_out(order, CONTROL_LIMIT)
            .map_err(|error| MachineError::Control {
                what,
                reason: error.to_string(),
            })
    }

    /// Waits for a machine that is switching itself off; kills it after `limit`. Returns whether
    /// it went by itself.
    pub fn wait_for_power_off(&mut self, limit: Duration) -> bool {
        let in_time = self.process.wait_for(limit).is_some();
        self.process.kill();
        in_time
    }

    /// Ends the machine now.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// What ended a machine that should still be running. Gives a machine that is about to end
    /// a moment to do so, and kills it otherwise.
    pub fn death(&mut self) -> MachineError {
        self.process.wait_for(Duration::from_secs(2));
        let status = self.process.exited();
        self.process.kill();
        let panic = self.console.panic_line();
        let died = |process: &mut Process| MachineError::Died {
            program: process.name().to_owned(),
            end: process.describe_end(),
        };
        match (status, panic) {
            // It said so and stayed where it was.
            (None, Some(line)) => MachineError::Panicked(line),
            (Some(status), panic) if self.remote.is_orderly(status) => {
                match (self.remote.cause(status), panic) {
                    // A panicking guest reboots, which ends the machine with success.
                    (Some(Cause::Reset) | None, Some(line)) => MachineError::Panicked(line),
                    (Some(Cause::Reset), None) => MachineError::Reset,
                    // Whatever it has printed.
                    (Some(Cause::PowerOff), _) | (None, None) => MachineError::PoweredOff,
                    (Some(Cause::Host), _) => died(&mut self.process),
                }
            }
            _ => died(&mut self.process),
        }
    }

    /// How many bytes the guest has printed on its console so far.
    #[must_use]
    pub fn console_bytes(&self) -> u64 {
        self.console.total()
    }

    /// The last lines of the guest's console, safe to print.
    #[must_use]
    pub fn console_lines(&self, count: usize) -> Vec<String> {
        self.console.last_lines(count)
    }
}
