//! The host's end: a packet socket on the tap, which sends to the guest and sees what it
//! sends.
#![expect(unsafe_code)]
// UNSAFETY: packet sockets, which no safe crate here has: each call is given arrays of
// ours with their lengths.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::time::Instant;

use libc::{c_int, c_void, iovec, mmsghdr, sockaddr_ll};
use pericarp_benches::Outcome;
use pericarp_benches::frames::HEADER;
use pericarp_tests::network::{GUEST_MAC, TAP};

/// Bytes of a packet socket's header before a packet.
const SHORT: usize = 10;
/// The most packets of one call.
const MANY: usize = 32;

/// The socket.
pub(crate) struct Host {
    socket: OwnedFd,
    large: bool,
    packet: Vec<u8>,
}

impl Host {
    /// Opens it; `large` where packets have a header of the socket's, `hears` where what
    /// the guest sends is of interest: it costs whoever sends it.
    pub(crate) fn open(large: bool, hears: bool) -> Outcome<Self> {
        // SAFETY: takes numbers.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                // Sees nothing before it is bound.
                0,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: just opened.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let host = Self {
            socket,
            large,
            packet: Vec::new(),
        };
        let name = format!("{TAP}\0");
        // SAFETY: a string that ends with a zero.
        let index = unsafe { libc::if_nametoindex(name.as_ptr().cast()) };
        if large {
            host.set(libc::PACKET_VNET_HDR, 1)?;
        }
        // SAFETY: a structure of numbers.
        let mut address: sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as c_int;
        address.sll_protocol = if hears { 0x0800u16.to_be() } else { 0 };
        // SAFETY: an address of this length.
        let bound = unsafe {
            libc::bind(
                host.socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<sockaddr_ll>() as u32,
            )
        };
        match bound {
            0 => Ok(host),
            _ => Err(io::Error::last_os_error().into()),
        }
    }

    fn set(&self, option: c_int, value: c_int) -> io::Result<()> {
        // SAFETY: a number of four bytes.
        let set = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const value).cast::<c_void>(),
                4,
            )
        };
        match set {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// What is sent to the guest from now on, given with virtio's header.
    pub(crate) fn load(&mut self, packet: &[u8]) {
        self.packet = match self.large {
            true => [&packet[..SHORT], &packet[HEADER..]].concat(),
            false => packet[HEADER..].to_vec(),
        };
    }

    /// Sends at most so many; how many were taken.
    pub(crate) fn send(&mut self, count: usize) -> usize {
        let mut segment = iovec {
            iov_base: self.packet.as_mut_ptr().cast(),
            iov_len: self.packet.len(),
        };
        // SAFETY: structures of numbers and null pointers.
        let mut messages: [mmsghdr; MANY] = unsafe { zeroed() };
        for message in &mut messages {
            message.msg_hdr.msg_name = null_mut();
            message.msg_hdr.msg_iov = &raw mut segment;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: so many messages are there, each with one segment of ours.
        let sent = unsafe {
            libc::sendmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                count.min(MANY) as u32,
                0,
            )
        };
        usize::try_from(sent).unwrap_or(0)
    }

    /// Waits, wide awake, for a packet of the guest's.
    pub(crate) fn receive(&self, limit: Instant) -> Outcome<()> {
        let mut bytes = [0u8; 256];
        loop {
            // SAFETY: an array of ours with its length.
            let got = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    bytes.as_mut_ptr().cast(),
                    bytes.len(),
                    0,
                )
            };
            // Not our own: those went to another address.
            if got > 0 && bytes[6..12] == GUEST_MAC {
                return Ok(());
            }
            if Instant::now() > limit {
                return Err("a packet did not come through".into());
            }
        }
    }
}
