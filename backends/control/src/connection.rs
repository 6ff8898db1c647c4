//! One peer: what it has sent so far, and what it has not read yet.
//!
//! [`Server`](crate::Server) calls it when the socket is ready. It never
//! blocks: while an answer waits for a peer that does not read, or for an
//! errand to end, nothing more is read from that peer.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;
use serde_json::json;

use crate::descriptors::{MOST_DESCRIPTORS, receive};
use crate::errands::{Errands, Pending};
use crate::operations::Operations;

/// The longest line, and the most that a peer may send of one HTTP request.
pub(crate) const LONGEST_LINE: usize = 16 * 1024;

/// What a peer is in the middle of.
#[derive(Debug, PartialEq, Eq)]
enum Mode {
    /// JSON lines.
    Lines,
    /// The headers of an HTTP request for this path.
    Headers(String),
    /// The last answer is being sent.
    Last,
    /// An errand is under way.
    Waiting,
}

/// Whether a peer is still served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Stays,
    Goes,
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    mode: Mode,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    /// The peer will send no more.
    ended: bool,
    /// What came with the line that is not whole yet.
    descriptors: Vec<OwnedFd>,
    /// More came than any line may have; all of them are closed.
    too_many: bool,
    pending: Option<Pending>,
}

impl Connection {
    /// Takes a stream that is non-blocking.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            mode: Mode::Lines,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            ended: false,
            descriptors: Vec::new(),
            too_many: false,
            pending: None,
        }
    }

    /// What to wait for.
    pub(crate) fn interest(&self) -> PollFlags {
        if self.mode == Mode::Waiting {
            // The end of the peer is seen all the same.
            PollFlags::empty()
        } else if self.output.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::OUT
        }
    }

    /// The socket is ready: reads, answers and sends what it can.
    pub(crate) fn ready(&mut self, operations: &mut Operations, errands: &Errands) -> Fate {
        if self.mode == Mode::Waiting {
            return Fate::Goes;
        }
        if self.output.is_empty() {
            if self.receive().is_err() {
                return Fate::Goes;
            }
            self.take_lines(operations, errands);
        }
        self.go_on(operations, errands)
    }

    /// An errand has ended, maybe that of this peer.
    pub(crate) fn look(&mut self, operations: &mut Operations, errands: &Errands) -> Fate {
        let Some(answer) = self.pending.as_ref().and_then(Pending::answer) else {
            return Fate::Stays;
        };
        self.pending = None;
        self.mode = Mode::Lines;
        self.output = answer.into_bytes();
        self.output.push(b'\n');
        self.go_on(operations, errands)
    }

    /// Sends, and answers what is left of the input.
    fn go_on(&mut self, operations: &mut Operations, errands: &Errands) -> Fate {
        loop {
            match self.send() {
                Ok(true) => {}
                Ok(false) => return Fate::Stays,
                Err(_) => return Fate::Goes,
            }
            // A peer may send many lines at once: one answer after the other,
            // so that a peer which does not read them costs one answer.
            if !self.take_lines(operations, errands) {
                break;
            }
        }
        if self.mode == Mode::Waiting {
            return Fate::Stays;
        }
        let done = self.mode == Mode::Last || self.ended;
        if done { Fate::Goes } else { Fate::Stays }
    }

    /// Reads once.
    fn receive(&mut self) -> std::io::Result<()> {
        let mut buffer = [0u8; 4096];
        match receive(&self.stream, &mut buffer, &mut self.descriptors) {
            Ok((0, _)) => self.ended = true,
            Ok((n, all)) => {
                self.input.extend_from_slice(&buffer[..n]);
                if !all || self.descriptors.len() > MOST_DESCRIPTORS {
                    self.too_many = true;
                    self.descriptors.clear();
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Answers the next line, if a whole one is there. False when nothing is
    /// left to answer.
    fn take_lines(&mut self, operations: &mut Operations, errands: &Errands) -> bool {
        while self.output.is_empty() && !matches!(self.mode, Mode::Last | Mode::Waiting) {
            let end = self.input.iter().position(|&b| b == b'\n');
            let mut line = match end {
                Some(end) => self.input.drain(..=end).collect(),
                // The last line may do without its end.
                None if self.ended => std::mem::take(&mut self.input),
                None if self.input.len() < LONGEST_LINE => return false,
                None => Vec::new(),
            };
            if line.len() > LONGEST_LINE || (end.is_none() && !self.ended) {
                let error =
                    format!(r#"{{"error":"a line has at most {LONGEST_LINE} bytes","ok":false}}"#);
                self.last(error + "\n");
                break;
            }
            while line.last().is_some_and(u8::is_ascii_whitespace) {
                line.pop();
            }
            self.take_line(&line, operations, errands);
            if end.is_none() {
                break;
            }
        }
        !self.output.is_empty()
    }

    fn take_line(&mut self, line: &[u8], operations: &mut Operations, errands: &Errands) {
        if line.is_empty() && self.mode == Mode::Lines {
            return;
        }
        let descriptors = std::mem::take(&mut self.descriptors);
        if std::mem::take(&mut self.too_many) {
            let rule = format!("a line has at most {MOST_DESCRIPTORS} descriptors");
            return self.refuse(&rule);
        }
        if let Some((errand, arguments)) = operations.errand(line)
            && self.mode == Mode::Lines
        {
            match errands.send(errand, arguments, descriptors) {
                Ok(pending) => {
                    self.pending = Some(pending);
                    self.mode = Mode::Waiting;
                }
                Err(error) => self.refuse(&error),
            }
            return;
        }
        if !descriptors.is_empty() {
            return self.refuse("descriptors came with it, and this line takes none");
        }
        match &self.mode {
            Mode::Lines if line.starts_with(b"GET ") => {
                let line = String::from_utf8_lossy(line);
                let path = line.split_whitespace().nth(1).unwrap_or_default();
                self.mode = Mode::Headers(path.to_owned());
                if self.ended {
                    self.take_line(b"", operations, errands);
                }
            }
            Mode::Lines => match operations.adopt(line, &self.stream) {
                Some(Ok(())) => self.last(String::new()),
                Some(Err(error)) => {
                    self.last(format!("{}\n", json!({"error": error, "ok": false})))
                }
                None => {
                    self.output = operations.answer(line).into_bytes();
                    self.output.push(b'\n');
                }
            },
            // The headers say nothing that we need. They are read to their end
            // all the same: closing with unread bytes looks like a failure.
            Mode::Headers(path) if line.is_empty() => {
                let answer = if path == "/metrics" {
                    http("200 OK", &operations.metrics())
                } else {
                    http("404 Not Found", "only /metrics is here\n")
                };
                self.last(answer);
            }
            Mode::Headers(_) | Mode::Last | Mode::Waiting => {}
        }
    }

    /// Answers that nothing was done.
    fn refuse(&mut self, error: &str) {
        self.output = format!("{}\n", json!({"error": error, "ok": false})).into_bytes();
    }

    /// Sends this and closes.
    fn last(&mut self, answer: String) {
        self.output = answer.into_bytes();
        self.mode = Mode::Last;
        self.input = Vec::new();
    }

    /// Sends what the peer has room for; true when nothing is left.
    fn send(&mut self) -> std::io::Result<bool> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        // Not kept: answers can be large, and peers may stay for ever.
        self.output = Vec::new();
        self.sent = 0;
        Ok(true)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn http(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.0 {status}\r\n\
         Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// What a peer that sends `pieces` and then ends reads back.
    fn exchange(pieces: &[&[u8]]) -> String {
        let mut operations = Operations::new("prog", "1", || "m 1\n".to_owned());
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(ours);
        let errands = Errands::new().unwrap();
        for piece in pieces {
            theirs.write_all(piece).unwrap();
            if connection.ready(&mut operations, &errands) == Fate::Goes {
                break;
            }
        }
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        while connection.ready(&mut operations, &errands) == Fate::Stays {}
        drop(connection);
        let mut answer = String::new();
        theirs.read_to_string(&mut answer).unwrap();
        answer
    }

    const VERSION: &str = "{\"ok\":true,\"program\":\"prog\",\"version\":\"1\"}\n";

    #[test]
    fn lines_in_pieces_together_and_without_an_end() {
        let one = br#"{"op":"version"}"#;
        assert_eq!(exchange(&[&one[..5], &one[5..], b"\r\n"]), VERSION);
        assert_eq!(exchange(&[one]), VERSION);
        let two = [&one[..], b"\n\n", one, b"\n"].concat();
        assert_eq!(exchange(&[&two]), VERSION.repeat(2));
        assert_eq!(exchange(&[]), "");
    }

    #[test]
    fn an_endless_line_is_the_last() {
        let long = vec![b'x'; 4096];
        let answer = exchange(&[&long[..]; 8]);
        assert!(answer.contains("at most 16384 bytes"), "{answer}");
        assert_eq!(answer.lines().count(), 1);
    }

    #[test]
    fn http_answers_after_the_headers() {
        for request in ["GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "GET /metrics"] {
            let answer = exchange(&[request.as_bytes()]);
            assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
            assert!(answer.contains("Content-Length: 4\r\n"), "{answer}");
            assert!(answer.ends_with("\r\n\r\nm 1\n"), "{answer}");
        }
        let answer = exchange(&[b"GET / HTTP/1.0\r\n\r\n"]);
        assert!(answer.starts_with("HTTP/1.0 404 "), "{answer}");
    }
}
