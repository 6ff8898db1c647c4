//! The port of the streams: each connection says which stream it is for and becomes it.
//!
//! Started by `main`. A connection has a thread until its header has been read; from then on it
//! belongs to the process.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use pericarp_api::{
    HOST_CID, STREAM_PORT, StreamKind, StreamTarget,
    stream::{ATTACHED, NO_SUCH_STREAM, TAKEN},
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::{
    greeting,
    pod::Pod,
    process::{STACK, Unattached},
    vsock, want,
};

/// For a header to arrive: it is sent with the connection.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// Connections whose header is being waited for.
const MAX_STRANGERS: usize = 256;
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts streams from now on.
pub(crate) fn serve(pod: Arc<Pod>) -> io::Result<()> {
    let listener = vsock::listen(STREAM_PORT)?;
    thread::Builder::new()
        .name("streams".into())
        .stack_size(STACK)
        .spawn(move || accept_all(&listener, &pod))?;
    Ok(())
}

fn accept_all(listener: &OwnedFd, pod: &Arc<Pod>) -> ! {
    let strangers = Arc::new(AtomicUsize::new(0));
    loop {
        let connection = match vsock::accept(listener) {
            Ok((connection, HOST_CID)) => connection,
            // Nobody in the guest has business here.
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                greeting::say(&format!("no stream can be accepted: {error}"));
                thread::sleep(PAUSE);
                continue;
            }
        };
        if strangers.fetch_add(1, Ordering::Relaxed) >= MAX_STRANGERS {
            strangers.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (pod, count) = (Arc::clone(pod), Arc::clone(&strangers));
        let thread = thread::Builder::new()
            .name("stream".into())
            .stack_size(STACK)
            .spawn(move || {
                // The host sees the end of a connection that fails.
                let _ = attach(&pod, connection, || {
                    count.fetch_sub(1, Ordering::Relaxed);
                });
            });
        if thread.is_err() {
            strangers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Reads the header, answers, and hands the connection over; `known` is called when the header
/// has been read, or has failed to come.
fn attach(pod: &Pod, connection: OwnedFd, known: impl FnOnce()) -> io::Result<()> {
    for direction in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&connection, direction, Some(HEADER_LIMIT))?;
    }
    let mut connection = File::from(connection);
    let target = StreamTarget::read(&mut connection);
    known();
    let target = target?;
    if target.kind == StreamKind::OutOfMemory {
        let found = pod.container(&target.container).and_then(|container| {
            // Not the container itself: it goes when it is removed, whoever still listens.
            Ok((container.group().clone(), container.process("")?))
        });
        return match found {
            Ok((group, own)) if target.process.is_empty() => {
                connection.write_all(&[ATTACHED])?;
                want::tell(&group, own.over(), &connection)
            }
            _ => connection.write_all(&[NO_SUCH_STREAM]),
        };
    }
    let Ok(process) = pod.process(&target.container, &target.process) else {
        return connection.write_all(&[NO_SUCH_STREAM]);
    };
    match process.reserve(target.kind) {
        Ok(()) => {}
        Err(Unattached::NoSuchStream) => return connection.write_all(&[NO_SUCH_STREAM]),
        Err(Unattached::Taken) => return connection.write_all(&[TAKEN]),
    }
    if let Err(error) = connection.write_all(&[ATTACHED]) {
        process.release(target.kind);
        return Err(error);
    }
    process.hand_over(target.kind, connection.into());
    Ok(())
}
