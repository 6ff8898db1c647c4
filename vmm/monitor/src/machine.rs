//! The machine: its parts, how it starts, what it is told while it runs, and how
//! it ends. `main` prepares it ([`Machine::new`]), confines the process, and runs
//! it; the control socket speaks to it meanwhile.
//!
//! A start of the guest, the first or one after a reset, is always the same: a new
//! virtual machine in KVM, memory that is all zero, the kernel loaded, all CPUs
//! made. Devices and their connections to backends live on.

use std::fs::File;
use std::io;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::{info, warn};
use pericarp_confine::SocketFile;
use pericarp_kernel::Image;
use thiserror::Error;

use crate::acpi;
use crate::cpu::thread::{Crew, End, Exits};
use crate::cpu::{cpuid, state};
use crate::devices::Devices;
use crate::kvm::{Kvm, KvmError};
use crate::layout;
use crate::load::{LoadError, load};
use crate::memory::{MemoryError, Ram};
use crate::options::Options;
use crate::ports::{Ports, Request};
use crate::wiring::Wiring;

/// How long devices may take to come to rest at the end.
const FAREWELL: Duration = Duration::from_secs(5);
/// How often a machine that starts again looks whether its devices rest.
const LOOK: Duration = Duration::from_millis(1);

/// Why a machine cannot be made, or not start again.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The hypervisor.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel.
    #[error("the kernel: {0}")]
    Kernel(#[from] LoadError),
    /// The CPU's addresses are too short for where devices are.
    #[error("this CPU has too few address bits for device memory: 39 are needed")]
    Reach,
    /// Tables.
    #[error("cannot write the machine's tables")]
    Tables(#[source] vm_memory::GuestMemoryError),
    /// Descriptors or threads.
    #[error("cannot prepare the machine")]
    Prepare(#[from] io::Error),
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest reset itself, which ends it where the operator said so.
    Reset,
    /// It was told to from outside.
    Stopped,
    /// It could not go on.
    Failed(String),
}

/// What comes to the thread that runs the machine.
#[derive(Debug)]
enum Event {
    End(End),
    Reset,
    Stop,
}

/// Tells the machine what to do, from any thread.
#[derive(Debug, Clone)]
pub struct Remote(SyncSender<Event>);

impl Remote {
    /// Ends it.
    pub fn stop(&self) {
        // A full queue is one that has its end in it.
        let _ = self.0.try_send(Event::Stop);
    }

    /// Starts it again.
    pub fn reset(&self) {
        let _ = self.0.try_send(Event::Reset);
    }
}

/// Where a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Not yet started, or between two starts.
    Starting,
    /// The guest runs.
    Running,
    /// Its CPUs rest.
    Paused,
    /// It ends.
    Ending,
}

/// The CPUs and where they are.
#[derive(Debug)]
struct Run {
    crew: Option<Crew>,
    stage: Stage,
    starts: u64,
    /// When the guest was entered last, since the machine began.
    entered: Duration,
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    kvm: Arc<Kvm>,
    ram: Arc<Ram>,
    image: Image,
    initramfs: Option<File>,
    cmdline: String,
    cpus: u8,
    memory: u64,
    no_reboot: bool,
    confined: bool,
    ports: Arc<Ports>,
    devices: Devices,
    exits: Arc<Exits>,
    begun: Instant,
    run: Mutex<Run>,
    events: SyncSender<Event>,
    inbox: Mutex<Receiver<Event>>,
}

impl Machine {
    /// Puts its parts together, without devices. Opens what is opened; nothing
    /// runs yet.
    ///
    /// # Errors
    /// A part is not to be had.
    pub fn new(
        options: &Options,
        image: Image,
        initramfs: Option<File>,
        begun: Instant,
    ) -> Result<Self, MachineError> {
        let kvm = Kvm::open()?;
        if !cpuid::reaches_devices(&kvm.cpuid()?) {
            return Err(MachineError::Reach);
        }
        let ram = Arc::new(Ram::new(options.memory, options.backing)?);
        let (events, inbox) = mpsc::sync_channel(16);
        let wiring: Arc<dyn Wiring> = Arc::<Kvm>::clone(&kvm);
        let devices = Devices::new(Arc::clone(&ram), wiring, options.cpus);
        Ok(Self {
            kvm,
            ram,
            image,
            initramfs,
            cmdline: options.cmdline.clone(),
            cpus: options.cpus,
            memory: options.memory,
            no_reboot: options.no_reboot,
            confined: options.confine,
            ports: Arc::new(Ports::new(begun)?),
            devices,
            exits: Arc::default(),
            begun,
            run: Mutex::new(Run {
                crew: None,
                stage: Stage::Starting,
                starts: 0,
                entered: Duration::ZERO,
            }),
            events,
            inbox: Mutex::new(inbox),
        })
    }

    /// Its devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Its ports.
    pub fn ports(&self) -> &Arc<Ports> {
        &self.ports
    }

    /// What its CPUs left the guest for.
    pub fn exits(&self) -> &Exits {
        &self.exits
    }

    /// Virtual CPUs and bytes of memory.
    pub fn size(&self) -> (u8, u64) {
        (self.cpus, self.memory)
    }

    /// Where it is, how often it was started, and when last.
    pub fn state(&self) -> (Stage, u64, Duration) {
        let run = self.run();
        (run.stage, run.starts, run.entered)
    }

    /// How long it exists.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// To tell it something from another thread.
    pub fn remote(&self) -> Remote {
        Remote(self.events.clone())
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the CPUs where they are. Devices go on with what they have.
    ///
    /// # Errors
    /// It is not running.
    pub fn pause(&self) -> Result<(), String> {
        self.turn(Stage::Running, Stage::Paused, Crew::pause)
    }

    /// Lets the CPUs go on.
    ///
    /// # Errors
    /// It is neither running nor paused.
    pub fn resume(&self) -> Result<(), String> {
        self.turn(Stage::Paused, Stage::Running, Crew::resume)
    }

    fn turn(&self, from: Stage, to: Stage, act: impl Fn(&Crew)) -> Result<(), String> {
        let mut run = self.run();
        match (&run.crew, run.stage) {
            (Some(crew), stage) if stage == from => {
                act(crew);
                run.stage = to;
                Ok(())
            }
            (_, stage) if stage == to => Ok(()),
            (_, stage) => Err(format!("the machine is {stage:?} now").to_lowercase()),
        }
    }

    /// Runs it to its end.
    pub fn run_to_end(&self) -> Ending {
        let ending = self.run_starts();
        self.run().stage = Stage::Ending;
        self.stop_cpus();
        self.devices.remove_all(FAREWELL);
        ending
    }

    fn run_starts(&self) -> Ending {
        loop {
            if let Err(error) = self.start() {
                return Ending::Failed(crate::backend::actor::chain(&error));
            }
            match self.wait() {
                None => {}
                Some(ending) => return ending,
            }
            self.run().stage = Stage::Starting;
            self.stop_cpus();
            if let Some(ending) = self.rest() {
                return ending;
            }
        }
    }

    /// Waits for what comes. `None` is another start.
    fn wait(&self) -> Option<Ending> {
        let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let event = inbox.recv().unwrap_or(Event::Stop);
        match event {
            Event::End(End::Asked(Request::PowerOff)) => Some(Ending::PoweredOff),
            Event::End(End::Asked(Request::Reset) | End::Fault) if self.no_reboot => {
                Some(Ending::Reset)
            }
            Event::End(End::Asked(Request::Reset)) => {
                info!("the guest resets itself");
                None
            }
            Event::End(End::Fault) => {
                warn!("a CPU of the guest gave up (triple fault): the machine starts again");
                None
            }
            Event::Reset => None,
            Event::End(End::Failed(why)) => Some(Ending::Failed(why)),
            Event::Stop => Some(Ending::Stopped),
        }
    }

    fn stop_cpus(&self) {
        // Not under the lock: a CPU may be waiting for it in no case, but a request may come.
        let crew = self.run().crew.take();
        if let Some(mut crew) = crew {
            crew.stop();
        }
    }

    /// Resets the devices, and waits until all of them rest: a backend may take
    /// its time with what it has begun. `Some` where the machine is told to end
    /// meanwhile.
    fn rest(&self) -> Option<Ending> {
        self.devices.reset();
        while !self.devices.are_quiet() {
            let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            match inbox.recv_timeout(LOOK) {
                Ok(Event::Stop) => return Some(Ending::Stopped),
                // Of the CPUs that have ended.
                Ok(Event::End(_) | Event::Reset) | Err(_) => {}
            }
        }
        let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox
            .try_iter()
            .any(|event| matches!(event, Event::Stop))
            .then_some(Ending::Stopped)
    }

    /// Starts the guest.
    fn start(&self) -> Result<(), MachineError> {
        let mut run = self.run();
        if run.starts > 0 {
            self.ram.clear()?;
        }
        self.kvm.renew(&self.ram)?;
        self.devices.forget_wiring();
        self.kvm
            .connect(layout::SERIAL_IRQ, self.ports.serial_interrupt())?;
        let initramfs = self.initramfs.as_ref();
        let entry = load(&self.ram, &self.image, initramfs, &self.cmdline)?;
        acpi::write(&self.ram, self.cpus).map_err(MachineError::Tables)?;
        let supported = self.kvm.cpuid()?;
        let mut cpus = Vec::new();
        for index in 0..self.cpus {
            let cpu = self.kvm.create_cpu(index)?;
            state::identify(&cpu, &cpuid::entries(&supported, index, self.cpus))?;
            if index == 0 {
                state::enter(&cpu, &self.ram, entry)?;
            }
            cpus.push(cpu);
        }
        let events = self.events.clone();
        run.entered = self.begun.elapsed();
        run.crew = Some(Crew::start(
            cpus,
            Arc::clone(self.devices.bus()),
            Arc::clone(&self.ports),
            Arc::clone(&self.exits),
            self.confined,
            move |end| {
                // A queue that is full has an end in it already.
                let _ = events.try_send(Event::End(end));
            },
        )?);
        run.starts += 1;
        run.stage = Stage::Running;
        Ok(())
    }
}

/// Reaches backends after the process is confined: by the directories of sockets
/// that were there before.
#[derive(Debug, Default)]
pub struct Neighbours(Vec<SocketFile>);

impl Neighbours {
    /// These directories.
    pub fn new(known: Vec<SocketFile>) -> Self {
        Self(known)
    }

    /// The socket at this path.
    ///
    /// # Errors
    /// It is elsewhere, or there is none.
    pub fn find(&self, path: &std::path::Path) -> Result<SocketFile, String> {
        for known in &self.0 {
            match known.neighbour(path) {
                Ok(Some(socket)) => return Ok(socket),
                Ok(None) => {}
                Err(e) => return Err(format!("socket: {}: {e}", path.display())),
            }
        }
        Err(format!(
            "socket: {}: not in a directory of the control socket or of a device that was there \
             at the start: put it there",
            path.display()
        ))
    }
}
