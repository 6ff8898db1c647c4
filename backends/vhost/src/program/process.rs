//! The options of the process, which all sidecars with workers have.
//! Their `options` call it with what their own options do not know.

use std::path::PathBuf;
use std::time::Duration;

use log::LevelFilter;
use pericarp_control::command_line::{
    BadOption, SocketOption, bad, cpu_list, log_level, number, path,
};
use pericarp_uring::EngineKind;

/// The most worker threads.
pub const MAX_WORKERS: usize = 64;
/// The longest time a worker may be told to poll before it sleeps.
const MAX_POLL_US: u64 = 1000;
/// About what it costs to sleep and be woken.
const POLL_LIMIT: Duration = Duration::from_micros(20);

/// How the process serves its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Threads.
    pub workers: usize,
    /// CPUs to pin them to, none if empty.
    pub cpus: Vec<usize>,
    /// Engine.
    pub engine: EngineKind,
    /// The longest time a worker polls before it sleeps.
    pub poll_limit: Duration,
    /// Where requests in flight are kept for front ends that do not keep them.
    pub inflight_file: Option<PathBuf>,
    /// Where the control socket is bound.
    pub control: Option<PathBuf>,
    /// Log level.
    pub log_level: LevelFilter,
    /// Confine the process.
    pub confine: bool,
}

/// The same while options are still being read.
#[derive(Debug, Default)]
pub struct ProcessDraft {
    workers: Option<usize>,
    cpus: Vec<usize>,
    engine: EngineKind,
    poll_limit: Option<Duration>,
    inflight_file: Option<PathBuf>,
    control: Option<PathBuf>,
    log_level: Option<LevelFilter>,
    unconfined: bool,
}

impl ProcessDraft {
    /// Sets what the option `name` means, if it is one of these; `value` reads
    /// its value. False if it is another.
    ///
    /// # Errors
    /// A value that is none.
    pub fn set(
        &mut self,
        name: &str,
        mut value: impl FnMut() -> Result<String, BadOption>,
    ) -> Result<bool, BadOption> {
        match name {
            "--no-confine" => self.unconfined = true,
            "--poll-us" => {
                let limit = number(name, &value()?, 0, MAX_POLL_US)?;
                self.poll_limit = Some(Duration::from_micros(limit));
            }
            "--workers" => self.workers = Some(number(name, &value()?, 1, MAX_WORKERS)?),
            "--cpus" => self.cpus = cpu_list(name, &value()?)?,
            "--io-engine" => self.engine = io_engine(name, &value()?)?,
            "--inflight-file" => {
                self.inflight_file = Some(path(name, value()?, "the path of a file")?);
            }
            "--control-path" => self.control = Some(path(name, value()?, "the path of a socket")?),
            "--log-level" => self.log_level = Some(log_level(name, &value()?)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The control socket's path.
    pub fn control(&self) -> Option<&PathBuf> {
        self.control.as_ref()
    }

    /// All of it, with one worker for each of so many queues unless something
    /// else was asked for, and at most one for each CPU. `sockets` are those of
    /// the devices.
    ///
    /// # Errors
    /// A control socket that is one of them.
    pub fn finish<'a>(
        self,
        queues: usize,
        mut sockets: impl Iterator<Item = &'a SocketOption>,
    ) -> Result<Process, BadOption> {
        if let Some(path) = &self.control
            && sockets.any(|socket| matches!(socket, SocketOption::Path(used) if used == path))
        {
            let rule = "used twice: give the control socket its own";
            return Err(bad("--control-path", path.display(), rule));
        }
        let default = std::thread::available_parallelism().map_or(1, |n| n.get().min(queues));
        Ok(Process {
            workers: self.workers.unwrap_or(default).min(MAX_WORKERS),
            cpus: self.cpus,
            engine: self.engine,
            poll_limit: self.poll_limit.unwrap_or(POLL_LIMIT),
            inflight_file: self.inflight_file,
            control: self.control,
            log_level: self.log_level.unwrap_or(LevelFilter::Warn),
            confine: !self.unconfined,
        })
    }
}

fn io_engine(name: &str, value: &str) -> Result<EngineKind, BadOption> {
    match value {
        "auto" => Ok(EngineKind::Auto),
        "uring" => Ok(EngineKind::Uring),
        "sync" => Ok(EngineKind::Sync),
        _ => Err(bad(
            name,
            format!("{value:?}"),
            "unknown engine: use auto, uring or sync",
        )),
    }
}
