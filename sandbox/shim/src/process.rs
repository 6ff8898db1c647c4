//! A process of a container as containerd sees it: its streams, its state, its end.
//!
//! The end is told when the outputs have been handed over, so that nobody who waits for it misses
//! the last of them. Neither a guest that goes on sending nor a reader that has gone keeps the end
//! from being told; what a reader takes, however slowly, is not cut.

use std::{
    fs::File,
    io,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
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

/// How long an output may keep us waiting after the process has ended: the guest altogether, our
/// reader at a stretch.
const SILENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(500);
/// More than there can be left of an output when the guest reports the end: what pipes and the
/// buffers of vsock hold.
const MOST_LEFT: u64 = 16 << 20;
/// How often those who wait for an end look whether anybody waits for them.
const ASK: Duration = Duration::from_secs(5);
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
    /// Until nothing comes on them any more.
    lines: Option<Lines>,
    /// The guest has said that it has ended, or has gone.
    reported: bool,
    /// Somebody sees to it that it ends.
    doomed: bool,
}

/// What joins a process that has been started to the guest, to cut it by.
struct Lines {
    outputs: Arc<[Output]>,
    exit: UnixStream,
}

impl Lines {
    fn cut(&self) {
        for output in &*self.outputs {
            output.give_up();
        }
        // It may have ended by itself.
        let _ = self.exit.shutdown(Shutdown::Both);
    }
}

/// A process that the guest has started.
pub(crate) struct Started {
    watch: Watch,
    lines: Lines,
    input: Option<Input>,
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
    outputs: Arc<[Output]>,
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
                lines: None,
                reported: false,
                doomed: false,
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

    /// Attaches to it and has the guest start it; `first` is called when the first of its output has
    /// been handed over. Give what comes back to [`Process::runs`].
    pub(crate) fn start(
        &self,
        guest: &Guest,
        first: impl FnOnce() + Send + 'static,
    ) -> Result<Started, ShimError> {
        let (opened, size) = {
            let mut state = self.state();
            (state.opened.take(), state.size)
        };
        let opened = opened.ok_or_else(|| ShimError::State("it has no streams".into()))?;
        let client = guest.client().map_err(unreachable)?;
        let attached = attach_and_start(guest, &client, &self.name, self.wiring(), size)?;
        drop(client);
        join(opened, attached, first)
    }

    /// It runs, unless it is over meanwhile: then what was started is cut, and the caller ends it.
    /// Give what comes back to [`Process::watcher`].
    pub(crate) fn runs(&self, started: Started) -> Option<Watch> {
        let mut state = self.state();
        if !matches!(state.phase, Phase::Starting) {
            started.lines.cut();
            return None;
        }
        state.phase = Phase::Running;
        state.lines = Some(started.lines);
        state.input = started.input;
        self.changed.notify_all();
        Some(started.watch)
    }

    /// A thread that waits for its end, and calls `over` with it. It is there before the process is
    /// started, since nobody would see the end of one that has none; it goes if it is given nothing
    /// to watch.
    pub(crate) fn watcher(
        self: &Arc<Self>,
        over: impl FnOnce(Exit) + Send + 'static,
    ) -> Result<Sender<Watch>, ShimError> {
        let process = Arc::clone(self);
        let (hand, handed) = channel::<Watch>();
        let watch = move || {
            if let Ok(watch) = handed.recv() {
                over(watch.wait(&process));
            }
        };
        thread::Builder::new()
            .name("exit".into())
            .spawn(watch)
            .map_err(during("a thread"))?;
        Ok(hand)
    }

    /// Waits for its end as long as it is `wanted`, which is asked every few seconds.
    pub(crate) fn wait(&self, wanted: impl Fn() -> bool) -> Option<Exit> {
        let mut state = self.state();
        loop {
            if let Phase::Over(exit) = state.phase {
                return Some(exit);
            }
            if !wanted() {
                return None;
            }
            let changed = self.changed.wait_timeout(state, ASK);
            state = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until it is not being started any more. False if it was not.
    pub(crate) fn wait_started(&self) -> bool {
        let mut state = self.state();
        let mut was = false;
        while matches!(state.phase, Phase::Starting) {
            was = true;
            let changed = self.changed.wait(state);
            state = changed.unwrap_or_else(PoisonError::into_inner);
        }
        was
    }

    /// Waits for the guest to say that it has ended. False when it has not after `limit`.
    pub(crate) fn is_reported_within(&self, limit: Duration) -> bool {
        let runs = |state: &mut State| !state.reported && !matches!(state.phase, Phase::Over(_));
        let waited = self
            .changed
            .wait_timeout_while(self.state(), limit, runs)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.1.timed_out()
    }

    /// Whether nobody sees to its end yet: the caller does from now on.
    pub(crate) fn doom(&self) -> bool {
        !std::mem::replace(&mut self.state().doomed, true)
    }

    /// The caller does not after all.
    pub(crate) fn spare(&self) {
        self.state().doomed = false;
    }

    /// Gives up what its outputs have not handed over by now.
    pub(crate) fn give_up_outputs(&self) {
        if let Some(lines) = &self.state().lines {
            for output in &*lines.outputs {
                output.give_up();
            }
        }
    }

    /// Lets go of everything that joins it to the guest.
    pub(crate) fn cut(&self) {
        let lines = self.state().lines.take();
        if let Some(lines) = lines {
            lines.cut();
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
fn join(
    opened: Opened,
    attached: Attached,
    first: impl FnOnce() + Send + 'static,
) -> Result<Started, ShimError> {
    let failed = || during("a thread");
    // Of either output.
    let first = Arc::new(Mutex::new(Some(first)));
    let (tell, ended) = channel();
    let mut outputs = Vec::new();
    let mut output = |name, socket, pipe: Option<File>| {
        let tell = tell.clone();
        // A reader that has gone is containerd's business.
        let over = move |_| {
            let _ = tell.send(());
        };
        let output = match pipe {
            Some(pipe) => {
                let first = Arc::clone(&first);
                let first = move || {
                    let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
                    if let Some(first) = first {
                        first();
                    }
                };
                Output::to_pipe(name, socket, pipe.into(), first, over)
            }
            None => Output::start(name, socket, io::sink(), over),
        };
        outputs.push(output.map_err(failed())?);
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
    let outputs: Arc<[Output]> = outputs.into();
    let lines = Lines {
        outputs: Arc::clone(&outputs),
        exit: attached.exit.try_clone().map_err(during("a descriptor"))?,
    };
    let watch = Watch {
        exit: attached.exit,
        outputs,
        ended,
    };
    Ok(Started {
        watch,
        lines,
        input,
    })
}

impl Watch {
    /// Waits for the report, and then for what is left of the outputs.
    fn wait(mut self, process: &Process) -> Exit {
        let report = self.report();
        {
            let mut state = process.state();
            state.reported = true;
            process.changed.notify_all();
        }
        if self.hand_over() {
            process.state().lines = None;
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

    /// Waits for the end of the outputs. False where one is left that nobody reads.
    fn hand_over(&self) -> bool {
        let carried = || -> Vec<u64> { self.outputs.iter().map(Output::carried).collect() };
        let first = carried();
        let mut last = (Instant::now(), first.clone());
        // How long each has waited for the guest.
        let mut owed = vec![Duration::ZERO; first.len()];
        let mut left = first.len();
        while left > 0 {
            match self.ended.recv_timeout(LOOK) {
                Ok(()) => left -= 1,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    for ((output, owed), first) in self.outputs.iter().zip(&mut owed).zip(&first) {
                        if output.waits_since().is_some() {
                            *owed += LOOK;
                        }
                        // It has nothing more to send; what it has sent is still handed over.
                        if *owed >= SILENCE || output.carried() - first > MOST_LEFT {
                            output.cut();
                        }
                    }
                    let now = carried();
                    if now != last.1 {
                        last = (Instant::now(), now);
                    } else if last.0.elapsed() > SILENCE + 2 * LOOK {
                        // Who reads nothing may read it later, until the process is deleted.
                        return false;
                    }
                }
            }
        }
        true
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

#[cfg(test)]
mod tests {
    use std::{io::Read, io::Write, sync::mpsc};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// The guest's ends of a process's lines.
    struct Ends {
        stdout: UnixStream,
        exit: UnixStream,
    }

    impl Ends {
        fn report(&mut self, code: u8) {
            ExitReport::Code(code).write(&mut self.exit).unwrap();
        }
    }

    fn process() -> Arc<Process> {
        let name = Name {
            container: "c".into(),
            process: String::new(),
        };
        Process::create(name, Stdio::default()).unwrap()
    }

    /// As if it had been started, with this for its output.
    fn started(stdout: Option<File>) -> (Started, Ends) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let (their_exit, exit) = UnixStream::pair().unwrap();
        let opened = Opened {
            stdin: None,
            stdin_keeper: None,
            stdout,
            stderr: None,
        };
        let attached = Attached {
            stdin: None,
            stdout: ours,
            stderr: None,
            exit,
        };
        let ends = Ends {
            stdout: theirs,
            exit: their_exit,
        };
        (join(opened, attached, || {}).unwrap(), ends)
    }

    fn pipe() -> (io::PipeReader, Option<File>) {
        let (reader, writer) = io::pipe().unwrap();
        let writer = std::os::fd::OwnedFd::from(writer);
        (reader, Some(writer.into()))
    }

    /// A running process, and where its end is told.
    fn running(stdout: Option<File>) -> (Arc<Process>, Ends, Receiver<Exit>) {
        let process = process();
        let (tell, told) = mpsc::channel();
        let watcher = process.watcher(move |exit| tell.send(exit).unwrap());
        assert!(process.step(|phase| matches!(phase, Phase::Created), Phase::Starting));
        let (started, ends) = started(stdout);
        let watch = process.runs(started).unwrap();
        watcher.unwrap().send(watch).unwrap();
        (process, ends, told)
    }

    #[test]
    fn a_process_that_was_killed_before_it_runs_does_not_run() {
        let process = process();
        let created = |phase| matches!(phase, Phase::Created);
        assert!(process.step(created, Phase::Starting));
        // Whoever kills it now comes too late for this way, and must ask the guest.
        assert!(!process.step(created, Phase::Over(Exit::now(LOST))));
        let (first, mut ends) = started(None);
        assert!(process.step(|_| true, Phase::Over(Exit::now(LOST))));
        assert!(process.runs(first).is_none());
        assert_eq!(ends.stdout.read(&mut [0]).unwrap(), 0);
        assert_eq!(ends.exit.read(&mut [0]).unwrap(), 0);
        assert!(matches!(process.phase(), Phase::Over(_)));

        let process = self::process();
        assert!(process.step(created, Phase::Over(Exit::now(1))));
        assert!(!process.step(created, Phase::Starting));
        assert_eq!(process.wait(|| true).unwrap().code, 1);
    }

    #[test]
    fn who_does_not_wait_any_more_is_let_go() {
        let process = process();
        assert!(process.wait(|| false).is_none());
    }

    #[test]
    fn a_slow_reader_gets_all_of_a_process_that_has_ended() {
        let (mut reader, writer) = pipe();
        let (process, mut ends, told) = running(writer);
        let talk = thread::spawn(move || {
            ends.stdout.write_all(&[b'x'; 400_000]).unwrap();
            ends.report(3);
        });
        let (mut seen, mut piece) = (0, [0; 20_000]);
        loop {
            thread::sleep(Duration::from_millis(20));
            match reader.read(&mut piece).unwrap() {
                0 => break,
                count => seen += count,
            }
        }
        talk.join().unwrap();
        assert_eq!(seen, 400_000);
        assert_eq!(told.recv_timeout(LIMIT).unwrap().code, 3);
        assert!(process.state().lines.is_none());
    }

    #[test]
    fn a_process_whose_reader_has_gone_ends_when_its_outputs_are_given_up() {
        // The reader is there, as ours is, and reads nothing.
        let (_reader, writer) = pipe();
        let (process, mut ends, told) = running(writer);
        let talk = thread::spawn(move || {
            // As the agent: no report before the output has been handed over.
            while ends.stdout.write_all(&[b'x'; 4096]).is_ok() {}
            ends.report(137);
        });
        assert!(!process.is_reported_within(Duration::from_millis(500)));
        process.give_up_outputs();
        assert!(process.is_reported_within(LIMIT));
        assert_eq!(told.recv_timeout(LIMIT).unwrap().code, 137);
        talk.join().unwrap();
    }

    #[test]
    fn a_guest_that_goes_on_after_its_report_is_cut() {
        let (process, mut ends, told) = running(None);
        ends.report(0);
        assert!(process.is_reported_within(LIMIT));
        let talk = thread::spawn(move || while ends.stdout.write_all(&[b'x'; 65_536]).is_ok() {});
        assert_eq!(told.recv_timeout(LIMIT).unwrap().code, 0);
        talk.join().unwrap();
    }

    #[test]
    fn a_process_that_is_cut_is_over() {
        let (_reader, writer) = pipe();
        let (process, _ends, told) = running(writer);
        process.cut();
        assert_eq!(told.recv_timeout(LIMIT).unwrap().code, LOST);
    }
}
