//! One peer: what it has sent so far, and what it has not read yet.
//!
//! [`Server`](crate::Server) calls it when the socket is ready. It never
//! blocks: while an answer waits for a peer that does not read, nothing more
//! is read from that peer.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;
use serde_json::json;

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
        }
    }

    /// What to wait for.
    pub(crate) fn interest(&self) -> PollFlags {
        if self.output.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::OUT
        }
    }

    /// The socket is ready: reads, answers and sends what it can.
    pub(crate) fn ready(&mut self, operations: &mut Operations) -> Fate {
        if self.output.is_empty() {
            if self.receive().is_err() {
                return Fate::Goes;
            }
            self.take_lines(operations);
        }
        loop {
            match self.send() {
                Ok(true) => {}
                Ok(false) => return Fate::Stays,
                Err(_) => return Fate::Goes,
            }
            // A peer may send many lines at once: one answer after the other,
            // so that a peer which does not read them costs one answer.
            if !self.take_lines(operations) {
                break;
            }
        }
        let done = self.mode == Mode::Last || self.ended;
        if done { Fate::Goes } else { Fate::Stays }
    }

    /// Reads once.
    fn receive(&mut self) -> std::io::Result<()> {
        let mut buffer = [0u8; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.ended = true,
            Ok(n) => self.input.extend_from_slice(&buffer[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Answers the next line, if a whole one is there. False when nothing is
    /// left to answer.
    fn take_lines(&mut self, operations: &mut Operations) -> bool {
        while self.output.is_empty() && self.mode != Mode::Last {
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
            self.take_line(&line, operations);
            if end.is_none() {
                break;
            }
        }
        !self.output.is_empty()
    }

    fn take_line(&mut self, line: &[u8], operations: &mut Operations) {
        match &self.mode {
            Mode::Lines if line.starts_with(b"GET ") => {
                let line = String::from_utf8_lossy(line);
                let path = line.split_whitespace().nth(1).unwrap_or_default();
                self.mode = Mode::Headers(path.to_owned());
                if self.ended {
                    self.take_line(b"", operations);
                }
            }
            Mode::Lines if line.is_empty() => {}
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
            Mode::Headers(_) | Mode::Last => {}
        }
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

    /// What a peer that sends `pieces` and then ends reads back.
    fn exchange(pieces: &[&[u8]]) -> String {
        let mut operations = Operations::new("prog", "1", || "m 1\n".to_owned());
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(ours);
        for piece in pieces {
            theirs.write_all(piece).unwrap();
            if connection.ready(&mut operations) == Fate::Goes {
                break;
            }
        }
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        while connection.ready(&mut operations) == Fate::Stays {}
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
