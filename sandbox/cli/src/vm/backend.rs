//! The block backend of a run: one `pericarp-block` process that serves all of its disks.
//!
//! Started before the machine, ended after it. Its error output is kept for the message if it
//! dies.

use std::{
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use pericarp_hypervisor::{Confinement, Process};

use crate::{assets::program_directory, failure::Failure, signals::Signals};

const NAME: &str = "pericarp-block";
/// How long it may take to listen.
const START_LIMIT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(2);
/// How long it may take to drain and end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// One disk.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    /// Also its serial, by which the guest finds it.
    pub(crate) id: String,
    pub(crate) socket: PathBuf,
    pub(crate) file: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) queues: u16,
}

impl Device {
    fn argument(&self) -> String {
        // Within the list a comma is written twice.
        let quoted = |path: &Path| path.to_string_lossy().replace(',', ",,");
        format!(
            "id={id},socket={socket},file={file},read-only={read_only},num-queues={queues},serial={id}",
            id = self.id,
            socket = quoted(&self.socket),
            file = quoted(&self.file),
            read_only = if self.read_only { "on" } else { "off" },
            queues = self.queues,
        )
    }
}

/// The running backend.
#[derive(Debug)]
pub(crate) struct Backend {
    process: Process,
}

impl Backend {
    /// Starts the backend and waits until every socket is there.
    pub(crate) fn start(devices: &[Device], signals: &mut Signals) -> Result<Self, Failure> {
        let program = match program_directory().map(|directory| directory.join(NAME)) {
            Some(path) if path.exists() => path,
            // Beside a program that was installed on its own there may be one in the path.
            _ => PathBuf::from(NAME),
        };
        let mut command = Command::new(&program);
        command.stdout(Stdio::null());
        for device in devices {
            command.arg("--device").arg(device.argument());
        }
        let process = Process::spawn(NAME, command, Confinement::default()).map_err(|source| {
            Failure::Program {
                program: NAME.into(),
                source,
                cure: "it belongs beside pericarp: `cargo build` makes both",
            }
        })?;
        let mut backend = Self { process };
        let end = Instant::now() + START_LIMIT;
        while !devices.iter().all(|device| device.socket.exists()) {
            signals.check()?;
            if let Some(failure) = backend.death() {
                return Err(failure);
            }
            if Instant::now() > end {
                let words = backend.process.last_words(1).concat();
                return Err(Failure::Backend(format!(
                    "{NAME} did not listen within {} s: {words}",
                    START_LIMIT.as_secs()
                )));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(backend)
    }

    /// Becomes readable when the backend has ended.
    pub(crate) fn exit_fd(&self) -> BorrowedFd<'_> {
        self.process.exit_fd()
    }

    /// What to report if it has ended, which it never should by itself.
    pub(crate) fn death(&mut self) -> Option<Failure> {
        self.process.exited()?;
        Some(Failure::Backend(format!(
            "{NAME}: {}",
            self.process.describe_end()
        )))
    }

    /// Ends the backend in an orderly way.
    pub(crate) fn end(mut self) {
        self.process.end(END_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_written_as_the_backend_reads_it() {
        let device = Device {
            id: "disk1".into(),
            socket: "/run/x/disk1.sock".into(),
            file: "/images/a,b.img".into(),
            read_only: true,
            queues: 2,
        };
        assert_eq!(
            device.argument(),
            "id=disk1,socket=/run/x/disk1.sock,file=/images/a,,b.img,read-only=on,num-queues=2,\
             serial=disk1"
        );
    }
}
