//! A way for User-mode Linux to a back end on the `vhost` crate: a socket whose
//! messages are passed on, with SET_MEM_TABLE cut to the regions it counts. User-mode
//! Linux sends room for two and a count of one, which that crate refuses; ours
//! takes it. Only control messages come this way, never a request.
//!
//! Used by `bench-compare` for its peer.

use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::wire::{request, send, sized};

/// Bytes of a message's header.
const HEADER: usize = 12;
/// Bytes of a memory table before its regions, and of a region.
const TABLE: usize = 8;
const REGION: usize = 32;
/// No message is longer.
const LONGEST: usize = 4096;

/// One front end's way to one back end. Dropping it ends both connections.
#[derive(Debug)]
pub struct Relay {
    socket: PathBuf,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Relay {
    /// Listens at `socket` for one front end of the back end at `to`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(socket: PathBuf, to: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(&socket)?;
        let to = to.to_owned();
        let thread = thread::spawn(move || {
            let (front, _) = listener.accept()?;
            let back = UnixStream::connect(to)?;
            let (mut answers, mut receiver) = (back.try_clone()?, front.try_clone()?);
            let upwards = thread::spawn(move || {
                let _ = io::copy(&mut answers, &mut receiver);
                let _ = receiver.shutdown(Shutdown::Both);
            });
            let ended = pass_on(&front, &back);
            let _ = back.shutdown(Shutdown::Both);
            let _ = upwards.join();
            ended
        });
        Ok(Self {
            socket,
            thread: Some(thread),
        })
    }

    /// Where the front end is to connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Wakes a relay that nobody came to.
        let _ = UnixStream::connect(&self.socket);
        let _ = std::fs::remove_file(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Messages of a front end, until it goes.
fn pass_on(front: &UnixStream, back: &UnixStream) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER];
        let (count, files) = receive(front, &mut header)?;
        if count == 0 {
            return Ok(());
        }
        let mut from = front;
        from.read_exact(&mut header[count..])?;
        let word = |at: usize| {
            let bytes = header[at..at + 4].try_into().unwrap_or_default();
            u32::from_le_bytes(bytes)
        };
        let mut payload = vec![0; (word(8) as usize).min(LONGEST)];
        from.read_exact(&mut payload)?;
        if word(0) == request::SET_MEM_TABLE {
            cut(&mut payload);
        }
        let message = sized(word(0), word(4), payload.len() as u32, &payload);
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        send(back, &message, &files)?;
    }
}

/// Leaves a memory table the regions it counts.
fn cut(table: &mut Vec<u8>) {
    let count = table.first_chunk::<4>().map(|c| u32::from_le_bytes(*c));
    table.truncate(TABLE + REGION * count.unwrap_or(0) as usize);
}

fn receive(stream: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); 512];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(into)];
    let got = recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    Ok((got.bytes, files))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use crate::wire::message;

    #[test]
    fn messages_pass_with_their_files_and_tables_are_cut() {
        let scratch = Scratch::new();
        let back = UnixListener::bind(scratch.path("back")).unwrap();
        let relay = Relay::start(scratch.path("front"), &scratch.path("back")).unwrap();
        let front = UnixStream::connect(relay.socket()).unwrap();
        let (mut behind, _) = back.accept().unwrap();
        let mut table = vec![0; TABLE + 2 * REGION];
        table[0] = 1;
        let sent = message(request::SET_MEM_TABLE, 1, &table);
        let file = std::fs::File::open("/dev/null").unwrap();
        send(&front, &sent, &[file.as_fd()]).unwrap();
        let mut got = [0; HEADER + TABLE + REGION];
        let (count, files) = receive(&behind, &mut got).unwrap();
        behind.read_exact(&mut got[count..]).unwrap();
        assert_eq!(files.len(), 1);
        let want = message(request::SET_MEM_TABLE, 1, &table[..TABLE + REGION]);
        assert_eq!(got.as_slice(), want);
        // Others stay as they are, answers too.
        let other = message(request::SET_OWNER, 1, b"12345678");
        send(&front, &other, &[]).unwrap();
        let mut got = [0; HEADER + 8];
        behind.read_exact(&mut got).unwrap();
        assert_eq!(got.as_slice(), other);
        send(&behind, b"answer", &[]).unwrap();
        let mut answer = [0; 6];
        (&front).read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        drop(front);
        assert_eq!(behind.read(&mut got).unwrap(), 0);
    }

    #[test]
    fn a_relay_that_nobody_needs_ends() {
        let scratch = Scratch::new();
        drop(Relay::start(scratch.path("front"), &scratch.path("none")).unwrap());
    }
}
