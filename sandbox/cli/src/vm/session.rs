//! Waits for everything a running machine can bring: the guest's frames, our own streams and
//! signals, the ends of the machine and its backend, and the time the boot may take.
//!
//! One loop over `poll`; what is said is `conversation`'s business. Called by `vm::run` with a
//! machine that has just been started.

use std::{
    io::{self, Stderr, Stdin, Stdout},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use pericarp_hypervisor::{Machine, MachineError};
use pericarp_protocol::{PORT_NAME, RunSpec, Stream};
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
        conversation::{self, Conversation, State},
        streams::{Input, Output},
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

impl From<conversation::Ending> for Ending {
    fn from(ending: conversation::Ending) -> Self {
        match ending {
            conversation::Ending::Failure(failure) => Self::Failure(failure),
            conversation::Ending::Guest(what) => Self::Guest(what),
        }
    }
}

/// When and after how long a guest that has not started its command is given up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BootLimit {
    pub(crate) deadline: Instant,
    pub(crate) limit: Duration,
}

pub(crate) struct Session<'a> {
    machine: &'a mut Machine,
    backend: &'a mut Backend,
    signals: &'a mut Signals,
    timing: &'a mut Timing,
    channel: UnixStream,
    conversation: Conversation<Stdin, Stdout, Stderr>,
}

/// What there is to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signals,
    Channel,
    Machine,
    Backend,
    Stream(Stream),
}

impl<'a> Session<'a> {
    pub(crate) fn new(
        machine: &'a mut Machine,
        backend: &'a mut Backend,
        signals: &'a mut Signals,
        timing: &'a mut Timing,
        spec: &RunSpec,
    ) -> Result<Self, Ending> {
        let channel = machine.take_channel(PORT_NAME).ok_or_else(|| {
            during("the channel to the guest")(io::Error::from(io::ErrorKind::NotFound))
        })?;
        channel
            .set_nonblocking(true)
            .map_err(during("the channel to the guest"))?;
        let conversation = Conversation::begin(
            spec,
            Input::new(io::stdin()),
            Output::new(io::stdout(), "standard output"),
            Output::new(io::stderr(), "the error output"),
        )?;
        Ok(Self {
            machine,
            backend,
            signals,
            timing,
            channel,
            conversation,
        })
    }

    /// Runs to the end of the command and returns its exit code.
    pub(crate) fn run(mut self, boot: BootLimit) -> Result<i32, Ending> {
        loop {
            if let Some(code) = self.conversation.result() {
                return Ok(code);
            }
            let ready = self.wait(boot)?;
            self.take_signals()?;
            for stream in [Stream::Stdout, Stream::Stderr] {
                if ready.contains(&Source::Stream(stream)) {
                    self.conversation.write_output(stream)?;
                }
            }
            if self.conversation.has_ended() {
                continue;
            }
            if ready.contains(&Source::Stream(Stream::Stdin)) {
                self.conversation.read_input();
            }
            self.write_channel();
            let open = !ready.contains(&Source::Channel) || self.read_channel()?;
            // What the guest said before its end has been read by now.
            if self.conversation.has_ended() {
                continue;
            }
            if ready.contains(&Source::Backend)
                && let Some(failure) = self.backend.death()
            {
                return Err(failure.into());
            }
            if !open || ready.contains(&Source::Machine) {
                while open && self.read_channel()? {
                    if self.conversation.has_ended() {
                        break;
                    }
                }
                if !self.conversation.has_ended() {
                    return Err(self.lost());
                }
            }
        }
    }

    /// The machine or its channel has gone without an exit code.
    fn lost(&mut self) -> Ending {
        let error = self.machine.death();
        // A machine may end in good order because its backend did not.
        match (&error, self.backend.death()) {
            (MachineError::PoweredOff, Some(failure)) => failure.into(),
            _ => Ending::Machine(error),
        }
    }

    /// Waits until something is ready, and says what.
    fn wait(&mut self, boot: BootLimit) -> Result<Vec<Source>, Ending> {
        let conversation = &self.conversation;
        let left = boot.deadline.saturating_duration_since(Instant::now());
        if conversation.is_starting() && left.is_zero() {
            return Err(Ending::Machine(MachineError::BootTimeout(boot.limit)));
        }
        let timeout = conversation.is_starting().then_some(Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        let (machine_exit, backend_exit) = (self.machine.exit_fd(), self.backend.exit_fd());
        // What is of no interest is left out, because a hang-up would wake the loop for ever.
        let mut sources = vec![Source::Signals];
        let mut fds = vec![PollFd::new(&*self.signals, PollFlags::IN)];
        if !conversation.has_ended() {
            let events = if conversation.outgoing().is_empty() {
                PollFlags::IN
            } else {
                PollFlags::IN | PollFlags::OUT
            };
            sources.extend([Source::Channel, Source::Machine, Source::Backend]);
            fds.push(PollFd::new(&self.channel, events));
            fds.push(PollFd::new(&machine_exit, PollFlags::IN));
            fds.push(PollFd::new(&backend_exit, PollFlags::IN));
        }
        if conversation.wants_input() {
            sources.push(Source::Stream(Stream::Stdin));
            fds.push(PollFd::new(&conversation.stdin, PollFlags::IN));
        }
        if conversation.stdout.is_pending() {
            sources.push(Source::Stream(Stream::Stdout));
            fds.push(PollFd::new(&conversation.stdout, PollFlags::OUT));
        }
        if conversation.stderr.is_pending() {
            sources.push(Source::Stream(Stream::Stderr));
            fds.push(PollFd::new(&conversation.stderr, PollFlags::OUT));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(during("waiting for the guest")(error).into()),
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(sources
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| is_ready(fd))
            .map(|(s, _)| s)
            .collect())
    }

    fn take_signals(&mut self) -> Result<(), Ending> {
        if self.conversation.state != State::Running {
            return Ok(self.signals.check()?);
        }
        while let Some(signal) = self.signals.next() {
            if self.signals.insists(signal) {
                return Err(Failure::Signal(signal).into());
            }
            self.conversation.signal(signal);
        }
        Ok(())
    }

    /// Writes what the channel takes now.
    fn write_channel(&mut self) {
        while !self.conversation.outgoing().is_empty() {
            match rustix::io::write(&self.channel, self.conversation.outgoing()) {
                Ok(count) => self.conversation.took(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // The machine has gone; its last words may still be there to be read.
                Err(_) => {
                    let all = self.conversation.outgoing().len();
                    self.conversation.took(all);
                }
            }
        }
    }

    /// Reads once. False at the end of the channel.
    fn read_channel(&mut self) -> Result<bool, Ending> {
        let mut buffer = [0; 16 * 1024];
        match rustix::io::read(&self.channel, &mut buffer) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.conversation.receive(&buffer[..count], self.timing)?;
                Ok(true)
            }
            Err(Errno::INTR) => Ok(true),
            Err(Errno::AGAIN) => Ok(!self.machine.has_ended()),
            Err(_) => Ok(false),
        }
    }
}
