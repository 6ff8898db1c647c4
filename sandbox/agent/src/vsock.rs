//! Sockets between the guest and its host.
//!
//! Used by the greeting, the service and the streams. Only what they need: connect, listen,
//! accept. Reading and writing is that of any descriptor.

// UNSAFETY: no safe crate here has addresses of this family.
#![expect(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, listen as start_listening, socket_with};

/// `VMADDR_CID_ANY`: whichever number the host gave this machine.
const ANY: u32 = u32::MAX;
/// Connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 128;

fn socket() -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(socket)
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

const ADDRESS_SIZE: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Connects; the kernel gives up after two seconds.
pub(crate) fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: `address` is a whole sockaddr_vm of the size that is passed, and outlives the call.
    checked(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            ADDRESS_SIZE,
        )
    })?;
    Ok(socket)
}

/// Accepts connections on `port` from now on.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(ANY, port);
    // SAFETY: as in `connect`.
    checked(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            ADDRESS_SIZE,
        )
    })?;
    start_listening(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next connection and who made it.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let mut peer = address(0, 0);
    let mut size = ADDRESS_SIZE;
    // SAFETY: `peer` and `size` are valid for writes, and `size` is that of `peer`: the kernel
    // writes no more.
    let accepted = checked(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut peer).cast(),
            &raw mut size,
            libc::SOCK_CLOEXEC,
        )
    })?;
    // SAFETY: the call has just made this descriptor, and nobody else knows it.
    let connection = unsafe { OwnedFd::from_raw_fd(accepted) };
    Ok((connection, peer.svm_cid))
}
