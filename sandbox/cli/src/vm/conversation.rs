//! What the guest may say when, what we answer, and the memory it may take.
//!
//! The state machine between the bytes of the channel and our standard streams, without waiting or
//! machine, so that a hostile guest can be tried on it in a test. Every frame is checked against
//! what it may say at that point; what it can make us hold is bounded by the windows of its two
//! outputs and one frame. Driven by `session`.

use std::os::fd::AsFd;

use pericarp_protocol::{
    Decoder, ExitReport, Failure as GuestFailure, Frame, RunSpec, Sender, Stream, VERSION,
    WindowError,
};

use crate::{
    failure::Failure,
    report::Timing,
    vm::streams::{Input, Output, Written},
};

/// How far the guest has come; decides which frames it may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing heard yet.
    Booting,
    /// It has said which protocol it speaks.
    Preparing,
    /// The command runs.
    Running,
    /// The command has ended with this code; only our own output may still be on its way.
    Ended(i32),
}

/// Why the conversation is over without an exit code.
#[derive(Debug)]
pub(crate) enum Ending {
    /// One of ours, or one that the guest reports.
    Failure(Failure),
    /// The guest does not keep to the protocol; this is what it sent.
    Guest(String),
}

impl From<Failure> for Ending {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<WindowError> for Ending {
    fn from(error: WindowError) -> Self {
        Self::Guest(error.to_string())
    }
}

/// One run's conversation.
#[derive(Debug)]
pub(crate) struct Conversation<I, O, E> {
    pub(crate) state: State,
    pub(crate) stdin: Input<I>,
    pub(crate) stdout: Output<O>,
    pub(crate) stderr: Output<E>,
    decoder: Decoder,
    /// Encoded frames that the channel has not taken yet.
    pending: Vec<u8>,
    sent: usize,
}

impl<I: AsFd, O: AsFd, E: AsFd> Conversation<I, O, E> {
    /// Begins with the description of the run.
    pub(crate) fn begin(
        spec: &RunSpec,
        stdin: Input<I>,
        stdout: Output<O>,
        stderr: Output<E>,
    ) -> Result<Self, Failure> {
        let mut conversation = Self {
            state: State::Booting,
            stdin,
            stdout,
            stderr,
            decoder: Decoder::new(Sender::Guest),
            pending: Vec::new(),
            sent: 0,
        };
        for frame in spec
            .frames()
            .map_err(|error| Failure::Setup(error.to_string()))?
        {
            conversation.say(&frame);
        }
        Ok(conversation)
    }

    /// The exit code, once the command has ended and its output is delivered.
    pub(crate) fn result(&self) -> Option<i32> {
        match self.state {
            State::Ended(code) if !self.stdout.is_pending() && !self.stderr.is_pending() => {
                Some(code)
            }
            _ => None,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended(_))
    }

    /// Whether the guest has yet to start the command.
    pub(crate) fn is_starting(&self) -> bool {
        matches!(self.state, State::Booting | State::Preparing)
    }

    /// Input is read once the command runs: before, a failure would lose it.
    pub(crate) fn wants_input(&self) -> bool {
        self.state == State::Running && self.stdin.is_wanted()
    }

    /// Bytes for the channel.
    pub(crate) fn outgoing(&self) -> &[u8] {
        &self.pending[self.sent..]
    }

    /// The channel has taken this much of [`Conversation::outgoing`].
    pub(crate) fn took(&mut self, count: usize) {
        self.sent += count;
        if self.sent == self.pending.len() {
            self.pending.clear();
            self.sent = 0;
        }
    }

    /// Passes a signal on to the command.
    pub(crate) fn signal(&mut self, number: u8) {
        self.say(&Frame::Signal(number));
    }

    /// Passes input on; call when there is some to read.
    pub(crate) fn read_input(&mut self) {
        let bytes = self.stdin.read_some();
        if !bytes.is_empty() {
            self.say(&Frame::Stdin(bytes));
        } else if self.stdin.is_closed() {
            self.say(&Frame::StdinEof);
        }
    }

    /// Passes output on; call when the stream can be written to.
    pub(crate) fn write_output(&mut self, stream: Stream) -> Result<(), Ending> {
        let (name, written) = match stream {
            Stream::Stderr => (self.stderr.name, self.stderr.write_some()),
            _ => (self.stdout.name, self.stdout.write_some()),
        };
        match written {
            Ok(Written::Credit(None)) => {}
            Ok(Written::Credit(Some(amount))) => self.say(&Frame::Credit(stream, amount)),
            Ok(Written::Closed) => self.say(&Frame::Closed(stream)),
            Err(source) => {
                return Err(Failure::Output {
                    stream: name,
                    source,
                }
                .into());
            }
        }
        Ok(())
    }

    /// Takes bytes from the guest and handles the frames they complete.
    pub(crate) fn receive(&mut self, bytes: &[u8], timing: &mut Timing) -> Result<(), Ending> {
        self.decoder.push(bytes);
        loop {
            match self.decoder.next_frame() {
                Ok(None) => return Ok(()),
                Ok(Some(frame)) => self.handle(frame, timing)?,
                Err(error) => return Err(Ending::Guest(error.to_string())),
            }
        }
    }

    fn say(&mut self, frame: &Frame) {
        frame.encode(Sender::Host, &mut self.pending);
    }

    fn handle(&mut self, frame: Frame, timing: &mut Timing) -> Result<(), Ending> {
        match (self.state, frame) {
            (State::Booting, Frame::Hello(VERSION)) => {
                timing.mark("kernel");
                self.state = State::Preparing;
            }
            (State::Booting, Frame::Hello(version)) => {
                return Err(Failure::Setup(format!(
                    "its first process speaks version {version} of the protocol instead of \
                     {VERSION}; `cargo xtask setup` makes the guest's files anew"
                ))
                .into());
            }
            (State::Preparing, Frame::Started { .. }) => {
                timing.mark("guest");
                self.state = State::Running;
            }
            (State::Running, Frame::Stdout(bytes)) => self.stdout.push(&bytes)?,
            (State::Running, Frame::Stderr(bytes)) => self.stderr.push(&bytes)?,
            (State::Running, Frame::Credit(_, amount)) => self.stdin.credit(amount)?,
            (State::Running, Frame::Closed(_)) => self.stdin.close(),
            (State::Running, Frame::Exit(report)) => {
                timing.mark("command");
                self.state = State::Ended(match report {
                    ExitReport::Code(code) => i32::from(code),
                    ExitReport::Signal {
                        signal,
                        out_of_memory,
                    } => {
                        if out_of_memory {
                            crate::report::warn(
                                "the command was killed: it used more memory than its --memory \
                                 limit",
                            );
                        }
                        128 + i32::from(signal)
                    }
                });
            }
            (State::Preparing | State::Running, Frame::Error(failure, text)) => {
                return Err(match failure {
                    GuestFailure::Setup => Failure::Setup(text),
                    GuestFailure::NotFound => Failure::NotFound(text),
                    GuestFailure::NotExecutable => Failure::NotExecutable(text),
                }
                .into());
            }
            (_, frame) => return Err(Ending::Guest(out_of_place(&frame))),
        }
        Ok(())
    }
}

fn out_of_place(frame: &Frame) -> String {
    let name = match frame {
        Frame::Hello(_) => "a greeting",
        Frame::Started { .. } => "a start",
        Frame::Stdout(_) | Frame::Stderr(_) => "output",
        Frame::Exit(_) => "an exit code",
        Frame::Error(..) => "an error",
        _ => "a frame",
    };
    format!("{name} at a time when it has no place")
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{PipeReader, PipeWriter},
    };

    use pericarp_protocol::{Disk, Limits, MAX_PAYLOAD, WINDOW};

    use super::*;

    type Tested = Conversation<PipeReader, PipeWriter, PipeWriter>;

    /// A conversation, and the other ends of its streams.
    fn begin() -> (Tested, PipeWriter, PipeReader, PipeReader) {
        let (stdin, input) = std::io::pipe().unwrap();
        let (output, stdout) = std::io::pipe().unwrap();
        let (errors, stderr) = std::io::pipe().unwrap();
        let spec = RunSpec {
            root: Disk {
                id: "root".into(),
                read_only: true,
            },
            disks: vec![],
            hostname: "h".into(),
            argv: vec!["true".into()],
            env: vec![],
            cwd: "/".into(),
            limits: Limits::default(),
        };
        let conversation = Conversation::begin(
            &spec,
            Input::new(stdin),
            Output::new(stdout, "standard output"),
            Output::new(stderr, "the error output"),
        )
        .unwrap();
        (conversation, input, output, errors)
    }

    fn say(conversation: &mut Tested, frame: &Frame) -> Result<(), String> {
        let mut bytes = Vec::new();
        frame.encode(Sender::Guest, &mut bytes);
        hear(conversation, &bytes)
    }

    fn hear(conversation: &mut Tested, bytes: &[u8]) -> Result<(), String> {
        conversation
            .receive(bytes, &mut Timing::begin())
            .map_err(|ending| match ending {
                Ending::Guest(what) => what,
                Ending::Failure(failure) => format!("failure: {failure}"),
            })
    }

    fn running() -> (Tested, PipeWriter, PipeReader, PipeReader) {
        let mut parts = begin();
        say(&mut parts.0, &Frame::Hello(VERSION)).unwrap();
        say(
            &mut parts.0,
            &Frame::Started {
                init_ms: 1,
                command_ms: 2,
            },
        )
        .unwrap();
        parts
    }

    #[test]
    fn a_good_guest_is_heard_to_the_end() {
        let (mut conversation, _input, _output, _errors) = running();
        say(&mut conversation, &Frame::Stdout(b"out".to_vec())).unwrap();
        say(&mut conversation, &Frame::Exit(ExitReport::Code(7))).unwrap();
        assert_eq!(conversation.result(), None, "its output comes first");
        conversation.write_output(Stream::Stdout).unwrap();
        assert_eq!(conversation.result(), Some(7));
    }

    #[test]
    fn a_flood_ends_at_the_window() {
        let (mut conversation, _input, _output, _errors) = running();
        let piece = Frame::Stdout(vec![b'x'; MAX_PAYLOAD]);
        for _ in 0..WINDOW as usize / MAX_PAYLOAD {
            say(&mut conversation, &piece).unwrap();
        }
        let error = say(&mut conversation, &Frame::Stdout(vec![b'x'])).unwrap_err();
        assert_eq!(error, "more output than it was allowed to send");
    }

    #[test]
    fn frames_out_of_place_end_the_conversation() {
        let before: [(Frame, &str); 4] = [
            (
                Frame::Stdout(vec![1]),
                "output at a time when it has no place",
            ),
            (
                Frame::Started {
                    init_ms: 0,
                    command_ms: 0,
                },
                "a start at a time",
            ),
            (Frame::Exit(ExitReport::Code(0)), "an exit code at a time"),
            (
                Frame::Hello(99),
                "failure: the guest could not be set up: its first process speaks",
            ),
        ];
        for (frame, message) in before {
            let error = say(&mut begin().0, &frame).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
        let during: [(Frame, &str); 3] = [
            (Frame::Hello(VERSION), "a greeting at a time"),
            (
                Frame::Started {
                    init_ms: 0,
                    command_ms: 0,
                },
                "a start at a time",
            ),
            (
                Frame::Credit(Stream::Stdin, 1),
                "credit for bytes that were never sent",
            ),
        ];
        for (frame, message) in during {
            let error = say(&mut running().0, &frame).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
        let (mut conversation, ..) = running();
        say(&mut conversation, &Frame::Exit(ExitReport::Code(0))).unwrap();
        let error = say(&mut conversation, &Frame::Exit(ExitReport::Code(1))).unwrap_err();
        assert!(error.starts_with("an exit code at a time"), "{error}");
        assert_eq!(conversation.result(), Some(0));
    }

    #[test]
    fn bytes_that_are_no_frames_end_the_conversation() {
        for (bytes, message) in [
            (&[0xff; 64][..], "a frame of unknown kind 0xff"),
            (b"HTTP/1.1 200 OK", "a frame of unknown kind 0x48"),
            (
                &[0x83, 0xff, 0xff, 0xff, 0xff],
                "a frame of kind 0x83 with an impossible length of",
            ),
            (&[0x01, 0, 0, 0, 0], "a frame of unknown kind 0x01"),
        ] {
            let error = hear(&mut running().0, bytes).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn input_goes_out_in_order_and_ends_once() {
        let (mut conversation, input, _output, _errors) = running();
        conversation.took(conversation.outgoing().len());
        rustix::io::write(&input, b"abc").unwrap();
        drop(input);
        conversation.read_input();
        conversation.read_input();
        assert!(!conversation.wants_input());
        assert_eq!(conversation.outgoing(), b"\x02\x03\0\0\0abc\x03\0\0\0\0");
        conversation.took(8);
        assert_eq!(conversation.outgoing(), b"\x03\0\0\0\0");
    }

    #[test]
    fn an_output_that_fails_is_named() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut output = Output::new(full, "standard output");
        output.push(b"x").unwrap();
        assert!(output.write_some().is_err());
    }
}
