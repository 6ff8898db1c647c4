//! The service of `agent.proto`: requests in, acts of `pod` out.
//!
//! Started by `main`. Each connection of the host has threads of its own, made and ended by ttrpc;
//! the host keeps one only while it has something to ask.

use std::{os::fd::IntoRawFd, sync::Arc, thread, time::Duration};

use pericarp_api::{
    AGENT_PORT,
    agent::{
        ConfigureRequest, ContainerRequest, CreateContainerRequest, CreateProcessRequest,
        DiskRequest, Empty, FactsResponse, FreezeRequest, ProcessRequest, RefreshRequest,
        ResizeRequest, SignalRequest, StartProcessResponse, StatsRequest, StatsResponse,
        UpdateRequest,
    },
    agent_ttrpc::{Agent, create_agent},
};
use ttrpc::{Server, TtrpcContext};

use crate::{
    boot, disks,
    error::{AgentError, RequestError, during},
    facts, memory,
    pod::Pod,
    stats, vsock,
};

/// Threads of one connection that wait for a request. More are made while all of them work.
const LEAST_IDLE: usize = 1;
const USUALLY_IDLE: usize = 2;
const MOST_IDLE: usize = 3;
/// Between the answer to the last request and the end of the machine.
const FAREWELL: Duration = Duration::from_millis(50);

struct Service {
    pod: Arc<Pod>,
}

/// Answers requests from now on.
pub(crate) fn serve(pod: Arc<Pod>) -> Result<(), AgentError> {
    let listener = vsock::listen(AGENT_PORT).map_err(during("the service's port"))?;
    let failed = |error: ttrpc::Error| AgentError::Service(error.to_string());
    let mut server = Server::new()
        .set_thread_count_min(LEAST_IDLE)
        .set_thread_count_default(USUALLY_IDLE)
        .set_thread_count_max(MOST_IDLE)
        .add_listener(listener.into_raw_fd())
        .map_err(failed)?
        .register_service(create_agent(Arc::new(Service { pod })));
    server.start().map_err(failed)?;
    // It ends with the machine.
    std::mem::forget(server);
    Ok(())
}

fn answer<T>(outcome: Result<T, RequestError>) -> ttrpc::Result<T> {
    outcome.map_err(Into::into)
}

fn done(outcome: Result<(), RequestError>) -> ttrpc::Result<Empty> {
    answer(outcome.map(|()| Empty::default()))
}

impl Agent for Service {
    fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> ttrpc::Result<Empty> {
        done(self.pod.configure(&request))
    }

    fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let outcome = self.pod.create(&request);
        drop(request);
        memory::trim();
        done(outcome)
    }

    fn create_process(
        &self,
        _: &TtrpcContext,
        request: CreateProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.container))?;
        done(container.add(&request))
    }

    fn start_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<StartProcessResponse> {
        let container = answer(self.pod.container(&request.container))?;
        let pid = answer(container.start(&request.process, &self.pod.reaper))?;
        memory::trim();
        Ok(StartProcessResponse {
            pid: pid.as_raw_nonzero().get().unsigned_abs(),
            ..StartProcessResponse::default()
        })
    }

    fn signal_process(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.container))?;
        done(container.signal(
            &request.process,
            request.signal,
            request.all,
            &self.pod.reaper,
        ))
    }

    fn resize_terminal(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<Empty> {
        let process = answer(self.pod.process(&request.container, &request.process))?;
        let size = |number: u32| {
            u16::try_from(number)
                .map_err(|_| RequestError::Invalid(format!("no terminal has a size of {number}")))
        };
        let (columns, rows) = (answer(size(request.columns))?, answer(size(request.rows))?);
        done(process.resize(columns, rows))
    }

    fn remove_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.pod.remove(&request.container))
    }

    fn update_container(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.container))?;
        done(container.update(&request.resources, &self.pod.reaper))
    }

    fn freeze_container(&self, _: &TtrpcContext, request: FreezeRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.pod.container(&request.container))?;
        done(container.freeze(request.frozen))
    }

    fn remove_disk(&self, _: &TtrpcContext, request: DiskRequest) -> ttrpc::Result<Empty> {
        done(disks::remove(&request.disk))
    }

    fn refresh_source(&self, _: &TtrpcContext, request: RefreshRequest) -> ttrpc::Result<Empty> {
        done(self.pod.refresh(&request))
    }

    fn get_stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        if request.container.is_empty() {
            return Ok(stats::collect(None));
        }
        let container = answer(self.pod.container(&request.container))?;
        Ok(stats::collect(Some(container.group())))
    }

    fn get_facts(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<FactsResponse> {
        Ok(facts::collect())
    }

    fn power_off(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let outcome = self.pod.put_away();
        // Whatever the outcome: nothing can be done here any more.
        thread::spawn(|| {
            thread::sleep(FAREWELL);
            boot::power_off()
        });
        done(outcome)
    }
}
