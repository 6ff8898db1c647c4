//! Sends back what comes, on the node's own network. Called by `site`; its threads wait for pods until
//! the process ends.

use std::io;
use std::net::{TcpListener, TcpStream};

/// Serves this socket in a thread for each connection.
pub(super) fn serve(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || back(&stream));
        }
    });
}

fn back(stream: &TcpStream) -> io::Result<u64> {
    stream.set_nodelay(true)?;
    io::copy(&mut &*stream, &mut &*stream)
}
