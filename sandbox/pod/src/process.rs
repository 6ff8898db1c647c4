//! Starting a process through the agent, and attaching to its streams.
//!
//! These calls wait for the guest: whoever must notice anything else meanwhile makes them on a
//! thread of its own.

use std::{os::unix::net::UnixStream, time::Duration};

use pericarp_api::{
    StreamKind, StreamTarget, agent,
    agent_ttrpc::AgentClient,
    hello::printable,
    host::{ConnectError, Guest},
};
use thiserror::Error;
use ttrpc::{Code, context::Context};

/// How long one call to the agent may take. Starting a container under an emulated CPU on a busy
/// host takes seconds.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// What the guest may have printed of an error message of its own.
const MAX_MESSAGE: usize = 600;

/// What came of a call.
#[derive(Debug, Error)]
pub enum CallError {
    /// There is no such program in the container.
    #[error("{0}")]
    NotFound(String),
    /// It cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// The agent refused for another reason, or cannot be reached.
    #[error("{0}")]
    Refused(String),
}

/// Which of its standard streams a process gets from us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wiring {
    /// Standard input is passed on; otherwise it is empty.
    pub stdin: bool,
    /// A terminal of its own: then there is no separate error output.
    pub terminal: bool,
}

impl Wiring {
    /// As the agent is told.
    #[must_use]
    pub fn streams(self) -> agent::Streams {
        agent::Streams {
            stdin: self.stdin,
            stdout: true,
            stderr: !self.terminal,
            ..Default::default()
        }
    }
}

/// A process of a container by its two ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// Of the agent's containers.
    pub container: String,
    /// Empty for the container's own process.
    pub process: String,
}

/// The connections to a started process.
#[derive(Debug)]
pub struct Attached {
    /// Where it is passed on.
    pub stdin: Option<UnixStream>,
    /// With a terminal: all that it shows.
    pub stdout: UnixStream,
    /// Without a terminal.
    pub stderr: Option<UnixStream>,
    /// Where [`pericarp_api::ExitReport`] comes.
    pub exit: UnixStream,
}

/// Attaches to a process that has been created, and starts it. `size` is that of its terminal in
/// columns and rows.
///
/// # Errors
///
/// [`CallError`].
pub fn attach_and_start(
    guest: &Guest,
    client: &AgentClient,
    name: &Name,
    wiring: Wiring,
    size: Option<(u16, u16)>,
) -> Result<Attached, CallError> {
    let attach = |kind| {
        guest
            .attach(&StreamTarget {
                kind,
                container: name.container.clone(),
                process: name.process.clone(),
            })
            .map_err(unreachable)
    };
    let attached = Attached {
        stdin: wiring
            .stdin
            .then(|| attach(StreamKind::Stdin))
            .transpose()?,
        stdout: attach(StreamKind::Stdout)?,
        stderr: (!wiring.terminal)
            .then(|| attach(StreamKind::Stderr))
            .transpose()?,
        exit: attach(StreamKind::Exit)?,
    };
    if let Some(size) = size {
        resize(client, name, size)?;
    }
    let request = agent::ProcessRequest {
        container: name.container.clone(),
        process: name.process.clone(),
        ..Default::default()
    };
    client.start_process(context(), &request).map_err(|error| {
        match (code(&error), message(&error)) {
            (Some(Code::NOT_FOUND), text) => CallError::NotFound(text),
            (Some(Code::PERMISSION_DENIED), text) => CallError::NotExecutable(text),
            (_, text) => CallError::Refused(text),
        }
    })?;
    Ok(attached)
}

/// Tells the process's terminal its size.
///
/// # Errors
///
/// [`CallError::Refused`].
pub fn resize(
    client: &AgentClient,
    name: &Name,
    (columns, rows): (u16, u16),
) -> Result<(), CallError> {
    let request = agent::ResizeRequest {
        container: name.container.clone(),
        process: name.process.clone(),
        columns: columns.into(),
        rows: rows.into(),
        ..Default::default()
    };
    client
        .resize_terminal(context(), &request)
        .map(drop)
        .map_err(refused)
}

/// With the limit that every call to the agent has.
#[must_use]
pub fn context() -> Context {
    context_within(CALL_LIMIT)
}

/// With a limit of its own.
#[must_use]
pub fn context_within(limit: Duration) -> Context {
    // None at all is what zero would mean.
    let nanoseconds = i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX).max(1);
    ttrpc::context::with_timeout(nanoseconds)
}

/// A call that the agent answers with an error.
#[must_use]
pub fn refused(error: ttrpc::Error) -> CallError {
    CallError::Refused(message(&error))
}

/// The guest cannot be reached.
#[must_use]
pub fn unreachable(error: ConnectError) -> CallError {
    CallError::Refused(error.to_string())
}

fn code(error: &ttrpc::Error) -> Option<Code> {
    match error {
        ttrpc::Error::RpcStatus(status) => Some(status.code()),
        _ => None,
    }
}

/// The agent's own words, which may be anything.
fn message(error: &ttrpc::Error) -> String {
    let text = match error {
        ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    let mut text = printable(&text);
    if let Some((cut, _)) = text.char_indices().nth(MAX_MESSAGE) {
        text.truncate(cut);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_says_is_one_short_line() {
        let status = ttrpc::get_status(Code::INTERNAL, format!("a\nb\x1b[2J{}", "ä".repeat(2000)));
        let text = message(&ttrpc::Error::RpcStatus(status));
        assert!(text.starts_with("a\u{fffd}b\u{fffd}[2Jää"), "{text}");
        assert_eq!(text.chars().count(), MAX_MESSAGE);
    }
}
