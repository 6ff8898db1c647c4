//! The control connection to a QEMU process: QMP, JSON objects line by line.
//!
//! Used by the QEMU driver only. QEMU is not trusted to keep to the protocol, since a guest may
//! have taken it over: lines are bounded, what is not understood is passed over, and no command
//! waits longer than its caller allows. Events are read at once by a thread of their own, so that
//! QEMU never has to keep them; of all of them only the cause of the end is remembered.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use thiserror::Error;

/// Longest line that is read. QEMU's own are below 1 KiB for the commands used here.
const MAX_LINE: u64 = 64 * 1024;
/// Longest reason that is kept of a refusal.
const MAX_REASON: usize = 240;

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum MonitorError {
    /// QEMU has closed the connection: it has ended, or is about to.
    #[error("the connection is closed")]
    Closed,
    /// No answer in time.
    #[error("no answer within {} s", .0.as_secs_f64())]
    Silent(Duration),
    /// QEMU says no.
    #[error("{0}")]
    Refused(String),
}

/// What QEMU said about the end of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine, or its CPU gave up.
    Reset,
    /// Something on the host ended it.
    Host,
}

/// What a command gets, with the number of the command.
type Reply = (u64, Result<(), String>);

/// The connection.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: UnixStream,
    replies: Receiver<Reply>,
    cause: Arc<Mutex<Option<Cause>>>,
    last: u64,
}

impl Monitor {
    /// A connection, and its other end for QEMU.
    ///
    /// # Errors
    ///
    /// No socket, or no thread.
    pub(crate) fn pair() -> std::io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        let source = ours.try_clone()?;
        let cause = Arc::new(Mutex::new(None));
        // More replies than commands is a QEMU gone mad; the rest stays in the socket.
        let (sender, replies) = mpsc::sync_channel(4);
        let shared = Arc::clone(&cause);
        thread::Builder::new()
            .name("monitor".into())
            .stack_size(128 * 1024)
            .spawn(move || follow(source, &sender, &shared))?;
        let monitor = Self {
            stream: ours,
            replies,
            cause,
            last: 0,
        };
        Ok((monitor, theirs.into()))
    }

    /// Has a command without arguments carried out.
    ///
    /// # Errors
    ///
    /// It was not, or not in time.
    pub(crate) fn execute(&mut self, command: &str, limit: Duration) -> Result<(), MonitorError> {
        let command = json!({ "execute": command });
        self.carry_out(command, limit)
    }

    /// The same for a command with arguments.
    ///
    /// # Errors
    ///
    /// It was not, or not in time.
    pub(crate) fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<(), MonitorError> {
        let command = json!({ "execute": command, "arguments": arguments });
        self.carry_out(command, limit)
    }

    fn carry_out(&mut self, mut command: Value, limit: Duration) -> Result<(), MonitorError> {
        let end = Instant::now() + limit;
        self.last += 1;
        command["id"] = self.last.into();
        let line = format!("{command}\n");
        // A few hundred bytes: they fit into the socket unless QEMU has stopped reading.
        self.stream
            .set_write_timeout(Some(limit.max(Duration::from_millis(1))))
            .and_then(|()| self.stream.write_all(line.as_bytes()))
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::WouldBlock => MonitorError::Silent(limit),
                _ => MonitorError::Closed,
            })?;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.replies.recv_timeout(left) {
                Ok((id, reply)) if id == self.last => return reply.map_err(MonitorError::Refused),
                // Too late for a command that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Err(MonitorError::Silent(limit)),
                Err(RecvTimeoutError::Disconnected) => return Err(MonitorError::Closed),
            }
        }
    }

    /// What ended the machine, as far as QEMU said. For a QEMU that has ended: its last lines are
    /// read first.
    pub(crate) fn cause(&mut self) -> Option<Cause> {
        let end = Instant::now() + Duration::from_secs(1);
        // The sender goes when the thread has come to the end of the connection.
        while self
            .replies
            .recv_timeout(end.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        *self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Wakes the thread, whoever else holds the other end.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn follow(source: UnixStream, replies: &SyncSender<Reply>, cause: &Mutex<Option<Cause>>) {
    let mut source = BufReader::new(source);
    let mut line = Vec::new();
    loop {
        line.clear();
        match source.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(1..) if line.ends_with(b"\n") => {}
            // The end, or a line too long to be one of QEMU's.
            _ => return,
        }
        let open = match understand(&line) {
            Some(Message::End(end)) => {
                let mut known = cause.lock().unwrap_or_else(PoisonError::into_inner);
                // The first is the cause, what follows its consequences.
                known.get_or_insert(end);
                true
            }
            Some(Message::Reply(id, reply)) => replies.send((id, reply)).is_ok(),
            None => true,
        };
        if !open {
            return;
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Message {
    End(Cause),
    Reply(u64, Result<(), String>),
}

fn understand(line: &[u8]) -> Option<Message> {
    let value: Value = serde_json::from_slice(line).ok()?;
    if value["event"] == "SHUTDOWN" {
        return Some(Message::End(match value["data"]["reason"].as_str() {
            Some("guest-shutdown") => Cause::PowerOff,
            Some("guest-reset" | "guest-panic") => Cause::Reset,
            _ => Cause::Host,
        }));
    }
    let id = value["id"].as_u64()?;
    if value.get("return").is_some() {
        return Some(Message::Reply(id, Ok(())));
    }
    let reason = value["error"]["desc"].as_str()?;
    let reason = reason.chars().filter(|c| !c.is_control());
    Some(Message::Reply(id, Err(reason.take(MAX_REASON).collect())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn lines_are_understood_or_passed_over() {
        let end = |reason: &str| {
            let line =
                format!(r#"{{"event":"SHUTDOWN","data":{{"guest":true,"reason":"{reason}"}}}}"#);
            understand(line.as_bytes())
        };
        assert_eq!(end("guest-shutdown"), Some(Message::End(Cause::PowerOff)));
        assert_eq!(end("guest-reset"), Some(Message::End(Cause::Reset)));
        assert_eq!(end("host-signal"), Some(Message::End(Cause::Host)));
        assert_eq!(
            understand(br#"{"return":{},"id":7}"#),
            Some(Message::Reply(7, Ok(())))
        );
        assert_eq!(
            understand(br#"{"error":{"class":"x","desc":"no\u001b"},"id":7}"#),
            Some(Message::Reply(7, Err("no".into())))
        );
        for other in [
            r#"{"QMP":{}}"#,
            r#"{"event":"RTC_CHANGE"}"#,
            r#"{"return":{}}"#,
            r#"{"id":-1,"return":{}}"#,
            "[]",
            "x",
        ] {
            assert_eq!(understand(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn replies_find_their_command() {
        let (mut monitor, theirs) = Monitor::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        theirs
            .write_all(b"{\"return\":{},\"id\":9}\n{\"error\":{\"desc\":\"not now\"},\"id\":1}\n")
            .unwrap();
        let refused = monitor.execute("stop", LIMIT);
        assert_eq!(refused, Err(MonitorError::Refused("not now".into())));
        let mut asked = [0; 25];
        theirs.read_exact(&mut asked).unwrap();
        let asked: Value = serde_json::from_slice(&asked).unwrap();
        assert_eq!(asked, json!({"execute": "stop", "id": 1}));
        let short = Duration::from_millis(10);
        assert_eq!(
            monitor.execute("stop", short),
            Err(MonitorError::Silent(short))
        );
        theirs
            .write_all(b"{\"event\":\"SHUTDOWN\",\"data\":{\"reason\":\"guest-reset\"}}\n")
            .unwrap();
        drop(theirs);
        assert_eq!(monitor.execute("stop", LIMIT), Err(MonitorError::Closed));
        assert_eq!(monitor.cause(), Some(Cause::Reset));
    }

    #[test]
    fn a_line_without_end_ends_the_connection() {
        let (mut monitor, theirs) = Monitor::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        theirs.write_all(&[b'x'; 64 * 1024]).unwrap();
        assert_eq!(monitor.execute("stop", LIMIT), Err(MonitorError::Closed));
        assert_eq!(monitor.cause(), None);
    }
}
