//! A process: its streams, and its end.
//!
//! Registered by `container`, attached to by `streams`, started by `container`, ended by the
//! reaper. A stream flows once both sides are there: the host's connection and the process's pipe.
//! The report of the end goes out when the outputs that the host has attached have been handed
//! over. All state of one process is under one lock, and nothing waits while it holds that.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::{ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use pericarp_api::{ExitReport, StreamKind, agent::Streams};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    net::{SendFlags, Shutdown, send, shutdown},
    process::Pid,
};

use crate::{
    container::Container,
    error::{RequestError, trying},
    pump, terminal,
};

/// What a thread that moves bytes needs.
pub(crate) const STACK: usize = 64 * 1024;

/// Why a connection does not become a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unattached {
    NoSuchStream,
    Taken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Registered,
    Starting,
    Running(Pid),
    /// Ended, or could not be started.
    Over(Option<ExitReport>),
}

/// One of the three standard streams.
#[derive(Debug, Default)]
struct Flow {
    /// The host will attach it.
    declared: bool,
    /// The host has attached it, and it has not been handed over to its end.
    attached: bool,
    /// The host's side, while it waits for the process's.
    connection: Option<OwnedFd>,
    /// The process's side, while it waits for the host's.
    pipe: Option<Arc<OwnedFd>>,
    /// It has flowed, or never will.
    done: bool,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// By the number of their kind.
    flows: [Flow; 3],
    exit: Option<OwnedFd>,
    reported: bool,
    terminal: Option<Arc<OwnedFd>>,
    /// Columns and rows.
    size: Option<(u16, u16)>,
}

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    /// Empty for the container's own.
    id: String,
    has_terminal: bool,
    container: Weak<Container>,
    state: Mutex<State>,
    /// Readable from the process's end on.
    over: OwnedFd,
    ended: Condvar,
}

const FLOWS: [StreamKind; 3] = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr];

/// The number of a standard stream.
fn index(kind: StreamKind) -> Option<usize> {
    FLOWS.iter().position(|flow| *flow == kind)
}

impl Process {
    pub(crate) fn register(
        container: Weak<Container>,
        id: &str,
        has_terminal: bool,
        streams: &Streams,
    ) -> Result<Arc<Self>, RequestError> {
        let over =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(trying("a process cannot be registered"))?;
        let flows = [streams.stdin, streams.stdout, streams.stderr].map(|declared| Flow {
            declared,
            ..Flow::default()
        });
        Ok(Arc::new(Self {
            id: id.to_owned(),
            has_terminal,
            container,
            state: Mutex::new(State {
                phase: Phase::Registered,
                flows,
                exit: None,
                reported: false,
                terminal: None,
                size: None,
            }),
            over,
            ended: Condvar::new(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends this program, so nobody sees a state left half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.has_terminal
    }

    /// Its id in the guest, while it runs.
    pub(crate) fn pid(&self) -> Option<Pid> {
        match self.state().phase {
            Phase::Running(pid) => Some(pid),
            _ => None,
        }
    }

    /// Whether it has been started and has ended, or could not be started.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state().phase, Phase::Over(_))
    }

    /// A descriptor that is readable from its end on.
    pub(crate) fn over(&self) -> BorrowedFd<'_> {
        self.over.as_fd()
    }

    /// Waits for its end. False when it is not over after `limit`.
    pub(crate) fn wait_over(&self, limit: Duration) -> bool {
        let state = self.state();
        let running =
            |state: &mut State| matches!(state.phase, Phase::Running(_) | Phase::Starting);
        let (_state, outcome) = self
            .ended
            .wait_timeout_while(state, limit, running)
            .unwrap_or_else(PoisonError::into_inner);
        !outcome.timed_out()
    }

    /// Reserves a stream for a connection. The caller answers the host and then hands the
    /// connection over with [`Process::hand_over`], or gives up with [`Process::release`].
    pub(crate) fn reserve(&self, kind: StreamKind) -> Result<(), Unattached> {
        let mut state = self.state();
        let Some(index) = index(kind) else {
            return match &state.exit {
                _ if state.reported => Err(Unattached::NoSuchStream),
                Some(connection) if !has_hung_up(connection) => Err(Unattached::Taken),
                _ => Ok(()),
            };
        };
        let flow = &mut state.flows[index];
        if !flow.declared || (flow.done && !flow.attached) {
            return Err(Unattached::NoSuchStream);
        }
        if flow.attached {
            return Err(Unattached::Taken);
        }
        flow.attached = true;
        Ok(())
    }

    /// The connection that a stream was reserved for has failed.
    pub(crate) fn release(self: &Arc<Self>, kind: StreamKind) {
        if let Some(index) = index(kind) {
            let mut state = self.state();
            let flow = &mut state.flows[index];
            flow.attached = false;
            if matches!(state.phase, Phase::Over(_)) {
                let flow = &mut state.flows[index];
                flow.pipe = None;
                flow.done = true;
            }
            self.report_if_done(state);
        }
    }

    /// The connection is the stream now.
    pub(crate) fn hand_over(self: &Arc<Self>, kind: StreamKind, connection: OwnedFd) {
        let mut state = self.state();
        match index(kind) {
            Some(index) => {
                state.flows[index].connection = Some(connection);
                self.flow(&mut state, index);
            }
            None => state.exit = Some(connection),
        }
        self.report_if_done(state);
    }

    /// The size its terminal has, or will have.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<(), RequestError> {
        if !self.has_terminal {
            return Err(RequestError::Invalid("the process has no terminal".into()));
        }
        let mut state = self.state();
        state.size = Some((columns, rows));
        match (&state.terminal, state.phase) {
            (_, Phase::Over(_)) => Err(RequestError::NotFound("the process has ended".into())),
            (Some(terminal), _) => {
                terminal::resize(terminal.as_fd(), columns, rows).map_err(trying("the terminal"))
            }
            (None, _) => Ok(()),
        }
    }

    /// Begins its start. Gives the size its terminal is to have.
    pub(crate) fn begin(&self) -> Result<Option<(u16, u16)>, RequestError> {
        let mut state = self.state();
        if state.phase != Phase::Registered {
            return Err(RequestError::State("the process has been started".into()));
        }
        state.phase = Phase::Starting;
        Ok(state.size)
    }

    /// Pipes for its standard streams. Gives the process's ends.
    pub(crate) fn make_pipes(&self) -> io::Result<[Stdio; 3]> {
        let mut state = self.state();
        let mut theirs = [Stdio::null(), Stdio::null(), Stdio::null()];
        for ((kind, flow), end) in FLOWS.iter().zip(&mut state.flows).zip(&mut theirs) {
            if !flow.declared {
                continue;
            }
            let (reader, writer) = io::pipe()?;
            let (our_end, their_end): (OwnedFd, Stdio) = if *kind == StreamKind::Stdin {
                (writer.into(), reader.into())
            } else {
                (reader.into(), writer.into())
            };
            flow.pipe = Some(Arc::new(our_end));
            *end = their_end;
        }
        Ok(theirs)
    }

    /// It runs. Its end may have been told already.
    pub(crate) fn started(self: &Arc<Self>, pid: Pid, terminal: Option<OwnedFd>) {
        let mut state = self.state();
        let over = matches!(state.phase, Phase::Over(_));
        if !over {
            state.phase = Phase::Running(pid);
        }
        if let Some(terminal) = terminal {
            let terminal = Arc::new(terminal);
            if let Some((columns, rows)) = state.size {
                // It was made with the size known then; this is the latest.
                let _ = terminal::resize(terminal.as_fd(), columns, rows);
            }
            for flow in state.flows.iter_mut().filter(|flow| flow.declared) {
                flow.pipe = Some(Arc::clone(&terminal));
            }
            if !over {
                state.terminal = Some(terminal);
            }
        }
        for index in 0..FLOWS.len() {
            self.flow(&mut state, index);
        }
        self.report_if_done(state);
    }

    /// It could not be started: its streams end, and there is nothing to report.
    pub(crate) fn failed(self: &Arc<Self>) {
        let mut state = self.state();
        state.phase = Phase::Over(None);
        for flow in &mut state.flows {
            *flow = Flow {
                declared: flow.declared,
                done: true,
                ..Flow::default()
            };
        }
        state.exit = None;
        self.say_over();
        self.report_if_done(state);
    }

    /// It has ended.
    pub(crate) fn end(self: &Arc<Self>, status: ExitStatus, out_of_memory: bool) {
        let mut state = self.state();
        state.phase = Phase::Over(Some(report(status, out_of_memory)));
        state.terminal = None;
        for (kind, flow) in FLOWS.iter().zip(&mut state.flows) {
            // With a terminal the pipes may still be on their way, see `started`.
            let unread = *kind == StreamKind::Stdin || (!flow.attached && !self.has_terminal);
            if unread {
                flow.connection = None;
                flow.pipe = None;
                flow.done = true;
            }
        }
        self.say_over();
        self.report_if_done(state);
    }

    fn say_over(&self) {
        // Cannot be full: it is written once or twice.
        let _ = rustix::io::write(&self.over, &1u64.to_ne_bytes());
        self.ended.notify_all();
    }

    /// Lets a stream flow when both its sides are there.
    fn flow(self: &Arc<Self>, state: &mut State, index: usize) {
        let over = matches!(state.phase, Phase::Over(_));
        let flow = &mut state.flows[index];
        if flow.done {
            flow.connection = None;
            return;
        }
        let is_input = FLOWS[index] == StreamKind::Stdin;
        if over && (is_input || !flow.attached) {
            *flow = Flow {
                declared: flow.declared,
                attached: flow.attached,
                done: true,
                ..Flow::default()
            };
            return;
        }
        let (Some(_), Some(_)) = (&flow.connection, &flow.pipe) else {
            return;
        };
        let (Some(connection), Some(pipe)) = (flow.connection.take(), flow.pipe.take()) else {
            return;
        };
        let process = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(if is_input { "input" } else { "output" }.into())
            .stack_size(STACK)
            .spawn(move || process.carry(index, connection, pipe));
        if thread.is_err() {
            // The descriptors went with the closure: the host sees the end of the stream.
            state.flows[index].done = true;
        }
    }

    /// The life of a stream, on its thread.
    fn carry(self: Arc<Self>, index: usize, connection: OwnedFd, pipe: Arc<OwnedFd>) {
        let outcome = rustix::io::ioctl_fionbio(&connection, true)
            .map_err(io::Error::from)
            .and_then(|()| match (FLOWS[index], self.has_terminal) {
                (StreamKind::Stdin, false) => pump::input(&connection, &pipe, &self.over),
                (StreamKind::Stdin, true) => pump::terminal_input(&connection, &pipe, &self.over),
                (_, false) => pump::output(&pipe, &connection, &self.over),
                (_, true) => pump::terminal_output(&pipe, &connection, &self.over),
            });
        // A stream that fails ends: its host has gone, or its process.
        drop(outcome);
        drop(pipe);
        let _ = shutdown(&connection, Shutdown::Write);
        drop(connection);
        let mut state = self.state();
        state.flows[index].done = true;
        self.report_if_done(state);
    }

    /// Reports the end if there is one, and all attached outputs have been handed over.
    fn report_if_done(&self, mut state: MutexGuard<'_, State>) {
        let Phase::Over(report) = state.phase else {
            return;
        };
        if state.reported {
            state.exit = None;
            return;
        }
        let outputs = &state.flows[1..];
        if outputs.iter().any(|flow| flow.attached && !flow.done) {
            return;
        }
        if let Some(report) = report {
            let Some(connection) = state.exit.take() else {
                // Somebody may still ask.
                return;
            };
            let mut bytes = Vec::with_capacity(3);
            // Into memory, which takes it; and a fresh connection takes three bytes at once.
            let _ = report.write(&mut bytes);
            let _ = send(
                &connection,
                &bytes,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            let _ = shutdown(&connection, Shutdown::Write);
        }
        state.reported = true;
        drop(state);
        if let Some(container) = self.container.upgrade() {
            container.forget(self);
        }
    }
}

fn has_hung_up(connection: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut fds, Some(&now)), Ok(1))
}

fn report(status: ExitStatus, out_of_memory: bool) -> ExitReport {
    // Both are bytes by the definition of a wait status.
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitReport::Code(code as u8),
        (None, signal) => {
            let signal = signal.unwrap_or(libc::SIGKILL) as u8;
            ExitReport::Signal {
                signal,
                out_of_memory: out_of_memory && i32::from(signal) == libc::SIGKILL,
            }
        }
    }
}
