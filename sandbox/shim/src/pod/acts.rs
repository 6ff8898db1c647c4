//! What is done with a container once it is there: started, added to, stopped where it is, measured,
//! deleted; and what follows from its end.

use std::{
    io::{ErrorKind, Read},
    sync::Arc,
    thread,
    time::Duration,
};

use containerd_shim_protos::{
    api::ExecProcessRequest,
    events::task::{
        TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
        TaskStart,
    },
};
use pericarp_api::{StreamKind, StreamTarget, agent};
use pericarp_pod::process::{Name, context};
use protobuf::MessageField;
use serde_json::{Value, json};

use super::{Pod, kill::KILL};
use crate::{
    bundle::Kind,
    error::ShimError,
    events::timestamp,
    guest,
    machine::Booted,
    process::{Exit, LOST, Phase, Process, Started},
    spec, stamps,
    stdio::Stdio,
    task::{Added, Task, guest_id},
};

/// How long containerd is not told again that a container wants for memory.
const MEMORY_PAUSE: Duration = Duration::from_secs(1);

impl Pod {
    /// Starts the container, or a process that was added to it.
    pub(crate) fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32, ShimError> {
        let began = stamps::now();
        let task = self.task(id)?;
        let booted = self.machine()?;
        let process = task.process(exec)?;
        let watcher = match task.is_pod() {
            true => None,
            false => {
                let (pod, task, exec) = (Arc::clone(self), Arc::clone(&task), exec.to_owned());
                Some(process.watcher(move |exit| pod.over(&task, &exec, exit))?)
            }
        };
        let created = |phase| matches!(phase, Phase::Created);
        if !process.step(created, Phase::Starting) {
            let text = format!("a process of container {id} has been started, or has ended");
            return Err(ShimError::State(text));
        }
        let starting = |phase| matches!(phase, Phase::Starting);
        let ended = || ShimError::State(format!("container {id} has ended meanwhile"));
        let started = match task.is_pod() {
            true => match process.step(starting, Phase::Running) {
                true => Ok(None),
                false => Err(ended()),
            },
            false => {
                let started = self.launch(&task, exec, &process, &booted, began);
                started.and_then(|started| process.runs(started).map(Some).ok_or_else(ended))
            }
        };
        let watch = match started {
            Ok(watch) => watch,
            Err(error) => {
                // It will not run any more; nobody was told that it does.
                process.step(starting, Phase::Over(Exit::now(LOST)));
                log::error!("container {id} cannot be started: {error}");
                if exec.is_empty() {
                    self.why.refused(id, "start", &error.to_string());
                }
                if !task.is_pod() {
                    // It may run all the same, where the guest's answer was late or we have failed.
                    let all = exec.is_empty();
                    let _ = guest::signal(&booted.guest, &process.name, KILL, all);
                }
                return Err(error);
            }
        };
        if exec.is_empty() {
            self.events.publish(&TaskStart {
                container_id: id.to_owned(),
                pid: booted.pid,
                ..TaskStart::default()
            });
        } else {
            self.events.publish(&TaskExecStarted {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                pid: booted.pid,
                ..TaskExecStarted::default()
            });
        }
        if exec.is_empty() && !task.is_pod() {
            self.watch_memory(&task, &booted);
        }
        // Its end is not told before its start.
        if let (Some(watcher), Some(watch)) = (watcher, watch) {
            // It waits for nothing else.
            let _ = watcher.send(watch);
        }
        Ok(booted.pid)
    }

    fn launch(
        &self,
        task: &Task,
        exec: &str,
        process: &Process,
        booted: &Booted,
        began: Duration,
    ) -> Result<Started, ShimError> {
        if !exec.is_empty() {
            let request = agent::CreateProcessRequest {
                container: process.name.container.clone(),
                process: process.name.process.clone(),
                spec: task.added(exec)?.spec.to_vec(),
                streams: MessageField::some(process.wiring().streams()),
                user_in_spec: true,
                ..agent::CreateProcessRequest::default()
            };
            guest::ask(&booted.guest, |client| {
                client.create_process(context(), &request)
            })?;
        }
        if !exec.is_empty() {
            return process.start(&booted.guest, || {});
        }
        let (stamps, id) = (Arc::clone(&self.stamps), task.id.clone());
        let started = process.start(&booted.guest, move || {
            stamps.of(&id, "output", began);
        })?;
        self.stamps.of(&task.id, "start", began);
        Ok(started)
    }

    /// A process has ended.
    pub(super) fn over(&self, task: &Task, exec: &str, exit: Exit) {
        let Ok(process) = task.process(exec) else {
            return;
        };
        let is_command = exec.is_empty() && !task.is_pod();
        let out_of_memory = is_command && self.ran_out_of_memory(task, exit);
        let mut noteworthy = None;
        if is_command && self.machine().is_ok() {
            // Where the first process was not the one, that was told before.
            match exit.out_of_memory {
                true => {
                    self.audit.tell("out-of-memory", Some(&task.id), json!({}));
                    self.why.out_of_memory(&task.id, true);
                }
                false => noteworthy = self.why.noteworthy(&task.id, exit),
            }
        }
        if out_of_memory {
            self.events.publish(&TaskOOM {
                container_id: task.id.clone(),
                ..TaskOOM::default()
            });
        }
        if process.step(|phase| !matches!(phase, Phase::Over(_)), Phase::Over(exit)) {
            self.told_over(task, exec, exit);
        }
        // Last: it looks at the volumes, one of which may be a dead server's, and nobody waits for that
        // to stop or delete the container.
        if let Some(what) = noteworthy {
            self.why.ended(what);
        }
    }

    /// Has containerd told that a process has ended.
    pub(super) fn told_over(&self, task: &Task, exec: &str, exit: Exit) {
        let pid = self.pid();
        self.events.publish(&TaskExit {
            container_id: task.id.clone(),
            id: match exec {
                "" => task.id.clone(),
                exec => exec.to_owned(),
            },
            pid,
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..TaskExit::default()
        });
    }

    /// Has containerd told whenever processes of the container are killed for want of memory. What
    /// ends the container itself is told at its end, should this come later.
    fn watch_memory(self: &Arc<Self>, task: &Arc<Task>, booted: &Booted) {
        let (guest, pod, task) = (booted.guest.clone(), Arc::clone(self), Arc::clone(task));
        let watch = move || {
            let target = StreamTarget {
                kind: StreamKind::OutOfMemory,
                container: task.guest_name().to_owned(),
                process: String::new(),
            };
            // A container that has ended meanwhile has nothing more to tell.
            let Ok(connection) = guest.attach(&target) else {
                return;
            };
            if !connection
                .try_clone()
                .is_ok_and(|copy| task.watch_memory(copy))
            {
                return;
            }
            tell_of_memory(connection, MEMORY_PAUSE, || {
                pod.why.out_of_memory(&task.id, false);
                pod.audit.tell("out-of-memory", Some(&task.id), json!({}));
                pod.events.publish_if_few_wait(&TaskOOM {
                    container_id: task.id.clone(),
                    ..TaskOOM::default()
                });
            });
        };
        if let Err(error) = thread::Builder::new().name("memory".into()).spawn(watch) {
            log::warn!("a container's memory is not watched: {error}");
        }
    }

    /// Whether the kernel has killed a process of the container, its own or another.
    fn ran_out_of_memory(&self, task: &Task, exit: Exit) -> bool {
        exit.out_of_memory
            || self
                .machine()
                .and_then(|booted| self.meter.read(&booted.guest, task.guest_name()))
                .is_ok_and(|answer| answer.container.oom_kills > 0)
    }

    pub(crate) fn exec(&self, request: &ExecProcessRequest) -> Result<(), ShimError> {
        let task = self.task(&request.id)?;
        if task.is_pod() {
            let text = "exec: the pod itself runs nothing; name one of its containers";
            return Err(ShimError::Unimplemented(text.into()));
        }
        if !matches!(task.own.phase(), Phase::Running) {
            let text = format!("container {} is not running", request.id);
            return Err(ShimError::State(text));
        }
        let mut object: Value = serde_json::from_slice(&request.spec.value).map_err(|error| {
            ShimError::Invalid(format!("the process's description is no object: {error}"))
        })?;
        spec::process(&mut object)?;
        object["terminal"] = request.terminal.into();
        let facts = json!({
            "exec_id": request.exec_id,
            "args": object["args"],
            "user": object["user"],
            "terminal": request.terminal,
        });
        self.audit.tell("exec", Some(&request.id), facts);
        let name = Name {
            container: task.guest_name().to_owned(),
            process: guest_id(&request.exec_id),
        };
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let added = Added {
            process: Process::create(name, stdio)?,
            spec: object.to_string().into_bytes().into(),
        };
        task.add(&request.exec_id, added)?;
        self.events.publish(&TaskExecAdded {
            container_id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            ..TaskExecAdded::default()
        });
        Ok(())
    }

    /// Deletes a container that has ended, or a process that was added to it; one that was never
    /// started has ended by that.
    pub(crate) fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit), ShimError> {
        let task = match exec {
            "" => self.unwanted_task(id)?,
            _ => self.task(id)?,
        };
        let process = task.process(exec)?;
        // Who starts it at this moment sees one of the two.
        process.step(
            |phase| matches!(phase, Phase::Created),
            Phase::Over(Exit::now(0)),
        );
        let Phase::Over(exit) = process.phase() else {
            let text = format!("a process of container {id} is still running");
            return Err(ShimError::State(text));
        };
        let pid = self.pid();
        if !exec.is_empty() {
            process.cut();
            task.forget(exec);
            self.told_deleted(id, exec, pid, exit);
            return Ok((pid, exit));
        }
        self.take_away(&task);
        self.why.forget(id);
        if task.kind != Kind::Member {
            self.end_machine("the pod was deleted");
        }
        self.state().tasks.remove(id);
        self.told_deleted(id, "", pid, exit);
        Ok((pid, exit))
    }

    fn told_deleted(&self, id: &str, exec: &str, pid: u32, exit: Exit) {
        self.events.publish(&TaskDelete {
            container_id: id.to_owned(),
            id: exec.to_owned(),
            pid,
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..TaskDelete::default()
        });
    }

    pub(crate) fn freeze(&self, id: &str, frozen: bool) -> Result<(), ShimError> {
        let task = self.task(id)?;
        if task.is_pod() {
            let text = "pause: the pod itself runs nothing; name one of its containers";
            return Err(ShimError::Unimplemented(text.into()));
        }
        let is_so = |phase| match frozen {
            true => matches!(phase, Phase::Running),
            false => matches!(phase, Phase::Paused),
        };
        if !is_so(task.own.phase()) {
            let text = format!(
                "container {id} is not {}",
                if frozen { "running" } else { "paused" }
            );
            return Err(ShimError::State(text));
        }
        guest::freeze(&self.machine()?.guest, task.guest_name(), frozen)?;
        let container_id = id.to_owned();
        if frozen {
            task.own.step(is_so, Phase::Paused);
            self.events.publish(&TaskPaused {
                container_id,
                ..TaskPaused::default()
            });
        } else {
            task.own.step(is_so, Phase::Running);
            self.events.publish(&TaskResumed {
                container_id,
                ..TaskResumed::default()
            });
        }
        Ok(())
    }

    /// Changes a container's limits; the machine keeps its size.
    pub(crate) fn update(&self, id: &str, resources: &[u8]) -> Result<(), ShimError> {
        let task = self.task(id)?;
        if task.is_pod() {
            return Ok(());
        }
        let resources: Value = serde_json::from_slice(resources)
            .map_err(|error| ShimError::Invalid(format!("resources: are no object: {error}")))?;
        let limits = spec::limits(&resources)?.to_string().into_bytes();
        guest::update(&self.machine()?.guest, task.guest_name(), limits)
    }

    pub(crate) fn stats(&self, id: &str) -> Result<agent::StatsResponse, ShimError> {
        let task = self.task(id)?;
        self.meter.read(&self.machine()?.guest, task.guest_name())
    }

    pub(crate) fn resize(&self, id: &str, exec: &str, size: (u32, u32)) -> Result<(), ShimError> {
        let number = |number: u32| {
            u16::try_from(number)
                .map_err(|_| ShimError::Invalid(format!("no terminal has a size of {number}")))
        };
        let size = (number(size.0)?, number(size.1)?);
        let process = self.task(id)?.process(exec)?;
        process.resize(&self.machine()?.guest, size)
    }
}

/// Calls `tell` when something comes, and not again before `pause` has gone by: what comes is the
/// guest's, and may be as much as it likes.
fn tell_of_memory(mut connection: impl Read, pause: Duration, mut tell: impl FnMut()) {
    let mut bytes = [0; 4096];
    loop {
        match connection.read(&mut bytes) {
            Ok(1..) => {
                tell();
                thread::sleep(pause);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream, time::Instant};

    use super::*;

    #[test]
    fn a_guest_that_never_stops_is_heard_now_and_then() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (length, pause) = (Duration::from_millis(500), Duration::from_millis(50));
        let begin = Instant::now();
        let talk = thread::spawn(move || {
            let mut write = || guest.write_all(&[1; 64]).is_ok();
            while begin.elapsed() < length && write() {}
        });
        let mut told = 0;
        tell_of_memory(ours.take(16 << 10), pause, || told += 1);
        // The connection is dropped with what it still holds.
        talk.join().unwrap();
        let most = begin.elapsed().as_millis() / pause.as_millis() + 1;
        assert!((1..=most).contains(&told), "{told} of {most}");

        let (mut guest, ours) = UnixStream::pair().unwrap();
        guest.write_all(&[1; 3]).unwrap();
        drop(guest);
        let mut told = 0;
        tell_of_memory(ours, pause, || told += 1);
        assert_eq!(told, 1);
    }
}
