//! crun, which makes the containers: called as a program, once per act.
//!
//! Used by `container`. It runs detached: it has set the process up and executed it when it ends,
//! and says which process it was in a file. What it has to say about failures is in a log of
//! JSON lines; its standard streams are already the container's.

use std::{
    fs,
    io::{self, Read},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::{
    boot::STATE,
    error::{RequestError, trying},
    reaper::{Reaper, Watch},
    terminal::Console,
};

const PROGRAM: &str = "/bin/crun";
/// Where it keeps what it knows about containers.
const ROOT: &str = "/run/crun";
/// It takes about 0.2 s on an emulated CPU.
const LIMIT: Duration = Duration::from_secs(60);
/// For a killed one to go.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// Longest log that is read.
const MAX_LOG: u64 = 64 * 1024;
/// Longest message that is passed on.
const MAX_MESSAGE: usize = 1024;

/// What a start is for.
pub(crate) enum Act<'a> {
    /// Makes and starts a container from its bundle.
    Run { bundle: &'a Path },
    /// Starts a further process from its process object.
    Exec { process: &'a [u8] },
}

/// A directory for the files of one call, removed with it.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Self, RequestError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Short: a socket's path has 107 bytes at most.
        let path = Path::new(STATE).join(format!("calls/{number}"));
        fs::create_dir_all(&path).map_err(trying(path.display().to_string()))?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What cannot be removed is a few bytes of memory.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn command(place: &Place) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .args(["--root", ROOT, "--cgroup-manager=cgroupfs"])
        .args(["--log-format=json", "--log"])
        .arg(place.file("log"));
    command
}

/// Starts `program` in `container` and watches the process. With a terminal the streams are
/// ignored, and its other end is returned.
pub(crate) fn start(
    reaper: &Reaper,
    container: &str,
    program: &str,
    act: &Act<'_>,
    streams: Option<[Stdio; 3]>,
    watch: Watch,
) -> Result<(Pid, Option<std::os::fd::OwnedFd>), RequestError> {
    let place = Place::new()?;
    let mut command = command(&place);
    match act {
        Act::Run { bundle } => command.args(["run", "--detach", "--bundle"]).arg(bundle),
        Act::Exec { process } => {
            let file = place.file("process");
            fs::write(&file, process).map_err(trying("the process's description"))?;
            command.args(["exec", "--detach", "--process"]).arg(file)
        }
    };
    let pid_file = place.file("pid");
    command.arg("--pid-file").arg(&pid_file);
    let console = match streams {
        Some([stdin, stdout, stderr]) => {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
            None
        }
        None => {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let socket = place.file("tty");
            let console = Console::listen(&socket).map_err(trying("the terminal's socket"))?;
            command.arg("--console-socket").arg(socket);
            Some(console)
        }
    };
    command.arg(container);

    let starting = reaper.starting();
    let ended = run(reaper, &mut command)?;
    // Its copies of the container's streams.
    drop(command);
    let pid = fs::read_to_string(&pid_file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .and_then(Pid::from_raw);
    match (ended, pid) {
        (Some(status), Some(pid)) if status.success() => {
            let terminal = match console.map(Console::receive).transpose() {
                Ok(terminal) => terminal,
                Err(error) => {
                    stop(reaper, starting, pid);
                    return Err(trying("the container's terminal")(error));
                }
            };
            starting.watch(pid, watch);
            Ok((pid, terminal))
        }
        (ended, pid) => {
            // What was set up half, when crun did not get to the end.
            if let Some(pid) = pid {
                stop(reaper, starting, pid);
            }
            Err(explain(program, ended, &log(&place)))
        }
    }
}

/// Kills a process that was started in vain.
fn stop(reaper: &Reaper, starting: crate::reaper::Starting<'_>, pid: Pid) {
    starting.watch(pid, Box::new(|_| {}));
    reaper.signal(pid, Signal::KILL);
}

/// Removes what crun knows of a container, and its control group.
pub(crate) fn delete(reaper: &Reaper, container: &str) -> Result<(), RequestError> {
    if !Path::new(ROOT).join(container).exists() {
        return Ok(());
    }
    let place = Place::new()?;
    let mut command = command(&place);
    command
        .args(["delete", "--force", container])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    match run(reaper, &mut command)? {
        Some(status) if status.success() => Ok(()),
        ended => Err(explain(container, ended, &log(&place))),
    }
}

/// Changes the limits of a container.
pub(crate) fn update(
    reaper: &Reaper,
    container: &str,
    resources: &[u8],
) -> Result<(), RequestError> {
    let place = Place::new()?;
    let file = place.file("resources");
    fs::write(&file, resources).map_err(trying("the container's limits"))?;
    let mut command = command(&place);
    command
        .args(["update", "--resources"])
        .arg(&file)
        .arg(container)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    match run(reaper, &mut command)? {
        Some(status) if status.success() => Ok(()),
        ended => Err(explain(container, ended, &log(&place))),
    }
}

/// Runs crun to its end. None when it had to be killed.
fn run(reaper: &Reaper, command: &mut Command) -> Result<Option<ExitStatus>, RequestError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let watch: Watch = Box::new(move |status| {
        let _ = sender.try_send(status);
    });
    let pid = reaper
        .spawn(command, watch)
        .map_err(trying("crun cannot be started"))?;
    match receiver.recv_timeout(LIMIT) {
        Ok(status) => Ok(Some(status)),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            reaper.signal(pid, Signal::KILL);
            let _ = receiver.recv_timeout(KILL_LIMIT);
            Ok(None)
        }
    }
}

fn log(place: &Place) -> String {
    let mut text = Vec::new();
    let read = |text: &mut Vec<u8>| -> io::Result<usize> {
        fs::File::open(place.file("log"))?
            .take(MAX_LOG)
            .read_to_end(text)
    };
    // Without a log there is the status.
    let _ = read(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// What went wrong, from the end of crun and its log.
fn explain(program: &str, ended: Option<ExitStatus>, log: &str) -> RequestError {
    let said: Vec<String> = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|line| line.get("msg")?.as_str().map(str::to_owned))
        .collect();
    let Some(last) = said.last() else {
        return RequestError::Crun(match ended.map(|status| (status.code(), status.signal())) {
            None => format!("it was not done after {} s", LIMIT.as_secs()),
            Some((_, Some(signal))) => format!("it was killed by signal {signal}"),
            Some((code, None)) => format!("it failed with code {}", code.unwrap_or_default()),
        });
    };
    let message: String = last.chars().take(MAX_MESSAGE).collect();
    let about_program = ["executable file ", "open executable", "exec"]
        .iter()
        .any(|beginning| message.starts_with(beginning));
    if message.starts_with("chdir ") {
        RequestError::Invalid(format!(
            "the working directory of '{program}' cannot be entered: {message}"
        ))
    } else if about_program && message.ends_with(": No such file or directory") {
        RequestError::NotFound(format!("'{program}': no such program in the container"))
    } else if about_program {
        let reason = message.rsplit(": ").next().unwrap_or_default();
        RequestError::Denied(format!(
            "'{program}' cannot be executed in the container: {reason}"
        ))
    } else {
        RequestError::Crun(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(message: &str) -> RequestError {
        let line = format!(
            "{}\n",
            serde_json::json!({"msg": message, "level": "error"})
        );
        explain("nope", Some(ExitStatus::from_raw(256)), &line)
    }

    /// As crun 1.8.1 of Debian 12 says them.
    #[test]
    fn what_crun_says_is_understood() {
        for (message, told) in [
            (
                "executable file `nope` not found in $PATH: No such file or directory",
                "'nope': no such program in the container",
            ),
            (
                "open executable: Permission denied",
                "'nope' cannot be executed in the container: Permission denied",
            ),
            (
                "exec format error: Exec format error",
                "'nope' cannot be executed in the container: Exec format error",
            ),
            (
                "chdir `/x`: No such file or directory",
                "the working directory of 'nope' cannot be entered: \
                 chdir `/x`: No such file or directory",
            ),
            (
                "mount `proc` to `proc`: No such file or directory",
                "crun: mount `proc` to `proc`: No such file or directory",
            ),
        ] {
            assert_eq!(explained(message).to_string(), told);
        }
    }

    #[test]
    fn silence_is_explained_by_the_end() {
        for (ended, told) in [
            (None, "crun: it was not done after 60 s"),
            (Some(9), "crun: it was killed by signal 9"),
            (Some(256), "crun: it failed with code 1"),
        ] {
            let error = explain("nope", ended.map(ExitStatus::from_raw), "no JSON\n{}\n");
            assert_eq!(error.to_string(), told);
        }
    }
}
