//! The conversation with the guest, from its first frame to the command's exit code.
//!
//! One loop over `poll` for the channel, our standard streams, our signals, and the ends of the
//! machine and its backend. The guest is hostile: every frame is checked against what it may say at
//! that point, and the memory it can make us use is bounded by the windows of its streams.

use std::{
    io::{self, Stderr, Stdin, Stdout},
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use pericarp_hypervisor::{Machine, MachineError};
use pericarp_protocol::{
    Decoder, ExitReport, Failure as GuestFailure, Frame, PORT_NAME, RunSpec, Sender, Stream,
    VERSION,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    failure::{Failure, during},
    report::Timing,
    signals::Signals,
    vm::{
        backend::Backend,
        streams::{Input, Output, Written},
    },
};

/// Why a session ended without an exit code. The caller adds what it knows of the machine.
#[derive(Debug)]
pub(crate) enum Ending {
    Failure(Failure),
    Machine(MachineError),
    Guest(String),
}

impl From<Failure> for Ending {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// How far the guest has come; decides which frames it may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing heard yet.
    Booting,
    /// It has the description of the run.
    Preparing,
    /// The command runs.
    Running,
    /// The command has ended with this code; only our own output may still be on its way.
    Ended(i32),
}

pub(crate) struct Session<'a> {
    machine: &'a mut Machine,
    backend: &'a mut Backend,
    signals: &'a mut Signals,
    timing: &'a mut Timing,
    channel: UnixStream,
    decoder: Decoder,
    /// Encoded frames that the channel has not taken yet.
    pending: Vec<u8>,
    written: usize,
    stdin: Input<Stdin>,
    stdout: Output<Stdout>,
    stderr: Output<Stderr>,
    state: State,
}

/// What `poll` found ready.
#[derive(Debug, Default)]
struct Ready {
    channel: bool,
    machine: bool,
    backend: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl<'a> Session<'a> {
    pub(crate) fn new(
        machine: &'a mut Machine,
        backend: &'a mut Backend,
        signals: &'a mut Signals,
        timing: &'a mut Timing,
    ) -> Result<Self, Ending> {
        let channel = machine.take_channel(PORT_NAME).ok_or_else(|| {
            during("the channel to the guest")(io::Error::from(io::ErrorKind::NotFound))
        })?;
        channel
            .set_nonblocking(true)
            .map_err(during("the channel to the guest"))?;
        Ok(Self {
            machine,
            backend,
            signals,
            timing,
            channel,
            decoder: Decoder::new(Sender::Guest),
            pending: Vec::new(),
            written: 0,
            stdin: Input::new(io::stdin()),
            stdout: Output::new(io::stdout(), "standard output"),
            stderr: Output::new(io::stderr(), "the error output"),
            state: State::Booting,
        })
    }

    /// Runs to the end of the command and returns its exit code. `boot` says when and after how
    /// long a guest that has not started its command is given up.
    pub(crate) fn run(mut self, spec: &RunSpec, boot: (Instant, Duration)) -> Result<i32, Ending> {
        let frames = spec
            .frames()
            .map_err(|error| Failure::Setup(error.to_string()))?;
        for frame in frames {
            self.send(&frame);
        }
        loop {
            if let State::Ended(code) = self.state
                && !self.stdout.is_pending()
                && !self.stderr.is_pending()
            {
                return Ok(code);
            }
            let ready = self.wait(boot)?;
            self.take_signals()?;
            if ready.stdout {
                Self::write_output(&mut self.stdout, Stream::Stdout, &mut self.pending)?;
            }
            if ready.stderr {
                Self::write_output(&mut self.stderr, Stream::Stderr, &mut self.pending)?;
            }
            if matches!(self.state, State::Ended(_)) {
                continue;
            }
            if ready.stdin {
                self.read_input();
            }
            let open = self.move_channel(ready.channel)?;
            if ready.backend
                && !matches!(self.state, State::Ended(_))
                && let Some(failure) = self.backend.death()
            {
                return Err(failure.into());
            }
            // What the guest still said before its end has been read by now.
            if (!open || ready.machine) && !matches!(self.state, State::Ended(_)) {
                return Err(self.lost(open));
            }
        }
    }

    /// The machine or its channel has gone without an exit code.
    fn lost(&mut self, open: bool) -> Ending {
        if open {
            // The machine has ended, and bytes may still be in the socket.
            while let Ok(true) = self.read_channel() {
                if matches!(self.state, State::Ended(_)) {
                    break;
                }
            }
        }
        let error = self.machine.death();
        // A killed group of processes loses the backend too; then that is not the cause.
        match (&error, self.backend.death()) {
            (MachineError::PoweredOff, Some(failure)) => failure.into(),
            _ => Ending::Machine(error),
        }
    }

    fn wait(&mut self, (deadline, limit): (Instant, Duration)) -> Result<Ready, Ending> {
        let booting = matches!(self.state, State::Booting | State::Preparing);
        let left = deadline.saturating_duration_since(Instant::now());
        if booting && left.is_zero() {
            return Err(Ending::Machine(MachineError::BootTimeout(limit)));
        }
        let timeout = booting.then_some(Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        let ended = matches!(self.state, State::Ended(_));
        let channel_events = match (ended, self.written < self.pending.len()) {
            (true, _) => PollFlags::empty(),
            (false, true) => PollFlags::IN | PollFlags::OUT,
            (false, false) => PollFlags::IN,
        };
        let when = |condition: bool, events| {
            if condition {
                events
            } else {
                PollFlags::empty()
            }
        };
        let (machine_exit, backend_exit) = (self.machine.exit_fd(), self.backend.exit_fd());
        // Input is read once the command runs: before, a signal or a failure would lose it.
        let wants_input = self.state == State::Running && self.stdin.is_wanted();
        let mut fds = vec![
            PollFd::new(&*self.signals, PollFlags::IN),
            PollFd::new(&self.channel, channel_events),
            PollFd::new(&machine_exit, when(!ended, PollFlags::IN)),
            PollFd::new(&backend_exit, when(!ended, PollFlags::IN)),
        ];
        // Left out when not wanted: an end that nobody waits for would wake the loop for ever.
        let mut optional = Vec::new();
        if wants_input {
            optional.push((fds.len(), Stream::Stdin));
            fds.push(PollFd::new(&self.stdin, PollFlags::IN));
        }
        if self.stdout.is_pending() {
            optional.push((fds.len(), Stream::Stdout));
            fds.push(PollFd::new(&self.stdout, PollFlags::OUT));
        }
        if self.stderr.is_pending() {
            optional.push((fds.len(), Stream::Stderr));
            fds.push(PollFd::new(&self.stderr, PollFlags::OUT));
        }
        if ended {
            // Hang-ups are reported whatever is asked for; nothing of these matters any more.
            fds.drain(1..4);
            for (at, _) in &mut optional {
                *at -= 3;
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(during("waiting for the guest")(error).into()),
        }
        let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let mut ready = Ready::default();
        if !ended {
            ready.channel = is_ready(1);
            ready.machine = is_ready(2);
            ready.backend = is_ready(3);
        }
        for (at, stream) in optional {
            match stream {
                Stream::Stdin => ready.stdin = is_ready(at),
                Stream::Stdout => ready.stdout = is_ready(at),
                Stream::Stderr => ready.stderr = is_ready(at),
            }
        }
        Ok(ready)
    }

    fn take_signals(&mut self) -> Result<(), Ending> {
        if self.state == State::Running {
            while let Some(signal) = self.signals.next() {
                if self.signals.insists(signal) {
                    return Err(Failure::Signal(signal).into());
                }
                self.send(&Frame::Signal(signal));
            }
            return Ok(());
        }
        Ok(self.signals.check()?)
    }

    fn read_input(&mut self) {
        let bytes = self.stdin.read_some();
        if !bytes.is_empty() {
            self.send(&Frame::Stdin(bytes));
        } else if self.stdin.is_closed() {
            self.send(&Frame::StdinEof);
        }
    }

    fn write_output<T: AsFd>(
        output: &mut Output<T>,
        stream: Stream,
        pending: &mut Vec<u8>,
    ) -> Result<(), Ending> {
        let name = output.name;
        let frame = match output.write_some() {
            Ok(Written::Credit(None)) => return Ok(()),
            Ok(Written::Credit(Some(amount))) => Frame::Credit(stream, amount),
            Ok(Written::Closed) => Frame::Closed(stream),
            Err(source) => {
                return Err(Failure::Output {
                    stream: name,
                    source,
                }
                .into());
            }
        };
        frame.encode(Sender::Host, pending);
        Ok(())
    }

    fn send(&mut self, frame: &Frame) {
        frame.encode(Sender::Host, &mut self.pending);
    }

    /// Writes what the channel takes and reads what it has. Returns whether it is still open.
    fn move_channel(&mut self, readable: bool) -> Result<bool, Ending> {
        while self.written < self.pending.len() {
            match rustix::io::write(&self.channel, &self.pending[self.written..]) {
                Ok(count) => self.written += count,
                Err(Errno::AGAIN | Errno::INTR) => break,
                // The machine has gone; its last words may still be there to be read.
                Err(_) => {
                    self.written = self.pending.len();
                }
            }
        }
        if self.written == self.pending.len() {
            self.pending.clear();
            self.written = 0;
        }
        if readable {
            self.read_channel()
        } else {
            Ok(true)
        }
    }

    /// Reads once and handles what is complete.
    fn read_channel(&mut self) -> Result<bool, Ending> {
        let mut buffer = [0; 16 * 1024];
        let count = match rustix::io::read(&self.channel, &mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
            Err(_) => return Ok(false),
        };
        self.decoder.push(&buffer[..count]);
        loop {
            match self.decoder.next_frame() {
                Ok(None) => return Ok(true),
                Ok(Some(frame)) => self.handle(frame)?,
                Err(error) => return Err(Ending::Guest(error.to_string())),
            }
        }
    }

    fn handle(&mut self, frame: Frame) -> Result<(), Ending> {
        let window = |error: pericarp_protocol::WindowError| Ending::Guest(error.to_string());
        match (self.state, frame) {
            (State::Booting, Frame::Hello(VERSION)) => {
                self.timing.mark("kernel");
                self.state = State::Preparing;
            }
            (State::Booting, Frame::Hello(version)) => {
                return Err(Ending::Guest(format!(
                    "protocol version {version} instead of {VERSION}; `cargo xtask setup` makes \
                     the guest's files anew"
                )));
            }
            (State::Preparing, Frame::Started { .. }) => {
                self.timing.mark("guest");
                self.state = State::Running;
            }
            (State::Running, Frame::Stdout(bytes)) => self.stdout.push(&bytes).map_err(window)?,
            (State::Running, Frame::Stderr(bytes)) => self.stderr.push(&bytes).map_err(window)?,
            (State::Running, Frame::Credit(_, amount)) => {
                self.stdin.credit(amount).map_err(window)?;
            }
            (State::Running, Frame::Closed(_)) => self.stdin.close(),
            (State::Running, Frame::Exit(report)) => {
                self.timing.mark("command");
                if let ExitReport::Signal {
                    out_of_memory: true,
                    ..
                } = report
                {
                    crate::report::warn(
                        "the command was killed: it used more memory than its --memory limit",
                    );
                }
                self.state = State::Ended(match report {
                    ExitReport::Code(code) => i32::from(code),
                    ExitReport::Signal { signal, .. } => 128 + i32::from(signal),
                });
            }
            (State::Preparing | State::Running, Frame::Error(failure, text)) => {
                return Err(Ending::Failure(match failure {
                    GuestFailure::Setup => Failure::Setup(text),
                    GuestFailure::NotFound => Failure::NotFound(text),
                    GuestFailure::NotExecutable => Failure::NotExecutable(text),
                }));
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
