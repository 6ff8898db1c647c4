//! The host's side: reaching the agent through the unix socket of `pericarp-vsock`.
//!
//! Used by `pericarp` and the tests. Every wait for the guest has a limit, because the guest may
//! never answer.

use std::{
    io::{self, Read, Write},
    os::{fd::IntoRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
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
    pub fn client(&self) -> Result<AgentClient, ConnectError> {
        let stream = self.connect(AGENT_PORT)?;
        let client = ttrpc::Client::new(stream.into_raw_fd())
            .map_err(|error| ConnectError::Client(error.to_string()))?;
        Ok(AgentClient::new(client))
    }

    /// Attaches to a stream of a process.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn attach(&self, target: &StreamTarget) -> Result<UnixStream, ConnectError> {
        let mut stream = self.connect(STREAM_PORT)?;
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
    fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(CONNECT_LIMIT))?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = Vec::new();
        // Byte by byte: what follows the line belongs to the stream.
        while answer.len() < MAX_ANSWER && !answer.ends_with(b"\n") {
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
