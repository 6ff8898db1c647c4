//! What is asked of the kernel for a connection: to notice that its peer has vanished.

use std::{os::fd::AsFd, time::Duration};

use rustix::net::sockopt;

/// A silent peer is asked after this time, and then this often.
const IDLE: Duration = Duration::from_secs(30);

/// Ends the connection some time after the peer's machine has gone. What cannot be set is not: it
/// costs a place among the connections at worst.
pub(super) fn vanished_peers(socket: impl AsFd) {
    let socket = socket.as_fd();
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, IDLE);
    let _ = sockopt::set_tcp_keepintvl(socket, IDLE);
    let _ = sockopt::set_tcp_nodelay(socket, true);
}
