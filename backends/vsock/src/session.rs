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
/// [`ServeError`], when not even a session can be made.
pub fn serve(listener: UnixListener, engine: &Arc<Mutex<Engine>>) -> Result<(), ServeError> {
    // The crate turns without a pause where accepting does not block.
    listener
        .set_nonblocking(false)
        .map_err(ServeError::Prepare)?;
    let mut listener = Listener::from(listener);
    loop {
        // The crate's session remembers its owner, so each front end gets one.
        let memory = Memory::new(GuestMemoryMmap::new());
        let device = Vsock::new(Arc::clone(engine), memory.clone()).map_err(ServeError::Prepare)?;
        let mut daemon = VhostUserDaemon::new("session".to_owned(), Arc::clone(&device), memory)
            .map_err(ServeError::Daemon)?;
        match daemon.start(&mut listener) {
            Ok(()) => {
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
            }
            Err(error) => {
                // Out of descriptors, most likely: do not spin on it.
                warn!("waiting for a front end: {error}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        device.end();
        // Waits for the event loop thread.
        drop(daemon);
        engine
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .reset();
    }
}
