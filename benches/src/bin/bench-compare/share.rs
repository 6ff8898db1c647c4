//! Programs that serve a directory to a guest, over virtio-fs: ours, and the one
//! that everybody uses. `guest` starts one for each turn.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_tests::bounded::poll;
use pericarp_tests::parts::{Part, missing, search_path};
use pericarp_tests::process::{Process, command};
use pericarp_tests::relay::Relay;
use pericarp_tests::scratch::Scratch;

/// What guests mount.
pub(crate) const TAG: &str = "bench";
/// How long one may take to listen.
const STEP: Duration = Duration::from_secs(10);

/// Which program, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    /// `pericarp-fs`.
    Pericarp,
    /// `virtiofsd` with a pool of so many threads; 0 is its default, none.
    Virtiofsd(u16),
}

impl Server {
    /// What is missing on this machine, and how to get it.
    pub(crate) fn lacks(self) -> Option<String> {
        match self {
            Self::Pericarp => missing(&[Part::PERICARP_FS]),
            Self::Virtiofsd(_) => search_path("virtiofsd").is_none().then(|| {
                "virtiofsd missing (install: apt packages libcap-ng-dev and libseccomp-dev, \
                 then cargo install virtiofsd)"
                    .to_owned()
            }),
        }
    }

    fn program(self) -> Option<PathBuf> {
        match self {
            Self::Pericarp => Part::PERICARP_FS.find(),
            Self::Virtiofsd(_) => search_path("virtiofsd"),
        }
    }

    /// As Kata has it: names and attributes for a second, and O_DIRECT passed on.
    fn arguments(self) -> Vec<String> {
        let mut arguments = vec!["--cache".to_owned(), "auto".to_owned()];
        arguments.push("--allow-direct-io".to_owned());
        match self {
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
pub(crate) struct Served {
    process: Process,
    socket: PathBuf,
    relay: Option<Relay>,
}

impl Served {
    /// Starts one on `directory`, with a socket in `scratch`.
    pub(crate) fn start(
        server: Server,
        directory: &Path,
        scratch: &Scratch,
        lifetime: Duration,
    ) -> Outcome<Self> {
        let program = server.program().ok_or("the server is not installed")?;
        let socket = scratch.path("share.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = command(&program);
        command.arg("--socket-path").arg(&socket);
        command.arg("--shared-dir").arg(directory);
        command.args(server.arguments());
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
            Server::Pericarp => None,
            Server::Virtiofsd(_) => Some(Relay::start(scratch.path("relay.sock"), &socket)?),
        };
        Ok(Self {
            process,
            socket,
            relay,
        })
    }

    /// Where the guest's device connects.
    pub(crate) fn socket(&self) -> &Path {
        self.relay.as_ref().map_or(&self.socket, Relay::socket)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// How it ended, if it did while it should not.
    pub(crate) fn death(&mut self) -> Option<String> {
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
