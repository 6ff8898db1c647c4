//! Signals, and what follows when a guest does not obey the last of them.
//!
//! A signal is a request to the agent, and a guest that is not ours any more does with it what it
//! likes. So the end of whatever is killed is waited for: where it does not come, the outputs are
//! given up first, since an agent reports an end when they have been handed over, and a reader may
//! have gone. After that the machine is ended, which takes all of its containers along.

use std::{sync::Arc, thread, time::Duration};

use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;

use super::Pod;
use crate::{
    error::{ShimError, during},
    guest,
    process::{Exit, LOST, Phase, Process},
    task::Task,
};

/// SIGKILL, whose number no process is told.
pub(super) const KILL: u32 = 9;
/// How long a guest may take to report the end of what was killed. What its outputs still hold has
/// that long to be read.
const KILL_LIMIT: Duration = Duration::from_secs(15);
/// The same once the outputs have been given up.
const LAST_LIMIT: Duration = Duration::from_secs(5);

impl Pod {
    pub(crate) fn kill(
        self: &Arc<Self>,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ShimError> {
        let task = self.task(id)?;
        let process = task.process(exec)?;
        let facts = json!({"exec_id": exec, "signal": signal, "all": all});
        self.audit.tell("kill", Some(id), facts);
        if exec.is_empty() {
            self.why.told_to_end(id);
        }
        // In one step: who starts it at this moment does not.
        let killed = Exit::now(signal.saturating_add(128));
        if process.step(|phase| matches!(phase, Phase::Created), Phase::Over(killed)) {
            self.told_over(&task, exec, killed);
            return Ok(());
        }
        match process.phase() {
            Phase::Over(_) => Err(ShimError::NotFound(format!(
                "the process of container {id} has ended"
            ))),
            _ if task.is_pod() => {
                let pod = Arc::clone(self);
                // As the pause container does: it takes the one for its end.
                let code = if signal == KILL { LOST } else { 0 };
                let end = move || {
                    pod.end_machine("the pod was stopped");
                    pod.over(&task, "", Exit::now(code));
                };
                let thread = thread::Builder::new().name("end".into()).spawn(end);
                thread.map(drop).map_err(during("a thread"))
            }
            phase => {
                let booted = self.machine()?;
                if signal == KILL {
                    self.see_to_end(&task, &process, all)?;
                    if matches!(phase, Phase::Starting) {
                        // It is killed once it has been started.
                        return Ok(());
                    }
                }
                guest::signal(&booted.guest, &process.name, signal, all)
            }
        }
    }

    /// Sees to it that this process ends, on a thread of its own; once is enough.
    fn see_to_end(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<Process>,
        all: bool,
    ) -> Result<(), ShimError> {
        if !process.doom() {
            return Ok(());
        }
        let (pod, task, doomed) = (Arc::clone(self), Arc::clone(task), Arc::clone(process));
        let see = move || {
            if doomed.wait_started()
                && let Ok(booted) = pod.machine()
            {
                let _ = guest::signal(&booted.guest, &doomed.name, KILL, all);
            }
            if doomed.is_reported_within(KILL_LIMIT) {
                return;
            }
            log::warn!(
                "the guest has not ended container {}, or nobody reads its output, which is cut",
                task.id
            );
            doomed.give_up_outputs();
            if !doomed.is_reported_within(LAST_LIMIT) {
                pod.end_at_once(format!("the guest does not end container {}", task.id));
            }
        };
        let thread = thread::Builder::new().name("kill".into()).spawn(see);
        thread.map(drop).map_err(|error| {
            process.spare();
            during("a thread")(error)
        })
    }

    /// Ends a machine that does not do what it must. The keeper takes it for dead, which it is.
    fn end_at_once(&self, reason: String) {
        let mut state = self.state();
        let Some(handle) = &state.handle else {
            return;
        };
        if let Err(error) = pidfd_send_signal(handle, Signal::KILL) {
            log::error!("{reason}, and its machine cannot be ended: {error}");
            return;
        }
        state.reason.get_or_insert(reason);
    }
}
