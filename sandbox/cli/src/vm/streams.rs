//! Our own standard streams, on the way to and from the guest.
//!
//! They may be pipes, terminals or files shared with other programs, so they stay blocking as they
//! are: [`Output`] only writes as much as is sure to be taken at once, and [`Input`] only reads
//! when there is something. Used by `session`.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use pericarp_protocol::{ReceiveWindow, SendWindow, WindowError};
use rustix::{fs::FileType, io::Errno};

/// A pipe that is ready to be written to takes this much without blocking.
const PIPE_BUF: usize = 4096;
const FILE_PIECE: usize = 128 * 1024;
const READ_PIECE: usize = 32 * 1024;

/// Standard output or error output.
#[derive(Debug)]
pub(crate) struct Output<T> {
    target: T,
    pub(crate) name: &'static str,
    window: ReceiveWindow,
    pending: Vec<u8>,
    written: usize,
    piece: usize,
    closed: bool,
}

/// What became of an attempt to write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// This much credit can be handed to the guest.
    Credit(Option<u32>),
    /// Nobody reads it any more.
    Closed,
}

impl<T: AsFd> Output<T> {
    pub(crate) fn new(target: T, name: &'static str) -> Self {
        let is_file = rustix::fs::fstat(&target)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        Self {
            target,
            name,
            window: ReceiveWindow::default(),
            pending: Vec::new(),
            written: 0,
            piece: if is_file { FILE_PIECE } else { PIPE_BUF },
            closed: false,
        }
    }

    /// Takes bytes from the guest.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), WindowError> {
        self.window.received(bytes.len())?;
        if !self.closed {
            self.pending.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Whether there is something to write.
    pub(crate) fn is_pending(&self) -> bool {
        self.written < self.pending.len()
    }

    /// Writes a piece; call when the stream is ready to be written to.
    pub(crate) fn write_some(&mut self) -> io::Result<Written> {
        let end = self.pending.len().min(self.written + self.piece);
        let count = match rustix::io::write(&self.target, &self.pending[self.written..end]) {
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Err(Errno::PIPE) => {
                self.closed = true;
                self.pending = Vec::new();
                self.written = 0;
                return Ok(Written::Closed);
            }
            Err(error) => return Err(error.into()),
        };
        self.written += count;
        if !self.is_pending() {
            self.pending.clear();
            self.written = 0;
        } else if self.written >= FILE_PIECE {
            self.pending.drain(..self.written);
            self.written = 0;
        }
        Ok(Written::Credit(self.window.taken(count)))
    }
}

impl<T: AsFd> AsFd for Output<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.target.as_fd()
    }
}

/// Standard input.
#[derive(Debug)]
pub(crate) struct Input<T> {
    source: T,
    window: SendWindow,
    closed: bool,
}

impl<T: AsFd> Input<T> {
    pub(crate) fn new(source: T) -> Self {
        Self {
            source,
            window: SendWindow::default(),
            closed: false,
        }
    }

    /// Whether more can be read and sent.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.closed && self.window.left() > 0
    }

    /// Reads once; call when there is something to read. An empty result is the end.
    pub(crate) fn read_some(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; READ_PIECE.min(self.window.left())];
        match rustix::io::read(&self.source, &mut buffer) {
            Ok(count @ 1..) => {
                buffer.truncate(count);
                self.window.sent(count);
                return buffer;
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            // An input that cannot be read, such as a terminal that has gone, is at its end.
            Ok(0) | Err(_) => self.closed = true,
        }
        Vec::new()
    }

    /// Whether the end was reached.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// The command reads no more.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    pub(crate) fn credit(&mut self, amount: u32) -> Result<(), WindowError> {
        self.window.credit(amount)
    }
}

impl<T: AsFd> AsFd for Input<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use pericarp_protocol::WINDOW;

    use super::*;

    #[test]
    fn output_arrives_in_order_and_hands_credit_back() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut output = Output::new(writer, "stdout");
        let sent: Vec<u8> = (0..WINDOW).map(|i| (i % 251) as u8).collect();
        output.push(&sent).unwrap();
        assert_eq!(output.push(b"x"), Err(WindowError::Overrun));
        let (mut seen, mut credit) = (Vec::new(), 0);
        while output.is_pending() {
            match output.write_some().unwrap() {
                Written::Credit(amount) => credit += amount.unwrap_or(0),
                Written::Closed => panic!(),
            }
            let mut buffer = [0; PIPE_BUF];
            let count = reader.read(&mut buffer).unwrap();
            seen.extend_from_slice(&buffer[..count]);
        }
        assert!(seen == sent);
        assert_eq!(credit, WINDOW);
    }

    #[test]
    fn a_reader_that_has_gone_closes_the_stream() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut output = Output::new(writer, "stdout");
        output.push(b"lost").unwrap();
        assert_eq!(output.write_some().unwrap(), Written::Closed);
        output.push(b"more").unwrap();
        assert!(!output.is_pending());
    }

    #[test]
    fn input_stops_at_the_window_and_at_the_end() {
        let (reader, writer) = io::pipe().unwrap();
        let mut input = Input::new(reader);
        rustix::io::write(&writer, b"abc").unwrap();
        assert_eq!(input.read_some(), b"abc");
        drop(writer);
        assert_eq!(input.read_some(), b"");
        assert!(input.is_closed() && !input.is_wanted());
        assert_eq!(input.credit(4), Err(WindowError::Excess));
    }
}
