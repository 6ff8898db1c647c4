//! A program's life once it has given up every right that it does not need: its threads start, it
//! serves, and it drains. Called by the `main` of block, fs and net, which differ until then.

use std::path::Path;

use pericarp_control::{Failure, Server as Control, Stop};

use super::{drain, take_over_failure};
use crate::causes;
use crate::device::Device;
use crate::handover::{Meeting, Predecessor};
use crate::pool::Pool;
use crate::server::{Fleet, Server};

/// All that a program serves with: its sockets are bound and no thread runs yet.
#[derive(Debug)]
pub struct Ready<'a, D: Device> {
    /// The workers.
    pub pool: Pool<D>,
    /// What keeps the sessions.
    pub fleet: Fleet<D>,
    /// The devices, by id.
    pub servers: Vec<(&'a str, Server<D>)>,
    /// The control socket, which is heard once all devices are served.
    pub control: Option<Control>,
    /// Who is taken over from, and the control socket where it was asked.
    pub predecessor: Option<(Predecessor, &'a Path)>,
    /// Where a successor will meet this program.
    pub meeting: &'a Meeting,
}

impl<D: Device> Ready<'_, D> {
    /// Serves until `stop`, then drains. `ours` says whether the sockets are this program's to
    /// remove: they are once it serves, and no longer after another has taken over.
    ///
    /// # Errors
    /// A thread that cannot be had, a predecessor that does not give way, a worker that failed, or
    /// requests that do not end.
    pub fn serve(self, stop: &Stop, ours: &mut bool) -> Result<(), Failure> {
        let running = self
            .pool
            .start(stop)
            .map_err(|e| Failure::run_time(causes(&e)))?;
        let failed = |e| Failure::run_time(format_args!("threads: {e}"));
        let event = stop.event().try_clone_to_owned().map_err(failed)?;
        let control = self.control.map(|control| control.start_when(event));
        let control = control.transpose().map_err(failed)?;
        match self.predecessor {
            Some((predecessor, path)) => {
                // All that takes time is done: from here on its queues stand still.
                let taken = predecessor.take(self.servers, &self.fleet);
                taken.map_err(|e| take_over_failure(path, &e))?;
            }
            None => {
                let started = self.fleet.start(self.servers);
                started.map_err(|e| Failure::run_time(format_args!("threads: {e}")))?;
            }
        }
        *ours = true;
        let control = control.map(|(thread, go)| {
            let _ = go.send(());
            thread
        });

        let ending = stop.wait();
        let mut threads = self.fleet.end();
        threads.extend(control);
        let drained = drain(ending, &threads);
        // Another process listens on them now: not ours to remove.
        *ours = !self.meeting.close();
        drained?;
        running.end();
        Ok(())
    }
}
