//! The control channel: the virtio-serial port that carries frames to and from the host.
//!
//! Used by `main` for the first and the last frames, and by the pump in between. Never blocks
//! except in [`Channel::receive_spec`] and [`Channel::flush`], whose business is to wait.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use pericarp_protocol::{Decoder, Frame, PORT_NAME, RunSpec, Sender, spec::MAX_SPEC};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::error::{InitError, during};

/// The port's name arrives shortly after its device.
const PORT_TRIES: u32 = 1000;
const PORT_PAUSE: Duration = Duration::from_millis(10);

pub(crate) struct Channel {
    port: OwnedFd,
    decoder: Decoder,
    /// Encoded frames that the port has not taken yet.
    pending: Vec<u8>,
    written: usize,
}

impl Channel {
    /// Finds the port by its name and opens it.
    pub(crate) fn open() -> Result<Self, InitError> {
        for _ in 0..PORT_TRIES {
            if let Some(device) = find_port() {
                let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let port = rustix::fs::open(format!("/dev/{device}"), flags, Mode::empty())
                    .map_err(during("the host's channel cannot be opened"))?;
                let decoder = Decoder::new(Sender::Host);
                return Ok(Self {
                    port,
                    decoder,
                    pending: Vec::new(),
                    written: 0,
                });
            }
            std::thread::sleep(PORT_PAUSE);
        }
        Err(InitError::NoChannel)
    }

    /// Queues a frame.
    pub(crate) fn send(&mut self, frame: &Frame) {
        frame.encode(Sender::Guest, &mut self.pending);
    }

    /// Bytes queued and not yet taken by the port.
    pub(crate) fn queued(&self) -> usize {
        self.pending.len() - self.written
    }

    /// What to wait for at [`Channel::as_fd`].
    pub(crate) fn interest(&self) -> PollFlags {
        if self.queued() > 0 {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        }
    }

    /// Writes what the port takes now.
    pub(crate) fn write_some(&mut self) -> Result<(), InitError> {
        while self.queued() > 0 {
            match rustix::io::write(&self.port, &self.pending[self.written..]) {
                Ok(count) => self.written += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::NODEV) => return Err(InitError::HostGone),
                Err(error) => return Err(during("writing to the host")(error)),
            }
        }
        self.pending.clear();
        self.written = 0;
        Ok(())
    }

    /// Reads once. Frames are then taken with [`Channel::next_frame`] until there are no more.
    pub(crate) fn read_some(&mut self) -> Result<(), InitError> {
        let mut buffer = [0; 16 * 1024];
        match rustix::io::read(&self.port, &mut buffer) {
            Ok(0) => Err(InitError::HostGone),
            Ok(count) => {
                self.decoder.push(&buffer[..count]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(during("reading from the host")(error)),
        }
    }

    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, InitError> {
        Ok(self.decoder.next_frame()?)
    }

    /// Waits for the description of the run.
    pub(crate) fn receive_spec(&mut self) -> Result<RunSpec, InitError> {
        let mut bytes = Vec::new();
        loop {
            while let Some(frame) = self.next_frame()? {
                match frame {
                    Frame::Spec(part) if part.is_empty() => {
                        return Ok(RunSpec::from_bytes(&bytes)?);
                    }
                    Frame::Spec(part) if bytes.len() + part.len() <= MAX_SPEC => {
                        bytes.extend_from_slice(&part);
                    }
                    _ => return Err(InitError::Unexpected),
                }
            }
            self.wait()?;
            self.write_some()?;
            self.read_some()?;
        }
    }

    /// Waits until the host has taken everything.
    pub(crate) fn flush(&mut self) -> Result<(), InitError> {
        loop {
            self.write_some()?;
            if self.queued() == 0 {
                return Ok(());
            }
            // Only for the port to take more: what the host still says has no meaning now.
            let mut fds = [PollFd::new(&self.port, PollFlags::OUT)];
            poll_ignoring_signals(&mut fds)?;
        }
    }

    fn wait(&self) -> Result<(), InitError> {
        poll_ignoring_signals(&mut [PollFd::new(&self.port, self.interest())])
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

fn poll_ignoring_signals(fds: &mut [PollFd<'_>]) -> Result<(), InitError> {
    match poll(fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(during("waiting for the host")(error)),
    }
}

/// Device name of the port that the host called [`PORT_NAME`].
fn find_port() -> Option<String> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let name = fs::read_to_string(entry.path().join("name")).ok()?;
            (name.trim() == PORT_NAME).then(|| entry.file_name().to_string_lossy().into_owned())
        })
}
