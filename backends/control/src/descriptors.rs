//! Reading from a peer, descriptors included. [`crate::connection`] calls it.
//!
//! The kernel hands descriptors out with the bytes they were sent with, and
//! ends a read there. They count for the line that these bytes belong to, as
//! long as the peer has waited for the answers to the lines before.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// The most descriptors that come with one line.
pub(crate) const MOST_DESCRIPTORS: usize = 4;

/// Reads once. False beside the number of bytes where descriptors were lost:
/// there were more than we take, or than this process may have open.
pub(crate) fn receive(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<(usize, bool)> {
    // Room for one more, so that too many are seen as such.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut slices = [IoSliceMut::new(buffer)];
    let received = recvmsg(stream, &mut slices, &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let all = !received.flags.contains(ReturnFlags::CTRUNC);
    Ok((received.bytes, all))
}
