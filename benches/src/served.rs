//! Programs that serve a directory to a guest, over virtio-fs: ours, and the one
//! that everybody uses. `bench-compare` and `tree-compare` start one for each turn.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::{Part, missing};
use pericarp_tests::process::{Process, command};
use pericarp_tests::relay::Relay;
use pericarp_tests::scratch::Scratch;

use crate::Outcome;

/// The server of nothing, a program of this package.
const NULL_FS: Part = Part::Ours("null-fs");
/// What guests mount.
pub const TAG: &str = "bench";
/// How long one may take to listen.
const STEP: Duration = Duration::from_secs(10);

/// Which program, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// `pericarp-fs`.
    Pericarp,
    /// `virtiofsd` with a pool of so many threads; 0 is its default, none.
    Virtiofsd(u16),
    /// `null-fs`: names and sizes in memory, no data.
    Null,
}

/// In which way.
#[derive(Debug, Clone, Copy)]
pub struct How<'a> {
    /// O_DIRECT is passed on.
    pub direct: bool,
    /// Another build of the program.
    pub build: Option<&'a Path>,
    /// The file of the directory that jobs read.
    pub file: Option<&'a Path>,
}

impl Server {
    /// What is missing on this machine, and how to get it.
    pub fn lacks(self) -> Option<String> {
        match self {
            Self::Pericarp => missing(&[Part::PERICARP_FS]),
            Self::Null => missing(&[NULL_FS]),
            Self::Virtiofsd(_) => missing(&[Part::Virtiofsd]),
        }
    }

    fn program(self) -> Option<PathBuf> {
        match self {
            Self::Pericarp => Part::PERICARP_FS.find(),
            Self::Null => NULL_FS.find(),
            Self::Virtiofsd(_) => Part::Virtiofsd.find(),
        }
    }

    /// False for the peer, which ends with its guest.
    pub fn outlives_its_guest(self) -> bool {
        !matches!(self, Self::Virtiofsd(_))
    }

    /// As Kata has it: names and attributes for a second.
    fn arguments(self, direct: bool) -> Vec<String> {
        if self == Self::Null {
            return vec!["--tag".to_owned(), TAG.to_owned()];
        }
        let mut arguments = vec!["--cache".to_owned(), "auto".to_owned()];
        if direct {
            arguments.push("--allow-direct-io".to_owned());
        }
        match self {
            Self::Null => {}
            Self::Pericarp => arguments.extend(["--tag".to_owned(), TAG.to_owned()]),
            // In a namespace it serves from a child, whose CPU time would not be
            // found. Its filter for system calls stays.
            Self::Virtiofsd(pool) => {
                arguments.extend(["--tag", TAG, "--sandbox", "chroot"].map(str::to_owned));
                arguments.push(format!("--thread-pool-size={pool}"));
            }
        }
        arguments
    }
}

/// A server of one directory.
#[derive(Debug)]
pub struct Served {
    process: Process,
    socket: PathBuf,
    relay: Option<Relay>,
}

impl Served {
    /// Starts one on `directory`, with a socket in `scratch`.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn start(
        server: Server,
        how: How<'_>,
        directory: &Path,
        scratch: &Scratch,
        lifetime: Duration,
    ) -> Outcome<Self> {
        let build = how.build.map(Path::to_owned);
        let program = build.or_else(|| server.program());
        let program = program.ok_or("the server is not installed")?;
        let socket = scratch.path("share.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = command(&program);
        command.arg("--socket-path").arg(&socket);
        if server != Server::Null {
            command.arg("--shared-dir").arg(directory);
        }
        command.args(server.arguments(how.direct));
        if let (Server::Null, Some(file)) = (server, how.file) {
            let bytes = std::fs::metadata(file)?.len().to_string();
            let name = file.file_name().unwrap_or_default();
            command.arg("--file").arg(name).arg(bytes);
        }
        let mut process = Process::start(&mut command, lifetime)?;
        let listening = poll(STEP, || {
            (process.ended().is_some() || socket.exists()).then(|| socket.exists())
        });
        if listening != Some(true) {
            let (how, words) = (process.epitaph(), process.output().last(10));
            process.kill();
            return Err(format!("the server made no socket: it {how}; {words}").into());
        }
        let relay = match server {
            Server::Pericarp | Server::Null => None,
            Server::Virtiofsd(_) => Some(Relay::start(scratch.path("relay.sock"), &socket)?),
        };
        Ok(Self {
            process,
            socket,
            relay,
        })
    }

    /// Where the guest's device connects.
    pub fn socket(&self) -> &Path {
        self.relay.as_ref().map_or(&self.socket, Relay::socket)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// How it ended, if it did while it should not.
    pub fn death(&mut self) -> Option<String> {
        self.process.ended()?;
        Some(self.process.epitaph())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.process.kill();
        let _ = std::fs::remove_file(&self.socket);
    }
}
