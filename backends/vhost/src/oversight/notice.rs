//! VHOST_USER_BACKEND_CONFIG_CHANGE_MSG on a front end's back-end channel: a
//! unix socket from most, a pipe from User-mode Linux.
//!
//! Sessions hand the channel over, the control thread writes to it. No answer
//! is asked for and none is read.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::SendFlags;

/// Request number and version flag (vhost-user, "Back-end message types").
const CONFIG_CHANGE: u32 = 2;
const VERSION: u32 = 1;

/// What became of a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It is on its way.
    FrontEnd,
    /// No front end is there, or none that can be told.
    Nobody,
    /// The channel is full: the front end has earlier notices to read first,
    /// and reads the configuration then.
    Full,
}

/// The back-end channel of a front end.
#[derive(Debug, Clone)]
pub(crate) struct Notices {
    channel: Arc<OwnedFd>,
    is_socket: bool,
}

impl Notices {
    /// Takes a channel that was made non-blocking if it is a pipe.
    pub(crate) fn new(channel: Arc<OwnedFd>, is_socket: bool) -> Self {
        Self { channel, is_socket }
    }

    /// The channel itself, for another process.
    pub(crate) fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.channel)
    }

    pub(crate) fn config_changed(&self) -> Told {
        let mut message = [0; 12];
        for (word, bytes) in [CONFIG_CHANGE, VERSION, 0]
            .iter()
            .zip(message.chunks_mut(4))
        {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        // Twelve bytes go whole or not at all, into a pipe and a socket alike.
        let sent = if self.is_socket {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            rustix::net::send(&self.channel, &message, flags)
        } else {
            rustix::io::write(&self.channel, &message)
        };
        match sent {
            Ok(_) => Told::FrontEnd,
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => Told::Full,
            Err(_) => Told::Nobody,
        }
    }
}
