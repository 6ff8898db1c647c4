//! The thread of a virtual CPU: enters the guest, does what it left for, enters
//! it again. Started by [`crate::machine`]; stopped and paused by [`Crew`].
//!
//! A CPU in the guest is called out by a signal. One that comes just before the
//! CPU enters is lost, so it is sent until the thread has heard.

// UNSAFETY: a signal's handler and its sending to a thread have no safe form.
#![expect(unsafe_code)]

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::backend::actor::chain;
use crate::confinement::narrow_cpu;
use crate::pci::bus::Bus;
use crate::ports::{Ports, Request};

/// Calls a CPU out of the guest.
const SIGNAL: libc::c_int = libc::SIGUSR1;
/// How long between two calls.
const CALL_AGAIN: Duration = Duration::from_millis(1);
/// The stack of a thread.
const STACK: usize = 256 * 1024;

/// Why a guest does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It asked.
    Asked(Request),
    /// A CPU could not go on, a triple fault: as a reset on a real machine.
    Fault,
    /// The hypervisor does not run it any further.
    Failed(String),
}

/// What a CPU left the guest for, counted.
#[derive(Debug, Default)]
pub struct Exits {
    /// Reads and writes of ports.
    pub port: AtomicU64,
    /// Of configuration space and device memory.
    pub device: AtomicU64,
    /// Of addresses where nothing is.
    pub nothing: AtomicU64,
    /// To be stopped or paused.
    pub called: AtomicU64,
    /// Anything else.
    pub other: AtomicU64,
}

/// What the CPUs share.
struct Shared {
    bus: Arc<Bus>,
    ports: Arc<Ports>,
    exits: Arc<Exits>,
    /// CPUs are to come out and look below.
    called: AtomicBool,
    wish: Mutex<Wish>,
    changed: Condvar,
    /// CPUs that wait there.
    resting: AtomicUsize,
    /// Hears of the first end.
    end: Box<dyn Fn(End) + Send + Sync>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("wish", &self.wish)
            .finish_non_exhaustive()
    }
}

/// The threads of a machine's CPUs.
#[derive(Debug)]
pub struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// Has the signal interrupt a thread and do nothing else. Once, before any CPU.
///
/// # Errors
/// The kernel's refusal.
pub fn prepare() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: the action is zeroed but for a handler that does nothing and so is safe at any point.
    let code = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        libc::sigaction(SIGNAL, &action, std::ptr::null_mut())
    };
    match code {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

impl Crew {
    /// Starts a thread for each CPU; `confined` ones give up all but what they need.
    /// `end` is told once or more why the guest does not go on.
    ///
    /// # Errors
    /// No threads.
    pub fn start(
        cpus: Vec<VcpuFd>,
        bus: Arc<Bus>,
        ports: Arc<Ports>,
        exits: Arc<Exits>,
        confined: bool,
        end: impl Fn(End) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            bus,
            ports,
            exits,
            called: AtomicBool::new(false),
            wish: Mutex::new(Wish::Run),
            changed: Condvar::new(),
            resting: AtomicUsize::new(0),
            end: Box::new(end),
        });
        let mut crew = Self {
            shared,
            threads: Vec::new(),
        };
        for (index, cpu) in cpus.into_iter().enumerate() {
            let shared = Arc::clone(&crew.shared);
            let thread = std::thread::Builder::new()
                .name(format!("cpu-{index}"))
                .stack_size(STACK)
                .spawn(move || match confined.then(narrow_cpu) {
                    None | Some(Ok(())) => run(cpu, &shared),
                    Some(Err(error)) => {
                        let why = format!("cannot confine a CPU's thread: {}", chain(&error));
                        (shared.end)(End::Failed(why));
                    }
                });
            match thread {
                Ok(thread) => crew.threads.push(thread),
                Err(e) => {
                    crew.stop();
                    return Err(e);
                }
            }
        }
        Ok(crew)
    }

    /// Stops all CPUs where they are, and returns when they are.
    pub fn pause(&self) {
        self.wish(Wish::Pause);
        let all = self.threads.len();
        self.call(|| self.shared.resting.load(Ordering::Acquire) >= all);
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.wish(Wish::Run);
    }

    /// Ends the threads, and with them the CPUs.
    pub fn stop(&mut self) {
        self.wish(Wish::Stop);
        let threads = std::mem::take(&mut self.threads);
        let left = |thread: &JoinHandle<()>| !thread.is_finished();
        while threads.iter().any(left) {
            threads.iter().filter(|t| left(t)).for_each(signal);
            std::thread::sleep(CALL_AGAIN);
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn wish(&self, wish: Wish) {
        let mut current = self
            .shared
            .wish
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *current != Wish::Stop {
            *current = wish;
        }
        self.shared
            .called
            .store(*current != Wish::Run, Ordering::Release);
        self.shared.changed.notify_all();
    }

    fn call(&self, done: impl Fn() -> bool) {
        while !done() && self.threads.iter().any(|thread| !thread.is_finished()) {
            self.threads
                .iter()
                .filter(|thread| !thread.is_finished())
                .for_each(signal);
            std::thread::sleep(CALL_AGAIN);
        }
    }
}

fn signal(thread: &JoinHandle<()>) {
    // SAFETY: the thread has not been joined, so its id is its own; the signal's handler does
    // nothing. Of a thread that has ended meanwhile this is an error, which changes nothing.
    unsafe {
        libc::pthread_kill(thread.as_pthread_t(), SIGNAL);
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Rests while it is wished. False at the end.
fn rest(shared: &Shared) -> bool {
    let mut wish = shared.wish.lock().unwrap_or_else(PoisonError::into_inner);
    while *wish == Wish::Pause {
        shared.resting.fetch_add(1, Ordering::AcqRel);
        wish = shared
            .changed
            .wait(wish)
            .unwrap_or_else(PoisonError::into_inner);
        shared.resting.fetch_sub(1, Ordering::AcqRel);
    }
    *wish == Wish::Run
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn run(mut cpu: VcpuFd, shared: &Shared) {
    loop {
        if shared.called.load(Ordering::Acquire) {
            count(&shared.exits.called);
            // What the guest left for last is done when it is entered again: an access that
            // was answered is only then complete.
            if !rest(shared) {
                return;
            }
        }
        match turn(&mut cpu, shared) {
            None => {}
            Some(end) => {
                (shared.end)(end);
                // Whoever heard of it stops this thread.
                return wait_for_stop(shared);
            }
        }
    }
}

/// After an end: until the threads are stopped.
fn wait_for_stop(shared: &Shared) {
    let mut wish = shared.wish.lock().unwrap_or_else(PoisonError::into_inner);
    shared.resting.fetch_add(1, Ordering::AcqRel);
    while *wish != Wish::Stop {
        wish = shared
            .changed
            .wait(wish)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

/// Enters the guest once.
fn turn(cpu: &mut VcpuFd, shared: &Shared) -> Option<End> {
    let exits = &shared.exits;
    match cpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            count(&exits.port);
            shared.ports.read(port, data);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            count(&exits.port);
            return shared.ports.write(port, data).map(End::Asked);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            let there = Bus::covers(address) && shared.bus.read(address, data);
            if !there {
                data.fill(0xff);
            }
            count(if there { &exits.device } else { &exits.nothing });
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            let there = shared.bus.write(address, data);
            count(if there { &exits.device } else { &exits.nothing });
        }
        Ok(VcpuExit::Intr) => {}
        Ok(VcpuExit::Shutdown) => return Some(End::Fault),
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            count(&exits.other);
            return Some(End::Failed(format!("the guest sent event {kind}")));
        }
        Ok(VcpuExit::FailEntry(reason, _)) => {
            let why = format!("the CPU cannot enter the guest: reason {reason:#x}");
            return Some(End::Failed(why));
        }
        Ok(VcpuExit::InternalError) => {
            let why = "the hypervisor cannot run an instruction of the guest's";
            return Some(End::Failed(why.to_owned()));
        }
        Ok(_) => count(&exits.other),
        Err(e) => match e.errno() {
            libc::EINTR | libc::EAGAIN => {}
            _ => return Some(End::Failed(format!("KVM_RUN: {e}"))),
        },
    }
    None
}
