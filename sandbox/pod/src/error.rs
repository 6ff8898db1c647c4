//! Why a machine's surroundings cannot be made. One line each.

use std::{fmt, io};

use thiserror::Error;

/// What failed, with a message that stands alone.
#[derive(Debug, Error)]
pub enum PodError {
    /// A system call of ours.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A program that is needed is not there, or cannot be started.
    #[error("'{program}' cannot be started: {source}; {cure}")]
    Program {
        /// Its name.
        program: String,
        /// The kernel's answer.
        source: io::Error,
        /// Where it should come from.
        cure: &'static str,
    },
    /// A sidecar ended.
    #[error("a sidecar of the machine died ({0})")]
    Sidecar(String),
    /// A sidecar never listened.
    #[error("a sidecar of the machine does not come up ({0})")]
    Silent(String),
    /// A sidecar that is started again when it dies has died too often.
    #[error("a sidecar of the machine died ({end}), {times} times within {seconds} s")]
    KeepsDying {
        /// The last time.
        end: String,
        /// How often it has died.
        times: usize,
        /// Within what time.
        seconds: u64,
    },
}

/// Names what was tried.
pub fn during<E: Into<io::Error>>(what: impl fmt::Display) -> impl FnOnce(E) -> PodError {
    move |source| PodError::System {
        what: what.to_string(),
        source: source.into(),
    }
}
