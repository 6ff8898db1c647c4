//! The shim of one pod: serves containerd on the socket that is its standard input until it is told
//! to leave.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, IntoRawFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    sync::Arc,
    thread,
    time::Duration,
};

use ttrpc::Server;

use crate::{
    arguments::Arguments,
    directory::Directory,
    error::{ShimError, during},
    events::{Events, TTRPC_ADDRESS},
    keeper::Keeper,
    log,
    pod::Pod,
    service,
    stamps::{BEGAN, Stamps},
    why::Chronicle,
};

/// Threads that wait for a request, for each connection. One that waits for a process's end is none
/// of them.
const LEAST_IDLE: usize = 2;
const USUALLY_IDLE: usize = 3;
const MOST_IDLE: usize = 6;
/// Between the last answer and our end.
const FAREWELL: Duration = Duration::from_millis(100);

/// `began` is when this process did, in case nobody says when its pod's shim did.
pub(crate) fn run(arguments: &Arguments, began: Duration) -> Result<(), ShimError> {
    // A terminal's Ctrl-C, and the end of who started us, are not for us.
    let _ = rustix::process::setsid();
    let bundle = std::env::current_dir().map_err(during("the bundle"))?;
    log::begin(&bundle, &arguments.id, arguments.debug);
    // Whoever removes the bundle need not wait for us.
    std::env::set_current_dir("/").map_err(during("the root directory"))?;
    let listener = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(during("the socket"))?;
    let socket = rustix::net::getsockname(&listener)
        .ok()
        .and_then(|address| rustix::net::SocketAddrUnix::try_from(address).ok())
        .and_then(|address| Some(PathBuf::from(OsStr::from_bytes(address.path_bytes()?))));
    let socket = socket.ok_or_else(|| {
        ShimError::Invalid("standard input is no socket: containerd starts this program".into())
    })?;

    let directory = Directory::of(&arguments.namespace, &arguments.id);
    let address = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    let events = Events::to(address, arguments.namespace.clone())?;
    let said = std::env::var(BEGAN).ok();
    let began = said
        .and_then(|text| text.parse().ok())
        .map_or(began, Duration::from_nanos);
    let stamps = Arc::new(Stamps::new(directory.path(), &arguments.id, began));
    let (keeper, orders) = Keeper::new(directory.clone(), socket, Arc::clone(&stamps))?;
    let pod = Pod::new(
        Chronicle::new(&arguments.namespace, &arguments.id),
        directory,
        orders,
        Arc::clone(&events),
        Arc::clone(&stamps),
    );
    let failed = |error: ttrpc::Error| ShimError::Machine(format!("the service: {error}"));
    let mut server = Server::new()
        .set_thread_count_min(LEAST_IDLE)
        .set_thread_count_default(USUALLY_IDLE)
        .set_thread_count_max(MOST_IDLE)
        .add_listener(listener.into_raw_fd())
        .map_err(failed)?
        .register_service(service::methods(&pod));
    // It is called from the next line on, which is another part.
    stamps.over("shim");
    server.start().map_err(failed)?;
    keeper.run(|ended| pod.lost(ended));
    // The answer to the last request is on its way.
    thread::sleep(FAREWELL);
    events.finish();
    pod.finish();
    // Its threads end with the process.
    std::mem::forget(server);
    Ok(())
}
