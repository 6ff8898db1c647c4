//! containerd's task service: requests in, acts of `pod` out.
//!
//! It has two names, since containerd 2.0 calls the same service `containerd.task.v3.Task`. The
//! generated code knows that name alone; the messages are those of both.

use std::{collections::HashMap, sync::Arc};

use containerd_shim_protos::{
    Task as Service,
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    create_task,
};
use protobuf::MessageField;
use ttrpc::{MethodHandler, TtrpcContext};

use crate::{
    error::ShimError,
    events::timestamp,
    pod::Pod,
    process::{Exit, Phase},
    stats,
};

const NEW: &str = "/containerd.task.v3.Task/";
const OLD: &str = "/containerd.task.v2.Task/";

type Methods = HashMap<String, Box<dyn MethodHandler + Send + Sync>>;

/// The service under both of its names.
pub(crate) fn methods(pod: &Arc<Pod>) -> Methods {
    let service = || Arc::new(Tasks(Arc::clone(pod)));
    let old = create_task(service()).into_iter();
    let old = old.map(|(path, method)| (path.replace(NEW, OLD), method));
    create_task(service()).into_iter().chain(old).collect()
}

struct Tasks(Arc<Pod>);

fn answer<T>(outcome: Result<T, ShimError>) -> ttrpc::Result<T> {
    outcome.map_err(Into::into)
}

fn done(outcome: Result<(), ShimError>) -> ttrpc::Result<Empty> {
    answer(outcome.map(|()| Empty::default()))
}

fn status(phase: Phase) -> (Status, Option<Exit>) {
    match phase {
        Phase::Created | Phase::Starting => (Status::CREATED, None),
        Phase::Running => (Status::RUNNING, None),
        Phase::Paused => (Status::PAUSED, None),
        Phase::Over(exit) => (Status::STOPPED, Some(exit)),
    }
}

impl Service for Tasks {
    fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let task = answer(self.0.task(&request.id))?;
        let process = answer(task.process(&request.exec_id))?;
        let (status, exit) = status(process.phase());
        let stdio = process.stdio.clone();
        Ok(StateResponse {
            id: request.id,
            bundle: task.bundle.display().to_string(),
            pid: self.0.pid(),
            status: status.into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.code),
            exited_at: exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = answer(self.0.create(&request))?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = answer(self.0.start(&request.id, &request.exec_id))?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = answer(self.0.delete(&request.id, &request.exec_id))?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        answer(self.0.task(&request.id))?;
        // The guest's own numbers mean nothing here.
        let machine = ProcessInfo {
            pid: self.0.pid(),
            ..ProcessInfo::default()
        };
        Ok(PidsResponse {
            processes: vec![machine],
            ..PidsResponse::default()
        })
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        done(self.0.freeze(&request.id, true))
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        done(self.0.freeze(&request.id, false))
    }

    fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let text = "checkpoint: the state of a container in a machine cannot be saved";
        done(Err(ShimError::Unimplemented(text.into())))
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..
        } = request;
        done(self.0.kill(&id, &exec_id, signal, all))
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        done(self.0.exec(&request))
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let size = (request.width, request.height);
        done(self.0.resize(&request.id, &request.exec_id, size))
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let task = answer(self.0.task(&request.id))?;
        let process = answer(task.process(&request.exec_id))?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::default())
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        done(self.0.update(&request.id, &request.resources.value))
    }

    fn wait(&self, context: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let task = answer(self.0.task(&request.id))?;
        let process = answer(task.process(&request.exec_id))?;
        drop(task);
        // A containerd that restarts leaves its calls behind; the connection's end is a channel's.
        let wanted = || {
            // Nothing ever comes there.
            let told = context.cancel_rx.try_recv();
            !told.is_err_and(|error| error.is_disconnected())
        };
        let gone = || ShimError::State("whoever waited for the process has gone".into());
        let exit = answer(process.wait(wanted).ok_or_else(gone))?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let numbers = answer(self.0.stats(&request.id))?;
        let packed = answer(stats::pack(&numbers))?;
        Ok(StatsResponse {
            stats: MessageField::some(packed),
            ..StatsResponse::default()
        })
    }

    fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.pid(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.shutdown(request.now);
        Ok(Empty::default())
    }
}
