//! From the agent's greeting to the started container: everything that waits for the guest.
//!
//! Runs on the session's starting thread, so that signals, deaths and the boot's time limit are
//! noticed meanwhile.

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use pericarp_api::{Hello, HelloError, agent, host::Guest};

use crate::{
    failure::{Failure, during},
    guest::{
        process::{Attached, Name, Wiring, attach_and_start, context, refused, unreachable},
        session::Ending,
    },
    report::Timing,
};

/// How long one read of the 16 bytes of a greeting may take.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// The connection of a greeting, once there is one.
pub(crate) type HelloSlot = Arc<Mutex<Option<UnixStream>>>;

/// Where the agent greets.
pub(crate) struct Greeting {
    listener: UnixListener,
}

impl Greeting {
    /// Listens beside the socket of the vsock device.
    pub(crate) fn listen(host_side: &Path) -> Result<Self, Failure> {
        let listener = UnixListener::bind(Guest::hello_socket(host_side))
            .map_err(during("a socket for the agent"))?;
        Ok(Self { listener })
    }

    fn receive(&self) -> Result<(Hello, UnixStream), Ending> {
        let failed = |error: io::Error| Ending::Failure(during("the agent's greeting")(error));
        let (mut stream, _) = self.listener.accept().map_err(failed)?;
        stream
            .set_read_timeout(Some(GREETING_LIMIT))
            .map_err(failed)?;
        let hello = Hello::read(&mut stream).map_err(|error| match error {
            HelloError::Version(_) => Ending::Failure(Failure::Setup(format!(
                "{error}; `cargo xtask setup` makes the guest's files anew"
            ))),
            HelloError::NotAnAgent => Ending::Guest("no greeting of an agent".into()),
            HelloError::Io(_) => Ending::Guest("half a greeting".into()),
        })?;
        stream.set_read_timeout(None).map_err(failed)?;
        Ok((hello, stream))
    }
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
        let (hello, stream) = self.greeting.receive()?;
        *self.hello.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        let now = Instant::now();
        // The guest's clock may say anything: it only divides the time that has passed here.
        let in_agent = hello.agent_ms.saturating_sub(hello.kernel_ms);
        let agent_began = now
            .checked_sub(Duration::from_millis(in_agent.into()))
            .unwrap_or(now);
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
