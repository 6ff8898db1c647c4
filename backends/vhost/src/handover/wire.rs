//! What two processes say to each other during a hand-over: JSON with a length
//! before it, and descriptors beside it. Both sides' halves call it.
//!
//! Nothing waits without a limit, and whoever waits sees the other side end.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use rustix::process::Uid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::HandOverError;

/// SCM_MAX_FD of the kernel: the most descriptors of one message.
pub(super) const MAX_FDS: usize = 253;
/// Length and number of descriptors, both little-endian.
const HEADER: usize = 8;
/// Far more than 64 queues and 32 regions take.
const LONGEST: usize = 256 * 1024;
/// As on the control socket.
const LONGEST_LINE: usize = 16 * 1024;
/// How long the other side may leave what we send unread.
const SENDING: Duration = Duration::from_secs(2);

/// The connection between the two processes.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    /// Readable when the program is to end; that ends every wait.
    stop: Option<OwnedFd>,
    /// Descriptors that may come with a message.
    most_fds: usize,
}

impl Wire {
    /// No message that comes may have more than `most_fds` descriptors.
    pub(super) fn new(
        stream: UnixStream,
        stop: Option<OwnedFd>,
        most_fds: usize,
    ) -> Result<Self, HandOverError> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            stop,
            most_fds,
        })
    }

    /// The next waits are for the other side alone.
    pub(super) fn ignore_the_end(&mut self) {
        self.stop = None;
    }

    /// Refuses a peer of another user: state and descriptors are believed.
    pub(super) fn check_peer(&self, own: Uid) -> Result<(), HandOverError> {
        let peer = sockopt::socket_peercred(&self.stream)?;
        if peer.uid == own {
            Ok(())
        } else {
            Err(HandOverError::Stranger(peer.uid.as_raw()))
        }
    }

    /// Sends one message.
    pub(super) fn send(
        &self,
        body: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), HandOverError> {
        let body = serde_json::to_vec(body).map_err(|_| HandOverError::Malformed)?;
        if body.len() > LONGEST || fds.len() > MAX_FDS {
            return Err(HandOverError::Malformed);
        }
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(fds.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        self.send_bytes(&bytes, fds)
    }

    /// Sends a line of the control socket's own form.
    pub(super) fn send_line(&self, line: &str) -> Result<(), HandOverError> {
        self.send_bytes(format!("{line}\n").as_bytes(), &[])
    }

    fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), HandOverError> {
        let end = Instant::now() + SENDING;
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // They go with the first byte.
            if sent == 0 && !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let rest = [IoSlice::new(&bytes[sent..])];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.stream, &rest, &mut control, flags) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, end)?,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(HandOverError::Gone),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Waits for one message.
    pub(super) fn receive<T: DeserializeOwned>(
        &self,
        limit: Duration,
    ) -> Result<(T, Vec<OwnedFd>), HandOverError> {
        let end = Instant::now() + limit;
        let mut header = [0; HEADER];
        let mut fds = Vec::new();
        self.fill(&mut header, &mut fds, self.most_fds, end)?;
        let [length, count] = [0, 4].map(|at| {
            let bytes = header[at..].first_chunk().copied().unwrap_or_default();
            u32::from_le_bytes(bytes) as usize
        });
        if length > LONGEST || count != fds.len() {
            return Err(HandOverError::Malformed);
        }
        let mut body = vec![0; length];
        self.fill(&mut body, &mut Vec::new(), 0, end)?;
        let body = serde_json::from_slice(&body).map_err(|_| HandOverError::Malformed)?;
        Ok((body, fds))
    }

    /// Waits for a line of the control socket's own form.
    pub(super) fn receive_line(&self, limit: Duration) -> Result<Vec<u8>, HandOverError> {
        let end = Instant::now() + limit;
        let mut line = Vec::new();
        let mut byte = [0];
        // One at a time: what follows the line is not ours to read.
        while line.len() < LONGEST_LINE {
            self.fill(&mut byte, &mut Vec::new(), 0, end)?;
            if byte == *b"\n" {
                return Ok(line);
            }
            line.extend_from_slice(&byte);
        }
        Err(HandOverError::Malformed)
    }

    fn fill(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        most_fds: usize,
        end: Instant,
    ) -> Result<(), HandOverError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut got = 0;
        while got < buffer.len() {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut buffer[got..])];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let received = match recvmsg(&self.stream, &mut slices, &mut control, flags) {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::IN, end)?;
                    continue;
                }
                Err(Errno::CONNRESET) => return Err(HandOverError::Gone),
                Err(errno) => return Err(errno.into()),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if received.bytes == 0 {
                return Err(HandOverError::Gone);
            }
            // Each byte can come with as many as fit a message.
            if fds.len() > most_fds {
                return Err(HandOverError::Malformed);
            }
            // Out of descriptors: some of them did not arrive.
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(HandOverError::Descriptors);
            }
            got += received.bytes;
        }
        Ok(())
    }

    /// An error when the other side has ended, or this program is to end.
    pub(super) fn look(&self) -> Result<(), HandOverError> {
        match self.wait(PollFlags::RDHUP, Instant::now()) {
            Err(HandOverError::Late) => Ok(()),
            Ok(()) => Err(HandOverError::Gone),
            other => other,
        }
    }

    fn wait(&self, flags: PollFlags, end: Instant) -> Result<(), HandOverError> {
        loop {
            let mut fds = vec![PollFd::new(&self.stream, flags)];
            fds.extend(self.stop.as_ref().map(|s| PollFd::new(s, PollFlags::IN)));
            let left = end.saturating_duration_since(Instant::now());
            let limit = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            match poll(&mut fds, Some(&limit)) {
                Ok(0) => return Err(HandOverError::Late),
                Ok(_) if fds.get(1).is_some_and(|s| !s.revents().is_empty()) => {
                    return Err(HandOverError::Ending);
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (Wire, Wire) {
        let (a, b) = UnixStream::pair().unwrap();
        [a, b]
            .map(|end| Wire::new(end, None, MAX_FDS).unwrap())
            .into()
    }

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn messages_keep_their_descriptors() {
        let (ours, theirs) = pair();
        ours.send_line("first").unwrap();
        let many = vec![ours.as_fd(); MAX_FDS];
        ours.send(&"x".repeat(10_000), &many).unwrap();
        ours.send(&1, &[]).unwrap();
        ours.send(&2, &[ours.as_fd()]).unwrap();
        assert_eq!(theirs.receive_line(SOON).unwrap(), b"first");
        let (body, fds) = theirs.receive::<String>(SOON).unwrap();
        assert_eq!((body.len(), fds.len()), (10_000, MAX_FDS));
        let (body, fds) = theirs.receive::<u8>(SOON).unwrap();
        assert_eq!((body, fds.len()), (1, 0));
        let (body, fds) = theirs.receive::<u8>(SOON).unwrap();
        assert_eq!((body, fds.len()), (2, 1));
    }

    #[test]
    fn an_end_is_seen_and_a_wait_has_a_limit() {
        let (ours, theirs) = pair();
        let short = Duration::from_millis(1);
        let late = theirs.receive::<u8>(short).unwrap_err();
        assert!(matches!(late, HandOverError::Late));
        theirs.look().unwrap();
        theirs.check_peer(rustix::process::geteuid()).unwrap();
        let other = theirs.check_peer(Uid::from_raw(12_345));
        assert!(matches!(other, Err(HandOverError::Stranger(_))));
        (&ours.stream).write_all(&[1, 0, 0]).unwrap();
        drop(ours);
        assert!(matches!(theirs.look(), Err(HandOverError::Gone)));
        let gone = theirs.receive::<u8>(SOON).unwrap_err();
        assert!(matches!(gone, HandOverError::Gone));
        assert!(matches!(theirs.send(&1, &[]), Err(HandOverError::Gone)));
    }

    #[test]
    fn descriptors_that_are_too_many_or_in_the_wrong_place_are_refused() {
        let (ours, mut theirs) = pair();
        theirs.most_fds = 1;
        ours.send(&1, &[ours.as_fd()]).unwrap();
        assert_eq!(theirs.receive::<u8>(SOON).unwrap().1.len(), 1);
        ours.send(&1, &[ours.as_fd(); 2]).unwrap();
        let error = theirs.receive::<u8>(SOON).unwrap_err();
        assert!(matches!(error, HandOverError::Malformed), "{error}");
        // With every byte of a header, and with the body.
        for (first, bytes) in [(0, &[1, 0, 0, 0, 2, 0, 0, 0][..]), (8, b"1")] {
            let (ours, theirs) = pair();
            ours.send_bytes(&[1, 0, 0, 0, 0, 0, 0, 0][..first], &[])
                .unwrap();
            for byte in bytes {
                ours.send_bytes(&[*byte], &[ours.as_fd(); MAX_FDS]).unwrap();
            }
            let error = theirs.receive::<u8>(SOON).unwrap_err();
            assert!(matches!(error, HandOverError::Malformed), "{error}");
        }
        let (ours, theirs) = pair();
        ours.send_bytes(b"x", &[ours.as_fd()]).unwrap();
        let error = theirs.receive_line(SOON).unwrap_err();
        assert!(matches!(error, HandOverError::Malformed), "{error}");
    }

    #[test]
    fn noise_is_malformed() {
        for bytes in [
            &[0xff; 8][..],
            &[1, 0, 0, 0, 1, 0, 0, 0, b'1'],
            &[1, 0, 0, 0, 0, 0, 0, 0, b'{'],
        ] {
            let (ours, theirs) = pair();
            (&ours.stream).write_all(bytes).unwrap();
            let error = theirs.receive::<u8>(SOON).unwrap_err();
            assert!(matches!(error, HandOverError::Malformed), "{error}");
        }
    }
}
