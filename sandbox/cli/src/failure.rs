//! What can go wrong after the input was found valid, and the exit code of each.
//!
//! One variant per cause, each with a message that stands alone; the lines of a guest's console
//! are kept apart from it, so that they can be printed below. Printed once, by `report`.

use std::{fmt, io};

use pericarp_hypervisor::MachineError;
use pericarp_pod::{PodError, process::CallError};
use thiserror::Error;

/// Console lines shown with a failure.
pub(crate) const CONSOLE_LINES: usize = 12;

/// A run that did not come to the end of its command.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    /// A system call of ours failed.
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
    /// A program we started failed.
    #[error("{program} failed ({end})")]
    Helper { program: String, end: String },
    /// What the machine is made of is not there, or one of its sidecars died.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The guest's first process has gone, and the machine is of no use without it.
    #[error("the guest agent is gone{}", .words.as_ref().map(|w| format!(": {w}")).unwrap_or_default())]
    Agent {
        words: Option<String>,
        console: Vec<String>,
    },
    /// Another run has this name.
    #[error(
        "--name '{name}': is in use by the run {id}; choose another, or remove that one with `pericarp rm`"
    )]
    NameTaken { name: String, id: String },
    /// The image cannot be used; found after the input was checked.
    #[error("--image: {0}")]
    Image(String),
    /// The machine failed.
    #[error("{error}")]
    Machine {
        error: MachineError,
        console: Vec<String>,
        hypervisor: String,
    },
    /// The guest does not keep to the protocol.
    #[error("the guest is not to be trusted any more: it sent {what}")]
    Guest { what: String, console: Vec<String> },
    /// The guest says that it cannot do its part.
    #[error("the guest could not be set up: {0}")]
    Setup(String),
    /// The node is not as it has to be, or cannot be changed.
    #[error("{0}")]
    Node(String),
    /// A feature's state cannot be read or changed.
    #[error(transparent)]
    Feature(#[from] pericarp_config::feature::FeatureError),
    /// Our own output cannot be written.
    #[error("{stream} cannot be written: {source}")]
    Output {
        stream: &'static str,
        source: io::Error,
    },
    /// The network cannot be made, or not be passed on.
    #[error("--network: {0}")]
    Network(String),
    /// The container runtime failed before the command ran.
    #[error("runc: {0}")]
    Runc(String),
    /// The command is missing.
    #[error("{0}")]
    NotFound(String),
    /// The command cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// A signal came before the command had started, or a third one after.
    #[error("ended by signal {0}")]
    Signal(u8),
}

impl Failure {
    /// The exit code that tells this apart.
    pub(crate) fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable(_) => 126,
            // Found late, because only the directory of all runs tells.
            Self::NameTaken { .. } => 2,
            // No command's code can be meant.
            Self::Node(_) | Self::Feature(_) => 1,
            Self::Signal(number) => 128 + i32::from(*number),
            _ => 125,
        }
    }

    /// The guest's last console lines, where they explain something.
    pub(crate) fn console(&self) -> &[String] {
        match self {
            Self::Machine { console, .. }
            | Self::Guest { console, .. }
            | Self::Agent { console, .. } => console,
            _ => &[],
        }
    }

    /// Which hypervisor ran, where that may be the cause.
    pub(crate) fn hypervisor(&self) -> Option<&str> {
        match self {
            Self::Machine { hypervisor, .. } => Some(hypervisor),
            _ => None,
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        match error {
            CallError::NotFound(what) => Self::NotFound(what),
            CallError::NotExecutable(what) => Self::NotExecutable(what),
            CallError::Refused(what) => Self::Setup(what),
        }
    }
}

/// Names what was tried.
pub(crate) fn during<E: Into<io::Error>>(what: impl fmt::Display) -> impl FnOnce(E) -> Failure {
    move |source| Failure::System {
        what: what.to_string(),
        source: source.into(),
    }
}
