//! Tells the host when the kernel kills processes of a container for want of memory.
//!
//! Called by `streams` on the thread of the connection, which it keeps until the container or the
//! host's interest is gone.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::cgroup::Group;

/// One byte for each time. Kills that come together may be one. `over` is readable from the end of
/// the container's own process on, and nothing is told after it: who removes the group wakes nobody
/// that polls its files.
pub(crate) fn tell(group: &Group, over: BorrowedFd<'_>, connection: &File) -> io::Result<()> {
    let events = group.events()?;
    let mut told = 0;
    let mut last = false;
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
        if last {
            return Ok(());
        }
        let mut fds = [
            PollFd::from_borrowed_fd(events.as_fd(), PollFlags::PRI),
            PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::RDHUP),
            PollFd::from_borrowed_fd(over, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
        // What ended it may have been want of memory: the count is compared once more.
        last = !fds[2].revents().is_empty();
    }
}
