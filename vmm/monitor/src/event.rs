//! Eventfds in the type that the crates of KVM and vhost-user take. Used wherever
//! the guest, a backend or another thread is to be told something.

// UNSAFETY: that type has no safe way from or to a descriptor.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, RawFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

/// One that does not block, and counts from zero.
///
/// # Errors
/// No descriptors are left.
pub(crate) fn new() -> io::Result<EventFd> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let fd = rustix::event::eventfd(0, flags)?;
    // SAFETY: the descriptor is an eventfd that nobody else owns.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// Its descriptor.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and lives as long as what is returned.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The descriptor `number` that `owner` holds.
pub(crate) fn borrow_from<T>(_owner: &T, number: RawFd) -> BorrowedFd<'_> {
    // SAFETY: the caller read the number from `owner`, which owns the descriptor and lives as long
    // as what is returned.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// True where it was written to and not read since.
pub(crate) fn is_written(event: &EventFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(borrow(event), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_one_is_known_until_it_is_read() {
        let event = new().unwrap();
        assert!(!is_written(&event));
        event.write(3).unwrap();
        assert!(is_written(&event));
        assert_eq!(event.read().unwrap(), 3);
        assert!(!is_written(&event) && event.read().is_err());
    }
}
