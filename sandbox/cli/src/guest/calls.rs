//! Signals and terminal sizes on their way to the guest.
//!
//! A guest may take its time with an answer or never give one; the session must still notice the
//! third Ctrl-C. So these calls are made one after the other on a thread of their own, which ends
//! when its [`Calls`] is dropped, or with the process.

use std::sync::mpsc::{Sender, channel};

use pericarp_api::{agent, host::Guest};
use pericarp_pod::process::{CallError, Name, context, refused, resize, unreachable};

enum Call {
    Signal(u8),
    Resize((u16, u16)),
}

/// The way to one process.
pub(crate) struct Calls {
    queue: Sender<Call>,
}

impl Calls {
    /// Starts the thread.
    pub(crate) fn to(guest: Guest, name: Name) -> std::io::Result<Self> {
        let (queue, calls) = channel();
        std::thread::Builder::new()
            .name("calls".into())
            .spawn(move || {
                for call in calls {
                    // A process that has just ended gets no signal; a guest that does not answer
                    // is the session's to notice.
                    let _ = make(&guest, &name, &call);
                }
            })?;
        Ok(Self { queue })
    }

    pub(crate) fn signal(&self, number: u8) {
        let _ = self.queue.send(Call::Signal(number));
    }

    pub(crate) fn resize(&self, size: (u16, u16)) {
        let _ = self.queue.send(Call::Resize(size));
    }
}

fn make(guest: &Guest, name: &Name, call: &Call) -> Result<(), CallError> {
    match call {
        Call::Signal(number) => signal(guest, name, *number, false),
        Call::Resize(size) => {
            let client = guest.client().map_err(unreachable)?;
            resize(&client, name, *size)
        }
    }
}

/// Sends a signal to a process, or to all processes of its container.
pub(crate) fn signal(guest: &Guest, name: &Name, number: u8, all: bool) -> Result<(), CallError> {
    let request = agent::SignalRequest {
        container: name.container.clone(),
        process: name.process.clone(),
        signal: number.into(),
        all,
        ..Default::default()
    };
    let client = guest.client().map_err(unreachable)?;
    client
        .signal_process(context(), &request)
        .map(drop)
        .map_err(refused)
}
