//! One front end after another on one listening socket. `main` runs it on a
//! thread of its own, which ends with the process.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use log::{debug, info, warn};
use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;

use crate::device::{Memory, Vsock};
use crate::engine::Engine;

/// Before what the kernel refused is tried again.
const PAUSE: Duration = Duration::from_millis(50);

/// Why no front end can be served any more.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The kernel refuses what a session needs.
    #[error("cannot prepare a session")]
    Prepare(#[source] io::Error),
    /// The crate's word for the same.
    #[error("cannot prepare a session: {0}")]
    Daemon(DaemonError),
}

/// Serves front ends for ever.
///
/// # Errors
/// [`ServeError`], when not even the first session can be made.
pub fn serve(listener: UnixListener, engine: &Arc<Mutex<Engine>>) -> Result<(), ServeError> {
    // The crate turns without a pause where accepting does not block.
    listener
        .set_nonblocking(false)
        .map_err(ServeError::Prepare)?;
    let mut listener = Listener::from(listener);
    // The crate's session remembers its owner, so each front end gets one.
    let prepare = || {
        let memory = Memory::new(GuestMemoryMmap::new());
        let device = Vsock::new(Arc::clone(engine), memory.clone()).map_err(ServeError::Prepare)?;
        let daemon = VhostUserDaemon::new("session".to_owned(), Arc::clone(&device), memory)
            .map_err(ServeError::Daemon)?;
        Ok::<_, ServeError>((device, daemon))
    };
    let mut has_waited = false;
    loop {
        let (device, mut daemon) = match prepare() {
            Ok(prepared) => prepared,
            // Descriptors are short: others may let go of theirs, and the next front end waits.
            Err(error) if has_waited => {
                warn!("{error}");
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(error) => return Err(error),
        };
        has_waited = true;
        // The crate keeps nothing of a front end that could not be let in, and a session that never
        // had one has an event loop that does not hear of its end.
        while let Err(error) = daemon.start(&mut listener) {
            // Out of descriptors, most likely: do not spin on it.
            warn!("waiting for a front end: {error}");
            std::thread::sleep(PAUSE);
        }
        info!("front end connected");
        match device.attach(&daemon) {
            Ok(()) => {}
            Err(error) => {
                warn!("the host's sockets cannot be watched: {error}");
                daemon.request_shutdown();
            }
        }
        if let Err(error) = daemon.wait() {
            debug!("session: {error}");
        }
        info!("front end gone");
        device.end();
        // Waits for the event loop thread.
        drop(daemon);
        engine
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .reset();
    }
}
