//! The thread behind the control socket: one poll loop for all peers.
//!
//! A program starts it once it is confined. It sleeps without a time-out, so
//! an idle program is not woken by it.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use log::{debug, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::connection::{Connection, Fate};
use crate::errands::Errands;
use crate::operations::Operations;

/// Peers served at once.
const MOST_PEERS: usize = 16;

/// How long nobody is taken in when descriptors ran out.
const MOMENT: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// The stack of the thread; the deepest it gets is JSON, bounded by the parser.
const STACK: usize = 256 * 1024;

/// A bound control socket and what it offers.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    operations: Operations,
    errands: Errands,
    peers: Vec<Peer>,
    /// Counts turns in which somebody moved; a clock for "silent longest".
    turn: u64,
    /// Descriptors ran out: nobody is taken in for a moment.
    full: bool,
}

#[derive(Debug)]
struct Peer {
    connection: Connection,
    moved: u64,
}

impl Server {
    /// Serves `operations` to whoever connects to `listener`.
    ///
    /// # Errors
    /// The kernel's refusal to make the listener non-blocking, or an eventfd.
    pub fn new(listener: UnixListener, operations: Operations) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            operations,
            errands: Errands::new()?,
            peers: Vec::new(),
            turn: 0,
            full: false,
        })
    }

    /// Serves on a thread of its own until `stop` is readable.
    ///
    /// # Errors
    /// The kernel's refusal to make a thread.
    pub fn start(self, stop: OwnedFd) -> io::Result<JoinHandle<()>> {
        let (thread, go) = self.start_when(stop)?;
        let _ = go.send(());
        Ok(thread)
    }

    /// As [`start`](Self::start), once the thread is told to; it ends when it
    /// never will be.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_when(self, stop: OwnedFd) -> io::Result<(JoinHandle<()>, SyncSender<()>)> {
        let (go, told) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                if told.recv().is_ok() {
                    self.run(&stop);
                }
            })?;
        Ok((thread, go))
    }

    fn run(mut self, stop: &OwnedFd) {
        loop {
            match self.turn(stop) {
                Ok(true) => {}
                Ok(false) => return,
                Err(errno) => {
                    // The disks go on without it.
                    warn!("the control socket is closed: {errno}");
                    return;
                }
            }
        }
    }

    /// Waits for something and does it. False at the end.
    fn turn(&mut self, stop: &OwnedFd) -> Result<bool, Errno> {
        let full = std::mem::take(&mut self.full);
        let listening = if full {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        let mut fds = vec![
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&self.listener, listening),
            PollFd::new(&self.errands, PollFlags::IN),
        ];
        fds.extend(
            self.peers
                .iter()
                .map(|p| PollFd::from_borrowed_fd(p.connection.as_fd(), p.connection.interest())),
        );
        match poll(&mut fds, full.then_some(&MOMENT)) {
            Err(Errno::INTR) => return Ok(true),
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            return Ok(false);
        }
        self.turn += 1;
        // Those who spoke before those who come: a newcomer can take a place.
        let mut index = 0;
        for ready in &ready[3..] {
            if *ready {
                let peer = &mut self.peers[index];
                peer.moved = self.turn;
                let fate = peer.connection.ready(&mut self.operations, &self.errands);
                if fate == Fate::Goes {
                    self.peers.remove(index);
                    continue;
                }
            }
            index += 1;
        }
        if ready[2] {
            self.errands.silence();
            let (operations, errands) = (&mut self.operations, &self.errands);
            self.peers
                .retain_mut(|peer| peer.connection.look(operations, errands) == Fate::Stays);
        }
        if ready[1] {
            self.admit();
        }
        Ok(true)
    }

    /// Takes one newcomer in, one a turn: a crowd cannot push out a peer that
    /// has its question ready.
    fn admit(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) =>
            {
                return;
            }
            Err(e) => {
                debug!("control socket: {e}");
                // Out of descriptors: give one back, or wait until there is one.
                self.full = self.drop_the_silent().is_none();
                return;
            }
        };
        if let Err(e) = self.seat(stream) {
            debug!("control socket: {e}");
        }
    }

    fn seat(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        if self.peers.len() >= MOST_PEERS {
            self.drop_the_silent();
        }
        self.peers.push(Peer {
            connection: Connection::new(stream),
            moved: self.turn,
        });
        Ok(())
    }

    /// Closes the connection of the peer that did nothing for the longest time.
    fn drop_the_silent(&mut self) -> Option<()> {
        let (index, _) = self.peers.iter().enumerate().min_by_key(|(_, p)| p.moved)?;
        self.peers.remove(index);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    struct Rig {
        path: PathBuf,
        stop: OwnedFd,
        thread: Option<JoinHandle<()>>,
    }

    impl Rig {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("pericarp-control-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            let flags = rustix::event::EventfdFlags::CLOEXEC;
            let stop = rustix::event::eventfd(0, flags).unwrap();
            let operations = Operations::new("prog", "1", || "m 1\n".repeat(1 << 18)).with_errand(
                "wait",
                |arguments, descriptors| {
                    let ms = arguments.get("ms").and_then(serde_json::Value::as_u64);
                    std::thread::sleep(Duration::from_millis(ms.unwrap_or(0)));
                    let count = serde_json::json!(descriptors.len());
                    Ok(serde_json::Map::from_iter([("count".to_owned(), count)]))
                },
            );
            let server = Server::new(listener, operations).unwrap();
            let thread = Some(server.start(stop.try_clone().unwrap()).unwrap());
            Self { path, stop, thread }
        }

        fn peer(&self) -> UnixStream {
            let stream = UnixStream::connect(&self.path).unwrap();
            let limit = Some(Duration::from_secs(10));
            stream.set_read_timeout(limit).unwrap();
            stream.set_write_timeout(limit).unwrap();
            stream
        }

        fn is_served(&self) {
            let mut peer = self.peer();
            peer.write_all(b"{\"op\":\"version\"}\n").unwrap();
            let mut line = String::new();
            BufReader::new(peer).read_line(&mut line).unwrap();
            assert!(line.contains("\"ok\":true"), "{line}");
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            rustix::io::write(&self.stop, &1u64.to_ne_bytes()).unwrap();
            self.thread.take().unwrap().join().unwrap();
            std::fs::remove_file(&self.path).unwrap();
        }
    }

    #[test]
    fn silent_peers_lose_their_places_and_the_server_ends_with_peers_there() {
        let rig = Rig::new();
        let mut silent: Vec<_> = (0..MOST_PEERS + 4).map(|_| rig.peer()).collect();
        rig.is_served();
        let mut byte = [0];
        assert_eq!(silent[0].read(&mut byte).unwrap(), 0, "closed by us");
        assert!(silent[MOST_PEERS].as_raw_fd() > 0);
    }

    #[test]
    fn only_who_sent_an_errand_out_waits_for_it() {
        let rig = Rig::new();
        let mut peer = rig.peer();
        peer.write_all(b"{\"op\":\"wait\",\"ms\":500}\n{\"op\":\"version\"}\n")
            .unwrap();
        let begin = std::time::Instant::now();
        (0..5).for_each(|_| rig.is_served());
        // Whoever goes leaves its errand behind, and there are not too many.
        for _ in 0..20 {
            rig.peer()
                .write_all(b"{\"op\":\"wait\",\"ms\":800}\n")
                .unwrap();
        }
        rig.is_served();
        let mut late = rig.peer();
        late.write_all(b"{\"op\":\"wait\"}\n").unwrap();
        let mut lines = BufReader::new(late).lines();
        let refused = lines.next().unwrap().unwrap();
        assert!(begin.elapsed() > Duration::from_millis(700) || refused.contains("too much"));
        let mut lines = BufReader::new(peer).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "{\"count\":0,\"ok\":true}");
        assert!(lines.next().unwrap().unwrap().contains("\"version\":\"1\""));
    }

    #[test]
    fn peers_that_do_not_read_hold_nobody_up() {
        let rig = Rig::new();
        let deaf: Vec<_> = (0..MOST_PEERS / 2)
            .map(|_| {
                let mut peer = rig.peer();
                // Each answer is a MiB, more than a socket holds.
                peer.write_all(&b"{\"op\":\"metrics\"}\n".repeat(50))
                    .unwrap();
                peer
            })
            .collect();
        for _ in 0..20 {
            rig.is_served();
        }
        // One that reads after all gets all of it.
        let mut reader = BufReader::new(&deaf[deaf.len() - 1]);
        for _ in 0..50 {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert!(line.len() > 1 << 20);
        }
    }
}
