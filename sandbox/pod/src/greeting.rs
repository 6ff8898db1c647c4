//! The agent's greeting: the first that a machine says.
//!
//! Listened for before the machine starts, since the agent dials once. Its connection
//! stays open: its end is the agent's, with last words if it had any.

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Duration,
};

use pericarp_api::{Hello, HelloError, host::Guest};
use thiserror::Error;

use crate::{PodError, during};

/// How long one read of the 16 bytes of a greeting may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Why there is none.
#[derive(Debug, Error)]
pub enum GreetingError {
    /// A system call of ours.
    #[error("the agent's greeting: {0}")]
    System(#[from] io::Error),
    /// The agent is of another making than this program.
    #[error("{0}; `cargo xtask setup` makes the guest's files anew")]
    Version(HelloError),
    /// The guest said something else.
    #[error("{0}")]
    Guest(&'static str),
}

/// Where the agent greets.
#[derive(Debug)]
pub struct Greeting {
    listener: UnixListener,
}

impl Greeting {
    /// Listens beside `host_side`, the socket of the vsock device.
    ///
    /// # Errors
    ///
    /// The kernel's: the socket is there, or its directory is not.
    pub fn listen(host_side: &Path) -> Result<Self, PodError> {
        let listener = UnixListener::bind(Guest::hello_socket(host_side))
            .map_err(during("a socket for the agent"))?;
        Ok(Self { listener })
    }

    /// Waits for it, however long the guest takes: for a thread of its own.
    ///
    /// # Errors
    ///
    /// [`GreetingError`].
    pub fn receive(&self) -> Result<(Hello, UnixStream), GreetingError> {
        let (mut stream, _) = self.listener.accept()?;
        stream.set_read_timeout(Some(LIMIT))?;
        let hello = Hello::read(&mut stream).map_err(|error| match error {
            HelloError::Version(_) => GreetingError::Version(error),
            HelloError::NotAnAgent => GreetingError::Guest("no greeting of an agent"),
            HelloError::Io(_) => GreetingError::Guest("half a greeting"),
        })?;
        stream.set_read_timeout(None)?;
        Ok((hello, stream))
    }
}
