//! `--runtime runc`: the same command as a plain container on this host's kernel.
//!
//! Called by `run`. The container runs in namespaces made by runc, within mounts and a PID
//! namespace that end with this process even if it is killed: then the kernel ends the container,
//! unmounts its root and releases the loop devices, and the next run removes the directory and the
//! cgroup. The command is the container's first process, as under podman.

mod isolation;
mod log;
mod root;

use std::{
    fs,
    path::Path,
    process::{Command as Program, Stdio},
};

use pericarp_hypervisor::{Confinement, Process};
use pericarp_oci::user;
use pericarp_pod::PodError;
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal},
};
use serde_json::json;

use crate::{
    failure::{Failure, during},
    input::{check::Root, network::NetworkPlan},
    network::Joined,
    report::Timing,
    run::Command,
    runc::root::Mounts,
    rundir::{CONTAINER_FILE, CONTAINER_STATE, RunDir},
    signals::Signals,
};

const PROGRAM: &str = "runc";
const CURE: &str = "`cargo xtask setup` installs it";
/// What runc has to say, one JSON object a line.
const LOG: &str = "runc.log";

pub(crate) fn run(
    root: Root,
    network: NetworkPlan,
    command: Command,
    run_dir: &RunDir,
    signals: &mut Signals,
    timing: &mut Timing,
) -> Result<i32, Failure> {
    // Before the mounts are private: others see a namespace's.
    let mut network = Joined::join(network, run_dir, signals)?;
    isolation::private_mounts()?;
    // Declared after the directory, so unmounted before the directory is removed.
    let mounts = Mounts::prepare(&root, run_dir, signals)?;
    let id = format!("pericarp-{}", std::process::id());
    let user = user::look_up(mounts.root(), &command.user)
        .map_err(|error| Failure::Runc(error.to_string()))?;
    let mut config = command.spec;
    config["root"]["path"] = json!(mounts.root());
    config["linux"]["cgroupsPath"] = json!(format!("/{id}"));
    config["process"]["user"] = json!({
        "uid": user.uid,
        "gid": user.gid,
        "additionalGids": user.additional_gids,
    });
    network.show_here(&mut config, run_dir)?;
    fs::write(run_dir.join("config.json"), config.to_string())
        .and_then(|()| fs::write(run_dir.join(CONTAINER_FILE), &id))
        .map_err(during("the container's description"))?;
    timing.mark("prepare");
    let outcome = start(run_dir, &id).and_then(|child| wait(child, signals, run_dir));
    timing.mark("command");
    remove_left_over(&run_dir.join(CONTAINER_STATE), &id);
    drop(mounts);
    network.leave(signals);
    outcome
}

fn start(run_dir: &RunDir, id: &str) -> Result<std::process::Child, Failure> {
    let mut command = Program::new(PROGRAM);
    command
        .arg("--root")
        .arg(run_dir.join(CONTAINER_STATE))
        .arg("--log")
        .arg(run_dir.join(LOG))
        .args(["--log-format", "json", "run", "--bundle"])
        .arg(run_dir.path())
        .arg(id);
    isolation::spawn_first_process(command).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => PodError::Program {
            program: PROGRAM.into(),
            source,
            cure: CURE,
        }
        .into(),
        _ => during("the container's namespaces")(source),
    })
}

/// Waits for the container's end and passes signals on.
fn wait(
    mut child: std::process::Child,
    signals: &mut Signals,
    run_dir: &RunDir,
) -> Result<i32, Failure> {
    let pid = Pid::from_child(&child);
    let mut forced = None;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(during(PROGRAM))? {
            break status;
        }
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(during("watching the container"))?;
        // An interrupted wait goes round again.
        let _ = poll(
            &mut [
                PollFd::new(&pidfd, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ],
            None,
        );
        while let Some(number) = signals.next() {
            let signal = if signals.insists(number) {
                forced = Some(number);
                Some(Signal::KILL)
            } else {
                Signal::from_named_raw(i32::from(number))
            };
            if let Some(signal) = signal {
                // One that has just ended needs no signal.
                let _ = rustix::process::pidfd_send_signal(&pidfd, signal);
            }
        }
    };
    if let Some(number) = forced {
        return Err(Failure::Signal(number));
    }
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(0),
        (Some(code), _) => {
            let log = fs::read_to_string(run_dir.join(LOG)).unwrap_or_default();
            log::start_failure(&log).map_or(Ok(code), Err)
        }
        (None, signal) => Err(Failure::Runc(format!(
            "it was killed by signal {}",
            signal.unwrap_or_default()
        ))),
    }
}

/// Removes what runc keeps of a container whose run is over, its cgroup above all.
pub(crate) fn remove_left_over(state: &Path, id: &str) {
    if !state.join(id).is_dir() {
        return;
    }
    let mut command = Program::new(PROGRAM);
    command
        .arg("--root")
        .arg(state)
        .args(["delete", "--force", id])
        .stdout(Stdio::null());
    if let Ok(mut process) = Process::spawn(PROGRAM, command, Confinement::default())
        && process
            .wait_for(std::time::Duration::from_secs(10))
            .is_none_or(|status| !status.success())
    {
        let words = process.describe_end();
        crate::report::warn(&format!(
            "the container '{id}' left a cgroup behind: {words}"
        ));
    }
}
