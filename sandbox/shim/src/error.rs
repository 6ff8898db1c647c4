//! What can go wrong, and how containerd is told: one line, with the code by which it tells a
//! missing container from a broken machine.

use std::{fmt, io};

use pericarp_pod::{PodError, process::CallError};
use thiserror::Error;
use ttrpc::Code;

/// A request that is not carried out, or a program that does not start.
#[derive(Debug, Error)]
pub(crate) enum ShimError {
    /// What is asked for makes no sense, or no guest can have it.
    #[error("{0}")]
    Invalid(String),
    /// What it names is not there, or has ended.
    #[error("{0}")]
    NotFound(String),
    /// What it makes is there already.
    #[error("{0}")]
    Exists(String),
    /// It comes too early or too late.
    #[error("{0}")]
    State(String),
    /// No pod of ours can do this.
    #[error("{0}")]
    Unimplemented(String),
    /// The machine has ended, or was never there.
    #[error("{0}")]
    Machine(String),
    /// What the machine is made of.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The agent says no.
    #[error(transparent)]
    Agent(#[from] CallError),
    /// The kernel.
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
}

/// Names what was tried.
pub(crate) fn during<E: Into<io::Error>>(what: impl fmt::Display) -> impl FnOnce(E) -> ShimError {
    move |source| ShimError::System {
        what: what.to_string(),
        source: source.into(),
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        let code = match &error {
            ShimError::Invalid(_) => Code::INVALID_ARGUMENT,
            ShimError::NotFound(_) | ShimError::Agent(CallError::NotFound(_)) => Code::NOT_FOUND,
            ShimError::Exists(_) => Code::ALREADY_EXISTS,
            ShimError::State(_) => Code::FAILED_PRECONDITION,
            ShimError::Unimplemented(_) => Code::UNIMPLEMENTED,
            ShimError::Machine(_)
            | ShimError::Pod(_)
            | ShimError::Agent(_)
            | ShimError::System { .. } => Code::UNKNOWN,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.to_string()))
    }
}
