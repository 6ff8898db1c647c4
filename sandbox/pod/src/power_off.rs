//! The last that is asked of a guest: to end its containers, to write its disks back and to switch
//! itself off.

use std::{sync::mpsc::channel, thread, time::Duration};

use pericarp_api::{agent, host::Guest};

use crate::process::{CallError, context, refused, unreachable};

/// How long a guest may take to answer, and then to be off.
pub const POWER_OFF_LIMIT: Duration = Duration::from_secs(10);

/// Returns when the guest has written its disks back; it is off a moment later.
///
/// # Errors
///
/// [`CallError::Refused`]: also where it does not answer in time.
pub fn power_off(guest: &Guest) -> Result<(), CallError> {
    // On a thread of its own: a guest may let us wait for an answer.
    let (tell, told) = channel();
    let guest = guest.clone();
    let ask = move || {
        let asked = guest.client().map_err(unreachable).and_then(|client| {
            client
                .power_off(context(), &agent::Empty::new())
                .map_err(refused)
        });
        let _ = tell.send(asked);
    };
    thread::Builder::new()
        .name("power-off".into())
        .spawn(ask)
        .map_err(|error| CallError::Refused(format!("a thread: {error}")))?;
    let silent = |_| CallError::Refused("it did not write its disks back in time".into());
    told.recv_timeout(POWER_OFF_LIMIT)
        .map_err(silent)?
        .map(drop)
}
