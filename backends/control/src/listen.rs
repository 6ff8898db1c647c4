//! Sockets that this process listens on, at a path. Called by the programs and by sessions,
//! before there are threads.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

/// Connections that may wait to be let in: as many as the system allows.
const BACKLOG: i32 = -1;

/// Binds a socket to a path at which there is nothing, and listens.
///
/// # Errors
/// The kernel's refusal. There is nothing at the path then: the standard library leaves a
/// socket behind that was bound and cannot be listened on.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG).inspect_err(|_| {
        // What counts is why it is of no use.
        let _ = fs::remove_file(path);
    })?;
    Ok(socket.into())
}
