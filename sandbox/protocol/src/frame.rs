//! The frames on the control channel: `[kind u8][length u32 le][payload]`.
//!
//! Called by both ends with bytes as they arrive. [`Decoder`] holds at most one frame plus what
//! one read brought, whatever the peer sends; it must not allocate by a length it has not checked.

use thiserror::Error;

use crate::MAX_PAYLOAD;

const HEADER: usize = 5;
/// Longest explanation a guest may send.
const MAX_FAILURE_TEXT: usize = 1024;

/// Which side sent the bytes a [`Decoder`] reads: each side may only say its own frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// The host's `pericarp`.
    Host,
    /// The guest's `pericarp-init`.
    Guest,
}

/// One of the command's three standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
}

impl Stream {
    fn code(self) -> u8 {
        match self {
            Self::Stdin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Stdin),
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            _ => None,
        }
    }
}

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReport {
    /// It returned this code.
    Code(u8),
    /// This signal ended it; the flag says whether the kernel did so for want of memory.
    Signal {
        /// Signal number.
        signal: u8,
        /// The command's memory limit was the cause.
        out_of_memory: bool,
    },
}

/// Why the guest could not run the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The machine could not be set up, or its disk could not be flushed.
    Setup,
    /// No such program.
    NotFound,
    /// The program is there and cannot be executed.
    NotExecutable,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Host: a part of the run's description; an empty part ends it.
    Spec(Vec<u8>),
    /// Host: input for the command.
    Stdin(Vec<u8>),
    /// Host: the input is at its end.
    StdinEof,
    /// Host: send this signal to the command.
    Signal(u8),
    /// Guest: first frame, with its protocol version.
    Hello(u32),
    /// Guest: the command runs. Milliseconds since the guest's kernel started, at the first
    /// instruction of init and now.
    Started {
        /// When init began.
        init_ms: u32,
        /// When the command was started.
        command_ms: u32,
    },
    /// Guest: output of the command.
    Stdout(Vec<u8>),
    /// Guest: error output of the command.
    Stderr(Vec<u8>),
    /// Guest: the command has ended, its output is delivered, the disks are flushed.
    Exit(ExitReport),
    /// Guest: the command could not be run.
    Error(Failure, String),
    /// Both: this many more bytes of the stream may be sent.
    Credit(Stream, u32),
    /// Both: the stream's reader is gone; what was not written is dropped.
    Closed(Stream),
}

/// Bytes that are not a frame of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The first byte names no frame that side may send.
    #[error("a frame of unknown kind {0:#04x}")]
    Kind(u8),
    /// The length is outside of what the kind allows.
    #[error("a frame of kind {kind:#04x} with an impossible length of {length} bytes")]
    Length {
        /// Kind byte.
        kind: u8,
        /// Claimed length.
        length: u32,
    },
    /// The payload's content is invalid.
    #[error("a frame of kind {0:#04x} with impossible content")]
    Content(u8),
    /// Bytes arrived in the middle of a frame and then the channel ended.
    #[error("the channel ended within a frame")]
    Truncated,
}

const SPEC: u8 = 0x01;
const STDIN: u8 = 0x02;
const STDIN_EOF: u8 = 0x03;
const SIGNAL: u8 = 0x04;
const HOST_CREDIT: u8 = 0x05;
const HOST_CLOSED: u8 = 0x06;
const HELLO: u8 = 0x81;
const STARTED: u8 = 0x82;
const STDOUT: u8 = 0x83;
const STDERR: u8 = 0x84;
const EXIT: u8 = 0x85;
const ERROR: u8 = 0x86;
const GUEST_CREDIT: u8 = 0x87;
const GUEST_CLOSED: u8 = 0x88;

/// Smallest and largest payload of each kind, `None` for kinds that side may not send.
fn lengths(kind: u8, sender: Sender) -> Option<(usize, usize)> {
    let range = match kind {
        SPEC => (0, MAX_PAYLOAD),
        STDIN | STDOUT | STDERR => (1, MAX_PAYLOAD),
        STDIN_EOF => (0, 0),
        SIGNAL | HOST_CLOSED | GUEST_CLOSED => (1, 1),
        HOST_CREDIT | GUEST_CREDIT => (5, 5),
        HELLO => (4, 4),
        STARTED => (8, 8),
        EXIT => (3, 3),
        ERROR => (1, 1 + MAX_FAILURE_TEXT),
        _ => return None,
    };
    let from_guest = kind & 0x80 != 0;
    (from_guest == (sender == Sender::Guest)).then_some(range)
}

impl Frame {
    /// Appends the frame's bytes to `out`. `sender` is the side that speaks.
    ///
    /// # Panics
    ///
    /// When a payload is larger than [`MAX_PAYLOAD`]: callers cut streams into pieces first.
    pub fn encode(&self, sender: Sender, out: &mut Vec<u8>) {
        let credit = |stream: Stream, amount: u32| {
            let mut payload = vec![stream.code()];
            payload.extend_from_slice(&amount.to_le_bytes());
            payload
        };
        let host = sender == Sender::Host;
        match self {
            Self::Spec(part) => put(out, SPEC, part),
            Self::Stdin(bytes) => put(out, STDIN, bytes),
            Self::StdinEof => put(out, STDIN_EOF, &[]),
            Self::Signal(number) => put(out, SIGNAL, &[*number]),
            Self::Hello(version) => put(out, HELLO, &version.to_le_bytes()),
            Self::Started {
                init_ms,
                command_ms,
            } => {
                let mut payload = init_ms.to_le_bytes().to_vec();
                payload.extend_from_slice(&command_ms.to_le_bytes());
                put(out, STARTED, &payload);
            }
            Self::Stdout(bytes) => put(out, STDOUT, bytes),
            Self::Stderr(bytes) => put(out, STDERR, bytes),
            Self::Exit(ExitReport::Code(code)) => put(out, EXIT, &[0, *code, 0]),
            Self::Exit(ExitReport::Signal {
                signal,
                out_of_memory,
            }) => {
                put(out, EXIT, &[1, *signal, u8::from(*out_of_memory)]);
            }
            Self::Error(failure, text) => {
                let mut payload = vec![match failure {
                    Failure::Setup => 0,
                    Failure::NotFound => 1,
                    Failure::NotExecutable => 2,
                }];
                let mut end = text.len().min(MAX_FAILURE_TEXT);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                payload.extend_from_slice(&text.as_bytes()[..end]);
                put(out, ERROR, &payload);
            }
            Self::Credit(stream, amount) => {
                put(
                    out,
                    if host { HOST_CREDIT } else { GUEST_CREDIT },
                    &credit(*stream, *amount),
                );
            }
            Self::Closed(stream) => {
                put(
                    out,
                    if host { HOST_CLOSED } else { GUEST_CLOSED },
                    &[stream.code()],
                );
            }
        }
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, FrameError> {
        let wrong = || FrameError::Content(kind);
        let word = |at: usize| -> Result<u32, FrameError> {
            let bytes = payload.get(at..at + 4).ok_or_else(wrong)?;
            Ok(u32::from_le_bytes(bytes.try_into().map_err(|_| wrong())?))
        };
        let byte = |at: usize| payload.get(at).copied().ok_or_else(wrong);
        // The receiver of a stream hands out credit and closes it; nobody else may.
        let stream = |code: u8| match (kind, Stream::from_code(code)) {
            (HOST_CREDIT | HOST_CLOSED, Some(s @ (Stream::Stdout | Stream::Stderr))) => Ok(s),
            (GUEST_CREDIT | GUEST_CLOSED, Some(s @ Stream::Stdin)) => Ok(s),
            _ => Err(wrong()),
        };
        Ok(match kind {
            SPEC => Self::Spec(payload.to_vec()),
            STDIN => Self::Stdin(payload.to_vec()),
            STDIN_EOF => Self::StdinEof,
            SIGNAL => match byte(0)? {
                number @ 1..=64 => Self::Signal(number),
                _ => return Err(wrong()),
            },
            HELLO => Self::Hello(word(0)?),
            STARTED => Self::Started {
                init_ms: word(0)?,
                command_ms: word(4)?,
            },
            STDOUT => Self::Stdout(payload.to_vec()),
            STDERR => Self::Stderr(payload.to_vec()),
            EXIT => Self::Exit(match (byte(0)?, byte(1)?, byte(2)?) {
                (0, code, 0) => ExitReport::Code(code),
                (1, signal @ 1..=64, oom @ 0..=1) => ExitReport::Signal {
                    signal,
                    out_of_memory: oom == 1,
                },
                _ => return Err(wrong()),
            }),
            ERROR => {
                let failure = match byte(0)? {
                    0 => Failure::Setup,
                    1 => Failure::NotFound,
                    2 => Failure::NotExecutable,
                    _ => return Err(wrong()),
                };
                let text = String::from_utf8_lossy(payload.get(1..).ok_or_else(wrong)?);
                Self::Error(failure, printable(&text))
            }
            HOST_CREDIT | GUEST_CREDIT => match word(1)? {
                0 => return Err(wrong()),
                amount => Self::Credit(stream(byte(0)?)?, amount),
            },
            HOST_CLOSED | GUEST_CLOSED => Self::Closed(stream(byte(0)?)?),
            _ => return Err(FrameError::Kind(kind)),
        })
    }
}

/// Text from the other side, safe to print on a terminal and on one line.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn put(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    assert!(
        payload.len() <= MAX_PAYLOAD,
        "the caller cuts streams into pieces of MAX_PAYLOAD"
    );
    out.push(kind);
    // Below 64 KiB by the line above.
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(payload);
}

/// Turns bytes of one peer into frames.
#[derive(Debug)]
pub struct Decoder {
    sender: Sender,
    pending: Vec<u8>,
    /// Start of what `pending` still holds.
    at: usize,
}

impl Decoder {
    /// A decoder for what `sender` says.
    #[must_use]
    pub fn new(sender: Sender) -> Self {
        Self {
            sender,
            pending: Vec::new(),
            at: 0,
        }
    }

    /// Takes bytes as read. Call [`Decoder::next_frame`] until it has no more before the next push;
    /// then no more than one frame is ever held.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.drain(..self.at);
        self.at = 0;
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    ///
    /// The bytes are no frame; the peer is not to be listened to any more.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.pending[self.at..];
        let Some(&kind) = rest.first() else {
            return Ok(None);
        };
        let (least, most) = lengths(kind, self.sender).ok_or(FrameError::Kind(kind))?;
        let Some(length) = rest.get(1..HEADER) else {
            return Ok(None);
        };
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
        let size = length as usize;
        if size < least || size > most {
            return Err(FrameError::Length { kind, length });
        }
        let Some(payload) = rest.get(HEADER..HEADER + size) else {
            return Ok(None);
        };
        let frame = Frame::decode(kind, payload)?;
        self.at += HEADER + size;
        Ok(Some(frame))
    }

    /// Bytes held for a frame that is not complete.
    #[must_use]
    pub fn held(&self) -> usize {
        self.pending.len() - self.at
    }

    /// To be called at the end of the channel.
    ///
    /// # Errors
    ///
    /// The channel ended within a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.held() == 0 {
            Ok(())
        } else {
            Err(FrameError::Truncated)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all_frames() -> Vec<(Sender, Frame)> {
        vec![
            (Sender::Host, Frame::Spec(vec![])),
            (Sender::Host, Frame::Spec(vec![b'x'; MAX_PAYLOAD])),
            (Sender::Host, Frame::Stdin(vec![0, 255])),
            (Sender::Host, Frame::StdinEof),
            (Sender::Host, Frame::Signal(15)),
            (Sender::Host, Frame::Credit(Stream::Stderr, 9)),
            (Sender::Host, Frame::Closed(Stream::Stdout)),
            (Sender::Guest, Frame::Hello(1)),
            (
                Sender::Guest,
                Frame::Started {
                    init_ms: 900,
                    command_ms: 1000,
                },
            ),
            (Sender::Guest, Frame::Stdout(vec![7; 3])),
            (Sender::Guest, Frame::Stderr(vec![8; 3])),
            (Sender::Guest, Frame::Exit(ExitReport::Code(7))),
            (
                Sender::Guest,
                Frame::Exit(ExitReport::Signal {
                    signal: 9,
                    out_of_memory: true,
                }),
            ),
            (
                Sender::Guest,
                Frame::Error(Failure::NotFound, "no such program".into()),
            ),
            (Sender::Guest, Frame::Credit(Stream::Stdin, u32::MAX)),
            (Sender::Guest, Frame::Closed(Stream::Stdin)),
        ]
    }

    fn decode(sender: Sender, bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
        let mut decoder = Decoder::new(sender);
        decoder.push(bytes);
        decoder.next_frame()
    }

    #[test]
    fn every_frame_comes_back_whole_and_in_pieces() {
        for (sender, frame) in all_frames() {
            let mut bytes = Vec::new();
            frame.encode(sender, &mut bytes);
            assert_eq!(decode(sender, &bytes), Ok(Some(frame.clone())));
            if bytes.len() < 1000 {
                let mut decoder = Decoder::new(sender);
                for (i, byte) in bytes.iter().enumerate() {
                    assert_eq!(decoder.next_frame(), Ok(None), "{frame:?} after {i} bytes");
                    decoder.push(&[*byte]);
                }
                assert_eq!(decoder.next_frame(), Ok(Some(frame)));
                assert_eq!(decoder.finish(), Ok(()));
            }
        }
    }

    #[test]
    fn a_side_may_not_say_the_other_sides_frames() {
        for (sender, frame) in all_frames() {
            let mut bytes = Vec::new();
            frame.encode(sender, &mut bytes);
            let other = if sender == Sender::Host {
                Sender::Guest
            } else {
                Sender::Host
            };
            assert_eq!(decode(other, &bytes), Err(FrameError::Kind(bytes[0])));
        }
    }

    #[test]
    fn impossible_lengths_are_refused_from_the_header_alone() {
        for (kind, length) in [
            (STDOUT, MAX_PAYLOAD as u32 + 1),
            (STDOUT, u32::MAX),
            (STDOUT, 0),
            (HELLO, 3),
            (EXIT, 4),
            (ERROR, 1026),
        ] {
            let mut bytes = vec![kind];
            bytes.extend_from_slice(&length.to_le_bytes());
            assert_eq!(
                decode(Sender::Guest, &bytes),
                Err(FrameError::Length { kind, length })
            );
        }
    }

    #[test]
    fn impossible_content_is_refused() {
        let cases: [(Sender, &[u8]); 7] = [
            (Sender::Guest, &[EXIT, 3, 0, 0, 0, 2, 0, 0]),
            (Sender::Guest, &[EXIT, 3, 0, 0, 0, 1, 0, 0]),
            (Sender::Guest, &[ERROR, 1, 0, 0, 0, 9]),
            (Sender::Guest, &[GUEST_CREDIT, 5, 0, 0, 0, 1, 1, 0, 0, 0]),
            (Sender::Guest, &[GUEST_CREDIT, 5, 0, 0, 0, 0, 0, 0, 0, 0]),
            (Sender::Guest, &[GUEST_CLOSED, 1, 0, 0, 0, 2]),
            (Sender::Host, &[SIGNAL, 1, 0, 0, 0, 65]),
        ];
        for (sender, bytes) in cases {
            assert_eq!(
                decode(sender, bytes),
                Err(FrameError::Content(bytes[0])),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn a_guests_explanation_cannot_drive_the_terminal() {
        let mut bytes = Vec::new();
        Frame::Error(Failure::Setup, "a\x1b[2Jb\nc".into()).encode(Sender::Guest, &mut bytes);
        let Ok(Some(Frame::Error(_, text))) = decode(Sender::Guest, &bytes) else {
            panic!()
        };
        assert_eq!(text, "a\u{fffd}[2Jb\u{fffd}c");
    }

    #[test]
    fn a_channel_that_ends_within_a_frame_is_told() {
        let mut decoder = Decoder::new(Sender::Guest);
        decoder.push(&[STDOUT, 9, 0]);
        assert_eq!(decoder.next_frame(), Ok(None));
        assert_eq!(decoder.finish(), Err(FrameError::Truncated));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_hold_little(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..20),
            guest in any::<bool>(),
        ) {
            let sender = if guest { Sender::Guest } else { Sender::Host };
            let mut decoder = Decoder::new(sender);
            'outer: for chunk in chunks {
                decoder.push(&chunk);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'outer,
                    }
                }
                prop_assert!(decoder.held() < HEADER + MAX_PAYLOAD);
            }
        }

        #[test]
        fn frames_survive_any_cutting(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..500), 1..20),
            step in 1usize..700,
        ) {
            let mut bytes = Vec::new();
            for payload in &payloads {
                Frame::Stdout(payload.clone()).encode(Sender::Guest, &mut bytes);
            }
            let mut decoder = Decoder::new(Sender::Guest);
            let mut seen = Vec::new();
            for piece in bytes.chunks(step) {
                decoder.push(piece);
                while let Some(Frame::Stdout(payload)) = decoder.next_frame().unwrap() {
                    seen.push(payload);
                }
            }
            prop_assert_eq!(seen, payloads);
        }
    }
}
