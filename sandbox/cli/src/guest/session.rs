//! Waits for everything that a started process, and the machine around it, can bring.
//!
//! One loop over `poll` on the main thread: our signals, the process's end, the ends of the
//! machine and its sidecars, and a bell that the other threads ring. Whatever waits for the guest
//! is on one of those threads, so nothing the guest does or leaves undone can hold the loop up.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use pericarp_api::{ExitReport, host::Guest};
use pericarp_hypervisor::MachineError;
use pericarp_pod::{
    PodError,
    process::{Attached, CallError, Name},
    pump::{Input, Output, OutputEnd},
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};

use crate::{
    failure::{Failure, during},
    guest::calls::Calls,
    signals::Signals,
    terminal,
};

/// How long the guest may be silent on an output after the process has ended.
const SILENCE: Duration = Duration::from_secs(10);
/// How long the three bytes of an exit report may take once the first is there.
const REPORT_LIMIT: Duration = Duration::from_secs(5);

/// Why a session ended without an exit code. The caller adds what it knows of the machine.
#[derive(Debug)]
pub(crate) enum Ending {
    Failure(Failure),
    Machine(MachineError),
    /// What the guest did that it must not.
    Guest(String),
    /// The agent has gone; its last words, if it had any.
    Agent(Option<String>),
    /// The guest did not start its command in this time.
    BootTimeout(Duration),
}

impl From<Failure> for Ending {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<PodError> for Ending {
    fn from(error: PodError) -> Self {
        Self::Failure(error.into())
    }
}

impl From<CallError> for Ending {
    fn from(error: CallError) -> Self {
        Self::Failure(error.into())
    }
}

/// What else may end: the machine and its sidecars, for who runs them.
pub(crate) trait Surroundings {
    /// The process runs.
    fn started(&mut self);
    /// Readable when something has ended.
    fn exit_fds(&self) -> Vec<BorrowedFd<'_>>;
    /// What has ended.
    fn ended(&mut self) -> Option<Ending>;
}

/// Nothing else: the machine is somebody else's.
pub(crate) struct Elsewhere;

impl Surroundings for Elsewhere {
    fn started(&mut self) {}

    fn exit_fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn ended(&mut self) -> Option<Ending> {
        None
    }
}

/// Where the process's streams go.
pub(crate) struct Ends {
    pub(crate) stdin: Option<Box<dyn AsFdSend>>,
    pub(crate) stdout: Box<dyn io::Write + Send>,
    pub(crate) stderr: Box<dyn io::Write + Send>,
}

/// Something to read from, on another thread.
pub(crate) trait AsFdSend: AsFd + Send {}
impl<T: AsFd + Send> AsFdSend for T {}

impl Ends {
    /// Our own standard streams. Written without a buffer: what the process has said is out.
    pub(crate) fn ours(input: bool) -> io::Result<Self> {
        let raw = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(std::fs::File::from);
        Ok(Self {
            stdin: input.then(|| Box::new(io::stdin()) as Box<dyn AsFdSend>),
            stdout: Box::new(raw(io::stdout().as_fd())?),
            stderr: Box::new(raw(io::stderr().as_fd())?),
        })
    }
}

/// What the other threads tell the loop.
enum Event {
    Started(Result<Attached, Ending>),
    Ended(&'static str, OutputEnd),
}

/// Wakes the loop from another thread.
#[derive(Clone)]
struct Bell {
    fd: Arc<OwnedFd>,
    events: Sender<Event>,
}

impl Bell {
    fn ring(&self, event: Event) {
        // Nobody listens any more at the end of the session; a full counter is readable.
        let _ = self.events.send(event);
        let _ = rustix::io::write(&*self.fd, &1u64.to_ne_bytes());
    }
}

/// When a guest that has not started its command is given up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BootLimit {
    pub(crate) deadline: Instant,
    pub(crate) limit: Duration,
}

/// How far the process has come.
enum State {
    Starting,
    Running(Running),
    /// Its end is known; its last output may be on the way.
    Ending(ExitReport, Running),
}

struct Running {
    exit: UnixStream,
    _input: Option<Input>,
    outputs: Vec<(&'static str, Output)>,
    calls: Calls,
    /// Since when, and at how many bytes, the outputs have been silent.
    silent: (Instant, Vec<u64>),
}

/// One process from its start to its end.
pub(crate) struct Session<'a> {
    pub(crate) guest: Guest,
    pub(crate) name: Name,
    pub(crate) signals: &'a mut Signals,
    pub(crate) surroundings: &'a mut dyn Surroundings,
    pub(crate) ends: Option<Ends>,
    /// Resizes are passed on.
    pub(crate) terminal: bool,
    pub(crate) boot: Option<BootLimit>,
    /// Called once, when the process runs.
    pub(crate) started: &'a mut dyn FnMut() -> Result<(), Failure>,
}

impl Session<'_> {
    /// Starts the process with `start`, which waits for the guest and runs on a thread of its own,
    /// and returns how it ended.
    pub(crate) fn run(
        mut self,
        start: impl FnOnce() -> Result<Attached, Ending> + Send + 'static,
    ) -> Result<ExitReport, Ending> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(during("a descriptor"))?;
        let (events, received) = channel();
        let bell = Bell {
            fd: Arc::new(fd),
            events,
        };
        let starter = bell.clone();
        std::thread::Builder::new()
            .name("start".into())
            .spawn(move || starter.ring(Event::Started(start())))
            .map_err(during("a thread"))?;
        let mut state = State::Starting;
        loop {
            if let State::Ending(report, running) = &mut state {
                if running.outputs.is_empty() {
                    return Ok(*report);
                }
                running.cut_the_silent();
            }
            let ready = self.wait(&bell, &state)?;
            if ready.signals {
                self.take_signals(&state)?;
            }
            if ready.bell {
                state = self.take_events(&bell, &received, state)?;
            }
            if ready.exit
                && let State::Running(mut running) = state
            {
                match read_report(&mut running.exit) {
                    Ok(report) => {
                        running.silent = (Instant::now(), running.progress());
                        state = State::Ending(report, running);
                    }
                    Err(ending) => return Err(self.explain(ending)),
                }
            }
            if ready.surroundings
                && !matches!(state, State::Ending(..))
                && let Some(ending) = self.surroundings.ended()
            {
                return Err(ending);
            }
        }
    }

    /// A process that is lost without a report may have gone with its machine.
    fn explain(&mut self, ending: Ending) -> Ending {
        let fds = self.surroundings.exit_fds();
        if !fds.is_empty() {
            let mut fds: Vec<PollFd<'_>> = fds
                .iter()
                .map(|fd| PollFd::new(fd, PollFlags::IN))
                .collect();
            // An interrupted wait explains less.
            let _ = poll(
                &mut fds,
                Some(&Timespec {
                    tv_sec: 2,
                    tv_nsec: 0,
                }),
            );
        }
        self.surroundings.ended().unwrap_or(ending)
    }

    fn wait(&mut self, bell: &Bell, state: &State) -> Result<Ready, Ending> {
        let timeout = match (state, self.boot) {
            (State::Starting, Some(boot)) => {
                let left = boot.deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Ending::BootTimeout(boot.limit));
                }
                Some(left)
            }
            (State::Ending(..), _) => Some(SILENCE / 10),
            _ => None,
        };
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        let surroundings = match state {
            State::Ending(..) => Vec::new(),
            _ => self.surroundings.exit_fds(),
        };
        let mut fds = vec![
            PollFd::new(&*self.signals, PollFlags::IN),
            PollFd::new(&bell.fd, PollFlags::IN),
        ];
        let is_running = if let State::Running(running) = state {
            fds.push(PollFd::new(&running.exit, PollFlags::IN));
            true
        } else {
            false
        };
        let first = fds.len();
        fds.extend(surroundings.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(during("waiting for the guest")(error).into()),
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            signals: is_ready(&fds[0]),
            bell: is_ready(&fds[1]),
            exit: is_running && is_ready(&fds[2]),
            surroundings: fds[first..].iter().any(is_ready),
        })
    }

    fn take_signals(&mut self, state: &State) -> Result<(), Ending> {
        let calls = match state {
            State::Starting => return Ok(self.signals.check()?),
            State::Running(running) | State::Ending(_, running) => &running.calls,
        };
        while let Some(signal) = self.signals.next() {
            if i32::from(signal) == libc::SIGWINCH {
                if let Some(size) = self.terminal.then(terminal::size).flatten() {
                    calls.resize(size);
                }
                continue;
            }
            if self.signals.insists(signal) {
                return Err(Failure::Signal(signal).into());
            }
            calls.signal(signal);
        }
        Ok(())
    }

    fn take_events(
        &mut self,
        bell: &Bell,
        received: &Receiver<Event>,
        mut state: State,
    ) -> Result<State, Ending> {
        let _ = rustix::io::read(&*bell.fd, &mut [0; 8]);
        while let Ok(event) = received.try_recv() {
            match event {
                Event::Started(Ok(attached)) => {
                    let running = self.join(bell, attached)?;
                    self.surroundings.started();
                    (self.started)()?;
                    state = State::Running(running);
                }
                Event::Started(Err(ending)) => return Err(self.explain_start(ending)),
                Event::Ended(stream, OutputEnd::Failed(source)) => {
                    return Err(Failure::Output { stream, source }.into());
                }
                Event::Ended(stream, OutputEnd::Closed) => {
                    if let State::Running(running) | State::Ending(_, running) = &mut state {
                        running.outputs.retain(|(name, _)| *name != stream);
                    }
                }
            }
        }
        Ok(state)
    }

    /// A start that failed because the machine did is explained by the machine.
    fn explain_start(&mut self, ending: Ending) -> Ending {
        match ending {
            Ending::Failure(Failure::Setup(_)) => self.surroundings.ended().unwrap_or(ending),
            other => other,
        }
    }

    /// Joins the process's streams to ours.
    fn join(&mut self, bell: &Bell, attached: Attached) -> Result<Running, Ending> {
        let failed = || during("a thread");
        let Some(ends) = self.ends.take() else {
            return Err(Ending::Guest("a second start".into()));
        };
        let mut outputs = Vec::new();
        let mut output = |name: &'static str, socket, sink| {
            let bell = bell.clone();
            let ended = move |end| bell.ring(Event::Ended(name, end));
            let output = Output::start(name, socket, sink, ended).map_err(failed())?;
            outputs.push((name, output));
            Ok::<(), Failure>(())
        };
        output("standard output", attached.stdout, ends.stdout)?;
        if let Some(socket) = attached.stderr {
            output("the error output", socket, ends.stderr)?;
        }
        let input = match (ends.stdin, attached.stdin) {
            (Some(source), Some(socket)) => Some(Input::start(source, socket).map_err(failed())?),
            _ => None,
        };
        let silent = (Instant::now(), Vec::new());
        Ok(Running {
            exit: attached.exit,
            _input: input,
            outputs,
            calls: Calls::to(self.guest.clone(), self.name.clone()).map_err(failed())?,
            silent,
        })
    }
}

#[derive(Debug, Default)]
struct Ready {
    signals: bool,
    bell: bool,
    exit: bool,
    surroundings: bool,
}

impl Running {
    /// Bytes of each output that waits for the guest.
    fn progress(&self) -> Vec<u64> {
        self.outputs
            .iter()
            .map(|(_, output)| output.waits_since().unwrap_or(u64::MAX))
            .collect()
    }

    /// After the process's end the guest only has to hand over what it holds. An output on which
    /// it neither says anything nor ends is not waited for.
    fn cut_the_silent(&mut self) {
        let progress = self.progress();
        let waits_for_us = progress.contains(&u64::MAX);
        if waits_for_us || progress != self.silent.1 {
            self.silent = (Instant::now(), progress);
        } else if self.silent.0.elapsed() > SILENCE {
            for (_, output) in &self.outputs {
                output.cut();
            }
        }
    }
}

fn read_report(exit: &mut UnixStream) -> Result<ExitReport, Ending> {
    exit.set_read_timeout(Some(REPORT_LIMIT))
        .map_err(during("the process's end"))?;
    ExitReport::read(exit).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => Ending::Guest("an exit report that is none".into()),
        _ => Failure::Setup("it went away before the command had ended".into()).into(),
    })
}
