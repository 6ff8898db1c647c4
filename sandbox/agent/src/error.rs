//! What can go wrong: before the host can ask, and in answer to a request.

use std::{io, path::PathBuf};

use thiserror::Error;
use ttrpc::Code;

/// The agent cannot come up.
#[derive(Debug, Error)]
pub(crate) enum AgentError {
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
    #[error("the kernel module '{}' cannot be loaded: {source}", .path.display())]
    Module { path: PathBuf, source: io::Error },
    #[error("the host does not answer the greeting: {0}")]
    NoHost(io::Error),
    #[error("the service cannot be offered: {0}")]
    Service(String),
}

/// Names what was tried.
pub(crate) fn during<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> AgentError {
    move |source| AgentError::System {
        what: what.into(),
        source: source.into(),
    }
}

/// A request that is not carried out.
#[derive(Debug, Error)]
pub(crate) enum RequestError {
    /// The request makes no sense, whatever the state.
    #[error("{0}")]
    Invalid(String),
    /// What it names is not there.
    #[error("{0}")]
    NotFound(String),
    /// The program may not be executed.
    #[error("{0}")]
    Denied(String),
    /// What it creates is there already.
    #[error("{0}")]
    Exists(String),
    /// It comes too early or too late.
    #[error("{0}")]
    State(String),
    /// A limit of this program.
    #[error("{0}")]
    Exhausted(String),
    /// The network cannot be what the host says.
    #[error("{0}")]
    Network(String),
    /// What crun said, unless it means one of the above.
    #[error("crun: {0}")]
    Crun(String),
    /// The kernel.
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
}

impl RequestError {
    /// The code the proto file promises.
    fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::Denied(_) => Code::PERMISSION_DENIED,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Exhausted(_) => Code::RESOURCE_EXHAUSTED,
            Self::Network(_) | Self::Crun(_) | Self::System { .. } => Code::INTERNAL,
        }
    }
}

impl From<RequestError> for ttrpc::Error {
    fn from(error: RequestError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

/// Names what was tried for the host.
pub(crate) fn trying<E: Into<io::Error>>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> RequestError {
    move |source| RequestError::System {
        what: what.into(),
        source: source.into(),
    }
}
