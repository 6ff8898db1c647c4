//! vhost-user messages on the wire, back-end side.
//!
//! Own code rather than the `vhost` crate's handler: it must see who
//! disconnects and when, accept what User-mode Linux sends (a SET_MEM_TABLE
//! longer than its regions, pipes for descriptors), and wait for a message and
//! for the end of the program at once. Message layouts are the crate's.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, recvmsg, sendmsg,
};
use thiserror::Error;
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vm_memory::ByteValued;

use crate::handover::Meeting;
use pericarp_control::Stop;

/// More descriptors than any message may carry.
const MAX_FDS: usize = 32;
const HEADER_SIZE: usize = 12;

const FLAG_VERSION: u32 = 0x1;
const FLAG_VERSION_MASK: u32 = 0x3;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;

/// Why a session's connection ended.
#[derive(Debug, Error)]
pub(crate) enum ChannelError {
    /// The front end closed its end.
    #[error("the front end disconnected")]
    Closed,
    /// The program is ending.
    #[error("the program is ending")]
    Stopped,
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[source] std::io::Error),
    /// What arrived is not vhost-user.
    #[error("not a vhost-user message: {0}")]
    Malformed(&'static str),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// One message from the front end.
#[derive(Debug)]
pub(crate) struct Message {
    /// The raw request number; numbers nobody knows get a negative answer.
    pub(crate) code: u32,
    pub(crate) need_reply: bool,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// The request, where it is a known one.
    pub(crate) fn request(&self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.code).ok()
    }

    /// The payload's first bytes as a message body. What follows is padding.
    pub(crate) fn body<T: ByteValued>(&self) -> Option<T> {
        T::from_slice(self.payload.get(..size_of::<T>())?).copied()
    }

    /// As [`body`](Self::body), `offset` bytes in.
    pub(crate) fn body_at<T: ByteValued>(&self, offset: usize) -> Option<T> {
        let end = offset.checked_add(size_of::<T>())?;
        T::from_slice(self.payload.get(offset..end)?).copied()
    }
}

/// What there is between two messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Message,
    /// A new process wants the session.
    Summons,
}

/// The connection to one front end.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    stop: Stop,
}

impl Channel {
    pub(crate) fn new(stream: UnixStream, stop: Stop) -> Self {
        Self { stream, stop }
    }

    /// Sleeps until there is a message, or a new process asks for the session.
    pub(crate) fn next(&self, meeting: Option<&Meeting>) -> Result<Next, ChannelError> {
        loop {
            let mut fds = vec![
                PollFd::new(&self.stream, PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.event(), PollFlags::IN),
            ];
            fds.extend(meeting.map(|m| PollFd::from_borrowed_fd(m.summons(), PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) if !fds[1].revents().is_empty() => return Err(ChannelError::Stopped),
                Ok(_) if fds.get(2).is_some_and(|m| !m.revents().is_empty()) => {
                    return Ok(Next::Summons);
                }
                Ok(_) => return Ok(Next::Message),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The connection itself, for another process.
    pub(crate) fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    /// Waits for the next message.
    pub(crate) fn receive(&mut self) -> Result<Message, ChannelError> {
        let mut header = [0u8; HEADER_SIZE];
        let mut fds = Vec::new();
        let mut got = 0;
        while got < HEADER_SIZE {
            self.wait()?;
            got += self.receive_some(&mut header[got..], &mut fds)?;
        }
        let [code, flags, size] = [0, 4, 8].map(|at| {
            let bytes = header[at..].first_chunk().copied().unwrap_or_default();
            u32::from_ne_bytes(bytes)
        });
        if flags & FLAG_VERSION_MASK != FLAG_VERSION {
            return Err(ChannelError::Malformed("wrong protocol version"));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(ChannelError::Malformed("a reply where a request is due"));
        }
        if size as usize > MAX_MSG_SIZE {
            return Err(ChannelError::Malformed("payload longer than 4096 bytes"));
        }
        let mut payload = vec![0; size as usize];
        let mut got = 0;
        while got < payload.len() {
            self.wait()?;
            match self.stream.read(&mut payload[got..]) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(n) => got += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ChannelError::Io(e)),
            }
        }
        Ok(Message {
            code,
            need_reply: flags & FLAG_NEED_REPLY != 0,
            payload,
            fds,
        })
    }

    /// Sleeps until the socket is readable or the program ends.
    fn wait(&self) -> Result<(), ChannelError> {
        loop {
            let stop = self.stop.event();
            let mut fds = [
                PollFd::new(&self.stream, PollFlags::IN),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) if fds[1].revents().contains(PollFlags::IN) => {
                    return Err(ChannelError::Stopped);
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for nothing but the time, the end of the program, and the end of
    /// the front end; the last two are errors.
    pub(crate) fn pause(&self, time: Duration) -> Result<(), ChannelError> {
        let mut fds = [
            PollFd::new(&self.stream, PollFlags::RDHUP),
            PollFd::from_borrowed_fd(self.stop.event(), PollFlags::IN),
        ];
        let time = Timespec {
            tv_sec: time.as_secs() as i64,
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        match poll(&mut fds, Some(&time)) {
            Ok(_) if fds[1].revents().contains(PollFlags::IN) => Err(ChannelError::Stopped),
            Ok(_) if !fds[0].revents().is_empty() => Err(ChannelError::Closed),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn receive_some(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<usize, ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(buffer)];
            match recvmsg(
                &self.stream,
                &mut slices,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        if received.flags.contains(rustix::net::ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Err(ChannelError::Malformed("more than 32 descriptors"));
        }
        Ok(received.bytes)
    }

    /// Answers a request.
    pub(crate) fn reply(&mut self, code: u32, payload: &[u8]) -> Result<(), ChannelError> {
        self.reply_with(code, payload, None)
    }

    /// Answers a request, with a descriptor.
    pub(crate) fn reply_with(
        &mut self,
        code: u32,
        payload: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ChannelError> {
        let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
        for word in [code, FLAG_VERSION | FLAG_REPLY, payload.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        let mut sent = 0;
        while sent < bytes.len() {
            // A front end that does not read its answers must not hold up the
            // end of the program: wait for room and for the stop together.
            let mut fds = [
                PollFd::new(&self.stream, PollFlags::OUT),
                PollFd::from_borrowed_fd(self.stop.event(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) if fds[1].revents().contains(PollFlags::IN) => {
                    return Err(ChannelError::Stopped);
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // It goes with the first byte.
            let fds = fd.filter(|_| sent == 0).map(|fd| [fd]);
            if let Some(fds) = &fds {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let rest = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.stream, &rest, &mut control, flags) {
                Ok(n) => sent += n,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (UnixStream, Channel) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        (theirs, Channel::new(ours, Stop::new().unwrap()))
    }

    fn header(code: u32, flags: u32, size: u32) -> Vec<u8> {
        [code, flags, size]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect()
    }

    #[test]
    fn message_arrives_in_pieces() {
        let (mut theirs, mut channel) = pair();
        let mut bytes = header(2, 0x9, 8);
        bytes.extend_from_slice(&7u64.to_ne_bytes());
        let sender = std::thread::spawn(move || {
            for byte in bytes {
                theirs.write_all(&[byte]).unwrap();
            }
            theirs
        });
        let message = channel.receive().unwrap();
        assert_eq!(message.request(), Some(FrontendReq::SET_FEATURES));
        assert!(message.need_reply);
        assert_eq!(message.payload, 7u64.to_ne_bytes());
        drop(sender.join().unwrap());
        assert!(matches!(channel.receive(), Err(ChannelError::Closed)));
    }

    #[test]
    fn bad_headers_are_malformed() {
        for bytes in [header(1, 0, 0), header(1, 0x5, 0), header(1, 1, 4097)] {
            let (mut theirs, mut channel) = pair();
            theirs.write_all(&bytes).unwrap();
            assert!(matches!(channel.receive(), Err(ChannelError::Malformed(_))));
        }
    }

    #[test]
    fn a_stop_request_interrupts_the_wait() {
        let (_theirs, mut channel) = pair();
        channel.stop.request();
        assert!(matches!(channel.receive(), Err(ChannelError::Stopped)));
    }

    #[test]
    fn bodies_need_their_bytes_and_ignore_more() {
        let message = Message {
            code: 99,
            need_reply: false,
            payload: vec![1, 0, 0, 0, 2, 0, 0, 0, 3],
            fds: Vec::new(),
        };
        assert_eq!(message.body::<u64>(), Some(0x2_0000_0001));
        assert_eq!(message.body_at::<u32>(4), Some(2));
        assert_eq!(message.body_at::<u64>(4), None);
        assert_eq!(message.body_at::<u64>(usize::MAX), None);
        assert_eq!(message.request(), None);
    }
}
