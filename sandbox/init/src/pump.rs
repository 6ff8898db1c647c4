//! Moves bytes between the command's pipes and the host until the command has ended and all of its
//! output is delivered.
//!
//! One loop over `poll`, without threads. Memory is bounded: input by the window the host has, and
//! output by [`QUEUE`]; a slow host makes the command wait, and nothing is dropped. Called by
//! `main` once the command runs.

use std::os::fd::{AsFd, OwnedFd};

use pericarp_protocol::{ExitReport, Frame, MAX_PAYLOAD, ReceiveWindow, SendWindow, Stream};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    channel::Channel,
    command::{self, Command},
    error::{InitError, during},
};

/// No more output is read while this much waits for the port.
const QUEUE: usize = 128 * 1024;
/// How often orphaned processes are collected when nothing else happens.
const TICK: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

struct Input {
    pipe: Option<OwnedFd>,
    waiting: Vec<u8>,
    at_end: bool,
    window: ReceiveWindow,
}

struct Output {
    stream: Stream,
    pipe: Option<OwnedFd>,
    window: SendWindow,
}

/// Runs until the command has ended and the channel has taken all output.
pub(crate) fn run(channel: &mut Channel, mut command: Command) -> Result<ExitReport, InitError> {
    let mut input = Input {
        pipe: command.stdin.take(),
        waiting: Vec::new(),
        at_end: false,
        window: ReceiveWindow::default(),
    };
    let mut outputs = [
        Output {
            stream: Stream::Stdout,
            pipe: command.stdout.take(),
            window: SendWindow::default(),
        },
        Output {
            stream: Stream::Stderr,
            pipe: command.stderr.take(),
            window: SendWindow::default(),
        },
    ];
    loop {
        if let Some(report) = command.ended() {
            input.close(channel, false);
            if outputs.iter().all(|output| output.pipe.is_none()) && channel.queued() == 0 {
                return Ok(report);
            }
        }
        wait(channel, &command, &input, &outputs)?;
        // Each of these does nothing when its descriptor is not ready.
        channel.write_some()?;
        channel.read_some()?;
        while let Some(frame) = channel.next_frame()? {
            handle(frame, &command, &mut input, &mut outputs)?;
        }
        input.write_some(channel);
        for output in &mut outputs {
            output.read_some(channel)?;
        }
        let before = command.ended();
        command.reap();
        if before.is_none() && command.ended().is_some() {
            // Like a container, the run is over with its first process: what it left behind
            // ends, and with it the last writers of the pipes.
            command::kill_all();
        }
    }
}

fn wait(
    channel: &Channel,
    command: &Command,
    input: &Input,
    outputs: &[Output; 2],
) -> Result<(), InitError> {
    let mut fds = vec![PollFd::new(channel, channel.interest())];
    if command.ended().is_none() {
        fds.push(PollFd::new(&command.pidfd, PollFlags::IN));
    }
    if let Some(pipe) = &input.pipe {
        // Without bytes to write only the end of the reader is of interest.
        let events = if input.waiting.is_empty() {
            PollFlags::empty()
        } else {
            PollFlags::OUT
        };
        fds.push(PollFd::new(pipe, events));
    }
    for output in outputs {
        if let Some(pipe) = &output.pipe
            && output.may_send(channel)
        {
            fds.push(PollFd::new(pipe, PollFlags::IN));
        }
    }
    match poll(&mut fds, Some(&TICK)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(during("waiting for the command")(error)),
    }
}

fn handle(
    frame: Frame,
    command: &Command,
    input: &mut Input,
    outputs: &mut [Output; 2],
) -> Result<(), InitError> {
    match frame {
        Frame::Stdin(bytes) => {
            input.window.received(bytes.len())?;
            if input.pipe.is_some() {
                input.waiting.extend_from_slice(&bytes);
            }
        }
        Frame::StdinEof => input.at_end = true,
        Frame::Signal(number) => command.signal(number),
        Frame::Credit(stream, amount) => {
            if let Some(output) = outputs.iter_mut().find(|output| output.stream == stream) {
                output.window.credit(amount)?;
            }
        }
        Frame::Closed(stream) => {
            // The command's next write fails as it would in a shell's pipeline.
            if let Some(output) = outputs.iter_mut().find(|output| output.stream == stream) {
                output.pipe = None;
            }
        }
        _ => return Err(InitError::Unexpected),
    }
    Ok(())
}

impl Input {
    fn write_some(&mut self, channel: &mut Channel) {
        let Some(pipe) = &self.pipe else { return };
        let mut taken = 0;
        let gone = loop {
            if taken == self.waiting.len() {
                // An empty poll shows whether the reader has gone.
                break self.at_end || reader_gone(pipe);
            }
            match rustix::io::write(pipe, &self.waiting[taken..]) {
                Ok(count) => taken += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break false,
                Err(_) => break true,
            }
        };
        self.waiting.drain(..taken);
        if let Some(credit) = self.window.taken(taken) {
            channel.send(&Frame::Credit(Stream::Stdin, credit));
        }
        if gone {
            self.close(channel, !self.at_end || !self.waiting.is_empty());
        }
    }

    /// Closes the command's input; the host is told when it might still send.
    fn close(&mut self, channel: &mut Channel, tell: bool) {
        if self.pipe.take().is_some() && tell {
            channel.send(&Frame::Closed(Stream::Stdin));
        }
        self.waiting = Vec::new();
    }
}

/// Whether nobody has the other end of this pipe open any more.
fn reader_gone(pipe: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&pipe, PollFlags::empty())];
    matches!(
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0
            })
        ),
        Ok(1)
    ) && fds[0].revents().contains(PollFlags::ERR)
}

impl Output {
    fn may_send(&self, channel: &Channel) -> bool {
        self.window.left() > 0 && channel.queued() < QUEUE
    }

    fn read_some(&mut self, channel: &mut Channel) -> Result<(), InitError> {
        let Some(pipe) = &self.pipe else {
            return Ok(());
        };
        if !self.may_send(channel) {
            return Ok(());
        }
        let mut buffer = vec![0; MAX_PAYLOAD.min(self.window.left())];
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => self.pipe = None,
            Ok(count) => {
                buffer.truncate(count);
                self.window.sent(count);
                channel.send(&match self.stream {
                    Stream::Stderr => Frame::Stderr(buffer),
                    _ => Frame::Stdout(buffer),
                });
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(during("reading the command's output")(error)),
        }
        Ok(())
    }
}
