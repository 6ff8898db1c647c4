//! How a running machine is told to stand still or go on, or that a disk comes or leaves, and how
//! its driver's program says what ended it. One form for each driver; [`crate::Machine`] does not know which.

use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    os::unix::net::UnixStream,
    process::ExitStatus,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    monitor::{Cause, Monitor, MonitorError},
    qemu::Ports,
    spec::DiskSpec,
};

/// Longest answer that is read.
const MAX_LINE: usize = 64 * 1024;
/// The exit code of `pericarp-vmm` when its guest reset itself.
const RESET: i32 = 3;

/// What a machine can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Its CPUs stand still.
    Pause,
    /// They go on.
    Resume,
}

/// The way to a driver's program.
#[derive(Debug)]
pub(crate) enum Remote {
    /// QMP, and where disks can be added.
    Qemu(Monitor, Ports),
    /// The control socket of `pericarp-vmm`.
    Pericarp(Control),
}

impl Remote {
    /// Has an order carried out.
    ///
    /// # Errors
    ///
    /// It was not, or not in time.
    pub(crate) fn carry_out(&mut self, order: Order, limit: Duration) -> Result<(), MonitorError> {
        match (self, order) {
            (Self::Qemu(monitor, _), Order::Pause) => monitor.execute("stop", limit),
            (Self::Qemu(monitor, _), Order::Resume) => monitor.execute("cont", limit),
            (Self::Pericarp(control), Order::Pause) => control.ask("pause", limit).map(drop),
            (Self::Pericarp(control), Order::Resume) => control.ask("resume", limit).map(drop),
        }
    }

    /// Adds a disk whose backend listens.
    ///
    /// # Errors
    ///
    /// It was not added, or not in time.
    pub(crate) fn add_disk(
        &mut self,
        disk: &DiskSpec,
        limit: Duration,
    ) -> Result<(), MonitorError> {
        match self {
            Self::Qemu(monitor, ports) => ports.add(monitor, disk, limit),
            Self::Pericarp(control) => {
                let request = json!({
                    "op": "add-device",
                    "kind": "disk",
                    "id": disk.id,
                    // Checked to be text by `DiskSpec::check`.
                    "socket": disk.socket.to_string_lossy(),
                    "queues": disk.num_queues,
                    "queue-size": disk.queue_size,
                });
                control.request(&request, limit).map(drop)
            }
        }
    }

    /// Takes a disk away that was added. True once it is gone; until then it is asked for again.
    ///
    /// # Errors
    ///
    /// The driver's program does not answer, or not so.
    pub(crate) fn remove_disk(&mut self, id: &str, limit: Duration) -> Result<bool, MonitorError> {
        match self {
            Self::Qemu(monitor, ports) => ports.remove(monitor, id, limit),
            Self::Pericarp(control) => {
                let request = json!({ "op": "remove-device", "id": id });
                match control.request(&request, limit) {
                    Ok(_) => Ok(true),
                    Err(MonitorError::Refused(why)) if why.contains("there is no such device") => {
                        Ok(true)
                    }
                    Err(error) => Err(error),
                }
            }
        }
    }

    /// True for an end that is the guest's doing.
    pub(crate) fn is_orderly(&self, status: ExitStatus) -> bool {
        match self {
            Self::Qemu(..) => status.success(),
            Self::Pericarp(_) => matches!(status.code(), Some(0 | RESET)),
        }
    }

    /// What ended a machine whose program has ended so.
    pub(crate) fn cause(&mut self, status: ExitStatus) -> Option<Cause> {
        match self {
            Self::Qemu(monitor, _) => monitor.cause(),
            Self::Pericarp(_) if status.code() == Some(RESET) => Some(Cause::Reset),
            Self::Pericarp(_) => Some(Cause::PowerOff),
        }
    }
}

/// A connection to the control socket of `pericarp-vmm`: a JSON object a line each way, answered one
/// after the other.
#[derive(Debug)]
pub(crate) struct Control {
    stream: BufReader<UnixStream>,
    /// Requests that were given up: their answers come first.
    late: usize,
    /// What has come of an answer so far.
    line: Vec<u8>,
}

impl Control {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream: BufReader::new(stream),
            late: 0,
            line: Vec::new(),
        }
    }

    /// Asks for an operation without arguments.
    ///
    /// # Errors
    ///
    /// No answer in time, or a refusal.
    pub(crate) fn ask(&mut self, operation: &str, limit: Duration) -> Result<Value, MonitorError> {
        self.request(&json!({ "op": operation }), limit)
    }

    fn request(&mut self, request: &Value, limit: Duration) -> Result<Value, MonitorError> {
        let end = Instant::now() + limit;
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => MonitorError::Silent(limit),
            _ => MonitorError::Closed,
        };
        let stream = self.stream.get_mut();
        stream
            .set_write_timeout(Some(left_until(end)))
            .and_then(|()| writeln!(stream, "{request}"))
            .map_err(failed)?;
        self.late += 1;
        let line = loop {
            let line = self.answer(end).map_err(failed)?;
            self.late -= 1;
            if self.late == 0 {
                break line;
            }
        };
        let answer: Value = serde_json::from_slice(&line).map_err(|_| MonitorError::Closed)?;
        match answer["ok"].as_bool() {
            Some(true) => Ok(answer),
            _ => {
                let why = answer["error"].as_str().unwrap_or("it does not say why");
                Err(MonitorError::Refused(why.to_owned()))
            }
        }
    }

    /// The next answer, of which half may have come before.
    fn answer(&mut self, end: Instant) -> std::io::Result<Vec<u8>> {
        while !self.line.ends_with(b"\n") {
            if self.line.len() >= MAX_LINE {
                return Err(ErrorKind::InvalidData.into());
            }
            let left = left_until(end);
            self.stream.get_mut().set_read_timeout(Some(left))?;
            let bytes = match self.stream.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            if bytes.is_empty() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let length = bytes.iter().position(|byte| *byte == b'\n');
            let length = length.map_or(bytes.len(), |at| at + 1);
            self.line.extend_from_slice(&bytes[..length]);
            self.stream.consume(length);
        }
        Ok(std::mem::take(&mut self.line))
    }
}

/// What a timeout on a socket may be, which is never nothing.
fn left_until(end: Instant) -> Duration {
    let left = end.saturating_duration_since(Instant::now());
    left.max(Duration::from_millis(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_asked_for_and_gone_when_it_is_not_there() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut remote = Remote::Pericarp(Control::new(ours));
        let limit = Duration::from_secs(10);
        theirs
            .write_all(
                b"{\"ok\":true,\"address\":\"0000:00:05.0\"}\n\
                  {\"ok\":false,\"error\":\"id: root: there is no such device\"}\n\
                  {\"ok\":false,\"error\":\"not now\"}\n",
            )
            .unwrap();
        let disk = &crate::spec::tests::sample().disks[0];
        remote.add_disk(disk, limit).unwrap();
        assert_eq!(remote.remove_disk("root", limit), Ok(true));
        let refused = remote.remove_disk("root", limit);
        assert_eq!(refused, Err(MonitorError::Refused("not now".into())));
        drop(remote);
        let mut asked = BufReader::new(theirs).lines();
        let first: Value = serde_json::from_str(&asked.next().unwrap().unwrap()).unwrap();
        let wanted = json!({
            "op": "add-device", "kind": "disk", "id": "root", "queues": 2, "queue-size": 128,
            "socket": "/run/x/root,1.sock",
        });
        assert_eq!(first, wanted);
        let second: Value = serde_json::from_str(&asked.next().unwrap().unwrap()).unwrap();
        assert_eq!(second, json!({"op": "remove-device", "id": "root"}));
    }

    #[test]
    fn answers_are_understood() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut control = Control::new(ours);
        let limit = Duration::from_secs(10);
        theirs
            .write_all(b"{\"ok\":true,\"state\":\"running\"}\n")
            .unwrap();
        assert_eq!(control.ask("status", limit).unwrap()["state"], "running");
        theirs
            .write_all(b"{\"ok\":false,\"error\":\"not now\"}\n")
            .unwrap();
        let refused = control.ask("pause", limit);
        assert_eq!(refused, Err(MonitorError::Refused("not now".into())));
        let short = Duration::from_millis(10);
        assert_eq!(
            control.ask("pause", short),
            Err(MonitorError::Silent(short))
        );
        // The late answer comes in two parts, and is nobody else's.
        theirs.write_all(b"{\"ok\":true,\"state\":\"pau").unwrap();
        let given_up = control.ask("resume", short);
        assert_eq!(given_up, Err(MonitorError::Silent(short)));
        let rest = b"sed\"}\n{\"ok\":true}\n{\"ok\":true,\"state\":\"ending\"}\n";
        theirs.write_all(rest).unwrap();
        assert_eq!(control.ask("status", limit).unwrap()["state"], "ending");
        drop(theirs);
        assert_eq!(control.ask("pause", limit), Err(MonitorError::Closed));
    }
}
