//! The workers of a sidecar, from before confinement to the end.
//!
//! Making the engines needs system calls that a confined program must not have,
//! and running them needs threads that must be confined: so a [`Pool`] is made
//! first, and its threads are started once the program has confined itself.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, error, warn};
use pericarp_uring::{Engine, EngineError, EngineKind, EngineOptions, MAX_BUFFERS};
use rustix::thread::{CpuSet, sched_setaffinity};
use thiserror::Error;

use crate::causes;
use crate::device::Device;
use crate::helpers::Helpers;
use crate::mailbox::{Command, Mailbox, QueueId};
use crate::worker::{Hand, Worker};
use pericarp_control::Stop;

/// The most threads for errands: what one device may have wait for a file system
/// on the network at a time, besides reads and writes.
const HELPERS: usize = 64;

/// How many workers, and of which kind.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Number of worker threads, at least 1.
    pub workers: usize,
    /// Which engine they use.
    pub engine: EngineKind,
    /// Operations one worker submits at once.
    pub depth: u32,
    /// Descriptors one worker can have registered: kick, call and error of its
    /// queues, and the files of every device.
    pub files: u32,
    /// The longest time a worker polls before it sleeps; zero for never.
    pub poll_limit: Duration,
    /// Devices discard on block devices.
    pub commands: bool,
    /// Guest memory is registered with the workers' rings, which pins all of it.
    pub register_memory: bool,
    /// Threads the kernel may use for each worker's operations that would
    /// block; its own choice where this is not given.
    pub threads: Option<u32>,
    /// Devices have files whose I/O is polled.
    pub polled: bool,
    /// Devices name open files by descriptor ([`crate::FileRef::Open`]).
    pub descriptors: bool,
    /// CPUs the workers are pinned to, in turn; empty leaves them free.
    pub cpus: Vec<usize>,
}

/// Why the workers could not be made.
#[derive(Debug, Error)]
pub enum PoolError {
    /// No engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No eventfd or thread.
    #[error("cannot make a worker")]
    Io(#[from] io::Error),
}

/// Workers that do not run yet.
#[derive(Debug)]
pub struct Pool<D: Device> {
    workers: Vec<Worker<D>>,
    helpers: Arc<Helpers>,
    handles: Handles<D>,
    files: u32,
    cpus: Vec<usize>,
}

/// The mailboxes of all workers.
#[derive(Debug)]
pub(crate) struct Handles<D>(Arc<[Arc<Mailbox<D>>]>);

impl<D> Clone for Handles<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D: Device> Handles<D> {
    /// The worker that serves a queue, always the same one.
    pub(crate) fn of(&self, id: QueueId) -> &Mailbox<D> {
        &self.0[(usize::from(id.device) + usize::from(id.queue)) % self.0.len()]
    }

    /// Has all workers let go of a device's files. True once they have.
    pub(crate) fn forget(&self, device: u16, end: Instant) -> bool {
        let ask = |mailbox: &Arc<Mailbox<D>>| {
            let (reply, answer) = sync_channel(1);
            mailbox.send(Command::Forget(device, reply));
            answer
        };
        let answers: Vec<_> = self.0.iter().map(ask).collect();
        answers.iter().all(|answer| {
            let left = end.saturating_duration_since(Instant::now());
            answer.recv_timeout(left).is_ok()
        })
    }
}

impl<D: Device> Pool<D> {
    /// Makes the workers and their engines.
    ///
    /// # Errors
    /// [`PoolError`], with nothing left behind.
    pub fn new(options: &PoolOptions) -> Result<Self, PoolError> {
        let mut workers = Vec::with_capacity(options.workers);
        let mut mailboxes = Vec::with_capacity(options.workers);
        let helpers = Arc::new(Helpers::new(HELPERS));
        for _ in 0..options.workers.max(1) {
            // One more descriptor than asked for: the mailbox.
            let engine = Engine::with(&EngineOptions {
                kind: options.engine,
                depth: options.depth,
                files: options.files + 1,
                commands: options.commands,
                buffers: if options.register_memory {
                    MAX_BUFFERS
                } else {
                    0
                },
                threads: options.threads,
                polled: options.polled,
                descriptors: options.descriptors,
            })?;
            let mailbox = Arc::new(Mailbox::new()?);
            mailboxes.push(Arc::clone(&mailbox));
            if options.engine == EngineKind::Auto && engine.is_synchronous() {
                warn!("io_uring is not available here: using synchronous system calls, slower");
            }
            if options.register_memory && !engine.registers_memory() && workers.is_empty() {
                warn!("guest memory cannot be registered here: serving without");
            }
            debug!("worker {} uses {engine}", workers.len());
            let helpers = Arc::clone(&helpers);
            workers.push(Worker::new(engine, mailbox, helpers, options.poll_limit));
        }
        Ok(Self {
            workers,
            helpers,
            handles: Handles(mailboxes.into()),
            files: options.files,
            cpus: options.cpus.clone(),
        })
    }

    /// Where sessions send their queues.
    pub(crate) fn handles(&self) -> Handles<D> {
        self.handles.clone()
    }

    /// Descriptors that each worker has room for.
    pub(crate) fn files(&self) -> u32 {
        self.files
    }

    /// Wakes all workers, so that they see limits that were changed.
    pub fn waker(&self) -> impl Fn() + Send + 'static {
        let handles = self.handles();
        move || {
            for mailbox in handles.0.iter() {
                mailbox.send(Command::Look);
            }
        }
    }

    /// The first worker without a thread of its own.
    ///
    /// # Errors
    /// The engine's refusal to start.
    pub fn by_hand(mut self) -> Result<Hand<D>, EngineError> {
        // There is always one.
        Hand::new(self.workers.swap_remove(0))
    }

    /// Starts the threads. A worker that fails asks everything to stop.
    ///
    /// # Errors
    /// The kernel's refusal to make a thread.
    pub fn start(self, stop: &Stop) -> Result<Running<D>, PoolError> {
        let mut threads = Vec::with_capacity(self.workers.len());
        self.helpers.answer_to(stop);
        for (index, worker) in self.workers.into_iter().enumerate() {
            let stop = stop.clone();
            let cpu = (!self.cpus.is_empty()).then(|| self.cpus[index % self.cpus.len()]);
            let thread = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    let _alarm = Alarm(stop.clone());
                    if let Some(cpu) = cpu {
                        pin(index, cpu);
                    }
                    if let Err(failure) = worker.run() {
                        error!("worker {index}: {}", causes(&failure));
                        stop.fail();
                    }
                })?;
            threads.push(thread);
        }
        Ok(Running {
            handles: self.handles,
            threads,
        })
    }
}

/// Workers that run.
#[derive(Debug)]
pub struct Running<D: Device> {
    handles: Handles<D>,
    threads: Vec<JoinHandle<()>>,
}

impl<D: Device> Running<D> {
    /// Ends the workers; every session must have ended before.
    pub fn end(self) {
        for mailbox in self.handles.0.iter() {
            mailbox.send(Command::End);
        }
        for thread in self.threads {
            // A worker that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn pin(worker: usize, cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    if let Err(errno) = sched_setaffinity(None, &set) {
        log::warn!("worker {worker} cannot be pinned to CPU {cpu}: {errno}");
    }
}

/// Turns a panic on a worker thread into the end of the program: its queues
/// would stand still otherwise, in silence.
pub(crate) struct Alarm(pub(crate) Stop);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail();
        }
    }
}
