//! A process of a container as containerd sees it: its streams, its state, its end.
//!
//! The end is told when the outputs have been handed over, so that nobody who waits for it misses
//! the last of them.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use pericarp_api::{ExitReport, host::Guest};
use pericarp_pod::{
    process::{Attached, Name, Wiring, attach_and_start, resize, unreachable},
    pump::{Input, Output},
};

use crate::{
    error::{ShimError, during},
    stdio::{Opened, Stdio},
};

/// How long an output may be silent after the process has ended.
const SILENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(500);
/// How long the three bytes of an exit report may take once the first is there.
const REPORT_LIMIT: Duration = Duration::from_secs(5);
/// Of a process whose machine has gone, as if somebody had killed it.
pub(crate) const LOST: u32 = 137;

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exit {
    pub(crate) code: u32,
    pub(crate) at: SystemTime,
    pub(crate) out_of_memory: bool,
}

impl Exit {
    pub(crate) fn now(code: u32) -> Self {
        Self {
            code,
            at: SystemTime::now(),
            out_of_memory: false,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Phase {
    Created,
    /// Somebody is starting it.
    Starting,
    Running,
    Paused,
    Over(Exit),
}

struct State {
    phase: Phase,
    opened: Option<Opened>,
    stdin_keeper: Option<File>,
    input: Option<Input>,
    size: Option<(u16, u16)>,
}

/// One process.
pub(crate) struct Process {
    /// As the agent knows it.
    pub(crate) name: Name,
    pub(crate) stdio: Stdio,
    state: Mutex<State>,
    changed: Condvar,
}

/// What watches a process that has been started.
pub(crate) struct Watch {
    exit: UnixStream,
    outputs: Vec<Output>,
    ended: Receiver<()>,
}

impl Process {
    /// One that is there already, and has no streams: the pod's.
    pub(crate) fn of_pod() -> Arc<Self> {
        Arc::new(Self::new(
            Name {
                container: String::new(),
                process: String::new(),
            },
            Stdio::default(),
            None,
        ))
    }

    /// Opens the streams of a process that will be started.
    pub(crate) fn create(name: Name, stdio: Stdio) -> Result<Arc<Self>, ShimError> {
        let opened = stdio.open()?;
        Ok(Arc::new(Self::new(name, stdio, Some(opened))))
    }

    fn new(name: Name, stdio: Stdio, mut opened: Option<Opened>) -> Self {
        let stdin_keeper = opened
            .as_mut()
            .and_then(|opened| opened.stdin_keeper.take());
        Self {
            name,
            stdio,
            state: Mutex::new(State {
                phase: Phase::Created,
                opened,
                stdin_keeper,
                input: None,
                size: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state().phase
    }

    pub(crate) fn wiring(&self) -> Wiring {
        Wiring {
            stdin: !self.stdio.stdin.is_empty(),
            terminal: self.stdio.terminal,
        }
    }

    /// Changes the phase, and tells those who wait. False where `from` does not hold.
    pub(crate) fn step(&self, from: impl Fn(Phase) -> bool, to: Phase) -> bool {
        let mut state = self.state();
        if !from(state.phase) {
            return false;
        }
        state.phase = to;
        if matches!(to, Phase::Over(_)) {
            // Its streams end with it.
            state.opened = None;
            state.stdin_keeper = None;
            state.input = None;
        }
        self.changed.notify_all();
        true
    }

    /// Attaches to it and starts it. Give what comes back to [`Process::watch`].
    pub(crate) fn start(&self, guest: &Guest) -> Result<Watch, ShimError> {
        let (opened, size) = {
            let mut state = self.state();
            (state.opened.take(), state.size)
        };
        let opened = opened.ok_or_else(|| ShimError::State("it has no streams".into()))?;
        let client = guest.client().map_err(unreachable)?;
        let attached = attach_and_start(guest, &client, &self.name, self.wiring(), size)?;
        drop(client);
        let (watch, input) = join(opened, attached)?;
        self.state().input = input;
        Ok(watch)
    }

    /// Waits for its end on a thread of its own, and calls `over` with it.
    pub(crate) fn watch(
        self: &Arc<Self>,
        watch: Watch,
        over: impl FnOnce(Exit) + Send + 'static,
    ) -> Result<(), ShimError> {
        thread::Builder::new()
            .name("exit".into())
            .spawn(move || over(watch.wait()))
            .map_err(during("a thread"))?;
        Ok(())
    }

    /// Waits for its end, however long that takes.
    pub(crate) fn wait(&self) -> Exit {
        let mut state = self.state();
        loop {
            if let Phase::Over(exit) = state.phase {
                return exit;
            }
            let changed = self.changed.wait(state);
            state = changed.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends its input, once all that was written to it has been read.
    pub(crate) fn close_stdin(&self) {
        self.state().stdin_keeper = None;
    }

    /// The size its terminal has, or will have.
    pub(crate) fn resize(&self, guest: &Guest, size: (u16, u16)) -> Result<(), ShimError> {
        let phase = {
            let mut state = self.state();
            state.size = Some(size);
            state.phase
        };
        if matches!(phase, Phase::Running | Phase::Paused) {
            let client = guest.client().map_err(unreachable)?;
            resize(&client, &self.name, size)?;
        }
        Ok(())
    }
}

/// Joins the guest's streams to containerd's.
fn join(opened: Opened, attached: Attached) -> Result<(Watch, Option<Input>), ShimError> {
    let failed = || during("a thread");
    let (tell, ended) = channel();
    let mut outputs = Vec::new();
    let mut output = |name, socket, sink: Box<dyn Write + Send>| {
        let tell = tell.clone();
        // A reader that has gone is containerd's business.
        let over = move |_| {
            let _ = tell.send(());
        };
        let output = Output::start(name, socket, sink, over).map_err(failed())?;
        outputs.push(output);
        Ok::<(), ShimError>(())
    };
    output("stdout", attached.stdout, opened.stdout)?;
    if let Some(socket) = attached.stderr {
        output("stderr", socket, opened.stderr)?;
    }
    let input = match (opened.stdin, attached.stdin) {
        (Some(source), Some(socket)) => Some(Input::start(source, socket).map_err(failed())?),
        _ => None,
    };
    let watch = Watch {
        exit: attached.exit,
        outputs,
        ended,
    };
    Ok((watch, input))
}

impl Watch {
    /// Waits for the report, and then for the outputs as long as something comes.
    fn wait(mut self) -> Exit {
        let report = self.report();
        let mut silent = (Instant::now(), self.progress());
        let mut left = self.outputs.len();
        while left > 0 {
            match self.ended.recv_timeout(LOOK) {
                Ok(()) => left -= 1,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let progress = self.progress();
                    if progress != silent.1 {
                        silent = (Instant::now(), progress);
                    } else if silent.0.elapsed() > SILENCE {
                        // Who reads nothing may read it later; who sends nothing is cut.
                        for output in &self.outputs {
                            if output.waits_since().is_some() {
                                output.cut();
                            }
                        }
                        break;
                    }
                }
            }
        }
        match report {
            Ok(report) => Exit {
                code: u32::try_from(report.code()).unwrap_or(LOST),
                at: SystemTime::now(),
                out_of_memory: matches!(
                    report,
                    ExitReport::Signal {
                        out_of_memory: true,
                        ..
                    }
                ),
            },
            Err(_) => Exit::now(LOST),
        }
    }

    fn progress(&self) -> Vec<Option<u64>> {
        self.outputs.iter().map(Output::waits_since).collect()
    }

    fn report(&mut self) -> io::Result<ExitReport> {
        // The first byte may take as long as the process runs.
        let mut fds = [rustix::event::PollFd::new(
            &self.exit,
            rustix::event::PollFlags::IN,
        )];
        while let Err(error) = rustix::event::poll(&mut fds, None) {
            if error != rustix::io::Errno::INTR {
                return Err(error.into());
            }
        }
        self.exit.set_read_timeout(Some(REPORT_LIMIT))?;
        ExitReport::read(&mut self.exit)
    }
}
