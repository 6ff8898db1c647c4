//! A running machine with its sidecars: whether all of it is still there, what it was that ended,
//! and its end in good order.

use std::{
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::PoisonError,
    time::Duration,
};

use pericarp_api::{hello::last_words, host::Guest, stream::ExitReport};
use pericarp_hypervisor::{Machine, MachineError};
use pericarp_pod::{
    Lasting, Sidecar,
    power_off::{POWER_OFF_LIMIT, power_off},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    failure::Failure,
    guest::session::{Ending, Surroundings},
    report,
    vm::{record::Told, start::HelloSlot},
};

/// When the connection to the agent ends, how soon the cause shows if it is one of our processes.
const CAUSE_LIMIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};

/// The machine and what belongs to it.
pub(crate) struct Pod {
    machine: Machine,
    sidecars: Vec<Sidecar>,
    lasting: Vec<Lasting>,
    told: Told,
    hello: HelloSlot,
    /// The same connection, to wait for its end.
    hello_end: Option<OwnedFd>,
}

impl Pod {
    /// `hello` is filled by the thread that waits for the agent's greeting. `told` is written.
    pub(crate) fn new(
        machine: Machine,
        sidecars: Vec<Sidecar>,
        lasting: Vec<Lasting>,
        hello: HelloSlot,
        mut told: Told,
    ) -> Self {
        told.tell(machine.pid(), &sidecars, &lasting);
        Self {
            machine,
            sidecars,
            lasting,
            told,
            hello,
            hello_end: None,
        }
    }

    /// The last lines of the guest's console.
    pub(crate) fn console_lines(&self, count: usize) -> Vec<String> {
        self.machine.console_lines(count)
    }

    /// Takes over the connection to the agent, once the agent has greeted.
    pub(crate) fn watch_agent(&mut self) {
        let slot = self.hello.lock().unwrap_or_else(PoisonError::into_inner);
        self.hello_end = slot
            .as_ref()
            .and_then(|stream| stream.as_fd().try_clone_to_owned().ok());
    }

    /// Ends the machine and then the sidecars. After a good end the guest is asked to write its
    /// disks back and to switch itself off; otherwise there is nothing to wait for.
    pub(crate) fn end(
        mut self,
        guest: &Guest,
        mut outcome: Result<ExitReport, Failure>,
    ) -> Result<ExitReport, Failure> {
        if outcome.is_ok() {
            match power_off(guest) {
                Ok(()) if self.machine.wait_for_power_off(POWER_OFF_LIMIT) => {}
                Ok(()) => report::warn("the machine did not switch itself off and was stopped"),
                // What the command wrote may be lost: that is no success.
                Err(error) => outcome = Err(error.into()),
            }
        }
        drop(self.machine);
        for sidecar in self.sidecars {
            sidecar.end();
        }
        for lasting in self.lasting {
            lasting.end();
        }
        outcome
    }

    /// The processes of ours that can end.
    fn process_fds(&self) -> Vec<BorrowedFd<'_>> {
        let sidecars = self.sidecars.iter().map(Sidecar::exit_fd);
        sidecars
            .chain(self.lasting.iter().map(Lasting::exit_fd))
            .chain([self.machine.exit_fd()])
            .collect()
    }
}

impl Surroundings for Pod {
    fn started(&mut self) {
        self.watch_agent();
    }

    fn exit_fds(&self) -> Vec<BorrowedFd<'_>> {
        let agent = self.hello_end.iter().map(AsFd::as_fd);
        self.process_fds().into_iter().chain(agent).collect()
    }

    fn ended(&mut self) -> Option<Ending> {
        {
            let processes = self.process_fds();
            let mut fds: Vec<PollFd<'_>> = processes
                .iter()
                .map(|fd| PollFd::new(fd, PollFlags::IN))
                .collect();
            // An interrupted wait explains less.
            let _ = poll(&mut fds, Some(&CAUSE_LIMIT));
        }
        if let Some(failure) = self.sidecars.iter_mut().find_map(Sidecar::death) {
            return Some(failure.into());
        }
        if self.machine.has_ended() {
            return Some(Ending::Machine(self.machine.death()));
        }
        let mut revived = false;
        for lasting in &mut self.lasting {
            // The machine finds another where this one was.
            match lasting.revive() {
                Ok(None) => {}
                Ok(Some(death)) => {
                    report::warn(&format!("{death}; it was started again"));
                    revived = true;
                }
                Err(error) => return Some(error.into()),
            }
        }
        if revived {
            self.told
                .tell(self.machine.pid(), &self.sidecars, &self.lasting);
        }
        let mut slot = self.hello.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = slot.take_if(|stream| has_word(stream))?;
        drop(slot);
        // The agent has ended; a guest that resets itself takes a moment to be gone.
        self.hello_end = None;
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        let words = last_words(&stream);
        Some(match self.machine.death() {
            error @ MachineError::Panicked(_) => Ending::Machine(error),
            error @ MachineError::PoweredOff if words.is_none() => Ending::Machine(error),
            _ => Ending::Agent(words),
        })
    }
}

/// Whether the connection has come to its end, or to last words.
fn has_word(stream: &UnixStream) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}
