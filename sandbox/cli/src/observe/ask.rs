//! Asks many control sockets at once, and waits for none longer than for all together.
//!
//! Called by `observe`. A sidecar answers from a thread of its own within a millisecond; one that
//! stands still, or something else that listens in its place, costs the limit once and is reported
//! as silent.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send,
        socket_with,
    },
};
use serde_json::Value;

/// The longest answer that is read: whole histograms of a sidecar with many devices.
const LONGEST: usize = 4 << 20;

/// One that is being asked.
struct Peer {
    socket: OwnedFd,
    said: Vec<u8>,
}

/// The lines that answer this line of JSON, as they came, each under the number of its socket; none
/// where nobody has answered within `limit`.
pub(super) fn all(sockets: &[PathBuf], request: &Value, limit: Duration) -> Vec<Option<Vec<u8>>> {
    let end = Instant::now() + limit;
    let line = format!("{request}\n");
    let mut peers: Vec<Option<Peer>> = sockets
        .iter()
        .map(|socket| begin(socket, &line).ok())
        .collect();
    let mut answers: Vec<Option<Vec<u8>>> = vec![None; sockets.len()];
    while peers.iter().any(Option::is_some) {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let Ok(ready) = wait(&peers, left) else {
            continue;
        };
        for index in ready {
            let Some(peer) = &mut peers[index] else {
                continue;
            };
            match peer.read() {
                Ok(false) => {}
                Ok(true) => answers[index] = peers[index].take().map(|peer| peer.said),
                Err(_) => peers[index] = None,
            }
        }
    }
    answers
}

fn begin(path: &Path, line: &str) -> Result<Peer, Errno> {
    let address = SocketAddrUnix::new(path)?;
    // Who does not take connections is not waited for.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    // Shorter than any socket's buffer.
    let sent = send(&socket, line.as_bytes(), SendFlags::NOSIGNAL)?;
    match sent == line.len() {
        true => Ok(Peer {
            socket,
            said: Vec::new(),
        }),
        false => Err(Errno::NOBUFS),
    }
}

/// Those that have something to read, or have gone.
fn wait(peers: &[Option<Peer>], left: Duration) -> Result<Vec<usize>, Errno> {
    let there = peers.iter().enumerate();
    let there: Vec<(usize, &Peer)> = there
        .filter_map(|(index, peer)| Some((index, peer.as_ref()?)))
        .collect();
    let fds = there.iter().map(|(_, peer)| peer.socket.as_fd());
    let mut fds: Vec<PollFd<'_>> = fds
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    let timeout = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    poll(&mut fds, Some(&timeout))?;
    let ready = there.iter().zip(&fds);
    let ready = ready.filter(|(_, fd)| !fd.revents().is_empty());
    Ok(ready.map(|((index, _), _)| *index).collect())
}

impl Peer {
    /// Reads what is there. Whether the line is whole.
    fn read(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 64 << 10];
        loop {
            match rustix::io::read(&self.socket, &mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.said.extend_from_slice(&bytes[..count]),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if self.said.ends_with(b"\n") {
                return Ok(true);
            }
            if self.said.len() > LONGEST {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        os::unix::net::UnixListener,
        thread,
    };

    use serde_json::json;

    use super::*;

    #[test]
    fn the_silent_and_the_absent_hold_nobody_up() {
        let name = format!("pericarp-ask-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let place = |name: &str| dir.join(name);
        let _silent = UnixListener::bind(place("silent")).unwrap();
        let listener = UnixListener::bind(place("speaks")).unwrap();
        let speaker = thread::spawn(move || {
            for answer in ["{\"ok\":true}", "noise", ""] {
                let (stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                let mut stream = BufReader::new(stream);
                stream.read_line(&mut line).unwrap();
                assert_eq!(line, "{\"op\":\"x\"}\n");
                if !answer.is_empty() {
                    // In two parts.
                    let (one, rest) = answer.as_bytes().split_at(3);
                    stream.get_mut().write_all(one).unwrap();
                    stream.get_mut().write_all(rest).unwrap();
                    stream.get_mut().write_all(b"\n").unwrap();
                }
            }
        });
        let sockets = ["silent", "absent", "speaks", "speaks", "speaks"].map(place);
        let limit = Duration::from_secs(2);
        let answers = all(&sockets, &json!({"op": "x"}), limit);
        std::fs::remove_dir_all(&dir).unwrap();
        speaker.join().unwrap();
        let lines = ["{\"ok\":true}\n", "noise\n"].map(|line| Some(line.as_bytes().to_vec()));
        assert_eq!(answers[..2], [None, None]);
        assert_eq!(answers[2..4], lines);
        assert_eq!(answers[4], None);
    }
}
