//! Carries a plan out: the steps common to both runtimes.
//!
//! Called by `main` with a valid plan. Whatever is created belongs to a value here or below, so
//! that returning, on any path, removes it.

use std::io::IsTerminal;

use pericarp_api::ExitReport;
use pericarp_pod::process::Wiring;
use serde_json::{Value, json};

use crate::{
    container,
    detach::{self, Half, Ready},
    failure::{Failure, during},
    guest::session::Ends,
    input::check::{Plan, RuntimePlan},
    log::Log,
    registry::{Record, Status, now},
    report::{self, Timing},
    runc,
    rundir::RunDir,
    signals::Signals,
    terminal, vm,
};

/// What both runtimes start.
#[derive(Debug)]
pub(crate) struct Command {
    /// OCI runtime configuration without root, user and cgroup.
    pub(crate) spec: Value,
    /// By name or number; empty: root.
    pub(crate) user: String,
    pub(crate) hostname: String,
    pub(crate) wiring: Wiring,
}

/// How a run ended for the process that asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With this exit code.
    Here(i32),
    /// It goes on in the background, or failed there and said so.
    Elsewhere(i32),
}

/// Runs the command.
pub(crate) fn run(plan: Plan, timing: &mut Timing) -> Result<Ended, Failure> {
    let ready = match plan.detach.then(detach::split).transpose()? {
        None => None,
        Some(Half::Run(ready)) => Some(ready),
        Some(Half::Failed(code)) => return Ok(Ended::Elsewhere(code)),
        Some(Half::Started) => {
            println!("{}", plan.id);
            return Ok(Ended::Elsewhere(0));
        }
    };
    let mut signals = Signals::block()?;
    let command = Command {
        spec: container::spec(&plan),
        user: plan.process.user.clone(),
        hostname: container::HOSTNAME.to_owned(),
        wiring: plan.wiring,
    };
    let mut record = record(&plan, &command);
    let mut run_dir = RunDir::create(&record)?;
    let result = attended(
        plan,
        command,
        ready,
        &mut record,
        &run_dir,
        &mut signals,
        timing,
    );
    if record.status == Status::Created {
        run_dir.forget();
    } else if record.detached {
        record.status = Status::Exited;
        record.finished = Some(now());
        match &result {
            Ok(code) => record.exit_code = Some(*code),
            Err(failure) => {
                record.exit_code = Some(failure.exit_code());
                record.error = Some(failure.to_string());
            }
        }
        record
            .write(run_dir.path())
            .map_err(during("the run's record"))?;
    }
    result.map(Ended::Here)
}

/// What `ps` and the others will know of the run.
fn record(plan: &Plan, command: &Command) -> Record {
    Record {
        id: plan.id.clone(),
        name: plan.name.clone(),
        pid: std::process::id(),
        runtime: match plan.runtime {
            RuntimePlan::Vm(_) => "vm".into(),
            RuntimePlan::Runc => "runc".into(),
        },
        image: plan.root_name.clone(),
        command: plan.process.args.clone(),
        created: now(),
        detached: plan.detach,
        // 1 to 64.
        stop_signal: u8::try_from(plan.process.stop_signal).unwrap_or_default(),
        process: json!({"process": command.spec["process"]}),
        ..Record::default()
    }
}

/// Runs the command with a directory of its own.
fn attended(
    plan: Plan,
    command: Command,
    mut ready: Option<Ready>,
    record: &mut Record,
    run_dir: &RunDir,
    signals: &mut Signals,
    timing: &mut Timing,
) -> Result<i32, Failure> {
    let wiring = command.wiring;
    let ends = if plan.detach {
        let (stdout, stderr) = Log::create(run_dir.path()).map_err(during("the run's log"))?;
        Ends {
            stdin: None,
            stdout: Box::new(stdout),
            stderr: Box::new(stderr),
        }
    } else {
        Ends::ours(wiring.stdin).map_err(during("the standard streams"))?
    };
    let joins_terminal = wiring.terminal && wiring.stdin;
    if joins_terminal && !std::io::stdin().is_terminal() {
        report::warn("standard input is no terminal, so '-t' shows what comes back and no more");
    }
    let mut raw = None;
    let mut started = || {
        record.status = Status::Running;
        record
            .write(run_dir.path())
            .map_err(during("the run's record"))?;
        if let Some(ready) = ready.take() {
            ready.tell()?;
        }
        if joins_terminal {
            raw = terminal::Raw::enter().map_err(during("the terminal"))?;
        }
        Ok(())
    };
    match plan.runtime {
        RuntimePlan::Vm(vm_plan) => {
            let job = vm::Job {
                plan: *vm_plan,
                root: plan.root,
                volumes: plan.volumes,
                network: plan.network,
                command,
                run_dir,
                ends,
                started: &mut started,
            };
            let report = vm::run(job, signals, timing);
            // Before anything is said about it.
            drop(raw);
            let report = report?;
            if let ExitReport::Signal {
                out_of_memory: true,
                ..
            } = report
            {
                report::warn(report::OUT_OF_MEMORY);
            }
            Ok(report.code())
        }
        // runc joins the terminal to the container by itself.
        RuntimePlan::Runc => runc::run(plan.root, plan.network, command, run_dir, signals, timing),
    }
}
