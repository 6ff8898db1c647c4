//! From the agent's greeting to the started container: everything that waits for the guest.
//!
//! Runs on the session's starting thread, so that signals, deaths and the boot's time limit are
//! noticed meanwhile.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use pericarp_api::{Hello, agent, host::Guest};
use pericarp_pod::{
    Greeting,
    greeting::GreetingError,
    process::{Attached, Name, Wiring, attach_and_start, context, refused, unreachable},
};

use crate::{
    failure::{Failure, during},
    guest::session::Ending,
    report::Timing,
};

/// The connection of a greeting, once there is one.
pub(crate) type HelloSlot = Arc<Mutex<Option<UnixStream>>>;

fn greeted(greeting: &Greeting) -> Result<(Hello, UnixStream), Ending> {
    greeting.receive().map_err(|error| match error {
        GreetingError::System(error) => during("the agent's greeting")(error).into(),
        GreetingError::Version(_) => Failure::Setup(error.to_string()).into(),
        GreetingError::Guest(what) => Ending::Guest(what.into()),
    })
}

/// When each part of the start was over.
#[derive(Debug, Clone, Default)]
pub(crate) struct Phases {
    times: Arc<Mutex<Vec<(&'static str, Instant)>>>,
}

impl Phases {
    fn over(&self, phase: &'static str) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.push((phase, Instant::now()));
    }

    /// Enters the phases into the run's timing.
    pub(crate) fn mark(&self, timing: &mut Timing) {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        for (phase, at) in times.iter() {
            timing.mark_at(phase, *at);
        }
    }
}

/// All that is said to the guest, prepared.
pub(crate) struct Start {
    pub(crate) guest: Guest,
    pub(crate) greeting: Greeting,
    pub(crate) hello: HelloSlot,
    pub(crate) name: Name,
    pub(crate) configure: agent::ConfigureRequest,
    pub(crate) create: agent::CreateContainerRequest,
    pub(crate) wiring: Wiring,
    pub(crate) size: Option<(u16, u16)>,
    pub(crate) phases: Phases,
}

impl Start {
    /// Waits for the agent and starts the container.
    pub(crate) fn run(self) -> Result<Attached, Ending> {
        let (hello, stream) = greeted(&self.greeting)?;
        *self.hello.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        let now = Instant::now();
        let agent_began = now.checked_sub(hello.in_agent()).unwrap_or(now);
        {
            let mut times = self
                .phases
                .times
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            times.push(("kernel", agent_began));
        }
        self.phases.over("agent");
        let client = self.guest.client().map_err(unreachable)?;
        client
            .configure(context(), &self.configure)
            .map_err(refused)?;
        client
            .create_container(context(), &self.create)
            .map_err(refused)?;
        self.phases.over("container");
        let attached = attach_and_start(&self.guest, &client, &self.name, self.wiring, self.size)?;
        self.phases.over("start");
        Ok(attached)
    }
}
