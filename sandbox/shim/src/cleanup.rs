//! `delete`: what containerd calls when a shim has gone without having deleted its container.
//!
//! The machine has gone with the shim, since the kernel sees to that. What is left of the pod are
//! processes on their way, mounts, taps and a directory. For a container of a pod whose shim lives
//! there is nothing to do: the pod's end undoes all of it.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::api::DeleteResponse;
use pericarp_network::{Namespace, sweep};
use protobuf::Message;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{
    arguments::Arguments,
    bootstrap,
    bundle::Bundle,
    cgroup,
    directory::{CONTAINERS, Directory},
    error::{ShimError, during},
    events::timestamp,
    mounts,
    process::LOST,
    task::guest_id,
};

/// How the programs begin that a pod starts.
const PROGRAMS: [&str; 3] = ["pericarp-", "qemu-system-", "containerd-shim-pericarp-"];
/// For processes to go.
const LIMIT: Duration = Duration::from_secs(5);
/// For a shim to go that has been told to.
const LEAVING: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

pub(crate) fn delete(arguments: &Arguments) -> Result<Vec<u8>, ShimError> {
    let bundle = match arguments.bundle.as_os_str().is_empty() {
        true => std::env::current_dir().map_err(during("the bundle"))?,
        false => arguments.bundle.clone(),
    };
    // A bundle that is half gone says nothing of a pod.
    let pod = Bundle::read(&bundle).map_or_else(
        |_| arguments.id.clone(),
        |bundle| bundle.pod_id(&arguments.id),
    );
    let directory = Directory::of(&arguments.namespace, &pod);
    let socket = socket(&bundle);
    let shim = [bootstrap::serving(&arguments.namespace, &pod)];
    if pod != arguments.id && !processes_with(&shim).is_empty() {
        // The pod lives, and its volumes are its shim's.
        let name = guest_id(&arguments.id);
        let at = |top: PathBuf| top.join(CONTAINERS).join(&name);
        let (behind, place) = (at(directory.behind()), at(directory.shared()));
        mounts::unmount_below(&place).map_err(during(place.display()))?;
        mounts::remove_place(&behind).map_err(during(behind.display()))?;
    } else {
        // One that is leaving has something to say yet.
        wait_for(LEAVING, || processes_with(&shim).is_empty());
        let [shim] = shim;
        end_processes(&[shim, within(directory.path())]);
        if let Some(path) = directory.network() {
            sweep_network(&path);
        }
        if let Some(group) = directory.group() {
            cgroup::sweep(&group);
        }
        directory.remove()?;
        if let Some(socket) = socket.filter(|socket| !answers(socket)) {
            let _ = fs::remove_file(socket);
        }
    }
    let response = DeleteResponse {
        exit_status: LOST,
        exited_at: timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    };
    response
        .write_to_bytes()
        .map_err(|error| ShimError::Machine(format!("an answer cannot be written: {error}")))
}

/// Where the shim that `start` has named serves, or served.
fn socket(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join("address")).ok()?;
    address.trim().strip_prefix("unix://").map(PathBuf::from)
}

fn answers(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

fn wait_for(limit: Duration, done: impl Fn() -> bool) {
    let end = Instant::now() + limit;
    while !done() && Instant::now() < end {
        thread::sleep(PAUSE);
    }
}

/// How a path in the directory begins.
fn within(directory: &Path) -> Vec<u8> {
    let mut beginning = directory.as_os_str().as_bytes().to_vec();
    beginning.push(b'/');
    beginning
}

/// Ends what still runs of the pod: programs of ours that were started with one of these in their
/// arguments. The shim, should it still be there, comes first.
fn end_processes(parts: &[Vec<u8>]) {
    let end = Instant::now() + LIMIT;
    loop {
        let left = processes_with(parts);
        if left.is_empty() || Instant::now() >= end {
            return;
        }
        for pid in left {
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
                continue;
            };
            // Between the list and the descriptor the id may have changed hands.
            if has_part(pid, parts) {
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
        }
        thread::sleep(PAUSE);
    }
}

fn processes_with(parts: &[Vec<u8>]) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter(|pid| has_part(*pid, parts))
        .collect()
}

fn has_part(pid: Pid, parts: &[Vec<u8>]) -> bool {
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let has = |part: &Vec<u8>| line.windows(part.len()).any(|seen| seen == part);
    parts.iter().any(has) && fs::read_link(process.join("exe")).is_ok_and(|exe| is_ours(&exe))
}

/// Whether a pod may have started this program. Anybody may have the path of a pod's directory in
/// the arguments, who looks into its log.
fn is_ours(program: &Path) -> bool {
    let name = program.file_name().unwrap_or_default().as_bytes();
    PROGRAMS
        .iter()
        .any(|ours| name.starts_with(ours.as_bytes()))
}

fn sweep_network(path: &Path) {
    // A namespace that is gone has taken everything along.
    let Ok(namespace) = Namespace::open(path) else {
        return;
    };
    if let Err(error) = sweep(&namespace) {
        eprintln!("containerd-shim-pericarp-v2: the pod's network: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn processes_are_known_by_the_pods_directory() {
        let base = std::env::temp_dir().join(format!("pericarp-end-{}", std::process::id()));
        let directory = base.join("pod");
        fs::create_dir_all(&directory).unwrap();
        let program = base.join("pericarp-shell");
        fs::copy("/bin/sh", &program).unwrap();
        let sleep = |program: &Path, place: &str| {
            let argument = format!("read line; : {}", base.join(place).display());
            let mut command = Command::new(program);
            let command = command.args(["-c", &argument]).stdin(Stdio::piped());
            command.spawn().unwrap()
        };
        let mut ours = sleep(&program, "pod/a.sock");
        let others = [
            sleep(Path::new("/bin/sh"), "pod/a.sock"),
            sleep(&program, "other/a.sock"),
        ];
        // Whoever waits closes it, and the shell would end by itself.
        let input = ours.stdin.take();
        let reaped = thread::spawn(move || ours.wait().unwrap());
        end_processes(&[within(&directory)]);
        drop(input);
        assert!(!reaped.join().unwrap().success());
        for mut other in others {
            assert!(other.try_wait().unwrap().is_none());
            other.kill().unwrap();
            other.wait().unwrap();
        }
        fs::remove_dir_all(base).unwrap();
    }
}
