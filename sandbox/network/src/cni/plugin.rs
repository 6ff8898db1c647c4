//! Runs one plugin once: the configuration goes in, a result or an error comes out, and both
//! time and output are bounded. A plugin ends with us, however we end.
#![expect(unsafe_code)]
// UNSAFETY: what a child does before it becomes the plugin.

use std::{
    io::{self, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Child, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    process::{Pid, Signal, getpid, getppid, kill_process_group, set_parent_process_death_signal},
};
use serde_json::Value;

use super::{CniError, Invocation, joined, one_line};

/// Bytes that a plugin may print.
const MOST: usize = 1 << 20;
/// How long output may still come after the plugin has ended, from programs that it has left.
const GRACE: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(10);

/// What a plugin is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Add,
    Del,
}

impl Command {
    fn name(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
        }
    }
}

/// Asked every few milliseconds whether to go on; true ends the plugin.
pub(super) type Stop<'a> = &'a mut dyn FnMut() -> bool;

/// Runs it and reads its result, which only ADD has.
pub(super) fn run(
    program: &Path,
    kind: &str,
    command: Command,
    invocation: &Invocation,
    input: &[u8],
    stop: Stop<'_>,
) -> Result<Value, CniError> {
    let plugin = || kind.to_owned();
    let name = command.name();
    let failed = |how: String| CniError::Failed {
        plugin: plugin(),
        command: name,
        how,
    };
    let started = |source| CniError::Start {
        plugin: plugin(),
        source,
    };
    let mut process = std::process::Command::new(program);
    process
        .env_clear()
        .env("CNI_COMMAND", name)
        .env("CNI_CONTAINERID", &invocation.container_id)
        .env("CNI_NETNS", &invocation.namespace)
        .env("CNI_IFNAME", &invocation.interface)
        .env("CNI_PATH", joined(&invocation.plugin_dirs))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // For all that it starts to be killed with it.
        .process_group(0);
    if let Some(path) = std::env::var_os("PATH") {
        process.env("PATH", path);
    }
    end_with_us(&mut process);
    let child = process.spawn().map_err(started)?;
    let ended = Talk::new(child, input)
        .and_then(|talk| talk.until(Instant::now() + invocation.time_limit, stop))
        .map_err(started)?;
    let (status, output, errors) = match ended {
        Ended::Exited {
            status,
            output,
            errors,
        } => (status, output, errors),
        Ended::Late => {
            return Err(CniError::TimeLimit {
                plugin: plugin(),
                command: name,
                seconds: invocation.time_limit.as_secs_f64(),
            });
        }
        Ended::Stopped => {
            return Err(CniError::Stopped {
                plugin: plugin(),
                command: name,
            });
        }
        Ended::Noisy => return Err(failed(format!("it has printed more than {MOST} bytes"))),
    };
    let answer = serde_json::from_slice::<Value>(&output);
    if status.success() {
        return match (command, answer) {
            (Command::Del, _) => Ok(Value::Null),
            (Command::Add, Ok(result @ Value::Object(_))) => Ok(result),
            (Command::Add, _) => Err(failed("what it has printed is no result".to_owned())),
        };
    }
    let answer = answer.unwrap_or_default();
    let Some(code) = answer.get("code").and_then(Value::as_u64) else {
        let said = one_line(&String::from_utf8_lossy(&errors));
        let said = match said.is_empty() {
            true => one_line(&String::from_utf8_lossy(&output)),
            false => said,
        };
        return Err(failed(format!("{status}: {said}")));
    };
    let text = |key| one_line(answer.get(key).and_then(Value::as_str).unwrap_or_default());
    let details = text("details");
    Err(CniError::Refused {
        plugin: plugin(),
        command: name,
        code,
        message: match details.is_empty() {
            true => text("msg"),
            false => format!("{}; {details}", text("msg")),
        },
    })
}

enum Ended {
    Exited {
        status: ExitStatus,
        output: Vec<u8>,
        errors: Vec<u8>,
    },
    Late,
    Stopped,
    Noisy,
}

/// One that goes on after us would be at work while the next run takes down what it has made.
/// Ends with this thread, which waits for it.
fn end_with_us(command: &mut std::process::Command) {
    let parent = getpid();
    // SAFETY: between fork and exec, two system calls and nothing that allocates or locks.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            match getppid() == Some(parent) {
                true => Ok(()),
                // We were gone before that.
                false => Err(io::ErrorKind::BrokenPipe.into()),
            }
        });
    }
}

/// A plugin that runs. Killed with all that it has started, if it is dropped before its end.
struct Talk<'a> {
    child: Child,
    /// What it has still to read.
    input: &'a [u8],
    output: Vec<u8>,
    errors: Vec<u8>,
    ended: bool,
}

impl<'a> Talk<'a> {
    fn new(child: Child, input: &'a [u8]) -> io::Result<Self> {
        let talk = Self {
            child,
            input,
            output: Vec::new(),
            errors: Vec::new(),
            ended: false,
        };
        let child = &talk.child;
        let pipes = [
            child.stdin.as_ref().map(AsFd::as_fd),
            child.stdout.as_ref().map(AsFd::as_fd),
            child.stderr.as_ref().map(AsFd::as_fd),
        ];
        for pipe in pipes.into_iter().flatten() {
            fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?;
        }
        Ok(talk)
    }

    fn until(mut self, deadline: Instant, stop: Stop<'_>) -> io::Result<Ended> {
        let mut end: Option<(ExitStatus, Instant)> = None;
        loop {
            self.pass()?;
            if self.output.len() > MOST || self.errors.len() > MOST {
                return Ok(Ended::Noisy);
            }
            if end.is_none() {
                end = self
                    .child
                    .try_wait()?
                    .map(|status| (status, Instant::now()));
                if end.is_some() {
                    // What it said last.
                    continue;
                }
            }
            let silent = self.child.stdout.is_none() && self.child.stderr.is_none();
            if let Some((status, since)) = end
                && (silent || since.elapsed() > GRACE)
            {
                self.ended = true;
                return Ok(Ended::Exited {
                    status,
                    output: std::mem::take(&mut self.output),
                    errors: std::mem::take(&mut self.errors),
                });
            }
            if Instant::now() > deadline {
                return Ok(Ended::Late);
            }
            if end.is_none() && stop() {
                return Ok(Ended::Stopped);
            }
            match silent {
                // Its end is all that is still to come, and near.
                true => sleep(TICK / 10),
                false => self.wait()?,
            }
        }
    }

    /// Waits for something to read or to write, for a tick at most.
    fn wait(&self) -> io::Result<()> {
        let child = &self.child;
        let pipes = [
            (child.stdin.as_ref().map(AsFd::as_fd), PollFlags::OUT),
            (child.stdout.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (child.stderr.as_ref().map(AsFd::as_fd), PollFlags::IN),
        ];
        let open = pipes
            .iter()
            .filter_map(|&(pipe, flags)| Some((pipe?, flags)));
        let mut pipes: Vec<_> = open
            .map(|(pipe, flags)| PollFd::from_borrowed_fd(pipe, flags))
            .collect();
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: TICK.subsec_nanos().into(),
        };
        match poll(&mut pipes, Some(&tick)) {
            Err(rustix::io::Errno::INTR) => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    /// Passes on what can be passed on now.
    fn pass(&mut self) -> io::Result<()> {
        if let Some(pipe) = &mut self.child.stdin {
            let written = loop {
                if self.input.is_empty() {
                    break Ok(0);
                }
                match pipe.write(self.input) {
                    Ok(count) => self.input = &self.input[count..],
                    Err(error) => break Err(error),
                }
            };
            match written {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // All is written, or it does not read, which is its own affair.
                _ => self.child.stdin = None,
            }
        }
        if let Some(pipe) = &mut self.child.stdout
            && drain(pipe, &mut self.output)?
        {
            self.child.stdout = None;
        }
        if let Some(pipe) = &mut self.child.stderr
            && drain(pipe, &mut self.errors)?
        {
            self.child.stderr = None;
        }
        Ok(())
    }
}

impl Drop for Talk<'_> {
    fn drop(&mut self) {
        if !self.ended {
            if let Some(group) = Pid::from_raw(self.child.id() as i32) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = self.child.wait();
        }
    }
}

/// Reads what is there, a little more than the limit at most. True at the end.
fn drain(pipe: &mut impl Read, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 16 << 10];
    while into.len() <= MOST {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(count) => into.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}
