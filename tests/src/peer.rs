//! The backends under test: ours, a reference peer, and the oracle, all
//! started the same way and watched from outside through `/proc`.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use thiserror::Error;

use crate::bounded::poll;
use crate::parts::{Part, have};
use crate::process::{Process, command};
use crate::scratch::Scratch;

/// How long a backend may take to make its socket, and to end.
const STEP: Duration = Duration::from_secs(10);

/// Which program serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `pericarp-block`.
    Pericarp,
    /// QEMU's storage daemon: the peer that validates the suites.
    QemuStorageDaemon,
    /// The oracle of this package.
    Reference,
}

impl Kind {
    /// All of them, the validating peer first.
    pub const ALL: [Kind; 3] = [Kind::QemuStorageDaemon, Kind::Reference, Kind::Pericarp];

    /// The program.
    pub fn part(self) -> Part {
        match self {
            Kind::Pericarp => Part::PERICARP_BLOCK,
            Kind::QemuStorageDaemon => Part::QemuStorageDaemon,
            Kind::Reference => Part::REFERENCE_BLOCK,
        }
    }

    /// True when it can be started here; says why not otherwise.
    pub fn usable(self, test: &str) -> bool {
        have(
            &format!("{test} [{}]", self.part().program()),
            &[self.part()],
        )
    }

    /// What GET_ID answers when `serial` was asked for.
    pub fn serial(self, serial: &str) -> &str {
        match self {
            // QEMU 7.2 has no option for it.
            Kind::QemuStorageDaemon => "vhost_user_blk",
            Kind::Pericarp | Kind::Reference => serial,
        }
    }
}

/// How the disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// O_DIRECT.
    Direct,
    /// Through the host's page cache.
    Buffered,
}

/// What a backend is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Refuse writes.
    pub read_only: bool,
    /// Request queues offered.
    pub num_queues: u16,
    /// How the file is opened; the oracle is always buffered.
    pub cache: Cache,
    /// What GET_ID answers, where the program can be told.
    pub serial: Option<String>,
    /// The watchdog's patience.
    pub lifetime: Duration,
    /// How `qemu-storage-daemon` does its I/O.
    pub aio: Option<&'static str>,
    /// More arguments, for `pericarp-block` only.
    pub extra: Vec<String>,
    /// Another build of the program than the one that is found.
    pub build: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            read_only: false,
            num_queues: 1,
            cache: Cache::Buffered,
            serial: None,
            lifetime: Duration::from_secs(120),
            aio: None,
            extra: Vec::new(),
            build: None,
        }
    }
}

/// What went wrong with a backend.
#[derive(Debug, Error)]
pub enum PeerError {
    /// The program could not be executed.
    #[error("{program} cannot be started")]
    Spawn {
        /// Which.
        program: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// It never made its socket.
    #[error("{program} made no socket, {epitaph}; it wrote:\n{tail}")]
    NoSocket {
        /// Which.
        program: &'static str,
        /// How it ended.
        epitaph: String,
        /// What it wrote.
        tail: String,
    },
    /// It did not end on SIGTERM.
    #[error("{program} did not end within {} s of SIGTERM", STEP.as_secs())]
    Stubborn {
        /// Which.
        program: &'static str,
    },
}

/// What a process holds, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Open file descriptors.
    pub fds: usize,
    /// Private memory in KiB; guest memory is shared and does not count.
    pub anon_kib: u64,
    /// Memory mappings.
    pub maps: usize,
    /// Threads.
    pub threads: usize,
}

impl Footprint {
    /// What a process holds now; `None` when it is gone.
    pub fn of(pid: i32) -> Option<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read_to_string(proc.join("status")).ok()?;
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        Some(Self {
            fds: fs::read_dir(proc.join("fd")).ok()?.count(),
            anon_kib: field("RssAnon:")?,
            maps: fs::read_to_string(proc.join("maps")).ok()?.lines().count(),
            threads: field("Threads:")? as usize,
        })
    }
}

/// A running backend. Dropping it kills it and removes its socket.
#[derive(Debug)]
pub struct Backend {
    kind: Kind,
    process: Process,
    socket: PathBuf,
    disk: PathBuf,
}

impl Backend {
    /// Starts `kind` on `disk` and waits for its socket, which is made in `scratch`.
    ///
    /// # Errors
    /// When it does not start or makes no socket in time.
    pub fn start(
        kind: Kind,
        scratch: &Scratch,
        disk: &Path,
        options: &Options,
    ) -> Result<Self, PeerError> {
        let name = disk.file_stem().unwrap_or_default().to_string_lossy();
        // A name of its own: a successor must not lose its socket to the old one's drop.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket = scratch.path(&format!("{name}-{serial}.sock"));
        let program = kind.part().program();
        let build = options.build.clone().or_else(|| kind.part().find());
        let path = build.unwrap_or_else(|| program.into());
        let mut command = command(&path);
        arguments(kind, &mut command, &socket, disk, options);
        let mut process = Process::start(&mut command, options.lifetime)
            .map_err(|source| PeerError::Spawn { program, source })?;
        let listening = poll(STEP, || {
            (process.ended().is_some() || socket.exists()).then(|| socket.exists())
        });
        if listening != Some(true) {
            let epitaph = process.epitaph();
            process.kill();
            return Err(PeerError::NoSocket {
                program,
                epitaph,
                tail: process.output().last(20),
            });
        }
        Ok(Backend {
            kind,
            process,
            socket,
            disk: disk.to_owned(),
        })
    }

    /// Which program this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The file it serves.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// True while it runs.
    pub fn is_alive(&mut self) -> bool {
        self.process.ended().is_none()
    }

    /// How it ended, and its last words.
    pub fn epitaph(&mut self) -> String {
        format!(
            "{}; it wrote:\n{}",
            self.process.epitaph(),
            self.process.output().last(10)
        )
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        self.process.output().last(usize::MAX)
    }

    /// Connects with bounded reads and writes. Retries while nobody listens
    /// yet: the socket exists a moment before that.
    ///
    /// # Errors
    /// When nobody listens for ten seconds.
    pub fn connect(&self) -> std::io::Result<UnixStream> {
        connect(&self.socket)
    }

    /// What it holds now; `None` when it is gone.
    pub fn footprint(&self) -> Option<Footprint> {
        Footprint::of(self.pid())
    }

    /// Asks it to end and waits.
    ///
    /// # Errors
    /// When it does not end in time; it is killed then.
    pub fn stop(mut self) -> Result<ExitStatus, PeerError> {
        self.process.signal(Signal::TERM);
        let program = self.kind.part().program();
        self.process
            .wait(STEP)
            .ok_or(PeerError::Stubborn { program })
    }

    /// Kills it at once, as a crash would.
    pub fn crash(&mut self) {
        self.process.kill();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.process.kill();
        let _ = fs::remove_file(&self.socket);
    }
}

/// Connects to a backend's socket; reads and writes are bounded to ten seconds.
///
/// # Errors
/// When nobody listens for ten seconds.
pub fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    let mut last = None;
    let stream = poll(STEP, || match UnixStream::connect(socket) {
        Ok(stream) => Some(Ok(stream)),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            last = Some(error);
            None
        }
        Err(error) => Some(Err(error)),
    });
    let stream = stream.unwrap_or_else(|| Err(last.unwrap_or(ErrorKind::TimedOut.into())))?;
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    Ok(stream)
}

fn arguments(kind: Kind, command: &mut Command, socket: &Path, disk: &Path, options: &Options) {
    let on_off = |on| if on { "on" } else { "off" };
    let direct = options.cache == Cache::Direct;
    let (socket, disk) = (socket.display(), disk.display());
    match kind {
        Kind::Pericarp => {
            command
                .arg(format!("--socket-path={socket}"))
                .arg(format!("--blk-file={disk}"));
            command.arg(format!("--num-queues={}", options.num_queues));
            command.arg(format!(
                "--cache={}",
                if direct { "direct" } else { "buffered" }
            ));
            if options.read_only {
                command.arg("--read-only");
            }
            if let Some(serial) = &options.serial {
                command.arg(format!("--serial={serial}"));
            }
            command.args(&options.extra);
        }
        Kind::QemuStorageDaemon => {
            // QEMU's own default for cached files is threads.
            let engine = match options.aio {
                Some(engine) => engine,
                None if direct => "io_uring",
                None => "threads",
            };
            command.arg("--blockdev").arg(format!(
                "driver=file,node-name=disk,filename={disk},aio={engine},cache.direct={},read-only={}",
                on_off(direct),
                on_off(options.read_only),
            ));
            command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable={},num-queues={}",
                on_off(!options.read_only),
                options.num_queues,
            ));
        }
        Kind::Reference => {
            command.arg(socket.to_string()).arg(disk.to_string());
            command.arg(format!("queues={}", options.num_queues));
            if options.read_only {
                command.arg("ro");
            }
            if let Some(serial) = &options.serial {
                command.arg(format!("serial={serial}"));
            }
        }
    }
}
