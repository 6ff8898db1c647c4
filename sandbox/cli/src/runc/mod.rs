//! `--runtime runc`: the same command in a plain container on this host's kernel.
//!
//! Called by `run`. The container runs in namespaces made by runc, within mounts and a PID
//! namespace that end with this process even if it is killed: then the kernel ends the container,
//! unmounts its root and releases the loop device, and the next run removes the directory and the
//! cgroup. The command is the container's first process, as under podman.

mod bundle;
mod isolation;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use pericarp_hypervisor::{Confinement, Process};
use pericarp_protocol::Limits;
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal},
};

use crate::{
    failure::{Failure, during},
    input::check::Root,
    report::Timing,
    rootdir::run_to_end,
    rundir::{CONTAINER_FILE, CONTAINER_STATE, Contents, RunDir},
    signals::Signals,
};

const PROGRAM: &str = "runc";
const CURE: &str = "`cargo xtask setup` installs it";

pub(crate) fn run(
    root: Root,
    limits: Limits,
    command: Vec<String>,
    signals: &mut Signals,
    timing: &mut Timing,
) -> Result<i32, Failure> {
    let contents = match root {
        Root::Image(_) => Contents::Small,
        Root::Directory(_) => Contents::Large,
    };
    let run_dir = RunDir::create(contents)?;
    isolation::private_mounts()?;
    // Declared after the directory, so unmounted before the directory is removed.
    let mounts = Mounts::prepare(&root, &run_dir, signals)?;
    let read_only = matches!(&root, Root::Image(image) if image.read_only);
    let id = format!("pericarp-{}", std::process::id());
    let config = bundle::config(&command, limits, &mounts.root, read_only, &id);
    fs::write(run_dir.join("config.json"), config.to_string())
        .and_then(|()| fs::write(run_dir.join(CONTAINER_FILE), &id))
        .map_err(during("the container's description"))?;
    timing.mark("prepare");
    let outcome = start(&run_dir, &id).and_then(|child| wait(child, signals, &run_dir));
    timing.mark("command");
    remove_left_over(&run_dir.join(CONTAINER_STATE), &id);
    drop(mounts);
    outcome
}

fn start(run_dir: &RunDir, id: &str) -> Result<std::process::Child, Failure> {
    let mut command = Command::new(PROGRAM);
    command
        .arg("--root")
        .arg(run_dir.join(CONTAINER_STATE))
        .arg("--log")
        .arg(run_dir.join("log"))
        .args(["--log-format", "json", "run", "--bundle"])
        .arg(run_dir.path())
        .arg(id);
    isolation::spawn_first_process(command).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Failure::Program {
            program: PROGRAM.into(),
            source,
            cure: CURE,
        },
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
            let log = fs::read_to_string(run_dir.join("log")).unwrap_or_default();
            bundle::start_failure(&log).map_or(Ok(code), Err)
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
    let mut command = Command::new(PROGRAM);
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

/// The container's root, mounted where only this run and its children see it.
struct Mounts {
    root: PathBuf,
    /// In the order of mounting.
    mounted: Vec<PathBuf>,
}

impl Mounts {
    fn prepare(root: &Root, run_dir: &RunDir, signals: &mut Signals) -> Result<Self, Failure> {
        let make = |name: &str| {
            let path = run_dir.join(name);
            fs::create_dir(&path).map_err(during(format!("'{}'", path.display())))?;
            Ok(path)
        };
        let target = make("rootfs")?;
        let mut mounts = Self {
            root: target.clone(),
            mounted: Vec::new(),
        };
        match root {
            Root::Image(image) => {
                // The loop device detaches itself when the last mount of it goes.
                let options = if image.read_only {
                    "loop,nodev,ro"
                } else {
                    "loop,nodev"
                };
                let mut command = Command::new("mount");
                command
                    .args(["-t", "ext4", "-o", options])
                    .args([&image.path, &target]);
                run_to_end("mount", command, signals)?;
                mounts.mounted.push(target);
            }
            Root::Directory(directory) => {
                // Bound first, because an overlay's options cannot hold every path.
                let lower = make("lower")?;
                rustix::mount::mount_bind(directory, &lower)
                    .map_err(during(format!("'{}'", directory.display())))?;
                mounts.mounted.push(lower.clone());
                let (upper, work) = (make("upper")?, make("work")?);
                isolation::mount_overlay(&lower, &upper, &work, &target).map_err(during(
                    "the directory's writable layer (set TMPDIR to a directory of a local disk)",
                ))?;
                mounts.mounted.push(target);
            }
        }
        Ok(mounts)
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for path in self.mounted.iter().rev() {
            isolation::unmount_or_end(path);
        }
    }
}
