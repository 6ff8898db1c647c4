//! One connection per stream of a process: what the host sends first, and how a process ends.
//!
//! After connecting to [`crate::STREAM_PORT`] the host sends one header:
//!
//! ```text
//! 1 byte   kind
//! 1 byte   length of the container's id   and the id
//! 1 byte   length of the process's id     and the id
//! ```
//!
//! and is answered one byte, [`ATTACHED`] or a refusal. From then on the connection is the stream:
//! standard input flows to the guest and ends with the host's half-close; the outputs flow to the
//! host and end with the guest's. A connection of kind [`StreamKind::OutOfMemory`] belongs to a running
//! container, not to one of its processes (whose id is empty): it brings one byte for each time that
//! the kernel has killed processes of it for want of memory, and ends with the container. On a connection of kind [`StreamKind::Exit`] the guest sends one
//! [`ExitReport`] when the process has ended and its outputs have been handed over.

use std::io::{self, Read, Write};

use crate::{MAX_ID, is_id};

/// The answer to a header: the connection is the stream now.
pub const ATTACHED: u8 = 0;
/// There is no such process, or it does not have this stream.
pub const NO_SUCH_STREAM: u8 = 1;
/// Somebody else has it.
pub const TAKEN: u8 = 2;

/// A stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// To the process; with a terminal, what is typed.
    Stdin,
    /// From the process; with a terminal, all it shows.
    Stdout,
    /// From the process; never with a terminal.
    Stderr,
    /// The process's end.
    Exit,
    /// The container's want of memory.
    OutOfMemory,
}

impl StreamKind {
    /// All kinds, by number.
    pub const ALL: [Self; 5] = [
        Self::Stdin,
        Self::Stdout,
        Self::Stderr,
        Self::Exit,
        Self::OutOfMemory,
    ];

    fn number(self) -> u8 {
        // Five of them.
        Self::ALL.iter().position(|kind| *kind == self).unwrap_or(0) as u8
    }
}

/// Which stream a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamTarget {
    /// The stream.
    pub kind: StreamKind,
    /// The container's id.
    pub container: String,
    /// The process's id; empty for the container's own process.
    pub process: String,
}

impl StreamTarget {
    /// Writes the header.
    ///
    /// # Errors
    ///
    /// The connection's; `InvalidInput` for an id that is none.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = vec![self.kind.number()];
        for id in [&self.container, &self.process] {
            let length = u8::try_from(id.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
            bytes.push(length);
            bytes.extend(id.as_bytes());
        }
        to.write_all(&bytes)
    }

    /// Reads a header.
    ///
    /// # Errors
    ///
    /// The connection's; `InvalidData` for anything that is no header.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut kind = [0];
        from.read_exact(&mut kind)?;
        let kind = StreamKind::ALL
            .get(usize::from(kind[0]))
            .ok_or(io::ErrorKind::InvalidData)?;
        let container = read_id(from)?;
        let process = read_id(from)?;
        if !is_id(&container) || !(process.is_empty() || is_id(&process)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            kind: *kind,
            container,
            process,
        })
    }
}

fn read_id(from: &mut impl Read) -> io::Result<String> {
    let mut length = [0];
    from.read_exact(&mut length)?;
    let length = usize::from(length[0]);
    if length > MAX_ID {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReport {
    /// With this code.
    Code(u8),
    /// By this signal.
    Signal {
        /// Its number.
        signal: u8,
        /// The kernel killed it because its container had used up its memory.
        out_of_memory: bool,
    },
}

impl ExitReport {
    /// The code a shell would report.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => i32::from(code),
            Self::Signal { signal, .. } => 128 + i32::from(signal),
        }
    }

    /// Writes the report: three bytes.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn write(self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&match self {
            Self::Code(code) => [0, code, 0],
            Self::Signal {
                signal,
                out_of_memory,
            } => [1, signal, u8::from(out_of_memory)],
        })
    }

    /// Reads a report.
    ///
    /// # Errors
    ///
    /// The connection's; `InvalidData` for anything that is no report.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut bytes = [0; 3];
        from.read_exact(&mut bytes)?;
        match bytes {
            [0, code, 0] => Ok(Self::Code(code)),
            [1, signal @ 1..=64, oom @ 0..=1] => Ok(Self::Signal {
                signal,
                out_of_memory: oom == 1,
            }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back() {
        for kind in StreamKind::ALL {
            for process in ["", "exec-1"] {
                let target = StreamTarget {
                    kind,
                    container: "main".into(),
                    process: process.into(),
                };
                let mut bytes = Vec::new();
                target.write(&mut bytes).unwrap();
                assert_eq!(StreamTarget::read(&mut bytes.as_slice()).unwrap(), target);
            }
        }
    }

    #[test]
    fn strange_headers_are_refused() {
        for bytes in [
            &b""[..],
            b"\x05\x01a\x00",
            b"\x00\x00\x00",
            b"\x00\x02..\x00",
            b"\x00\x01a\x01/",
            b"\x00\xff",
            b"\x00\x01\xff\x00",
        ] {
            assert!(StreamTarget::read(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn reports_come_back_and_strange_ones_do_not() {
        for (report, code) in [
            (ExitReport::Code(7), 7),
            (
                ExitReport::Signal {
                    signal: 9,
                    out_of_memory: true,
                },
                137,
            ),
        ] {
            let mut bytes = Vec::new();
            report.write(&mut bytes).unwrap();
            assert_eq!(ExitReport::read(&mut bytes.as_slice()).unwrap(), report);
            assert_eq!(report.code(), code);
        }
        for bytes in [[2, 0, 0], [0, 0, 1], [1, 0, 0], [1, 65, 0], [1, 9, 2]] {
            assert!(ExitReport::read(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
