//! Child processes that cannot outlive the test: output kept in a bounded
//! tail, a watchdog that kills at the end of a lifetime, a kill on drop.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::bounded::poll;
use crate::parts::search_path;

/// Lines kept of one process's output.
const TAIL: usize = 400;
/// How long the last words of a process that has ended may be on their way. Something that it
/// started may have its pipe open for ever.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The last lines a process wrote.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn follow(&self, source: impl Read + Send + 'static) -> JoinHandle<()> {
        let tail = self.clone();
        spawn(move || {
            let mut source = BufReader::new(source);
            let mut line = Vec::new();
            while source.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                tail.push(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
        })
    }

    fn push(&self, line: String) {
        let mut lines = self
            .0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if lines.len() == TAIL {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// All lines kept.
    pub fn lines(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .iter()
            .cloned()
            .collect()
    }

    /// The last `count` lines as one text.
    pub fn last(&self, count: usize) -> String {
        let lines = self.lines();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// The first line that contains `text`.
    pub fn find(&self, text: &str) -> Option<String> {
        self.lines().into_iter().find(|line| line.contains(text))
    }
}

/// A running program and everything it started.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pid: Pid,
    output: Tail,
    readers: Vec<JoinHandle<()>>,
    watchdog: Option<(Sender<()>, JoinHandle<()>)>,
    status: Option<ExitStatus>,
}

/// A command for `program` that the kernel kills when the thread that started
/// it ends, so that an interrupted test run leaves nothing behind. A process
/// must therefore not be handed to a thread that lives longer.
pub fn command(program: &Path) -> Command {
    match search_path("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

impl Process {
    /// Starts `command` in a process group of its own. After `lifetime` the
    /// whole group is killed: whoever waits for it then sees it die.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(command: &mut Command, lifetime: Duration) -> std::io::Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let pid = Pid::from_child(&child);
        let output = Tail::default();
        let mut readers = Vec::new();
        readers.extend(child.stdout.take().map(|pipe| output.follow(pipe)));
        readers.extend(child.stderr.take().map(|pipe| output.follow(pipe)));
        let (calm, barked) = channel();
        let tail = output.clone();
        let dog = spawn(move || {
            use std::sync::mpsc::RecvTimeoutError::Timeout;
            if barked.recv_timeout(lifetime) == Err(Timeout) {
                tail.push(format!(
                    "[killed by the rig after {} s]",
                    lifetime.as_secs()
                ));
                let _ = kill_process_group(pid, Signal::KILL);
            }
        });
        Ok(Process {
            child,
            pid,
            output,
            readers,
            watchdog: Some((calm, dog)),
            status: None,
        })
    }

    /// What it wrote to stdout and stderr.
    pub fn output(&self) -> &Tail {
        &self.output
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// How it ended, if it has. Its output is complete then, but for what others write who
    /// have its pipe open a second later.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
            if self.status.is_some() {
                let read = || self.readers.iter().all(JoinHandle::is_finished);
                poll(LAST_WORDS, || read().then_some(()));
            }
        }
        self.status
    }

    /// Sends one signal to the program itself.
    pub fn signal(&mut self, signal: Signal) {
        // Not after it was reaped: the id could belong to someone else by now.
        if self.ended().is_none() {
            let _ = kill_process(self.pid, signal);
        }
    }

    /// Waits at most `limit` for it to end, as [`ended`](Self::ended) has it.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        poll(limit, || self.ended())
    }

    /// Kills the group and reaps the program; its output is complete after this.
    pub fn kill(&mut self) {
        // The group outlives its leader as long as one member runs, and its
        // id stays taken until then.
        let _ = kill_process_group(self.pid, Signal::KILL);
        if let Some((calm, dog)) = self.watchdog.take() {
            drop(calm);
            let _ = dog.join();
        }
        if self.status.is_none() {
            self.status = self.child.wait().ok();
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }

    /// One line on how it ended.
    pub fn epitaph(&mut self) -> String {
        match self.ended() {
            None => "is still running".into(),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with code {code}"),
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (None, None) => "ended".into(),
            },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Process {
        let mut shell = command(Path::new("/bin/sh"));
        Process::start(shell.args(["-c", script]), LIMIT).unwrap()
    }

    #[test]
    fn what_it_wrote_is_there_when_it_has_ended() {
        // The pipe is read to its end, which comes after that of the process here.
        let mut process = shell("echo first; (sleep 0.1; echo last) & exit 3");
        let status = process.wait(LIMIT).expect("an end");
        assert_eq!(process.output().lines(), ["first", "last"]);
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn whoever_keeps_the_pipe_open_keeps_nobody_waiting() {
        let begin = std::time::Instant::now();
        let mut process = shell("sleep 50 & echo said");
        assert!(process.wait(LIMIT).is_some_and(|status| status.success()));
        assert_eq!(process.output().lines(), ["said"]);
        assert!(begin.elapsed() < Duration::from_secs(30));
    }
}
