//! Requests to the pod's agent: one connection for each, and its errors as containerd knows them.

use pericarp_api::{agent, agent_ttrpc::AgentClient, host::Guest};
use pericarp_pod::process::{Name, context, refused, unreachable};
use ttrpc::Code;

use crate::error::ShimError;

fn told(error: ttrpc::Error) -> ShimError {
    let code = match &error {
        ttrpc::Error::RpcStatus(status) => Some(status.code()),
        _ => None,
    };
    // Made safe to print.
    let text = refused(error).to_string();
    match code {
        Some(Code::NOT_FOUND) => ShimError::NotFound(text),
        Some(Code::ALREADY_EXISTS) => ShimError::Exists(text),
        Some(Code::FAILED_PRECONDITION) => ShimError::State(text),
        Some(Code::INVALID_ARGUMENT) => ShimError::Invalid(text),
        _ => ShimError::Machine(text),
    }
}

/// Asks the agent.
pub(crate) fn ask<T>(
    guest: &Guest,
    what: impl FnOnce(&AgentClient) -> ttrpc::Result<T>,
) -> Result<T, ShimError> {
    let client = guest.client().map_err(unreachable)?;
    what(&client).map_err(told)
}

pub(crate) fn signal(guest: &Guest, name: &Name, signal: u32, all: bool) -> Result<(), ShimError> {
    let request = agent::SignalRequest {
        container: name.container.clone(),
        process: name.process.clone(),
        signal,
        all,
        ..agent::SignalRequest::default()
    };
    ask(guest, |client| client.signal_process(context(), &request)).map(drop)
}

pub(crate) fn remove(guest: &Guest, container: &str) -> Result<(), ShimError> {
    let request = agent::ContainerRequest {
        container: container.to_owned(),
        ..agent::ContainerRequest::default()
    };
    ask(guest, |client| client.remove_container(context(), &request)).map(drop)
}

/// Numbers of a container; of the machine for an empty name.
pub(crate) fn stats(guest: &Guest, container: &str) -> Result<agent::StatsResponse, ShimError> {
    let request = agent::StatsRequest {
        container: container.to_owned(),
        ..agent::StatsRequest::default()
    };
    ask(guest, |client| client.get_stats(context(), &request))
}

pub(crate) fn update(guest: &Guest, container: &str, resources: Vec<u8>) -> Result<(), ShimError> {
    let request = agent::UpdateRequest {
        container: container.to_owned(),
        resources,
        ..agent::UpdateRequest::default()
    };
    ask(guest, |client| client.update_container(context(), &request)).map(drop)
}

pub(crate) fn freeze(guest: &Guest, container: &str, frozen: bool) -> Result<(), ShimError> {
    let request = agent::FreezeRequest {
        container: container.to_owned(),
        frozen,
        ..agent::FreezeRequest::default()
    };
    ask(guest, |client| client.freeze_container(context(), &request)).map(drop)
}
