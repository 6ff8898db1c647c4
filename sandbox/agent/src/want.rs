//! Tells the host when the kernel kills processes of a container for want of memory.
//!
//! Called by `streams` on the thread of the connection, which it keeps until the container or the
//! host's interest is gone.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::cgroup::Group;

/// One byte for each time. Kills that come together may be one.
pub(crate) fn tell(group: &Group, connection: &File) -> io::Result<()> {
    let events = group.events()?;
    let mut told = 0;
    loop {
        // Reading is what a later change is compared with.
        let mut text = [0; 1024];
        rustix::io::pread(&events, &mut text, 0)?;
        let kills = group.oom_kills();
        if kills > told {
            told = kills;
            let mut connection = connection;
            connection.write_all(&[1])?;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(events.as_fd(), PollFlags::PRI),
            PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::RDHUP),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
    }
}
