//! The host's side: reaching the agent through the unix socket of `pericarp-vsock`.
//!
//! Used by `pericarp` and the tests. Every wait for the guest has a limit, because the guest may
//! never answer.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    ops::Deref,
    os::{
        fd::{IntoRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

use thiserror::Error;

use crate::{
    AGENT_PORT, STREAM_PORT, StreamTarget,
    agent_ttrpc::AgentClient,
    stream::{ATTACHED, NO_SUCH_STREAM, TAKEN},
};

/// How long the guest may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// `OK ` and the largest port.
const MAX_ANSWER: usize = 16;

/// The lowest number of a client's descriptor. All others stay below: the kernel gives the lowest
/// that is free.
const NUMBERS_APART: RawFd = 512;

/// Why the agent cannot be reached.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The socket of the vsock device.
    #[error("the guest's sockets cannot be reached: {0}")]
    Socket(#[from] io::Error),
    /// Nobody listens on that port in the guest.
    #[error("the guest does not accept connections on port {0}")]
    Refused(u32),
    /// The agent knows no such stream.
    #[error("the guest has no such stream")]
    NoSuchStream,
    /// The stream is attached elsewhere.
    #[error("the stream is attached elsewhere")]
    Taken,
    /// An answer that means nothing.
    #[error("the guest's answer is not part of the protocol")]
    Garbage,
    /// The ttrpc client could not be made.
    #[error("no ttrpc client: {0}")]
    Client(String),
}

/// A client of the agent's service with the connection it has for itself, which ends with it.
///
/// ttrpc reads on a thread of its own, by the number of the descriptor. That thread may wait for the
/// rest of a message when the client is dropped; a guest that never sends the rest would keep the
/// thread, and the number would be another's when it is read from again.
pub struct Client {
    client: AgentClient,
    connection: UnixStream,
}

impl Client {
    fn new(connection: UnixStream) -> Result<Self, ConnectError> {
        let number = number_apart(&connection)?;
        let client = ttrpc::Client::new(number.into_raw_fd())
            .map_err(|error| ConnectError::Client(error.to_string()))?;
        Ok(Self {
            client: AgentClient::new(client),
            connection,
        })
    }
}

impl Deref for Client {
    type Target = AgentClient;

    fn deref(&self) -> &AgentClient {
        &self.client
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The thread sees the end. It may have ended by itself.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

/// The same connection by a number that nobody gets for a while after it is closed: the thread may
/// be between two reads just then, and is to find nothing.
fn number_apart(connection: &UnixStream) -> io::Result<OwnedFd> {
    static TURN: AtomicU8 = AtomicU8::new(0);
    let lowest = NUMBERS_APART + RawFd::from(TURN.fetch_add(1, Ordering::Relaxed));
    match rustix::io::fcntl_dupfd_cloexec(connection, lowest) {
        Ok(number) => Ok(number),
        // So few descriptors are allowed; the end of the connection has to do.
        Err(_) => connection.try_clone().map(OwnedFd::from),
    }
}

/// The guest of one machine.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The socket that `pericarp-vsock` was given as `--uds-path`.
    socket: PathBuf,
}

impl Guest {
    /// The guest behind this socket. Connects to nothing yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// Where the host listens for the agent's greeting.
    #[must_use]
    pub fn hello_socket(socket: &Path) -> PathBuf {
        let mut path = socket.as_os_str().to_owned();
        path.push(format!("_{}", crate::HELLO_PORT));
        path.into()
    }

    /// A client of the agent's service, on a connection of its own that lasts as long as the
    /// client. Keep it for the moment only: a ttrpc client wakes up all the time.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn client(&self) -> Result<Client, ConnectError> {
        self.client_within(CONNECT_LIMIT)
    }

    /// The same, of a guest that has no longer than `limit` to accept the connection.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn client_within(&self, limit: Duration) -> Result<Client, ConnectError> {
        Client::new(self.connect(AGENT_PORT, limit)?)
    }

    /// Attaches to a stream of a process.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn attach(&self, target: &StreamTarget) -> Result<UnixStream, ConnectError> {
        let mut stream = self.connect(STREAM_PORT, CONNECT_LIMIT)?;
        stream.set_read_timeout(Some(CONNECT_LIMIT))?;
        target.write(&mut stream)?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        stream.set_read_timeout(None)?;
        match answer[0] {
            ATTACHED => Ok(stream),
            NO_SUCH_STREAM => Err(ConnectError::NoSuchStream),
            TAKEN => Err(ConnectError::Taken),
            _ => Err(ConnectError::Garbage),
        }
    }

    /// A connection to a port of the guest.
    fn connect(&self, port: u32, limit: Duration) -> Result<UnixStream, ConnectError> {
        let end = Instant::now() + limit;
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = Vec::new();
        // Byte by byte: what follows the line belongs to the stream.
        while answer.len() < MAX_ANSWER && !answer.ends_with(b"\n") {
            stream.set_read_timeout(Some(left(end)?))?;
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(0) => return Err(ConnectError::Refused(port)),
                Ok(_) => answer.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ConnectError::Refused(port));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if !answer.starts_with(b"OK ") || !answer.ends_with(b"\n") {
            return Err(ConnectError::Garbage);
        }
        stream.set_read_timeout(None)?;
        Ok(stream)
    }
}

/// What is left until `end`.
pub(crate) fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;
    use crate::agent;

    const LIMIT: Duration = Duration::from_secs(20);

    /// A guest that does with its first connection what `talk` does.
    fn guest(name: &str, talk: impl FnOnce(UnixStream) + Send + 'static) -> Guest {
        let name = format!("pericarp-host-{name}-{}", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || talk(listener.accept().unwrap().0));
        Guest::new(socket)
    }

    fn accept(stream: &mut UnixStream) {
        let mut line = [0; "CONNECT 1024\n".len()];
        stream.read_exact(&mut line).unwrap();
        stream.write_all(b"OK 1073741824\n").unwrap();
    }

    #[test]
    fn a_message_without_an_end_does_not_outlive_the_client() {
        let (tell, told) = std::sync::mpsc::channel();
        let guest = guest("unfinished", move |mut stream| {
            accept(&mut stream);
            let mut request = [0; 10];
            stream.read_exact(&mut request).unwrap();
            let length = u32::from_be_bytes(request[..4].try_into().unwrap());
            let mut rest = vec![0; length as usize];
            stream.read_exact(&mut rest).unwrap();
            // Response to stream 1 without a byte; then a message of 4 MiB, of which little comes.
            stream.write_all(&[0, 0, 0, 0, 0, 0, 0, 1, 2, 0]).unwrap();
            stream
                .write_all(&[0, 0x3f, 0xff, 0xff, 0, 0, 0, 3, 2, 0, 1])
                .unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            tell.send(stream.read(&mut [0]).map_err(|error| error.kind()))
                .unwrap();
        });
        let client = guest.client().unwrap();
        let limited = ttrpc::context::with_timeout(20_000_000_000);
        let request = agent::StatsRequest::default();
        client.get_stats(limited, &request).unwrap();
        // The thread is in the middle of the message.
        thread::sleep(Duration::from_millis(100));
        drop(client);
        let end = told.recv_timeout(LIMIT).unwrap();
        let late = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
        assert!(!end.is_err_and(|kind| late.contains(&kind)), "{end:?}");
    }

    #[test]
    fn the_number_of_a_client_is_not_the_next_descriptors() {
        let guest = guest("number", |mut stream| accept(&mut stream));
        let client = guest.client().unwrap();
        let next = client.connection.try_clone().unwrap().into_raw_fd();
        assert!(next < NUMBERS_APART, "{next}");
    }

    #[test]
    fn a_guest_that_does_not_answer_is_not_waited_for_longer() {
        let guest = guest("silent", |stream| {
            thread::sleep(LIMIT);
            drop(stream);
        });
        let begin = Instant::now();
        let refused = guest.client_within(Duration::from_millis(200));
        assert!(matches!(refused, Err(ConnectError::Socket(_))));
        assert!(begin.elapsed() < LIMIT / 2);
    }
}
