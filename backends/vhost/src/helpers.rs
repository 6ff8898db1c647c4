//! Threads for calls that have no place in a ring and may take long: those of a
//! file system that is served from elsewhere, or that write all of one back. A
//! worker hands them over and goes on; what came of them arrives in its mailbox.
//!
//! They are started when there is something to do and nobody to do it, and end
//! when there has been nothing for a while. Their number is bounded; so is what
//! waits for them, since each errand belongs to a request in flight.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use log::warn;

use crate::pool::Alarm;
use pericarp_control::Stop;

/// Something to do elsewhere. What it returns is the result of the step.
pub struct Errand(What);

enum What {
    Do(Call),
    Await(Box<dyn FnOnce(Report) + Send>),
}

impl Errand {
    /// This.
    pub fn new(what: impl FnOnce() -> i32 + Send + 'static) -> Self {
        Self(What::Do(Box::new(what)))
    }

    /// Something that nobody does: it happens, and whoever sees it calls the
    /// report with the result of the step, from any thread. `keep` is called at
    /// once, on the worker's thread, and keeps the report for as long.
    pub fn awaited(keep: impl FnOnce(Report) + Send + 'static) -> Self {
        Self(What::Await(Box::new(keep)))
    }

    /// Does it on this thread, for who has no helpers; what it says.
    pub fn run(self) -> i32 {
        match self.0 {
            What::Do(call) => call(),
            What::Await(keep) => {
                let (tell, told) = sync_channel(1);
                keep(Box::new(move |result| {
                    let _ = tell.send(result);
                }));
                told.recv().unwrap_or(-libc::EIO)
            }
        }
    }
}

impl fmt::Debug for Errand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Errand")
    }
}

/// Whom to tell how it went.
pub type Report = Box<dyn FnOnce(i32) + Send>;

/// How long a thread waits for more.
const PATIENCE: Duration = Duration::from_secs(10);

type Call = Box<dyn FnOnce() -> i32 + Send>;

/// What there is to do, and who does it.
#[derive(Default)]
struct State {
    errands: VecDeque<(Call, Report)>,
    threads: usize,
    idle: usize,
}

/// All helpers of a pool.
pub(crate) struct Helpers {
    state: Mutex<State>,
    wanted: Condvar,
    limit: usize,
    stop: OnceLock<Stop>,
}

impl fmt::Debug for Helpers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Helpers")
            .field("waiting", &state.errands.len())
            .field("threads", &state.threads)
            .finish_non_exhaustive()
    }
}

impl Helpers {
    /// At most `limit` threads.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            state: Mutex::default(),
            wanted: Condvar::new(),
            limit: limit.max(1),
            stop: OnceLock::new(),
        }
    }

    /// A helper that panics asks everything to stop here.
    pub(crate) fn answer_to(&self, stop: &Stop) {
        let _ = self.stop.set(stop.clone());
    }

    /// Has somebody do this.
    pub(crate) fn send(self: &Arc<Self>, errand: Errand, report: Report) {
        let call = match errand.0 {
            What::Do(call) => call,
            What::Await(keep) => return keep(report),
        };
        let mut state = self.lock();
        state.errands.push_back((call, report));
        let needed = state.errands.len() > state.idle && state.threads < self.limit;
        if needed {
            state.threads += 1;
        }
        let alone = state.threads == 1;
        drop(state);
        self.wanted.notify_one();
        if needed && let Err(refusal) = self.start() {
            self.lock().threads -= 1;
            if alone {
                // Slow, and not lost.
                warn!("no thread for calls that may wait: {refusal}");
                self.serve_one();
            }
        }
    }

    fn start(self: &Arc<Self>) -> io::Result<()> {
        let own = Arc::clone(self);
        let thread = std::thread::Builder::new().name("helper".to_owned());
        thread.spawn(move || own.serve()).map(drop)
    }

    fn serve(&self) {
        let _alarm = self.stop.get().map(|stop| Alarm(stop.clone()));
        let mut state = self.lock();
        loop {
            if let Some((call, report)) = state.errands.pop_front() {
                drop(state);
                report(call());
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let wait = self.wanted.wait_timeout(state, PATIENCE);
            let (again, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
            state = again;
            state.idle -= 1;
            if timeout.timed_out() && state.errands.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    fn serve_one(&self) {
        let next = self.lock().errands.pop_front();
        if let Some((call, report)) = next {
            report(call());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn errands_are_done_beside_each_other_up_to_the_limit() {
        let helpers = Arc::new(Helpers::new(3));
        let (tell, told) = channel();
        // Nobody gets past it unless three are there at the same time.
        let together = Arc::new(Barrier::new(3));
        for number in 0..9 {
            let (together, tell) = (Arc::clone(&together), tell.clone());
            let errand = Errand::new(move || {
                together.wait();
                number
            });
            let report = Box::new(move |result| tell.send(result).unwrap());
            helpers.send(errand, report);
        }
        let mut results: Vec<i32> = (0..9).map(|_| told.recv().unwrap()).collect();
        results.sort_unstable();
        assert_eq!(results, (0..9).collect::<Vec<_>>());
        assert_eq!(helpers.lock().threads, 3);
    }

    #[test]
    fn one_thread_is_enough_for_one_after_the_other() {
        let helpers = Arc::new(Helpers::new(64));
        for number in 0..20 {
            let (tell, told) = channel();
            let report = Box::new(move |result| tell.send(result).unwrap());
            helpers.send(Errand::new(move || number), report);
            assert_eq!(told.recv(), Ok(number));
            // It is about to wait again.
            while helpers.lock().idle == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!(helpers.lock().threads, 1);
    }
}
